// jml_qr_v1: check -> plan (a pure function) -> host kernels, or kernels/qr.metal on a device
// (csrc/qr_device.cc).
//
// Custom call: a [batch..., m, n] -> (q, r), or (r) where Q is not wanted. The one attribute
// `config` is the flat JSON that the plan takes.
#include "csrc/qr.h"

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "csrc/handler.h"
#include "csrc/host/qr.h"
#include "csrc/isa.h"
#include "csrc/registry.h"

namespace jml {
namespace {

using host::QrKernels;
using host::QrTask;
using host::QrVariant;

// ---- the problem ----

std::string wrong(const char* argument, const std::string& expected, const std::string& got) {
  return jml::wrong("qr", argument, expected, got);
}

// Empty on success, else the error.
std::string parse_problem(const std::string& text, QrProblem* out) {
  const std::vector<Field> fields = {{"batch", &out->batch, 1},  {"m", &out->m, 1},
                                     {"n", &out->n, 1},          {"dtype", &out->dtype},
                                     {"mode", &out->mode},       {"method", &out->method},
                                     {"variant", &out->variant}, {"device", &out->device}};
  const std::vector<Field> host = {{"interleaved_max_n", &out->interleaved_max_n},
                                   {"interleaved_max_kib", &out->interleaved_max_kib},
                                   {"interleaved_even", &out->interleaved_even, 1},
                                   {"interleaved_single_max", &out->interleaved_single_max},
                                   {"cholesky_min_n", &out->cholesky_min_n},
                                   {"cholesky_max_n", &out->cholesky_max_n},
                                   {"cholesky_aspect", &out->cholesky_aspect, 1},
                                   {"tsqr_max_n", &out->tsqr_max_n},
                                   {"tsqr_min_blocks", &out->tsqr_min_blocks, 1},
                                   {"gram_min_m", &out->gram_min_m},
                                   {"blocked_min_n", &out->blocked_min_n},
                                   {"blocked_max_n", &out->blocked_max_n},
                                   {"threads", &out->threads}};
  const std::string error = read_problem("qr", text, fields, host, device_fields(out, false));
  if (!error.empty()) return error;
  if (dtype_row(out->dtype) == nullptr) return wrong("a", kDTypeNames, out->dtype);
  if (out->mode != "reduced" && out->mode != "complete" && out->mode != "r") {
    return wrong("mode", "reduced, complete or r", out->mode);
  }
  return check_caps("qr", *out);
}

// ---- the plan ----

// One row a host variant; JAXMETAL_VARIANT=qr:<name> asks for one by name.
struct VariantRow {
  const char *name, *route;
  QrVariant QrKernels::* kernels;  // null for a route that is not ours
  bool parallel_inside;  // threads share one matrix instead of taking some each, unless in_lanes is
                         // false and there is a matrix for each of them
  bool in_lanes;         // matrices come by whole vectors
};
constexpr VariantRow kVariants[] = {
    {"interleaved", "host", &QrKernels::interleaved, false, true},
    {"tsqr", "host", &QrKernels::tsqr, true, true},
    {"blocked", "host", &QrKernels::blocked, true, false},
    {"gram", "host", &QrKernels::gram, true, false},
    {"lapack", "lapack", nullptr, false, false},
    {"cholesky2", "cholesky", nullptr, false, false},
};

struct QrPlan : CallPlan<QrProblem, VariantRow> {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;
};

const QrKernels& kernels() { return JML_HOST_KERNELS(qr); }

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
    plan.variant = row_named(kVariants, name);
    plan.reason = reason;
    return plan;
  };
  const bool tall = p.m >= p.n && (p.mode != "complete" || p.m == p.n);
  const int64_t panel = kernels().panel_columns(dtype_row(p.dtype)->dtype);
  const std::string by_name = "asked for by name (JAXMETAL_VARIANT)";
  std::string asked = p.variant, why = by_name;
  if (asked.empty() && p.method != "auto") {
    if (p.method != "householder" && p.method != "tsqr" && p.method != "lapack") {
      plan.error = wrong("method", "auto, householder, tsqr or lapack", p.method);
      return plan;
    }
    asked = p.method;
    if (asked == "householder") asked = p.k() > p.interleaved_max_n ? "blocked" : "interleaved";
    why = "method=\"" + p.method + "\" was asked for";
  }
  if (!asked.empty()) {
    pick(asked.c_str(), why);
    if (plan.variant == nullptr)
      plan.error = wrong("variant", "one of " + names_of(kVariants), p.variant);
    if (asked == "gram" && p.n > panel) {
      plan.error = wrong("variant", "one that serves " + p.size(),
                         "gram, which takes up to " + std::to_string(panel) + " columns");
    }
    if ((asked == "tsqr" || asked == "cholesky2" || asked == "gram") && !tall) {
      plan.error = wrong(why == by_name ? "variant" : "method",
                         "one that serves mode " + p.mode + " at " + p.size(),
                         asked + ", which needs m >= n and gives reduced factors");
    }
    return plan;
  }
  const int64_t threads =
      p.threads > 0 ? p.threads : std::max<int64_t>(1, std::thread::hardware_concurrency());
  const QrTask t = task_for(p, threads);
  const int64_t lanes = kernels().lanes(t.dtype);
  const int64_t kib = kernels().interleaved.scratch_bytes(t) / 1024;
  const int64_t vectors = divide_up(divide_up(p.batch, lanes), threads);
  if (p.longest() <= p.interleaved_single_max) {
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
  if (tall && p.batch == 1 && !dtype_row(p.dtype)->wide && p.n >= p.cholesky_min_n &&
      p.n <= p.cholesky_max_n && p.m >= p.cholesky_aspect * p.n) {
    return pick("cholesky2",
                "one matrix of n = " + std::to_string(p.n) +
                    " from cholesky_min_n = " + std::to_string(p.cholesky_min_n) +
                    " to cholesky_max_n = " + std::to_string(p.cholesky_max_n) +
                    " and m >= cholesky_aspect = " + std::to_string(p.cholesky_aspect) +
                    " n: XLA's products and Cholesky factorisations, LAPACK where its columns are "
                    "too dependent");
  }
  if (tall && p.n == panel && !p.dtype.starts_with("complex") && p.gram_min_m > 0 &&
      p.m >= p.gram_min_m) {
    return pick("gram", "m >= gram_min_m = " + std::to_string(p.gram_min_m) + " and " +
                            std::to_string(panel) +
                            " columns, a panel: two Cholesky factorisations of Gram matrices, "
                            "tsqr where its columns are too dependent");
  }
  if (tall && p.n <= p.tsqr_max_n) {
    const int64_t blocks = p.m / kernels().tsqr_rows(t);
    if (blocks >= p.tsqr_min_blocks) {
      return pick("tsqr", "n = " + std::to_string(p.n) +
                              " <= tsqr_max_n = " + std::to_string(p.tsqr_max_n) + " and " +
                              std::to_string(blocks) + " blocks of rows >= tsqr_min_blocks = " +
                              std::to_string(p.tsqr_min_blocks) + ": a block a lane");
    }
  }
  if (p.k() >= p.blocked_min_n && p.k() <= p.blocked_max_n) {
    return pick("blocked", "min(m, n) = " + std::to_string(p.k()) +
                               " from blocked_min_n = " + std::to_string(p.blocked_min_n) +
                               " to blocked_max_n = " + std::to_string(p.blocked_max_n) +
                               ": panels and products on vectors, faster than LAPACK");
  }
  return pick("lapack", p.size() +
                            " is beyond the sizes at which the native rows were "
                            "measured faster than LAPACK");
}

std::string host_plan_json(const QrProblem& p) {
  const QrPlan plan = plan_qr(p);
  if (!plan.error.empty()) return JsonWriter().field("error", plan.error).text();
  const bool native = plan.variant->kernels != nullptr;
  JsonWriter w;
  w.field("route", plan.variant->route)
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

constexpr Handler<QrPlan> kHandler = {"qr", parse_problem, plan_qr_device};

std::string plan_json(const std::string& text) { return kHandler.plan_json(text, host_plan_json); }

// Pure: for a call that has come here, and so must be ours.
QrPlan plan_native(const QrProblem& p) {
  QrPlan plan = plan_qr(p);
  if (plan.error.empty() && plan.variant->kernels == nullptr) {
    plan.error =
        wrong("variant", "a native row (interleaved, tsqr, blocked or gram)", plan.variant->name);
  }
  return plan;
}

ffi::ErrorOr<std::unique_ptr<QrPlan>> instantiate(std::string_view config) {
  return kHandler.instantiate(config, plan_native);
}

ffi::Error check_shapes(const QrProblem& p, const ffi::AnyBuffer& a, ffi::RemainingRets& rets,
                        int64_t* batch) {
  const DTypeRow& row = *dtype_row(p.dtype);
  ffi::AnyBuffer::Dimensions lead;
  ffi::Error e = check_matrices("qr", p, a, row.element, &lead, batch);
  if (e.failure()) return e;
  const size_t want = p.want_q() ? 2 : 1;
  if (rets.size() != want) {
    return invalid("qr", "results", "", std::to_string(want), std::to_string(rets.size()));
  }
  size_t at = 0;
  auto next = [&](const char* name, std::initializer_list<int64_t> tail) {
    return check_result("qr", name, rets, at++, row.element, lead, tail);
  };
  if (p.want_q()) {
    e = next("q", {p.m, p.kq()});
    if (e.failure()) return e;
  }
  return next("r", {p.kq(), p.n});
}

ffi::Error execute(QrPlan* plan, ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::RemainingRets rets,
                   std::string_view) {
  const HandedOver handed_over;
  const QrProblem& p = plan->problem;
  int64_t batch = 0;
  ffi::Error e = check_shapes(p, a, rets, &batch);
  if (e.failure()) return e;
  if (batch == 0) return ffi::Error::Success();
  if (plan->runner != nullptr) return kHandler.run(*plan, {batch, 1}, call_buffers(a, rets));

  SharedPool shared(pool);
  const VariantRow& row = *plan->variant;
  const bool inside = row.parallel_inside && (row.in_lanes || batch < shared.threads());
  QrTask t = task_for(p, inside ? shared.threads() : 1);
  t.a = a.untyped_data();
  size_t at = 0;
  auto data = [&] { return (*rets.get<ffi::AnyBuffer>(at++))->untyped_data(); };
  if (t.want_q) t.q = data();
  t.r = data();

  return shared.run("qr", kernels().*(row.kernels), t, inside, batch,
                    row.in_lanes ? kernels().lanes(t.dtype) : 1, p.size() + " " + p.dtype);
}

// ---- the handler on the CUDA platform ----

ffi::Error instantiate_cuda(std::string_view config) { return kHandler.instantiate_cuda(config); }

ffi::Error execute_cuda(void* stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer a,
                        ffi::RemainingRets rets, std::string_view config) {
  const auto qr = kHandler.cuda(config);
  if (qr.error) return ffi::Error::InvalidArgument(*qr.error);
  int64_t batch = 0;
  ffi::Error e = check_shapes(qr.value->problem, a, rets, &batch);
  if (e.failure() || batch == 0) return e;
  return kHandler.enqueue(*qr.value, {batch, 1}, call_buffers(a, rets), stream, scratch);
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

XLA_FFI_DEFINE_HANDLER(kInstantiateCuda, instantiate_cuda,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("config"));
// Only launches, and the same ones each time: XLA may capture it into a graph.
XLA_FFI_DEFINE_HANDLER(kExecuteCuda, execute_cuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::ScratchAllocator>()
                           .Arg<ffi::AnyBuffer>()  // a
                           .RemainingRets()        // q, r
                           .Attr<std::string_view>("config"),
                       {ffi::Traits::kCmdBufferCompatible});

ffi::TypeId QrPlan::id = {};
const ffi::TypeInfo QrPlan::info = ffi::MakeTypeInfo<QrPlan>();

const RegisterOp kRegister({"qr", "jml_qr_v1", "cpu", "jml_qr_plan_v1", kInstantiate, kExecute,
                            &QrPlan::id, &QrPlan::info, plan_json});
const RegisterOp kRegisterCuda({"qr", "jml_qr_v1", "CUDA", nullptr, kInstantiateCuda, kExecuteCuda,
                                nullptr, nullptr, plan_json});

}  // namespace
}  // namespace jml
