// jml_qr_v1: check -> plan (a pure function) -> host kernels.
//
// Custom call: a [batch..., m, n] -> (q, r), or (r) where Q is not wanted. The one attribute
// `config` is the flat JSON that the plan takes.
#include "csrc/host/qr.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "csrc/caps.h"
#include "csrc/ffi_common.h"
#include "csrc/isa.h"
#include "csrc/json.h"
#include "csrc/problem.h"
#include "csrc/registry.h"

namespace jml {
namespace {

using host::QrKernels;
using host::QrTask;
using host::QrVariant;

// ---- the problem ----

struct QrProblem {
  int64_t batch = 1, m = 0, n = 0;
  std::string dtype, mode = "reduced", method = "auto", variant;
  std::string device = "host";
  std::string caps;  // of other devices than the host: whose limits
  // Tuning: jaxmetal_linalg/hardware_params.json, host.qr.
  int64_t threads = 0;  // 0: as many as the processor has
  int64_t interleaved_max_n = 0, interleaved_max_kib = 0, interleaved_even = 0;
  int64_t interleaved_single_max = 0;
  int64_t tsqr_max_n = 0, tsqr_min_blocks = 0;

  int64_t k() const { return std::min(m, n); }
  int64_t kq() const { return mode == "complete" ? m : k(); }
  bool want_q() const { return mode != "r"; }
};

std::string wrong(const char* argument, const std::string& expected, const std::string& got) {
  return jml::wrong("qr", argument, expected, got);
}

// Empty on success, else the error.
std::string parse_problem(const std::string& text, QrProblem* out) {
  FlatJson json;
  std::string error;
  if (!json.parse(text, &error)) return "qr: config: " + error;
  std::vector<Field> fields = {{"batch", &out->batch},     {"m", &out->m, 1},
                               {"n", &out->n, 1},          {"dtype", &out->dtype},
                               {"mode", &out->mode},       {"method", &out->method},
                               {"variant", &out->variant}, {"device", &out->device}};
  const JsonValue* device = json.find("device");
  if (device == nullptr || *device == JsonValue("host")) {
    const Field more[] = {{"interleaved_max_n", &out->interleaved_max_n},
                          {"interleaved_max_kib", &out->interleaved_max_kib},
                          {"interleaved_even", &out->interleaved_even, 1},
                          {"interleaved_single_max", &out->interleaved_single_max},
                          {"tsqr_max_n", &out->tsqr_max_n},
                          {"tsqr_min_blocks", &out->tsqr_min_blocks, 1},
                          {"threads", &out->threads}};
    fields.insert(fields.end(), std::begin(more), std::end(more));
  } else {
    fields.push_back({"caps", &out->caps});
  }
  error = read_fields("qr", json, fields);
  if (!error.empty()) return error;
  if (dtype_row(out->dtype) == nullptr) return wrong("a", kDTypeNames, out->dtype);
  if (out->mode != "reduced" && out->mode != "complete" && out->mode != "r") {
    return wrong("mode", "reduced, complete or r", out->mode);
  }
  if (out->device != "host" && find_caps(out->caps) == nullptr) {
    return wrong("caps", "one of " + caps_names(), out->caps);
  }
  return "";
}

// ---- the plan ----

// One row a host variant; JAXMETAL_VARIANT=qr:<name> asks for one by name.
struct VariantRow {
  const char* name;
  QrVariant QrKernels::* kernels;  // null for a route that is not ours
  bool parallel_inside;            // threads share one matrix instead of taking some each
};
constexpr VariantRow kVariants[] = {
    {"interleaved", &QrKernels::interleaved, false},
    {"tsqr", &QrKernels::tsqr, true},
    {"lapack", nullptr, false},
};

struct QrPlan {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;

  QrProblem problem;
  const VariantRow* variant = nullptr;
  std::string reason, error;
};

std::string size_text(const QrProblem& p) {
  return std::to_string(p.m) + "x" + std::to_string(p.n);
}

const QrKernels& kernels() {
  switch (active_isa()) {
#ifdef JML_HAVE_avx512
    case Isa::kAvx512:
      return *host::qr_kernels_avx512();
#endif
#ifdef JML_HAVE_avx2
    case Isa::kAvx2:
      return *host::qr_kernels_avx2();
#endif
    default:
      return *host::qr_kernels_baseline();
  }
}

QrTask task_for(const QrProblem& p, int64_t threads) {
  QrTask t{};
  t.m = p.m;
  t.n = p.n;
  t.dtype = dtype_row(p.dtype)->dtype;
  t.want_q = p.want_q();
  t.complete = p.mode == "complete";
  t.slots = 4 * threads;
  return t;
}

// Pure: which variant for this problem. `error` is set when the request cannot be met.
QrPlan plan_qr(const QrProblem& p) {
  QrPlan plan;
  plan.problem = p;
  auto pick = [&](const char* name, const std::string& reason) {
    for (const VariantRow& r : kVariants) {
      if (std::strcmp(r.name, name) == 0) plan.variant = &r;
    }
    plan.reason = reason;
    return plan;
  };
  const bool tsqr_fits = p.m >= p.n && (p.mode != "complete" || p.m == p.n);
  const std::string by_name = "asked for by name (JAXMETAL_VARIANT)";
  std::string asked = p.variant, why = by_name;
  if (asked.empty() && p.method != "auto") {
    if (p.method != "householder" && p.method != "tsqr" && p.method != "lapack") {
      plan.error = wrong("method", "auto, householder, tsqr or lapack", p.method);
      return plan;
    }
    asked = p.method == "householder" ? "interleaved" : p.method;
    why = "method=\"" + p.method + "\" was asked for";
  }
  if (!asked.empty()) {
    pick(asked.c_str(), why);
    std::string names;
    for (const VariantRow& r : kVariants)
      names += (names.empty() ? "" : ", ") + std::string(r.name);
    if (plan.variant == nullptr) plan.error = wrong("variant", "one of " + names, p.variant);
    if (asked == "tsqr" && !tsqr_fits) {
      plan.error = wrong(why == by_name ? "variant" : "method",
                         "one that serves mode " + p.mode + " at " + size_text(p),
                         "tsqr, which needs m >= n and gives reduced factors");
    }
    return plan;
  }
  const int64_t threads =
      p.threads > 0 ? p.threads : std::max<int64_t>(1, std::thread::hardware_concurrency());
  const QrTask t = task_for(p, threads);
  const int64_t lanes = kernels().lanes(t.dtype);
  const int64_t kib = kernels().interleaved.scratch_bytes(t) / 1024;
  const int64_t vectors = divide_up(divide_up(p.batch, lanes), threads);
  if (std::max(p.m, p.n) <= p.interleaved_single_max) {
    return pick("interleaved",
                "m and n <= interleaved_single_max = " + std::to_string(p.interleaved_single_max) +
                    ": one matrix a lane, faster than LAPACK on one alone");
  }
  if (p.k() <= p.interleaved_max_n && kib <= p.interleaved_max_kib &&
      vectors * p.interleaved_even <= p.batch) {
    return pick("interleaved",
                "min(m, n) = " + std::to_string(p.k()) + " <= interleaved_max_n = " +
                    std::to_string(p.interleaved_max_n) + ", " + std::to_string(kib) +
                    " KiB a vector of matrices <= " + std::to_string(p.interleaved_max_kib) +
                    " and enough matrices: one a lane");
  }
  if (tsqr_fits && p.n <= p.tsqr_max_n) {
    const int64_t blocks = p.m / kernels().tsqr_rows(t);
    if (blocks >= p.tsqr_min_blocks) {
      return pick("tsqr", "n = " + std::to_string(p.n) +
                              " <= tsqr_max_n = " + std::to_string(p.tsqr_max_n) + " and " +
                              std::to_string(blocks) + " blocks of rows >= tsqr_min_blocks = " +
                              std::to_string(p.tsqr_min_blocks) + ": a block a lane");
    }
  }
  return pick("lapack", size_text(p) +
                            " is beyond the sizes at which the native rows were "
                            "measured faster than LAPACK");
}

std::string plan_json(const std::string& text) {
  QrProblem p;
  std::string error = parse_problem(text, &p);
  if (!error.empty()) return JsonWriter().field("error", error).text();
  if (p.device != "host") {
    const std::string reason =
        wrong("a", "a device with QR kernels (" + p.caps + " has none yet)", size_text(p));
    return JsonWriter()
        .field("route", "none")
        .field("device", p.device)
        .field("variant", "")
        .field("launches", 0)
        .field("reason", reason + ". Use device host, xla or auto")
        .text();
  }
  const QrPlan plan = plan_qr(p);
  if (!plan.error.empty()) return JsonWriter().field("error", plan.error).text();
  const bool native = plan.variant->kernels != nullptr;
  JsonWriter w;
  w.field("route", native ? "host" : "lapack")
      .field("variant", plan.variant->name)
      .field("reason", plan.reason)
      .field("launches", 1);
  if (native) {
    const QrTask t = task_for(p, 1);
    w.field("isa", isa_name(active_isa()))
        .field("lanes", kernels().lanes(t.dtype))
        .field("scratch_bytes", (kernels().*(plan.variant->kernels)).scratch_bytes(t));
  }
  return w.text();
}

// ---- the handler ----

ffi::ErrorOr<std::unique_ptr<QrPlan>> instantiate(std::string_view config) {
  QrProblem p;
  const std::string error = parse_problem(std::string(config), &p);
  if (!error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(error));
  if (p.device != "host") {
    return ffi::Unexpected(ffi::Error::InvalidArgument(wrong("device", "host", p.device)));
  }
  auto plan = std::make_unique<QrPlan>(plan_qr(p));
  if (!plan->error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(plan->error));
  if (plan->variant->kernels == nullptr) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        wrong("variant", "a native row (interleaved or tsqr)", plan->variant->name)));
  }
  return plan;
}

ffi::Error check_shapes(const QrProblem& p, const ffi::AnyBuffer& a, ffi::RemainingRets& rets,
                        int64_t* batch) {
  const DTypeRow& row = *dtype_row(p.dtype);
  auto dims = a.dimensions();
  if (dims.size() < 2) {
    return invalid("qr", "argument", "a", "rank of at least 2", "shape " + shape_text(dims));
  }
  ffi::AnyBuffer::Dimensions lead(dims.begin(), dims.size() - 2);
  ffi::Error e = check_buffer("qr", "argument", "a", a, row.element, lead, {p.m, p.n});
  if (e.failure()) return e;
  const size_t want = p.want_q() ? 2 : 1;
  if (rets.size() != want) {
    return invalid("qr", "results", "", std::to_string(want), std::to_string(rets.size()));
  }
  *batch = 1;
  for (int64_t d : lead) *batch *= d;
  size_t at = 0;
  auto next = [&](const char* name, std::initializer_list<int64_t> tail) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> r = rets.get<ffi::AnyBuffer>(at++);
    if (r.has_error()) return r.error();
    return check_buffer("qr", "result", name, **r, row.element, lead, tail);
  };
  if (p.want_q()) {
    e = next("q", {p.m, p.kq()});
    if (e.failure()) return e;
  }
  return next("r", {p.kq(), p.n});
}

ffi::Error execute(QrPlan* plan, ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::RemainingRets rets,
                   std::string_view) {
  const QrProblem& p = plan->problem;
  int64_t batch = 0;
  ffi::Error e = check_shapes(p, a, rets, &batch);
  if (e.failure()) return e;
  if (batch == 0) return ffi::Error::Success();

  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  QrTask t = task_for(p, threads);
  t.a = a.untyped_data();
  size_t at = 0;
  auto data = [&] { return (*rets.get<ffi::AnyBuffer>(at++))->untyped_data(); };
  if (t.want_q) t.q = data();
  t.r = data();

  const QrVariant& variant = kernels().*(plan->variant->kernels);
  auto share = [&](int64_t count, const auto& body) { parallel_for(pool, threads, count, body); };
  using Share = decltype(share);
  host::Parallel inside{[](void* self, int64_t count, void (*body)(void*, int64_t), void* arg) {
                          (*static_cast<Share*>(self))(count, [&](int64_t i) {
                            ScopedDenormals keep;
                            body(arg, i);
                          });
                        },
                        &share};
  if (plan->variant->parallel_inside) t.parallel = &inside;
  const int64_t scratch_bytes = variant.scratch_bytes(t);
  std::atomic<bool> out_of_memory{false};
  auto run = [&](int64_t first, int64_t count) {
    AlignedBlock scratch = allocate_aligned(scratch_bytes);
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    ScopedDenormals keep;
    variant.run(t, first, count, scratch.get());
  };
  if (t.parallel != nullptr) {
    run(0, batch);
  } else {
    // Whole vectors of matrices; enough chunks that an unlucky thread does not hold up the rest.
    const int64_t lanes = kernels().lanes(t.dtype);
    const int64_t chunk = lanes * std::max<int64_t>(1, divide_up(batch, lanes) / (threads * 16));
    share(divide_up(batch, chunk),
          [&](int64_t c) { run(c * chunk, std::min(chunk, batch - c * chunk)); });
  }
  if (out_of_memory) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "qr: could not allocate " + std::to_string(scratch_bytes) +
                          " bytes of scratch for " + size_text(p) + " " + p.dtype);
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("config"));
XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<QrPlan>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()  // a
                           .RemainingRets()        // q, r
                           .Attr<std::string_view>("config"));

ffi::TypeId QrPlan::id = {};
const ffi::TypeInfo QrPlan::info = ffi::MakeTypeInfo<QrPlan>();

const RegisterOp kRegister({"qr", "jml_qr_v1", "cpu", "jml_qr_plan_v1", kInstantiate, kExecute,
                            &QrPlan::id, &QrPlan::info, plan_json});

}  // namespace
}  // namespace jml
