// jml_gemv_v1: check -> plan (a pure function) -> host kernels, or kernels/gemv.metal on a device
// (csrc/gemv_device.cc).
//
// Custom call: a, x and what GemvProblem's flags say, in the order of csrc/gemv.h -> out. The one
// attribute `config` is the flat JSON that the plan takes.
#include "csrc/gemv.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/caps.h"
#include "csrc/device_cuda.h"
#include "csrc/ffi_common.h"
#include "csrc/host/gemv.h"
#include "csrc/isa.h"
#include "csrc/json.h"
#include "csrc/plan.h"
#include "csrc/problem.h"
#include "csrc/registry.h"

namespace jml {
namespace {

using host::GemvKernels;
using host::GemvTask;

// ---- the problem ----

bool is_complex(const std::string& dtype) { return dtype.rfind("complex", 0) == 0; }

std::string wrong(const char* argument, const std::string& expected, const std::string& got) {
  return jml::wrong("gemv", argument, expected, got);
}

// Empty on success, else the error. Every key must be known and of its type; none may be missing.
std::string parse_problem(const std::string& text, GemvProblem* out) {
  const std::vector<Field> fields = {{"batch", &out->batch, 1},
                                     {"m", &out->m, 1},
                                     {"n", &out->n, 1},
                                     {"nrhs", &out->nrhs, 1},
                                     {"transpose", &out->transpose},
                                     {"conjugate", &out->conjugate},
                                     {"a_dtype", &out->a_dtype},
                                     {"x_dtype", &out->x_dtype},
                                     {"out_dtype", &out->out_dtype},
                                     {"alpha_re", &out->alpha_re},
                                     {"alpha_im", &out->alpha_im},
                                     {"beta_re", &out->beta_re},
                                     {"beta_im", &out->beta_im},
                                     {"y", &out->y},
                                     {"bias", &out->bias},
                                     {"residual", &out->residual},
                                     {"activation", &out->activation},
                                     {"variant", &out->variant},
                                     {"device", &out->device, 0, true}};
  const std::vector<Field> host = {{"threads", &out->threads},
                                   {"serial_bytes", &out->serial_bytes},
                                   {"xla_min_nrhs", &out->xla_min_nrhs, 1},
                                   {"xla_min_nrhs_half", &out->xla_min_nrhs_half, 1}};
  const std::string error = read_problem("gemv", text, fields, host, device_fields(out, true));
  if (!error.empty()) return error;
  const std::pair<const char*, const std::string&> dtypes[] = {
      {"a", out->a_dtype}, {"x", out->x_dtype}, {"out", out->out_dtype}};
  for (const auto& [name, dtype] : dtypes) {
    if (dtype_row(dtype) == nullptr) return wrong(name, kDTypeNames, dtype);
  }
  if (is_complex(out->out_dtype) != (is_complex(out->a_dtype) || is_complex(out->x_dtype))) {
    return wrong("out", "a complex dtype exactly if a or x is complex", out->out_dtype);
  }
  std::string names;
  for (const char* name : kActivations) add_name(&names, name);
  if (std::find(std::begin(kActivations), std::end(kActivations), out->activation) ==
      std::end(kActivations)) {
    return wrong("activation", "one of " + names, out->activation);
  }
  if (is_complex(out->out_dtype) && out->activation != "none") {
    return wrong("activation", "none for complex numbers", out->activation);
  }
  return check_caps("gemv", *out);
}

// ---- the plan ----

// One row a host variant; JAXMETAL_VARIANT=gemv:<name> asks for one by name. All rows of one
// orientation give the same bits.
struct VariantRow {
  const char* name;
  bool transpose;      // sums columns instead of rows
  int rows_in_flight;  // of the matrix
  bool on;             // picked without being asked for
};
constexpr VariantRow kVariants[] = {
    {"rows8", false, 8, true},
    {"rows4", false, 4, false},
    {"columns8", true, 8, true},
    {"columns4", true, 4, false},
};

struct GemvPlan {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;

  GemvProblem problem;
  const VariantRow* variant = nullptr;  // null: XLA's matmul
  std::string reason, error;
  // Where the device is not the host.
  DevicePlan on_device;
  std::shared_ptr<Runner> runner;
};

const GemvKernels& kernels() { return JML_HOST_KERNELS(gemv); }

// Pure: which variant for this problem. `error` is set when the request cannot be met.
GemvPlan plan_gemv(const GemvProblem& p) {
  GemvPlan plan;
  plan.problem = p;
  if (!p.variant.empty()) {
    std::string names;
    for (const VariantRow& r : kVariants) {
      if (r.transpose != p.transpose) continue;
      add_name(&names, r.name);
      if (p.variant == r.name) plan.variant = &r;
    }
    plan.reason = "asked for by name (JAXMETAL_VARIANT)";
    if (plan.variant == nullptr) {
      plan.error =
          wrong("variant", "one of " + names + (p.transpose ? " for a transposed matrix" : ""),
                p.variant);
    }
    return plan;
  }
  const bool half = dtype_row(p.a_dtype)->bytes == 2;
  const char* key = half ? "xla_min_nrhs_half" : "xla_min_nrhs";
  const int64_t limit = half ? p.xla_min_nrhs_half : p.xla_min_nrhs;
  if (p.nrhs >= limit) {
    plan.reason = std::to_string(p.nrhs) + " vectors a matrix reach " + key + " = " +
                  std::to_string(limit) + ", from where XLA's matmul was measured faster";
    return plan;
  }
  for (const VariantRow& r : kVariants) {
    if (r.on && r.transpose == p.transpose) plan.variant = &r;
  }
  plan.reason = std::to_string(plan.variant->rows_in_flight) + " rows at once, " +
                (p.transpose ? "added to the columns' sums" : "a dot product each");
  if (p.nrhs > 1) {
    plan.reason += "; " + std::to_string(p.nrhs) + " vectors a read of the matrix";
  }
  return plan;
}

GemvTask task_for(const GemvProblem& p, const VariantRow& variant) {
  GemvTask t{};
  t.m = p.m;
  t.n = p.n;
  t.nrhs = p.nrhs;
  t.transpose = p.transpose;
  t.conjugate = p.conjugate;
  t.a_dtype = dtype_row(p.a_dtype)->dtype;
  t.x_dtype = dtype_row(p.x_dtype)->dtype;
  t.out_dtype = dtype_row(p.out_dtype)->dtype;
  t.activation = host::Activation(
      std::find(std::begin(kActivations), std::end(kActivations), p.activation) - kActivations);
  t.alpha_re = p.alpha_re;
  t.alpha_im = p.alpha_im;
  t.beta_re = p.beta_re;
  t.beta_im = p.beta_im;
  t.rows_in_flight = variant.rows_in_flight;
  return t;
}

std::string plan_json(const std::string& text) {
  GemvProblem p;
  std::string error = parse_problem(text, &p);
  if (!error.empty()) return JsonWriter().field("error", error).text();
  if (p.device != "host") {
    const Caps& caps = *find_caps(p.caps);
    return device_plan_json(plan_gemv_device(p, caps), caps);
  }
  const GemvPlan plan = plan_gemv(p);
  if (!plan.error.empty()) return JsonWriter().field("error", plan.error).text();
  JsonWriter w;
  w.field("route", plan.variant != nullptr ? "host" : "matmul")
      .field("variant", plan.variant != nullptr ? plan.variant->name : "")
      .field("reason", plan.reason)
      .field("launches", 1);
  if (plan.variant != nullptr) {
    const GemvTask t = task_for(p, *plan.variant);
    w.field("isa", isa_name(active_isa()))
        .field("chunks", kernels().chunks(t))
        .field("scratch_bytes",
               kernels().x_bytes(t) + kernels().partial_bytes(t) + kernels().scratch_bytes(t));
  }
  return w.text();
}

// ---- the handler ----

ffi::ErrorOr<std::unique_ptr<GemvPlan>> instantiate(std::string_view config) {
  const HandedOver handed_over;
  GemvProblem p;
  const std::string error = parse_problem(std::string(config), &p);
  if (!error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(error));
  if (p.device != "host") {
    auto plan = std::make_unique<GemvPlan>();
    plan->problem = p;
    plan->on_device = plan_gemv_device(p, *find_caps(p.caps));
    if (!plan->on_device.error.empty()) {
      return ffi::Unexpected(ffi::Error::InvalidArgument(plan->on_device.error));
    }
    DeviceChoice choice{p.device, *find_caps(p.caps), {}};
    choice.sim.checked = p.sim_checked;
    choice.sim.shuffle = p.sim_shuffle;
    choice.sim.seed = uint64_t(p.sim_seed);
    if (p.max_submission_work > 0) choice.caps.max_submission_work = double(p.max_submission_work);
    Result<std::unique_ptr<Device>> device = make_device(choice);
    if (device.error) {
      return ffi::Unexpected(ffi::Error::InvalidArgument("gemv: " + *device.error));
    }
    plan->runner = std::make_shared<Runner>(std::move(device.value));
    if (Status bad = plan->runner->prepare(plan->on_device)) {
      return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInternal, "gemv: " + *bad));
    }
    return plan;
  }
  auto plan = std::make_unique<GemvPlan>(plan_gemv(p));
  if (!plan->error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(plan->error));
  if (plan->variant == nullptr) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        wrong("nrhs", "a number of vectors that a native row serves", std::to_string(p.nrhs))));
  }
  return plan;
}

// Takes batch and nrhs from the buffers: they may be a part of what was planned (partitioned), or
// symbolic when it was lowered.
ffi::Error bind_buffers(const GemvProblem& p, const ffi::AnyBuffer& a, const ffi::AnyBuffer& x,
                        const ffi::RemainingArgs& rest, const ffi::AnyBuffer& out, GemvTask* t,
                        int64_t* batch) {
  auto dims = a.dimensions();
  if (dims.size() < 2) {
    return invalid("gemv", "argument", "a", "rank of at least 2", "shape " + shape_text(dims));
  }
  ffi::AnyBuffer::Dimensions lead(dims.begin(), dims.size() - 2);
  *batch = 1;
  for (int64_t d : lead) *batch *= d;
  const ffi::DataType out_dtype = dtype_row(p.out_dtype)->element;
  ffi::Error e =
      check_buffer("gemv", "argument", "a", a, dtype_row(p.a_dtype)->element, lead, {p.m, p.n});
  if (e.failure()) return e;
  auto x_dims = x.dimensions();
  if (x_dims.size() != dims.size()) {
    return invalid("gemv", "argument", "x", "the rank of a", "shape " + shape_text(x_dims));
  }
  t->nrhs = x_dims[x_dims.size() - 2];
  e = check_buffer("gemv", "argument", "x", x, dtype_row(p.x_dtype)->element, lead,
                   {t->nrhs, p.depth()});
  if (e.failure()) return e;
  e = check_buffer("gemv", "result", "out", out, out_dtype, lead, {t->nrhs, p.outputs()});
  if (e.failure()) return e;
  const struct {
    const char* name;
    bool given;
    const void** to;
  } more[] = {
      {"y", p.y, &t->y}, {"bias", p.bias, &t->bias}, {"residual", p.residual, &t->residual}};
  size_t at = 0;
  for (const auto& m : more) {
    if (!m.given) continue;
    ffi::ErrorOr<ffi::AnyBuffer> b = rest.get<ffi::AnyBuffer>(at++);
    if (b.has_error()) return b.error();
    e = check_buffer("gemv", "argument", m.name, *b, out_dtype, lead, {t->nrhs, p.outputs()});
    if (e.failure()) return e;
    *m.to = b->untyped_data();
  }
  if (at != rest.size()) {
    return invalid("gemv", "arguments", "", std::to_string(2 + at),
                   std::to_string(2 + rest.size()));
  }
  t->a = a.untyped_data();
  t->x = x.untyped_data();
  t->out = out.untyped_data();
  return ffi::Error::Success();
}

// A thread's share of the matrix should take longer than handing it over.
constexpr int64_t kShareBytes = 128 << 10;

std::vector<CallBuffer> call_buffers(ffi::AnyBuffer& a, ffi::AnyBuffer& x, ffi::RemainingArgs& rest,
                                     ffi::AnyBuffer& out) {
  std::vector<CallBuffer> buffers;
  auto push = [&](const ffi::AnyBuffer& b) {
    buffers.push_back({b.untyped_data(), int64_t(b.size_bytes())});
  };
  push(a);
  push(x);
  for (size_t i = 0; i < rest.size(); ++i) push(*rest.get<ffi::AnyBuffer>(i));
  push(out);
  buffers.back().result = true;
  return buffers;
}

// Buffers were checked: their sizes are those of `batch` matrices and `nrhs` vectors for each.
ffi::Error execute_on_device(GemvPlan& plan, int64_t batch, int64_t nrhs, ffi::AnyBuffer& a,
                             ffi::AnyBuffer& x, ffi::RemainingArgs& rest, ffi::AnyBuffer& out) {
  const std::vector<CallBuffer> buffers = call_buffers(a, x, rest, out);
  Status bad;
  if (batch == plan.problem.batch && nrhs == plan.problem.nrhs) {
    bad = plan.runner->run(plan.on_device, buffers);
  } else {  // partitioned, or symbolic when it was lowered
    GemvProblem p = plan.problem;
    p.batch = batch;
    p.nrhs = nrhs;
    const DevicePlan part = plan_gemv_device(p, *find_caps(p.caps));
    bad = part.error.empty() ? plan.runner->run(part, buffers) : Status(part.error);
  }
  return bad ? ffi::Error(ffi::ErrorCode::kInternal, "gemv: " + *bad) : ffi::Error::Success();
}

// ---- the handler on the CUDA platform ----

DevicePlan plan_sizes(GemvProblem p, std::array<int64_t, 2> sizes) {
  p.batch = sizes[0];
  p.nrhs = sizes[1];
  return plan_gemv_device(p, *find_caps(p.caps));
}

ffi::Error instantiate_cuda(std::string_view config) {
  auto gemv = cuda_config<GemvProblem>("gemv", config, parse_problem);
  if (gemv.error) return ffi::Error::InvalidArgument(*gemv.error);
  const GemvProblem& p = gemv.value->problem;
  const std::array<int64_t, 2> sizes = {std::max<int64_t>(p.batch, 1),
                                        std::max<int64_t>(p.nrhs, 1)};
  return prepare_on_cuda("gemv", gemv.value->plan(sizes, plan_sizes));
}

ffi::Error execute_cuda(void* stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer a,
                        ffi::AnyBuffer x, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                        std::string_view config) {
  auto gemv = cuda_config<GemvProblem>("gemv", config, parse_problem);
  if (gemv.error) return ffi::Error::InvalidArgument(*gemv.error);
  GemvTask t{};
  int64_t batch = 0;
  ffi::Error e = bind_buffers(gemv.value->problem, a, x, rest, *out, &t, &batch);
  if (e.failure() || batch == 0 || t.nrhs == 0) return e;
  const DevicePlan& plan = gemv.value->plan({batch, t.nrhs}, plan_sizes);
  return enqueue_on_cuda("gemv", plan, call_buffers(a, x, rest, *out), stream, scratch);
}

ffi::Error execute(GemvPlan* plan, ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer x,
                   ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, std::string_view) {
  const HandedOver handed_over;
  const GemvProblem& p = plan->problem;
  GemvTask t = plan->runner != nullptr ? GemvTask{} : task_for(p, *plan->variant);
  int64_t batch = 0;
  ffi::Error e = bind_buffers(p, a, x, rest, *out, &t, &batch);
  if (e.failure()) return e;
  if (batch == 0 || t.nrhs == 0) return ffi::Error::Success();
  if (plan->runner != nullptr) return execute_on_device(*plan, batch, t.nrhs, a, x, rest, *out);

  const GemvKernels& k = kernels();
  const int64_t matrix_bytes = p.m * p.n * dtype_row(p.a_dtype)->bytes;
  int64_t threads = 1;
  if (matrix_bytes * batch > p.serial_bytes) {
    threads = p.threads > 0 ? p.threads : std::max<int64_t>(1, pool.num_threads());
  }
  const int64_t chunks = k.chunks(t), outputs = p.outputs();
  const int64_t x_bytes = divide_up(k.x_bytes(t), 64) * 64;
  const int64_t partial_bytes = divide_up(k.partial_bytes(t), 64) * 64;
  const int64_t scratch_bytes = k.scratch_bytes(t);
  std::atomic<bool> out_of_memory{false};
  auto memory = [&](int64_t bytes) {
    AlignedBlock block = allocate_aligned(std::max<int64_t>(bytes, 64));
    if (block == nullptr) out_of_memory = true;
    return block;
  };
  // Matrices [first, last) by one thread.
  auto whole = [&](int64_t first, int64_t last) {
    AlignedBlock block = memory(x_bytes + partial_bytes + scratch_bytes);
    if (block == nullptr) return;
    char* prepared = static_cast<char*>(block.get());
    char* partial = prepared + x_bytes;
    char* scratch = partial + partial_bytes;
    ScopedDenormals keep;
    for (int64_t b = first; b < last; ++b) {
      if (x_bytes > 0) k.prepare(t, b, prepared);
      for (int64_t c = 0; c < chunks; ++c) {
        k.run(t, b, x_bytes > 0 ? prepared : nullptr, c, 0, outputs, chunks > 1 ? partial : nullptr,
              scratch);
      }
      if (chunks > 1) k.finish(t, b, 0, outputs, partial, scratch);
    }
  };
  if (threads <= 1) {
    whole(0, batch);
  } else if (batch >= 4 * threads || matrix_bytes < 2 * kShareBytes) {
    const int64_t run =
        std::max<int64_t>(1, std::min(divide_up(kShareBytes, matrix_bytes), batch / threads));
    parallel_for(pool, threads, divide_up(batch, run),
                 [&](int64_t i) { whole(i * run, std::min(batch, (i + 1) * run)); });
  } else {
    // Blocks of outputs of one matrix after the other.
    const int64_t most = std::max<int64_t>(threads, matrix_bytes / kShareBytes);
    const int64_t wanted = divide_up(std::min(most, 8 * threads), chunks);
    const int64_t width = divide_up(divide_up(outputs, wanted), k.grain) * k.grain;
    const int64_t blocks = divide_up(outputs, width);
    AlignedBlock shared = memory(x_bytes + partial_bytes);
    if (shared != nullptr) {
      char* prepared = x_bytes > 0 ? static_cast<char*>(shared.get()) : nullptr;
      char* partial = chunks > 1 ? static_cast<char*>(shared.get()) + x_bytes : nullptr;
      for (int64_t b = 0; b < batch && !out_of_memory; ++b) {
        ScopedDenormals keep;
        if (prepared != nullptr) k.prepare(t, b, prepared);
        parallel_for(pool, threads, blocks * chunks, [&](int64_t i) {
          AlignedBlock scratch = memory(scratch_bytes);
          if (scratch == nullptr) return;
          ScopedDenormals keep;
          const int64_t first = i % blocks * width;
          k.run(t, b, prepared, i / blocks, first, std::min(width, outputs - first), partial,
                scratch.get());
        });
        if (partial != nullptr && !out_of_memory) {
          AlignedBlock scratch = memory(scratch_bytes);
          if (scratch != nullptr) k.finish(t, b, 0, outputs, partial, scratch.get());
        }
      }
    }
  }
  if (out_of_memory) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "gemv: could not allocate " +
                          std::to_string(x_bytes + partial_bytes + scratch_bytes) +
                          " bytes of scratch for " + std::to_string(t.nrhs) + " vectors of a " +
                          p.size() + " " + p.a_dtype + " matrix");
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("config"));
XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<GemvPlan>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()  // a
                           .Arg<ffi::AnyBuffer>()  // x
                           .RemainingArgs()        // y, bias, residual
                           .Ret<ffi::AnyBuffer>()  // out
                           .Attr<std::string_view>("config"));

XLA_FFI_DEFINE_HANDLER(kInstantiateCuda, instantiate_cuda,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("config"));
// Only launches, and the same ones each time: XLA may capture it into a graph.
XLA_FFI_DEFINE_HANDLER(kExecuteCuda, execute_cuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::ScratchAllocator>()
                           .Arg<ffi::AnyBuffer>()  // a
                           .Arg<ffi::AnyBuffer>()  // x
                           .RemainingArgs()        // y, bias, residual
                           .Ret<ffi::AnyBuffer>()
                           .Attr<std::string_view>("config"),
                       {ffi::Traits::kCmdBufferCompatible});

ffi::TypeId GemvPlan::id = {};
const ffi::TypeInfo GemvPlan::info = ffi::MakeTypeInfo<GemvPlan>();

const RegisterOp kRegister({"gemv", "jml_gemv_v1", "cpu", "jml_gemv_plan_v1", kInstantiate,
                            kExecute, &GemvPlan::id, &GemvPlan::info, plan_json});
const RegisterOp kRegisterCuda({"gemv", "jml_gemv_v1", "CUDA", nullptr, kInstantiateCuda,
                                kExecuteCuda, nullptr, nullptr, plan_json});

}  // namespace
}  // namespace jml
