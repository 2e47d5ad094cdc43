// jml_svd_v1: check -> plan (a pure function) -> host kernels.
//
// Custom call: a [batch..., m, n] -> (u, s, vh, status, sweeps, off_norm), or (s, status, sweeps,
// off_norm) for singular values only. The one attribute `config` is the flat JSON that the plan
// takes.
#include "csrc/host/svd.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "csrc/ffi_common.h"
#include "csrc/isa.h"
#include "csrc/json.h"
#include "csrc/registry.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace jml {
namespace {

using host::DType;
using host::SvdKernels;
using host::SvdTask;
using host::SvdVariant;

// ---- the problem ----

struct SvdProblem {
  int64_t batch = 1, m = 0, n = 0;
  std::string dtype, method = "auto", variant;
  bool compute_uv = true, full_matrices = true;
  // Tuning: jaxmetal_linalg/hardware_params.json, host.svd.
  int64_t max_sweeps = 0, fallback_max_sweeps = 0;
  int64_t interleaved_max_n = 0, interleaved_max_m = 0, interleaved_even_n = 0;
  int64_t interleaved_max_sweeps = 0;
  int64_t threads = 0;  // 0: as many as the processor has
  // The largest min(m, n) that method "auto" keeps from LAPACK: one row a case (see crossover()).
  int64_t jacobi_max_n[8] = {};

  int64_t k() const { return std::min(m, n); }
  int64_t longest() const { return std::max(m, n); }
};

struct DTypeRow {
  const char* name;
  DType dtype;
  ffi::DataType element, real;
  int64_t bytes;  // of one element
  bool wide;      // more work an element than float32: its own crossovers to LAPACK
};
constexpr DTypeRow kDTypes[] = {
    {"float16", DType::kF16, ffi::DataType::F16, ffi::DataType::F16, 2, false},
    {"bfloat16", DType::kBF16, ffi::DataType::BF16, ffi::DataType::BF16, 2, false},
    {"float32", DType::kF32, ffi::DataType::F32, ffi::DataType::F32, 4, false},
    {"float64", DType::kF64, ffi::DataType::F64, ffi::DataType::F64, 8, true},
    {"complex64", DType::kC64, ffi::DataType::C64, ffi::DataType::F32, 8, true},
    {"complex128", DType::kC128, ffi::DataType::C128, ffi::DataType::F64, 16, true},
};
const DTypeRow* dtype_row(const std::string& name) {
  for (const DTypeRow& r : kDTypes) {
    if (name == r.name) return &r;
  }
  return nullptr;
}

// Cases whose crossover to LAPACK was measured apart; the index is batch == 1, plus 2 if wide, plus
// 4 for singular values only.
constexpr const char* kCrossovers[8] = {"jacobi_max_n",
                                        "jacobi_max_n_single",
                                        "jacobi_max_n_wide",
                                        "jacobi_max_n_single_wide",
                                        "jacobi_max_n_values",
                                        "jacobi_max_n_single_values",
                                        "jacobi_max_n_wide_values",
                                        "jacobi_max_n_single_wide_values"};
int crossover(const SvdProblem& p) {
  return int(p.batch == 1) + 2 * int(dtype_row(p.dtype)->wide) + 4 * int(!p.compute_uv);
}

std::string wrong(const char* argument, const std::string& expected, const std::string& got) {
  return std::string("svd: argument ") + argument + ": expected " + expected + ", got " + got;
}

// Empty on success, else the error. Every key must be known and of its type; none may be missing.
std::string parse_problem(const std::string& text, SvdProblem* out) {
  FlatJson json;
  std::string error;
  if (!json.parse(text, &error)) return "svd: config: " + error;
  struct Field {
    const char* key;
    std::variant<int64_t*, bool*, std::string*> to;
    int64_t low = 0;  // of an integer
  };
  std::vector<Field> fields = {{"batch", &out->batch},
                               {"m", &out->m, 1},
                               {"n", &out->n, 1},
                               {"max_sweeps", &out->max_sweeps},
                               {"fallback_max_sweeps", &out->fallback_max_sweeps},
                               {"interleaved_max_n", &out->interleaved_max_n},
                               {"interleaved_max_m", &out->interleaved_max_m},
                               {"interleaved_max_sweeps", &out->interleaved_max_sweeps},
                               {"interleaved_even_n", &out->interleaved_even_n, 1},
                               {"threads", &out->threads},
                               {"compute_uv", &out->compute_uv},
                               {"full_matrices", &out->full_matrices},
                               {"dtype", &out->dtype},
                               {"method", &out->method},
                               {"variant", &out->variant}};
  for (int i = 0; i < 8; ++i) fields.push_back({kCrossovers[i], &out->jacobi_max_n[i]});
  for (const Field& f : fields) {
    const JsonValue* v = json.find(f.key);
    if (v == nullptr) return std::string("svd: config: key ") + f.key + " is missing";
    if (auto* to = std::get_if<int64_t*>(&f.to)) {
      const double* d = std::get_if<double>(v);
      if (d == nullptr || *d < double(f.low) || *d > 1e15 || *d != std::floor(*d)) {
        return wrong(f.key, "an integer of at least " + std::to_string(f.low),
                     d == nullptr ? "another type" : std::to_string(*d));
      }
      **to = int64_t(*d);
    } else if (auto* to = std::get_if<bool*>(&f.to)) {
      const bool* b = std::get_if<bool>(v);
      if (b == nullptr) return wrong(f.key, "true or false", "another type");
      **to = *b;
    } else {
      const std::string* s = std::get_if<std::string>(v);
      if (s == nullptr) return wrong(f.key, "a string", "another type");
      *std::get<std::string*>(f.to) = *s;
    }
  }
  for (const auto& [key, value] : json.values()) {
    auto is_key = [&key = key](const Field& f) { return key == f.key; };
    if (std::none_of(fields.begin(), fields.end(), is_key)) {
      return "svd: config: unknown key " + key;
    }
  }
  if (dtype_row(out->dtype) == nullptr) {
    return wrong("a", "dtype float16, bfloat16, float32, float64, complex64 or complex128",
                 out->dtype);
  }
  return "";
}

// ---- the plan ----

// One row a host variant; JAXMETAL_VARIANT=svd:<name> asks for one by name.
struct VariantRow {
  const char* name;
  SvdVariant SvdKernels::* kernels;  // null for a route that is not ours
  bool thin_only;                    // cannot complete a rectangular factor
  bool parallel_inside;              // threads share one matrix instead of taking one each
};
constexpr VariantRow kVariants[] = {
    {"interleaved", &SvdKernels::interleaved, true, false},
    {"column", &SvdKernels::column, false, false},
    {"block", &SvdKernels::column, false, true},
    {"lapack", nullptr, false, false},
};

struct SvdPlan {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;

  SvdProblem problem;
  const VariantRow* variant = nullptr;
  std::string reason, error;
};

std::string size_text(const SvdProblem& p) {
  return std::to_string(p.m) + "x" + std::to_string(p.n);
}

const SvdKernels& kernels() {
  switch (active_isa()) {
#ifdef JML_HAVE_avx512
    case Isa::kAvx512:
      return *host::svd_kernels_avx512();
#endif
#ifdef JML_HAVE_avx2
    case Isa::kAvx2:
      return *host::svd_kernels_avx2();
#endif
    default:
      return *host::svd_kernels_baseline();
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pure: which variant for this problem. `error` is set when the request cannot be met.
SvdPlan plan_svd(const SvdProblem& p) {
  SvdPlan plan;
  plan.problem = p;
  auto pick = [&](const char* name, const std::string& reason) {
    for (const VariantRow& r : kVariants) {
      if (std::strcmp(r.name, name) == 0) plan.variant = &r;
    }
    plan.reason = reason;
    return plan;
  };
  const bool rectangular_full = p.compute_uv && p.full_matrices && p.m != p.n;
  if (!p.variant.empty()) {
    pick(p.variant.c_str(), "asked for by name (JAXMETAL_VARIANT)");
    std::string names;
    for (const VariantRow& r : kVariants)
      names += (names.empty() ? "" : ", ") + std::string(r.name);
    if (plan.variant == nullptr) plan.error = wrong("variant", "one of " + names, p.variant);
    if (plan.variant != nullptr && plan.variant->thin_only && rectangular_full) {
      plan.error =
          wrong("variant", "one that completes a rectangular factor (column, block, lapack)",
                p.variant + " with full_matrices=True at " + size_text(p));
    }
    return plan;
  }
  if (p.method == "lapack") return pick("lapack", "method=\"lapack\" was asked for");
  if (p.method == "block_jacobi") return pick("block", "method=\"block_jacobi\" was asked for");
  if (p.method != "auto" && p.method != "jacobi") {
    plan.error = wrong("method", "auto, jacobi, block_jacobi or lapack", p.method);
    return plan;
  }
  const int row = crossover(p);
  const int64_t limit = p.jacobi_max_n[row];
  const char* key = kCrossovers[row];
  const std::string why = p.method == "jacobi" ? "method=\"jacobi\" was asked for; " : "";
  if (p.method == "auto" && p.k() > limit) {
    return pick("lapack", "min(m, n) = " + std::to_string(p.k()) + " is above " + key + " = " +
                              std::to_string(limit) + ", from where LAPACK was measured faster");
  }
  const std::string size = "min(m, n) = " + std::to_string(p.k());
  if (p.k() <= p.interleaved_max_n && p.longest() <= p.interleaved_max_m && !rectangular_full) {
    // A vector of matrices costs as much half empty as full; a full one costs k /
    // interleaved_even_n of the same matrices one at a time.
    const int64_t threads =
        p.threads > 0 ? p.threads : std::max<int64_t>(1, std::thread::hardware_concurrency());
    const int64_t lanes = kernels().lanes(dtype_row(p.dtype)->dtype);
    const int64_t vectors = divide_up(divide_up(p.batch, lanes), threads);
    if (vectors * lanes * p.k() <= divide_up(p.batch, threads) * p.interleaved_even_n) {
      return pick("interleaved",
                  why + size + " <= interleaved_max_n = " + std::to_string(p.interleaved_max_n) +
                      " and the batch fills the lanes: one matrix a lane");
    }
  }
  return pick(
      "column",
      why + size +
          (p.method == "auto" ? " <= " + std::string(key) + " = " + std::to_string(limit) : "") +
          ": QR, then one matrix at a time, rows across the lanes");
}

SvdTask task_for(const SvdProblem& p) {
  SvdTask t{};
  t.m = p.m;
  t.n = p.n;
  t.dtype = dtype_row(p.dtype)->dtype;
  t.compute_uv = p.compute_uv;
  t.full_matrices = p.full_matrices;
  t.max_sweeps = int(std::min<int64_t>(p.max_sweeps, INT_MAX));
  t.interleaved_max_sweeps = int(std::min<int64_t>(p.interleaved_max_sweeps, t.max_sweeps));
  t.fallback_max_sweeps = int(std::min<int64_t>(p.fallback_max_sweeps, INT_MAX));
  return t;
}

std::string plan_json(const std::string& text) {
  SvdProblem p;
  std::string error = parse_problem(text, &p);
  if (!error.empty()) return JsonWriter().field("error", error).text();
  const SvdPlan plan = plan_svd(p);
  if (!plan.error.empty()) return JsonWriter().field("error", plan.error).text();
  const bool native = plan.variant->kernels != nullptr;
  JsonWriter w;
  w.field("route", native ? "host" : "lapack")
      .field("variant", plan.variant->name)
      .field("reason", plan.reason)
      .field("launches", 1);
  if (native) {
    const SvdTask t = task_for(p);
    w.field("isa", isa_name(active_isa()))
        .field("lanes", kernels().lanes(t.dtype))
        .field("scratch_bytes", (kernels().*(plan.variant->kernels)).scratch_bytes(t));
  }
  return w.text();
}

// ---- the handler ----

// Inputs may be subnormal and results may be too; XLA's threads flush them. The kernels scale
// first, so denormals cost nothing inside.
class ScopedDenormals {
 public:
#if defined(__x86_64__)
  ScopedDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~ScopedDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  ScopedDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ & ~(uint64_t(1) << 24)));
  }
  ~ScopedDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

ffi::ErrorOr<std::unique_ptr<SvdPlan>> instantiate(std::string_view config) {
  SvdProblem p;
  const std::string error = parse_problem(std::string(config), &p);
  if (!error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(error));
  auto plan = std::make_unique<SvdPlan>(plan_svd(p));
  if (!plan->error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(plan->error));
  if (plan->variant->kernels == nullptr) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        wrong("variant", "a native row (interleaved, column or block)", plan->variant->name)));
  }
  return plan;
}

ffi::Error check_shapes(const SvdProblem& p, const ffi::AnyBuffer& a, ffi::RemainingRets& rets,
                        int64_t* batch) {
  const DTypeRow& row = *dtype_row(p.dtype);
  auto dims = a.dimensions();
  if (dims.size() < 2) {
    return invalid("svd", "argument", "a", "rank of at least 2", "shape " + shape_text(dims));
  }
  ffi::AnyBuffer::Dimensions lead(dims.begin(), dims.size() - 2);
  ffi::Error e = check_buffer("svd", "argument", "a", a, row.element, lead, {p.m, p.n});
  if (e.failure()) return e;
  const size_t want = p.compute_uv ? 6 : 4;
  if (rets.size() != want) {
    return invalid("svd", "results", "", std::to_string(want), std::to_string(rets.size()));
  }
  *batch = 1;
  for (int64_t d : lead) *batch *= d;
  size_t at = 0;
  auto next = [&](const char* name, ffi::DataType dtype, std::initializer_list<int64_t> tail) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> r = rets.get<ffi::AnyBuffer>(at++);
    if (r.has_error()) return r.error();
    return check_buffer("svd", "result", name, **r, dtype, lead, tail);
  };
  if (p.compute_uv) {
    e = next("u", row.element, {p.m, p.full_matrices ? p.m : p.k()});
    if (e.failure()) return e;
  }
  e = next("s", row.real, {p.k()});
  if (e.failure()) return e;
  if (p.compute_uv) {
    e = next("vh", row.element, {p.full_matrices ? p.n : p.k(), p.n});
    if (e.failure()) return e;
  }
  e = next("status", ffi::DataType::S32, {});
  if (e.failure()) return e;
  e = next("sweeps", ffi::DataType::S32, {});
  if (e.failure()) return e;
  return next("off_norm", ffi::DataType::F32, {});
}

ffi::Error execute(SvdPlan* plan, ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::RemainingRets rets,
                   std::string_view) {
  const SvdProblem& p = plan->problem;
  int64_t batch = 0;
  ffi::Error e = check_shapes(p, a, rets, &batch);
  if (e.failure()) return e;
  if (batch == 0) return ffi::Error::Success();

  SvdTask t = task_for(p);
  t.a = a.untyped_data();
  size_t at = 0;
  auto data = [&] { return (*rets.get<ffi::AnyBuffer>(at++))->untyped_data(); };
  if (p.compute_uv) t.u = data();
  t.s = data();
  if (p.compute_uv) t.vh = data();
  t.status = static_cast<int32_t*>(data());
  t.sweeps = static_cast<int32_t*>(data());
  t.off_norm = static_cast<float*>(data());

  const SvdVariant& variant = kernels().*(plan->variant->kernels);
  const int64_t scratch_bytes = variant.scratch_bytes(t);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  // Whole vectors of matrices for the interleaved layout, single matrices otherwise; enough chunks
  // that an unlucky thread does not hold up the rest, few enough that taking one costs nothing.
  const bool interleaved = plan->variant->kernels == &SvdKernels::interleaved;
  const int64_t grain = interleaved ? kernels().lanes(t.dtype) : 1;
  const int64_t grains = divide_up(batch, grain);
  const int64_t per_chunk = std::max<int64_t>(1, grains / (threads * 16));
  const int64_t chunk = per_chunk * grain;
  const int64_t chunks = divide_up(batch, chunk);
  auto share = [&](int64_t count, const auto& body) { parallel_for(pool, threads, count, body); };
  using Share = decltype(share);
  host::Parallel inside{[](void* self, int64_t count, void (*body)(void*, int64_t), void* arg) {
                          (*static_cast<Share*>(self))(count, [&](int64_t i) {
                            ScopedDenormals keep;
                            body(arg, i);
                          });
                        },
                        &share};
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
  if (plan->variant->parallel_inside) {
    t.parallel = &inside;
    run(0, batch);
  } else {
    share(chunks, [&](int64_t c) { run(c * chunk, std::min(chunk, batch - c * chunk)); });
  }
  if (out_of_memory) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "svd: could not allocate " + std::to_string(scratch_bytes) +
                          " bytes of scratch for one " + size_text(p) + " " + p.dtype + " matrix");
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("config"));
XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<SvdPlan>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()  // a
                           .RemainingRets()        // u, s, vh, status, sweeps, off_norm
                           .Attr<std::string_view>("config"));

ffi::TypeId SvdPlan::id = {};
const ffi::TypeInfo SvdPlan::info = ffi::MakeTypeInfo<SvdPlan>();

const RegisterOp kRegister({"svd", "jml_svd_v1", "cpu", "jml_svd_plan_v1", kInstantiate, kExecute,
                            &SvdPlan::id, &SvdPlan::info, plan_json});

}  // namespace
}  // namespace jml
