// jml_gemv_v1: check -> plan (a pure function) -> host kernels, or kernels/gemv.metal on a device
// (csrc/gemv_device.cc).
//
// Custom call: a, x and what GemvProblem's flags say, in the order of csrc/gemv.h -> out. The one
// attribute `config` is the flat JSON that the plan takes.
#include "csrc/gemv.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "csrc/handler.h"
#include "csrc/host/gemv.h"
#include "csrc/isa.h"
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

// When a variant is picked without being asked for. Of rows shorter than a page, two tiles of eight
// rows, of which one is fetched ahead, fill the L1 cache: on an EPYC 9004 four rows took 0.81 to
// 0.87 of the time from memory with 128 to 1536 columns (AVX2: 0.69 to 0.90), and 0.85 to 1.0 from
// the caches. Of longer rows 0.90 to 1.15.
enum class Pick { kAlways, kShortRows, kOtherRows, kByName };

// One row a host variant; JAXMETAL_VARIANT=gemv:<name> asks for one by name. All rows of one
// orientation give the same bits.
struct VariantRow {
  const char* name;
  bool transpose;      // sums columns instead of rows
  int rows_in_flight;  // of the matrix
  Pick pick;
};
constexpr VariantRow kVariants[] = {
    {"rows8", false, 8, Pick::kOtherRows},
    {"rows4", false, 4, Pick::kShortRows},
    {"columns8", true, 8, Pick::kAlways},
    {"columns4", true, 4, Pick::kByName},
};

struct GemvPlan : CallPlan<GemvProblem, VariantRow> {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;
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
  // Several vectors share what a tile reads: the more rows, the less often x is loaded.
  const bool in_page = p.n * dtype_row(p.a_dtype)->bytes < host::kPageBytes;
  const Pick by_rows = p.nrhs == 1 && in_page ? Pick::kShortRows : Pick::kOtherRows;
  for (const VariantRow& r : kVariants) {
    const bool picked = r.pick == Pick::kAlways || r.pick == by_rows;
    if (picked && r.transpose == p.transpose) plan.variant = &r;
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

std::string host_plan_json(const GemvProblem& p) {
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

constexpr Handler<GemvPlan> kHandler = {"gemv", parse_problem, plan_gemv_device};

std::string plan_json(const std::string& text) { return kHandler.plan_json(text, host_plan_json); }

// Pure: for a call that has come here, and so must be ours.
GemvPlan plan_native(const GemvProblem& p) {
  GemvPlan plan = plan_gemv(p);
  if (plan.error.empty() && plan.variant == nullptr) {
    plan.error =
        wrong("nrhs", "a number of vectors that a native row serves", std::to_string(p.nrhs));
  }
  return plan;
}

ffi::ErrorOr<std::unique_ptr<GemvPlan>> instantiate(std::string_view config) {
  return kHandler.instantiate(config, plan_native);
}

// Takes batch and nrhs from the buffers: they may be a part of what was planned (partitioned), or
// symbolic when it was lowered.
ffi::Error bind_buffers(const GemvProblem& p, const ffi::AnyBuffer& a, const ffi::AnyBuffer& x,
                        const ffi::RemainingArgs& rest, const ffi::AnyBuffer& out, GemvTask* t,
                        int64_t* batch) {
  ffi::AnyBuffer::Dimensions lead;
  ffi::Error e = check_matrices("gemv", p, a, dtype_row(p.a_dtype)->element, &lead, batch);
  if (e.failure()) return e;
  const ffi::DataType out_dtype = dtype_row(p.out_dtype)->element;
  auto x_dims = x.dimensions();
  if (x_dims.size() != lead.size() + 2) {
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

std::vector<CallBuffer> call_buffers(const ffi::AnyBuffer& a, const ffi::AnyBuffer& x,
                                     const ffi::RemainingArgs& rest, const ffi::AnyBuffer& out) {
  std::vector<CallBuffer> buffers = {call_buffer(a, false), call_buffer(x, false)};
  for (size_t i = 0; i < rest.size(); ++i) {
    buffers.push_back(call_buffer(*rest.get<ffi::AnyBuffer>(i), false));
  }
  buffers.push_back(call_buffer(out, true));
  return buffers;
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
  if (plan->runner != nullptr) {
    return kHandler.run(*plan, {batch, t.nrhs}, call_buffers(a, x, rest, *out));
  }

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
    const int64_t wanted = divide_up(std::min(most, 32 * threads), chunks);
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
    return no_scratch(
        "gemv", x_bytes + partial_bytes + scratch_bytes,
        std::to_string(t.nrhs) + " vectors of a " + p.size() + " " + p.a_dtype + " matrix");
  }
  return ffi::Error::Success();
}

// ---- the handler on the CUDA platform ----

ffi::Error instantiate_cuda(std::string_view config) { return kHandler.instantiate_cuda(config); }

ffi::Error execute_cuda(void* stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer a,
                        ffi::AnyBuffer x, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                        std::string_view config) {
  const auto gemv = kHandler.cuda(config);
  if (gemv.error) return ffi::Error::InvalidArgument(*gemv.error);
  GemvTask t{};
  int64_t batch = 0;
  ffi::Error e = bind_buffers(gemv.value->problem, a, x, rest, *out, &t, &batch);
  if (e.failure() || batch == 0 || t.nrhs == 0) return e;
  return kHandler.enqueue(*gemv.value, {batch, t.nrhs}, call_buffers(a, x, rest, *out), stream,
                          scratch);
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
