// jml_qr_v1: check -> plan (a pure function) -> host kernels, or kernels/qr.metal on a device
// (csrc/qr_device.cc).
//
// Custom call: a [batch..., m, n] -> (q, r), or (r) where Q is not wanted. The one attribute
// `config` is the flat JSON that the plan takes.
#include "csrc/qr.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "csrc/caps.h"
#include "csrc/device_cuda.h"
#include "csrc/ffi_common.h"
#include "csrc/host/qr.h"
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

std::string wrong(const char* argument, const std::string& expected, const std::string& got) {
  return jml::wrong("qr", argument, expected, got);
}

// Empty on success, else the error.
std::string parse_problem(const std::string& text, QrProblem* out) {
  const std::vector<Field> fields = {{"batch", &out->batch},     {"m", &out->m, 1},
                                     {"n", &out->n, 1},          {"dtype", &out->dtype},
                                     {"mode", &out->mode},       {"method", &out->method},
                                     {"variant", &out->variant}, {"device", &out->device}};
  const std::vector<Field> host = {{"interleaved_max_n", &out->interleaved_max_n},
                                   {"interleaved_max_kib", &out->interleaved_max_kib},
                                   {"interleaved_even", &out->interleaved_even, 1},
                                   {"interleaved_single_max", &out->interleaved_single_max},
                                   {"tsqr_max_n", &out->tsqr_max_n},
                                   {"tsqr_min_blocks", &out->tsqr_min_blocks, 1},
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
  // Where the device is not the host.
  DevicePlan on_device;
  std::shared_ptr<Runner> runner;
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
    if (plan.variant == nullptr)
      plan.error = wrong("variant", "one of " + names_of(kVariants), p.variant);
    if (asked == "tsqr" && !tsqr_fits) {
      plan.error = wrong(why == by_name ? "variant" : "method",
                         "one that serves mode " + p.mode + " at " + p.size(),
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
  if (tsqr_fits && p.n <= p.tsqr_max_n) {
    const int64_t blocks = p.m / kernels().tsqr_rows(t);
    if (blocks >= p.tsqr_min_blocks) {
      return pick("tsqr", "n = " + std::to_string(p.n) +
                              " <= tsqr_max_n = " + std::to_string(p.tsqr_max_n) + " and " +
                              std::to_string(blocks) + " blocks of rows >= tsqr_min_blocks = " +
                              std::to_string(p.tsqr_min_blocks) + ": a block a lane");
    }
  }
  return pick("lapack", p.size() +
                            " is beyond the sizes at which the native rows were "
                            "measured faster than LAPACK");
}

std::string plan_json(const std::string& text) {
  QrProblem p;
  std::string error = parse_problem(text, &p);
  if (!error.empty()) return JsonWriter().field("error", error).text();
  if (p.device != "host") {
    const Caps& caps = *find_caps(p.caps);
    return device_plan_json(plan_qr_device(p, caps), caps);
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
  const HandedOver handed_over;
  QrProblem p;
  const std::string error = parse_problem(std::string(config), &p);
  if (!error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(error));
  if (p.device != "host") {
    auto plan = std::make_unique<QrPlan>();
    plan->problem = p;
    plan->on_device = plan_qr_device(p, *find_caps(p.caps));
    if (!plan->on_device.error.empty()) {
      return ffi::Unexpected(ffi::Error::InvalidArgument(plan->on_device.error));
    }
    DeviceChoice choice{p.device, *find_caps(p.caps), {}};
    choice.sim.checked = p.sim_checked;
    choice.sim.shuffle = p.sim_shuffle;
    choice.sim.seed = uint64_t(p.sim_seed);
    Result<std::unique_ptr<Device>> device = make_device(choice);
    if (device.error) {
      return ffi::Unexpected(ffi::Error::InvalidArgument("qr: " + *device.error));
    }
    plan->runner = std::make_shared<Runner>(std::move(device.value));
    if (Status bad = plan->runner->prepare(plan->on_device)) {
      return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInternal, "qr: " + *bad));
    }
    return plan;
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

std::vector<CallBuffer> call_buffers(ffi::AnyBuffer& a, ffi::RemainingRets& rets) {
  std::vector<CallBuffer> buffers = {{a.untyped_data(), int64_t(a.size_bytes())}};
  for (size_t i = 0; i < rets.size(); ++i) {
    ffi::Result<ffi::AnyBuffer> r = *rets.get<ffi::AnyBuffer>(i);
    buffers.push_back({r->untyped_data(), int64_t(r->size_bytes()), true});
  }
  return buffers;
}

DevicePlan plan_batch(QrProblem p, int64_t batch) {
  p.batch = batch;
  return plan_qr_device(p, *find_caps(p.caps));
}

// Buffers were checked: their sizes are those of `batch` matrices.
ffi::Error execute_on_device(QrPlan& plan, int64_t batch, ffi::AnyBuffer& a,
                             ffi::RemainingRets& rets) {
  const std::vector<CallBuffer> buffers = call_buffers(a, rets);
  Status bad;
  if (batch == plan.problem.batch) {
    bad = plan.runner->run(plan.on_device, buffers);
  } else {  // partitioned, or symbolic when it was lowered
    const DevicePlan part = plan_batch(plan.problem, batch);
    bad = part.error.empty() ? plan.runner->run(part, buffers) : Status(part.error);
  }
  return bad ? ffi::Error(ffi::ErrorCode::kInternal, "qr: " + *bad) : ffi::Error::Success();
}

// ---- the handler on the CUDA platform ----

DevicePlan plan_sizes(const QrProblem& p, std::array<int64_t, 2> sizes) {
  return plan_batch(p, sizes[0]);
}

ffi::Error instantiate_cuda(std::string_view config) {
  auto qr = cuda_config<QrProblem>("qr", config, parse_problem);
  if (qr.error) return ffi::Error::InvalidArgument(*qr.error);
  const int64_t batch = std::max<int64_t>(qr.value->problem.batch, 1);
  return prepare_on_cuda("qr", qr.value->plan({batch, 0}, plan_sizes));
}

ffi::Error execute_cuda(void* stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer a,
                        ffi::RemainingRets rets, std::string_view config) {
  auto qr = cuda_config<QrProblem>("qr", config, parse_problem);
  if (qr.error) return ffi::Error::InvalidArgument(*qr.error);
  int64_t batch = 0;
  ffi::Error e = check_shapes(qr.value->problem, a, rets, &batch);
  if (e.failure() || batch == 0) return e;
  const DevicePlan& plan = qr.value->plan({batch, 0}, plan_sizes);
  return enqueue_on_cuda("qr", plan, call_buffers(a, rets), stream, scratch);
}

ffi::Error execute(QrPlan* plan, ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::RemainingRets rets,
                   std::string_view) {
  const HandedOver handed_over;
  const QrProblem& p = plan->problem;
  int64_t batch = 0;
  ffi::Error e = check_shapes(p, a, rets, &batch);
  if (e.failure()) return e;
  if (batch == 0) return ffi::Error::Success();
  if (plan->runner != nullptr) return execute_on_device(*plan, batch, a, rets);

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
                          " bytes of scratch for " + p.size() + " " + p.dtype);
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
