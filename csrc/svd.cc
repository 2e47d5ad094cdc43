// jml_svd_v1: check -> plan (a pure function) -> host kernels, or kernels/svd.metal on a device.
//
// Custom call: a [batch..., m, n] -> (u, s, vh, status, sweeps, off_norm), or (s, status, sweeps,
// off_norm) for singular values only. The one attribute `config` is the flat JSON that the plan
// takes.
#include "csrc/host/svd.h"

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "csrc/handler.h"
#include "csrc/isa.h"
#include "csrc/registry.h"
#include "csrc/svd.h"

namespace jml {
namespace {

using host::SvdKernels;
using host::SvdTask;
using host::SvdVariant;

// SvdParams and the table of kernels.
#define JM_HOST
#include "kernels/svd.metal"
#undef JM_HOST

// ---- the problem ----

struct SvdProblem : MatrixProblem {
  std::string dtype, method = "auto";
  bool compute_uv = true, full_matrices = true;
  // Tuning: jaxmetal_linalg/hardware_params.json, <device>.svd; all but the first for the host.
  int64_t max_sweeps = 0, fallback_max_sweeps = 0;
  int64_t interleaved_max_n = 0, interleaved_max_m = 0, interleaved_even_n = 0;
  int64_t interleaved_max_sweeps = 0;
  int64_t threads = 0;  // 0: as many as the processor has
  // The largest min(m, n) that method "auto" keeps from LAPACK: one row a case (see crossover()).
  int64_t jacobi_max_n[8] = {};
};

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
  return jml::wrong("svd", argument, expected, got);
}

// Empty on success, else the error. Every key must be known and of its type; none may be missing.
std::string parse_problem(const std::string& text, SvdProblem* out) {
  std::vector<Field> host = {{"fallback_max_sweeps", &out->fallback_max_sweeps},
                             {"interleaved_max_n", &out->interleaved_max_n},
                             {"interleaved_max_m", &out->interleaved_max_m},
                             {"interleaved_max_sweeps", &out->interleaved_max_sweeps},
                             {"interleaved_even_n", &out->interleaved_even_n, 1},
                             {"threads", &out->threads}};
  for (int i = 0; i < 8; ++i) host.push_back({kCrossovers[i], &out->jacobi_max_n[i]});
  const std::vector<Field> fields = {{"batch", &out->batch, 1},
                                     {"m", &out->m, 1},
                                     {"n", &out->n, 1},
                                     {"max_sweeps", &out->max_sweeps},
                                     {"compute_uv", &out->compute_uv},
                                     {"full_matrices", &out->full_matrices},
                                     {"dtype", &out->dtype},
                                     {"method", &out->method},
                                     {"variant", &out->variant},
                                     // Programs exported by older versions do not say.
                                     {"device", &out->device, 0, true}};
  const std::string error = read_problem("svd", text, fields, host, device_fields(out, true));
  if (!error.empty()) return error;
  if (dtype_row(out->dtype) == nullptr) {
    return wrong("a", kDTypeNames, out->dtype);
  }
  return check_caps("svd", *out);
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

struct SvdPlan : CallPlan<SvdProblem, VariantRow> {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;
};

const SvdKernels& kernels() { return JML_HOST_KERNELS(svd); }

// Pure: which variant for this problem. `error` is set when the request cannot be met.
SvdPlan plan_svd(const SvdProblem& p) {
  SvdPlan plan;
  plan.problem = p;
  auto pick = [&](const char* name, const std::string& reason) {
    plan.variant = row_named(kVariants, name);
    plan.reason = reason;
    return plan;
  };
  const bool rectangular_full = p.compute_uv && p.full_matrices && p.m != p.n;
  if (!p.variant.empty()) {
    pick(p.variant.c_str(), "asked for by name (JAXMETAL_VARIANT)");
    if (plan.variant == nullptr)
      plan.error = wrong("variant", "one of " + names_of(kVariants), p.variant);
    if (plan.variant != nullptr && plan.variant->thin_only && rectangular_full) {
      plan.error =
          wrong("variant", "one that completes a rectangular factor (column, block, lapack)",
                p.variant + " with full_matrices=True at " + p.size());
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

// ---- the plan for a device ----

// Of "twin" with vectors. Hard matrices took up to 10; dispatches for more of them cost 1.5 us a
// pair on an H200 where a matrix is done, 4 us where 1024 are.
constexpr int kMostTwinSweeps = 2 * kTwinKept;

// Of threadgroup memory, for steps of "twin": see Twin in kernels/svd.metal.
int64_t twin_bytes(int64_t n, int64_t simdgroups) {
  const int64_t columns_of_lane = n <= 128 ? 4 : 6;
  const int64_t turns = 4 * columns_of_lane * (n <= 64 ? 16 : 32);
  const int64_t sums = n <= 64 ? 0 : 64 * columns_of_lane * simdgroups;
  return 4 * (turns + sums + 3 * n + 16);
}

// One row of SVD_VARIANTS or SVD_DOUBLE_VARIANTS.
struct KernelRow {
  std::string name, variant;  // svd_xor_vectors_f32_n8, xor
  std::string storage;
  bool vectors, block, twin, complex, tile;
  int64_t n, columns, simdgroups;

  // As the head of kernels/svd.metal says; tests hold it against tools/msl/layout.py.
  int64_t matrices() const {
    const auto lanes = int64_t(std::bit_ceil(uint64_t(n / columns)));  // from matrix to matrix
    return block || twin ? 1 : simdgroups * 32 / lanes;
  }
  int64_t threads() const { return 32 * simdgroups; }
  int64_t threadgroup_bytes() const {
    if (tile) return simdgroups * 2 * n * 32 * 8;
    if (twin) {
      const int64_t slices = simdgroups * (n <= 64 ? 2 : 1);
      return std::max(twin_bytes(n, simdgroups), vectors ? 16 * slices * (n + 1) : 0);
    }
    const int64_t real = storage == "double" ? 8 : 4;
    if (!block) return complex ? 0 : matrices() * n * (n + 1) * real;
    const int64_t rows = divide_up(n, 32) * 32;
    return 4 * std::max(n * rows / 2 * (vectors && n <= 64 ? 2 : 1), vectors ? 32 * (rows + 1) : 0);
  }
  // Of device memory, a matrix: X and, for V, reflectors and rotations.
  int64_t device_scratch_bytes() const {
    const int64_t parts = n <= 64 ? 1 : n <= 128 ? 2 : 4;
    if (!twin) return 0;
    return 4 * (vectors ? 2 * n * n + 5 * n + 4 + kTwinKept * (n + parts) * n : n * n);
  }
  // Of the kernel that makes U of what this one of "twin" recorded, and its threadgroup bytes; see
  // TwinRows.
  bool has_rows() const { return twin && vectors; }
  std::string rows_name() const {
    return std::string(name).replace(name.find("_vectors_"), 9, "_rows_");
  }
  int64_t rows_bytes() const { return 4 * (2 * n + simdgroups * (n <= 128 ? 8 : 4) * (n + 1)); }
};

// Between svd_ and the next underscore.
std::string variant_of(const std::string& kernel) {
  return kernel.substr(4, kernel.find('_', 4) - 4);
}

const std::vector<KernelRow>& kernel_rows() {
  static const std::vector<KernelRow> rows = [] {
    struct Entry {
      const char *name, *function, *storage;
      int64_t n, columns, simdgroups;
    };
#define JML_ROW(name, function, T, N, C, SIMDGROUPS) {#name, #function, #T, N, C, SIMDGROUPS},
    constexpr Entry kTable[] = {SVD_VARIANTS(JML_ROW) SVD_DOUBLE_VARIANTS(JML_ROW)};
#undef JML_ROW
    std::vector<KernelRow> out;
    for (const Entry& e : kTable) {
      const std::string name = e.name, function = e.function;
      if (function == "svd_twin_rows") continue;  // a part of "vectors"
      const bool vectors = function.find("vectors") != std::string::npos;
      out.push_back({name, variant_of(name), e.storage, vectors,
                     function.find("block") != std::string::npos,
                     function.find("twin") != std::string::npos,
                     function.find("complex") != std::string::npos,
                     function.find("tile") != std::string::npos, e.n, e.columns, e.simdgroups});
    }
    return out;
  }();
  return rows;
}

// The smallest kernel of a variant that holds the problem.
const KernelRow* find_row(const std::string& variant, const SvdProblem& p) {
  const KernelRow* best = nullptr;
  for (const KernelRow& r : kernel_rows()) {
    if (r.variant == variant && r.storage == dtype_row(p.dtype)->storage &&
        r.vectors == p.compute_uv && r.n >= p.longest() && (best == nullptr || r.n < best->n)) {
      best = &r;
    }
  }
  return best;
}

int64_t columns_of_u(const SvdProblem& p) {
  return p.compute_uv && p.full_matrices ? p.longest() : p.k();
}

// What the params of all kernels have in common. Wide matrices are tall ones with the strides of A
// swapped, U and Vh exchanged.
template <class ParamsOfKernel>
ParamsOfKernel params_of(const SvdProblem& p) {
  const int64_t m = p.longest(), n = p.k(), u_cols = columns_of_u(p);
  const bool wide = p.m < p.n;
  ParamsOfKernel q{};
  q.a_batch = m * n;
  q.u_batch = m * u_cols;
  q.vt_batch = n * n;
  q.batch = int(p.batch);
  q.m = int(m);
  q.n = int(n);
  q.u_cols = int(u_cols);
  q.a_row = int(wide ? 1 : n);
  q.a_col = int(wide ? m : 1);
  // The kernel's U is the transpose of Vh [u_cols, m] then, and its Vt that of U [n, n].
  q.u_row = int(wide ? 1 : u_cols);
  q.u_col = int(wide ? m : 1);
  q.vt_row = int(wide ? 1 : n);
  q.vt_col = int(wide ? n : 1);
  const double ulp = dtype_row(p.dtype)->is_double() ? 0x1p-52 : 0x1p-23;
  q.tol = float(std::max(1.0, std::sqrt(double(m)) / 4) * ulp);
  return q;
}

// The custom call's operand and results by the names that kernels have for them.
Regions regions_of(const SvdProblem& p) {
  const DTypeRow& dtype = *dtype_row(p.dtype);
  const int64_t m = p.longest(), n = p.k(), element = dtype.bytes;
  const int64_t real = dtype.real == dtype.element ? element : element / 2;
  const bool wide = p.m < p.n;
  Regions regions;
  auto add = [&](const char* name, int64_t bytes) { regions.add_operand(name, p.batch * bytes); };
  add("a", m * n * element);
  const int64_t u_bytes = m * columns_of_u(p) * element, vt_bytes = n * n * element;
  if (p.compute_uv) add(wide ? "vt" : "u", wide ? vt_bytes : u_bytes);
  add("s", n * real);
  if (p.compute_uv) add(wide ? "u" : "vt", wide ? u_bytes : vt_bytes);
  add("status", 4);
  add("sweeps", 4);
  add("off_norm", 4);
  return regions;
}

// The launches of a row.
std::vector<Step> svd_launches(const SvdProblem& p, const KernelRow& row) {
  SvdParams q = params_of<SvdParams>(p);
  q.max_sweeps = int(std::min<int64_t>(p.max_sweeps, INT_MAX));
  Regions regions = regions_of(p);
  std::vector<const char*> buffers = {"a"};
  if (p.compute_uv && !row.has_rows()) buffers.push_back("u");
  buffers.push_back("s");
  if (p.compute_uv) buffers.push_back("vt");
  for (const char* name : {"status", "sweeps", "off_norm"}) buffers.push_back(name);
  if (row.twin) {
    regions.add_scratch("w", p.batch * row.device_scratch_bytes());
    buffers.push_back("w");
  }
  std::vector<Step> steps;
  auto add = [&](const std::string& name, const std::vector<const char*>& of, int64_t bytes) {
    Step s =
        make_step(name, divide_up(p.batch, row.matrices()), row.threads(), regions.args(of), q);
    s.threadgroup_bytes = p.threadgroup_argument(bytes);
    steps.push_back(std::move(s));
  };
  if (row.has_rows()) q.max_sweeps = std::min(q.max_sweeps, kMostTwinSweeps);
  do {
    q.last = std::min(q.max_sweeps, q.first + kTwinKept);
    add(row.name, buffers, row.threadgroup_bytes());
    if (row.has_rows()) add(row.rows_name(), {"u", "status", "sweeps", "w"}, row.rows_bytes());
    q.first += kTwinKept;
  } while (row.has_rows() && q.first < q.max_sweeps);
  return steps;
}

// One row of SVD_FUSED_VARIANTS.
struct FusedRow {
  std::string name, variant;  // svd_fused_n256, fused
  int64_t n, per_pair;        // columns at most; lanes

  // The row of "quarters" has one size of all that depends on n.
  bool quarters() const { return variant == "quarters"; }
};

const std::vector<FusedRow>& fused_rows() {
  static const std::vector<FusedRow> rows = [] {
    std::vector<FusedRow> out;
#define JML_ROW(name, function, N, PER_PAIR) out.push_back({#name, "", N, PER_PAIR});
    SVD_FUSED_VARIANTS(JML_ROW)
#undef JML_ROW
    for (FusedRow& r : out) r.variant = variant_of(r.name);
    return out;
  }();
  return rows;
}

// How many of `count`, of so much work each, a dispatch may have for the watchdog's sake, in whole
// multiples of `together`; at least one of them. 0: no limit.
int64_t most_at_once(double limit, double each, int64_t count, int64_t together = 1) {
  if (limit <= 0) return count;
  const double fit = limit / each / double(together);
  return std::min(count, together * std::max<int64_t>(1, int64_t(std::min(fit, double(INT_MAX)))));
}

// So few simdgroups that they take as many steps as with all that a threadgroup may have.
int64_t simdgroups_for(int64_t needed, const Caps& caps) {
  return divide_up(needed, divide_up(needed, caps.max_threads_per_threadgroup / 32));
}

// Of all sweeps by pairs of columns, as many as an int counts.
int64_t rounds_by_pairs(const SvdProblem& p) {
  const int64_t in_sweep = p.k() + p.k() % 2 - 1;
  return std::min<int64_t>(p.max_sweeps, INT_MAX / in_sweep) * in_sweep;
}

// The dispatches of "grid" (head of kernels/svd.metal), for any size, or with a row of "fused";
// tools/msl/layout.py says the same, and tests hold one against the other.
class GridPlanner {
 public:
  GridPlanner(const SvdProblem& p, const Caps& caps, const FusedRow* fused = nullptr)
      : p_(p),
        fused_(fused),
        cores_(std::max<int64_t>(caps.cores, 1)),
        limit_(p.submission_work(caps)),
        m_(p.longest()),
        n_(p.k()),
        vectors_(p.compute_uv),
        regions_(regions_of(p)) {
    side_ = quarters() ? fused->n : divide_up(n_, kGridPair) * kGridPair;
    rows_ = std::max(side_, divide_up(m_, kGridPair) * kGridPair);
    pairs_ = side_ / kGridPair;
    // As many as a core of an H200 has room for.
    auto fill = [&](int64_t each, int64_t tiles) {
      const int64_t room = std::max<int64_t>(each * cores_ / (p.batch * pairs_), 1);
      return divide_up(tiles, divide_up(tiles, room));
    };
    slices_ = fill(3, side_ / kGridRows);
    turn_slices_ = fill(8, side_ * (vectors_ ? 2 : 1) / 32);
    if (fused != nullptr) {
      simdgroups_ = quarters()
                        ? fused->per_pair
                        : simdgroups_for(divide_up(divide_up(n_, 2) * fused->per_pair, 32), caps);
    }
    q_ = params_of<SvdGridParams>(p);
    q_.side = int(side_);
    lay_out();
  }

  int64_t slices() const { return slices_; }
  // Of any dispatch, or more.
  int64_t most_threadgroups() const {
    const int64_t squares = divide_up(rows_, 32) * divide_up(u_cols(), 32);
    return p_.batch * (squares + side_ / 32 * (side_ / 32) + pairs_ * (3 * slices_ + turn_slices_));
  }
  int64_t scratch_bytes() const { return regions_.scratch_bytes(); }
  // Floating-point operations on one matrix, of the least that its largest dispatch may have.
  double least_work() const {
    if (quarters()) return quarters_work();
    return fused_ != nullptr ? fused_work() : std::max(turn_work(), solve_work());
  }

  std::vector<Step> steps() {
    const int64_t height = side_ * (vectors_ ? 2 : 1);
    set(m_, rows_, u_cols(), height);
    add(typed("svd_grid_scan"), side_ / 32, 1024, {"a", "keys"}, 4096);
    add("svd_grid_rank", side_ / 32, 256,
        {"keys", "origin", "exponent", "status", "sweeps", "off_norm"}, 2048);
    add(typed("svd_grid_load"), side_ / 32 * divide_up(rows_, kGridTile), 256,
        {"a", "origin", "exponent", "status", "f"}, 32 * 33 * 4);
    set(m_, rows_, u_cols(), side_);
    factor("f", "f_triangles", "g");
    set(n_, side_, n_, height);
    factor("g", "g_triangles", "w");
    set(m_, rows_, u_cols(), height);
    if (quarters())
      turn_by_quarters();
    else if (fused_ != nullptr)
      turn_by_pairs(height);
    else
      turn_by_blocks();
    const bool by_product = fused_ != nullptr || !vectors_;
    q_.step = int(by_product);
    add("svd_grid_norms", side_ / 8, 256, {"w", "keys", "status"});
    if (by_product) {
      add("svd_grid_lengths", side_ / kLengthsColumns, 256, {"w", "g", "keys", "status"},
          4 * int(kLengthsDepth) * (int(kLengthsRows) + int(kLengthsColumns) + 4),
          double(n_) * double(n_) * double(n_));
    }
    q_.step = 1;
    add("svd_grid_rank", side_ / 32, 256,
        {"keys", "order", "exponent", "status", "sweeps", "off_norm"}, 2048);
    if (vectors_) {
      q_.step = 0;
      add("svd_grid_complete", 1, 256, {"w", "keys", "order", "status", "work"}, 32);
      back("f", "f_triangles", "f_merged", "left");
      set(n_, side_, n_, height);
      q_.step = 1;
      back("g", "g_triangles", "g_merged", "right");
      set(m_, rows_, u_cols(), height);
    }
    add(typed("svd_grid_values"), divide_up(n_, 256), 256,
        {"keys", "order", "exponent", "status", "s"});
    if (vectors_) {
      const int64_t squares = rows_ / 32 * divide_up(u_cols(), 32) + side_ / 32 * (side_ / 32);
      add(typed("svd_grid_factors"), squares, 256, {"left", "right", "origin", "status", "u", "vt"},
          32 * 33 * 4);
    }
    return std::move(steps_);
  }

  // Dispatches that find their matrix done cost 1.2 us each on an H200. Gaussian matrices took 12
  // sweeps at n = 4096 there; those with three singular values, each many times, which gain one
  // digit a sweep, take 12 at n = 129, 14 at 200 and 15 at 384 and 512 in the simulator.
  static constexpr int64_t kMaxSweeps = 20;
  static constexpr int64_t kSolveBytes =
      4 * (kGridPair * kGridSquare + kGridHalf * kGridHalf + 3 * kGridPair);
  // Guesses for the watchdog's sake.
  static constexpr double kPanelWaits = 8, kWorkOfLightThread = 200;

 private:
  int64_t u_cols() const { return columns_of_u(p_); }

  // Of a round: the columns of X and V times a matrix, and Jacobi on all Gram matrices.
  double turn_work() const {
    return 2 * double(side_) * double(side_ * (vectors_ ? 2 : 1)) * int(kGridPair);
  }
  double solve_work() const { return 400 * double(side_) * int(kGridPair); }
  bool quarters() const { return fused_ != nullptr && fused_->quarters(); }
  double quarters_work() const {
    return double(side_ * side_) * int(kQuarter) * (vectors_ ? 10 : 6);
  }
  double fused_work() const {
    return double(divide_up(n_, 2)) * double(side_) * (6 + 8 * (vectors_ ? 2 : 1));
  }

  std::string typed(const char* function) const {
#define JML_ROW(name, function, T) {#name, #function, #T},
    constexpr StorageRow kTable[] = {SVD_GRID_VARIANTS(JML_ROW)};
#undef JML_ROW
    return kernel_for(kTable, function, dtype_row(p_.dtype)->storage);
  }

  void lay_out() {
    auto scratch = [&](const char* name, int64_t words) {
      regions_.add_scratch(name, 4 * p_.batch * words);
    };
    const int64_t triangles = side_ / kGridBlock * 256;
    scratch("keys", side_);
    scratch("origin", side_);
    scratch("order", side_);
    scratch("exponent", 1);
    scratch("f", side_ * rows_);
    scratch("f_triangles", triangles);
    scratch("g", side_ * side_);
    scratch("g_triangles", triangles);
    scratch("w", side_ * side_ * (vectors_ ? 2 : 1));
    if (quarters()) {
      scratch("x", int64_t(kQuartersSide) * kQuartersSide);
      scratch("slots", kQuartersSlots);
      scratch("records", 2 * int64_t(kQuartersRows) * kQuartersSide);
    } else if (fused_ != nullptr) {
      scratch("state", 2);
    } else {
      scratch("slots", 3 * pairs_);
      scratch("grams", pairs_ * slices_ * 3 * kGridHalf * kGridHalf);
      scratch("blocks", 2 * pairs_ * kGridKept);
      scratch("turns", pairs_ * kGridPair * kGridPair);
    }
    if (vectors_) {
      scratch("work", 3 * side_);
      scratch("f_merged", side_ * int64_t(kGridMerged));
      scratch("g_merged", side_ * int64_t(kGridMerged));
      scratch("left", divide_up(u_cols(), 32) * 32 * rows_);
      scratch("right", divide_up(n_, 32) * 32 * side_);
    }
  }

  void turn_by_blocks() {
    for (int64_t sweep = 0; sweep < std::min<int64_t>(p_.max_sweeps, kMaxSweeps); ++sweep) {
      for (int64_t round = 0; round < 2 * pairs_ - 1; ++round) {
        q_.step = int(round);
        q_.slices = int(slices_);
        const int kinds = round == 0 ? 3 : 1;
        add("svd_grid_gram", pairs_ * slices_ * kinds, kGridGramThreads, {"w", "grams", "status"},
            4 * kGridPair * kGridRows, kinds * turn_work() / 4);
        add("svd_grid_solve", pairs_, kGridSolveThreads,
            {"grams", "blocks", "turns", "slots", "status"}, kSolveBytes, solve_work());
        q_.slices = int(turn_slices_);
        add("svd_grid_turn", pairs_ * turn_slices_, kGridTurnThreads,
            {"w", "turns", "slots", "status"},
            4 * int(kGridPair) * (int(kGridTurnPitch) + int(kGridTurnsPitch)), turn_work());
      }
      q_.step = 0;
      add("svd_grid_check", 1, 32, {"slots", "status", "sweeps", "off_norm"});
    }
  }

  // A dispatch more than rounds: V is a sweep behind.
  void turn_by_quarters() {
    q_.slices = int(3 * std::min<int64_t>(p_.max_sweeps, kMaxSweeps));
    for (q_.step = 0; q_.step <= q_.slices; ++q_.step) {
      add(fused_->name, vectors_ && q_.step > 0 && q_.step % 3 == 0 ? 4 : 2, 32 * simdgroups_,
          {"w", "x", "records", "slots", "status", "sweeps", "off_norm"},
          twin_bytes(kQuartersSide / 2, simdgroups_), quarters_work());
    }
  }

  // In as few dispatches as the device's watchdog allows.
  void turn_by_pairs(int64_t height) {
    SvdPairsParams q = params_of<SvdPairsParams>(p_);
    q.rows = int(rows_);
    q.side = int(side_);
    q.height = int(height);
    const int64_t count = rounds_by_pairs(p_);
    const int64_t most = most_at_once(limit_, stretched(1, 32 * simdgroups_, fused_work()), count);
    for (int64_t first = 0; first < count; first += most) {
      q.first = int(first);
      q.last = int(std::min(first + most, count));
      add(fused_->name, 1, 32 * simdgroups_, {"w", "state", "status", "sweeps", "off_norm"},
          4 * simdgroups_, fused_work() * double(q.last - q.first), q);
    }
  }

  void set(int64_t m, int64_t rows, int64_t u_cols, int64_t height) {
    q_.m = int(m);
    q_.rows = int(rows);
    q_.u_cols = int(u_cols);
    q_.height = int(height);
    q_.step = 0;
  }

  // QR of `f`; its R^T goes `to`.
  void factor(const char* f, const char* triangles, const char* to) {
    for (int64_t panel = 0; panel < divide_up(n_, kGridBlock); ++panel) {
      q_.step = int(panel);
      const int64_t below = q_.rows - panel * kGridBlock;
      const bool tall = below > 2048;
      const int64_t threads = std::min<int64_t>(divide_up(below, 128) * 32, tall ? 384 : 512);
      // Each column is one pass over the rows, with the other threads waiting for the slowest.
      add(tall ? "svd_grid_panel_tall" : "svd_grid_panel", 1, threads, {f, triangles, "status"},
          4 * (688 + threads / 2),
          4 * double(below) * int(kGridBlock) * int(kGridBlock) * kPanelWaits);
      const int64_t behind = n_ - (panel + 1) * kGridBlock;
      if (behind > 0) {
        const int64_t columns = reflected_columns(behind, false);
        add("svd_grid_reflect_" + std::to_string(columns), divide_up(behind, columns), 256,
            {f, triangles, f, "status"},
            columns == kGridReflected ? 4 * 64 * (256 / 32 + 1)
                                      : reflect_bytes(kGridBlock, columns),
            4 * double(below) * int(kGridBlock) * double(behind));
      }
    }
    q_.step = 0;
    add("svd_grid_start", side_ / 32 * (side_ / 32), 256, {f, "status", to}, 32 * 33 * 4);
  }

  // `to` = the orthogonal factor of the QR in `f` times vectors.
  void back(const char* f, const char* triangles, const char* merged, const char* to) {
    add("svd_grid_merge", divide_up(n_, kGridMerged), 256, {f, triangles, "status", merged},
        reflect_bytes(kGridBlock, kGridBlock) + 4 * int64_t(kGridBlock) * (kGridBlock + 1),
        2 * double(q_.rows) * double(side_) * int(kGridBlock));
    const int64_t columns = reflected_columns(q_.u_cols, true);
    add("svd_grid_back_" + std::to_string(columns), divide_up(q_.u_cols, columns), 256,
        {f, merged, "w", "order", "status", to}, reflect_bytes(kGridMerged, columns),
        4 * double(q_.rows) * double(side_) * double(q_.u_cols));
  }

  // That a threadgroup reflects: many where enough threadgroups remain. On an H200 back took 0.65
  // of the time with 8 columns instead of 16 at n = 1024, and 1.4 of it with 16 instead of 32 at
  // 64x256x256. Columns behind a panel are worth fewer threadgroups, which read its vectors anew.
  int64_t reflected_columns(int64_t columns, bool back) const {
    for (const int64_t c : {32, 16, 8}) {
      const int64_t enough = back || c == 32 ? 3 * cores_ : cores_;
      if (2 * p_.batch * divide_up(columns, c) >= enough) return c;
    }
    return back ? 8 : int64_t(kGridReflected);
  }

  // Of threadgroup memory: the tile, or what its products are summed in, and the products.
  static int64_t reflect_bytes(int64_t reflectors, int64_t columns) {
    const int64_t both = reflectors + columns, quads = both > 48 ? 16 : 32;
    const int64_t tile = 4 * std::max<int64_t>(both * (quads + 1), 1024);
    return 4 * (tile + both * (reflectors + 1));
  }

  // Of all matrices. Cores without a threadgroup make it last as if they had one.
  double stretched(int64_t groups, int64_t threads, double work) const {
    const double idle = double(cores_) / double(p_.batch * groups);
    const double least = kWorkOfLightThread * double(groups * threads);
    return double(p_.batch) * std::max(work, least) * std::max(1.0, idle);
  }

  // `work` in floating-point operations a matrix; 0: next to none.
  void add(const std::string& kernel, int64_t groups, int64_t threads,
           std::initializer_list<const char*> buffers, int64_t bytes = 0, double work = 0) {
    add(kernel, groups, threads, buffers, bytes, work, q_);
  }
  template <class ParamsOfKernel>
  void add(const std::string& kernel, int64_t groups, int64_t threads,
           std::initializer_list<const char*> buffers, int64_t bytes, double work,
           const ParamsOfKernel& params) {
    Step s = make_step(kernel, p_.batch * groups, threads, regions_.args(buffers), params);
    s.work = stretched(groups, threads, work);
    s.threadgroup_bytes = p_.threadgroup_argument(bytes);
    steps_.push_back(std::move(s));
  }

  const SvdProblem& p_;
  const FusedRow* fused_;  // null: "grid"
  int64_t cores_;
  double limit_;
  int64_t m_, n_, rows_ = 0, side_ = 0, pairs_ = 0, slices_ = 1, turn_slices_ = 1, simdgroups_ = 1;
  bool vectors_;
  SvdGridParams q_;
  Regions regions_;
  std::vector<Step> steps_;
};

// The dispatches of "pairs", in the same two places.
class PairsPlanner {
 public:
  PairsPlanner(const SvdProblem& p, const Caps& caps)
      : p_(p),
        cores_(double(std::max<int64_t>(caps.cores, 1))),
        limit_(p.submission_work(caps)),
        m_(p.longest()),
        n_(p.k()),
        u_cols_(columns_of_u(p)),
        rows_(divide_up(m_, 32) * 32),
        side_(divide_up(n_, 32) * 32),
        height_(side_ * (p.compute_uv ? 2 : 1)),
        q_(params_of<SvdPairsParams>(p)),
        regions_(regions_of(p)) {
    simdgroups_ = simdgroups_for(divide_up(n_, 2), caps);
    q_.side = int(side_);
    auto scratch = [&](const char* name, int64_t words) {
      regions_.add_scratch(name, 4 * p.batch * words);
    };
    for (const char* name : {"keys", "origin", "order", "fill"}) scratch(name, n_);
    scratch("exponent", 1);
    scratch("state", 2);
    scratch("f", 2 * n_ * rows_);
    scratch("f_reflectors", 5 * n_);
    scratch("g", 2 * n_ * side_);
    scratch("g_reflectors", 5 * n_);
    scratch("w", 2 * n_ * height_);
    scratch("work", 4 * n_);
    if (p.compute_uv) {
      scratch("left", 2 * u_cols_ * rows_);
      scratch("right", 2 * n_ * side_);
    }
  }

  int64_t scratch_bytes() const { return regions_.scratch_bytes(); }
  int64_t most_threadgroups() const { return p_.batch * divide_up(u_cols_ + n_, kBack); }
  // Floating-point operations on one matrix, of the least that a dispatch may have.
  double least_work() const { return std::max(column_work(), round_work()); }

  std::vector<Step> steps() {
    const int64_t bytes = 4 * simdgroups_;
    set(m_, rows_, side_);
    add("svd_pairs_load", 1, simdgroups_,
        {"a", "keys", "origin", "exponent", "status", "sweeps", "off_norm", "f"});
    add_pieces("svd_pairs_factor", n_, column_work(), {"f", "f_reflectors", "g", "status"});
    set(n_, side_, height_);
    add_pieces("svd_pairs_factor", n_, column_work(), {"g", "g_reflectors", "w", "status"});
    set(m_, rows_, height_);
    add_pieces("svd_pairs_turn", rounds_by_pairs(p_), round_work(),
               {"w", "state", "status", "sweeps", "off_norm"}, bytes);
    add("svd_pairs_finish", 1, simdgroups_,
        {"w", "keys", "order", "exponent", "status", "fill", "work", "s"}, bytes,
        8 * double(n_) * double(height_));
    if (p_.compute_uv) {
      add("svd_pairs_back", divide_up(u_cols_ + n_, kBack), kBack,
          {"f", "f_reflectors", "g", "g_reflectors", "w", "origin", "order", "status", "left",
           "right", "u", "vt"},
          0, double(u_cols_ + n_) * column_work());
    }
    return std::move(steps_);
  }

  static constexpr int64_t kBack = 8;  // columns of U that a threadgroup of svd_pairs_back makes

 private:
  // A complex multiplication and addition is eight operations.
  double column_work() const { return 16 * double(rows_) * double(n_); }
  double round_work() const {
    return double(divide_up(n_, 2)) * (16 * double(side_) + 32 * double(height_));
  }

  void set(int64_t m, int64_t rows, int64_t height) {
    q_.m = int(m);
    q_.rows = int(rows);
    q_.height = int(height);
  }

  // Cores without a threadgroup make it last as if they had one.
  double stretched(double work, int64_t groups) const {
    return double(p_.batch) * work * std::max(1.0, cores_ / double(p_.batch * groups));
  }

  // `count` pieces of so much work each, in as few dispatches as the device's watchdog allows.
  void add_pieces(const std::string& kernel, int64_t count, double each,
                  std::initializer_list<const char*> buffers, int64_t bytes = 0) {
    const int64_t most = most_at_once(limit_, stretched(each, 1), count);
    for (int64_t first = 0; first < count; first += most) {
      q_.first = int(first);
      q_.last = int(std::min(first + most, count));
      add(kernel, 1, simdgroups_, buffers, bytes, each * double(q_.last - q_.first));
    }
    q_.first = 0;
    q_.last = 0;
  }

  void add(const std::string& kernel, int64_t groups, int64_t simdgroups,
           std::initializer_list<const char*> buffers, int64_t bytes = 0, double work = 0) {
    Step s = make_step(kernel, p_.batch * groups, 32 * simdgroups, regions_.args(buffers), q_);
    s.work = stretched(work, groups);
    s.threadgroup_bytes = p_.threadgroup_argument(bytes);
    steps_.push_back(std::move(s));
  }

  const SvdProblem& p_;
  double cores_, limit_;
  int64_t m_, n_, u_cols_, rows_, side_, height_, simdgroups_ = 1;
  SvdPairsParams q_;
  Regions regions_;
  std::vector<Step> steps_;
};

// Bytes of device memory that matrices of a launch share, the next launch again. Enough of them for
// an H200 to be busy: 576 matrices of 128 columns, of which it has 264 at a time.
constexpr int64_t kMostScratch = int64_t{512} << 20;

// The launch, in as many pieces as the device's watchdog and kMostScratch ask for.
std::vector<Step> svd_steps(const SvdProblem& p, const KernelRow& row, const Caps& caps) {
  // Twelve sweeps, six operations an element and pair of columns; V as much again.
  const double columns = double(p.k()) * double(p.k());
  const double each = 12 * 6 * columns * double(p.compute_uv ? p.longest() + p.k() : p.longest());
  int64_t most = most_at_once(p.submission_work(caps), each, p.batch, row.matrices());
  if (row.twin) {
    const int64_t together = std::max<int64_t>(2 * caps.cores, 1);
    const int64_t all = kMostScratch / row.device_scratch_bytes();
    most = std::min(most, std::max<int64_t>(all > together ? all / together * together : all, 1));
  }
  std::vector<Step> steps;
  for (int64_t first = 0; first < p.batch; first += most) {
    SvdProblem part = p;
    part.batch = std::min(most, p.batch - first);
    for (Step& s : svd_launches(part, row)) {
      for (Step::Arg& a : s.args) {
        if (a.operand >= 0) a.offset = first * (a.bytes / part.batch);
      }
      s.work = each * double(part.batch);
      steps.push_back(std::move(s));
    }
  }
  return steps;
}

constexpr int64_t kTwinRegisters = 255;

// The row of "twin" for a problem that names no variant, where it was measured faster than others.
// On an H200, in float32:
// Up to 128 columns, 1024 matrices took 0.42 of block8's time at n = 64, 0.60 at 128, 0.71 at 96
// and 0.58 at 40; single ones 0.76 to 0.93 above 64. Up to 64 a single one took 1.1 to 1.4 of it,
// 264 1.0 to 1.1, 528 0.6 to 0.8. (Block16 took 1.24 of block8 at 64, 1.00 to 1.14 at 128.)
// Above, of grid's time: 0.82 for one and 0.31 for 100 matrices at n = 144; 1.06 for one, 1.00 for
// 8, 0.55 for 56 and 0.37 for 264 at 192. Grid's time falls with the columns: of 64 matrices 190x96
// it took 1.5 ms and of 140x64 0.64, where twin takes 1.9 and 1.4.
const KernelRow* twin_where_faster(const SvdProblem& p, const Caps& caps) {
  if (!p.variant.empty() || p.method == "block_jacobi") return nullptr;
  if (p.longest() <= 32 || caps.registers < kTwinRegisters) return nullptr;
  const KernelRow* twin = find_row("twin", p);
  if (twin == nullptr) return nullptr;
  const KernelRow* block = find_row("block8", p);
  if (block == nullptr) return p.k() > 96 ? twin : nullptr;
  const bool few = p.compute_uv && p.longest() <= 64 && p.batch <= 2 * caps.cores;
  // In 16 bits it has fewer sizes.
  return few || twin->n > block->n ? nullptr : twin;
}

// The same for "quarters", for more columns than "twin" has. On an H200, in float32, it took 0.85
// of grid's time for one matrix 256x256, 0.60 for 64 and 0.64 for 2000; 0.87 for one 193x193 and
// 0.59 for 64. Of matrices 300x160 1.08 and 0.85: grid's time falls with the columns, and its is
// the same for all.
const FusedRow* quarters_where_faster(const SvdProblem& p, const Caps& caps) {
  if (!p.variant.empty() || p.method == "block_jacobi") return nullptr;
  for (const FusedRow& r : fused_rows()) {
    if (r.quarters() && p.k() > 192 && p.k() <= r.n && caps.registers >= kTwinRegisters) return &r;
  }
  return nullptr;
}

// Pure: which kernel with which launch sizes on a device with these limits.
DevicePlan plan_svd_device(const SvdProblem& p, const Caps& caps) {
  DevicePlan plan;
  auto fail = [&](const char* argument, const std::string& expected, const std::string& got) {
    plan.error = not_on_device("svd", caps, argument, expected, got);
    return plan;
  };
  if (p.method != "auto" && p.method != "jacobi" && p.method != "block_jacobi") {
    return fail("method", "auto, jacobi or block_jacobi", p.method);
  }
  const DTypeRow& dtype = *dtype_row(p.dtype);
  if (dtype.is_double() && !caps.float64) return fail("a", kKernelDTypeNames, p.dtype);
  if (p.batch > INT_MAX) {
    return fail("a", "at most " + std::to_string(INT_MAX) + " matrices", std::to_string(p.batch));
  }
  std::string names;
  int64_t limit = 0;
  bool complex = false;
  for (const KernelRow& r : kernel_rows()) {
    if (r.storage != dtype.storage) continue;
    complex = r.complex;
    add_name(&names, r.variant);
    if (r.vectors != p.compute_uv) continue;
    const bool of_auto = p.variant.empty() && r.variant != "twin";
    if (of_auto || p.variant == r.variant) limit = std::max(limit, r.n);
  }
  const bool unnamed = p.variant.empty();
  // What serves any size; 64-bit types have rows in registers and nowhere else.
  const std::string any = dtype.is_double() ? "" : complex ? "pairs" : "grid";
  if (!any.empty()) add_name(&names, any);
  // By name alone: on an H200 fused took 4.1 of grid's time at 64x256x256, 5.7 at 1024x256x256, 10
  // at 132x512x512 and 17 at 132x1024x1024, fused16 4.3, 5.8 and 9.1 at the first three.
  const FusedRow* fused = nullptr;
  int64_t most_columns = 0;
  if (any == "grid") {
    for (const FusedRow& r : fused_rows()) {
      add_name(&names, r.variant);
      if (r.variant != p.variant) continue;
      most_columns = std::max(most_columns, r.n);
      if (r.n >= p.k() && (fused == nullptr || r.n < fused->n)) fused = &r;
    }
    if (unnamed) fused = quarters_where_faster(p, caps);
  }
  if (most_columns > 0 && fused == nullptr) {
    const std::string up_to = "min(m, n) up to " + std::to_string(most_columns);
    return fail("a", up_to + " for variant " + p.variant, p.size());
  }
  const KernelRow* twin = twin_where_faster(p, caps);
  const bool beyond =
      unnamed && twin == nullptr && (p.longest() > limit || p.method == "block_jacobi");
  if (beyond && any.empty()) {
    const std::string up_to = "m and n up to " + std::to_string(limit);
    return fail("a", up_to + " for " + p.dtype + " and method auto or jacobi",
                p.size() + ", method " + p.method);
  }
  if (beyond || fused != nullptr || (!unnamed && p.variant == any)) {
    const std::string why =
        !unnamed ? "asked for by name (JAXMETAL_VARIANT)"
        : p.method == "block_jacobi"
            ? "method=\"block_jacobi\" was asked for"
            : "max(m, n) = " + std::to_string(p.longest()) + " > " + std::to_string(limit);
    // The dispatches of as many matrices at a time as the watchdog allows.
    auto plan_with = [&](auto planner_for) {
      const auto whole = planner_for(p);
      if (whole.most_threadgroups() > INT_MAX) {
        return fail("a", "a smaller batch", std::to_string(p.batch) + " matrices of " + p.size());
      }
      const int64_t most = most_at_once(p.submission_work(caps), whole.least_work(), p.batch);
      for (int64_t first = 0; first < p.batch; first += most) {
        SvdProblem part = p;
        part.batch = std::min(most, p.batch - first);
        auto planner = planner_for(part);
        plan.scratch_bytes = std::max(plan.scratch_bytes, planner.scratch_bytes());
        for (Step& s : planner.steps()) {
          for (Step::Arg& a : s.args) {
            if (a.operand >= 0) a.offset = first * (a.bytes / part.batch);
          }
          plan.steps.push_back(std::move(s));
        }
      }
      if (Status bad = check_limits(plan, caps)) plan.error = "svd: " + *bad;
      return plan;
    };
    if (complex) {
      plan.variant = "pairs";
      plan.reason = why + ": QR twice, then Jacobi by pairs of columns, one threadgroup a matrix";
      auto planner_for = [&](const SvdProblem& part) { return PairsPlanner(part, caps); };
      return plan_with(planner_for);
    }
    auto planner_for = [&](const SvdProblem& part) { return GridPlanner(part, caps, fused); };
    plan.variant = fused != nullptr ? fused->variant : "grid";
    plan.reason = why + ": QR twice, then Jacobi by ";
    if (fused != nullptr && fused->quarters()) {
      plan.reason +=
          "pairs of columns, two threadgroups a matrix, which have its columns in "
          "registers; " +
          fused->name;
    } else if (fused != nullptr) {
      plan.reason += "pairs of columns, one threadgroup a matrix, lanes a pair: " +
                     std::to_string(fused->per_pair) + "; " + fused->name;
    } else {
      plan.reason += "blocks of columns, " + std::to_string(planner_for(p).slices()) +
                     " threadgroups for each two blocks of a matrix";
    }
    return plan_with(planner_for);
  }
  if (limit == 0) return fail("variant", "one of " + names, p.variant);
  if (twin == nullptr && p.longest() > limit) {
    const std::string of = p.variant.empty() ? "" : " for variant " + p.variant;
    return fail("a", "m and n up to " + std::to_string(limit) + of, p.size());
  }

  const std::string size = "max(m, n) = " + std::to_string(p.longest());
  std::string variant = p.variant;
  if (!variant.empty()) {
    plan.reason = "asked for by name (JAXMETAL_VARIANT)";
  } else if (dtype.is_double()) {
    variant = "xor";
    plan.reason = size + " <= 32: columns in registers, one a lane";
  } else if (p.longest() <= 32) {
    // xor moves two columns where ring moves one, and saves registers. On an H200, which shuffles
    // 32 lanes a clock, ring took 0.94 of xor's time at n = 16, 1.05 at 32 and 1.10 at 8; 0.85,
    // 0.94 and 1.01 for values only. Of complex64 0.99 at 16 and 1.10 at 8; 0.84, 0.83 and 1.06 for
    // values only. It has no row for vectors at n = 32.
    const bool shuffles = caps.shuffle_lanes >= 64;
    const bool ring = p.longest() > 8 && (p.longest() <= 16 || !p.compute_uv);
    // At 12 and 24, where xor's lanes and steps are those of 16 and 32: half of its instructions.
    const KernelRow* of_ring = find_row("ring", p);
    const bool between = of_ring != nullptr && of_ring->n < find_row("xor", p)->n;
    variant = between || (ring && !shuffles) ? "ring" : "xor";
    plan.reason =
        size + " <= 32: QR, then columns in registers, several matrices a simdgroup; " +
        (between                       ? "ring, which has a row for this size"
         : shuffles                    ? "xor where shuffles are cheap"
         : ring                        ? "ring where shuffles are dear"
         : complex && p.longest() > 16 ? "xor, as ring has no row for complex vectors at this size"
                                       : "xor was measured faster at this size");
  } else {
    variant = twin != nullptr ? "twin" : "block8";
    plan.reason = size + " > 32: one threadgroup a matrix";
    if (twin != nullptr) plan.reason += ", A in registers";
    if (twin != nullptr && p.compute_uv)
      plan.reason += "; its rotations are kept and turn the rows of U";
  }
  const KernelRow* row = find_row(variant, p);
  if (row == nullptr) return fail("variant", "a row for this problem", variant);
  plan.variant = row->variant;
  plan.reason += "; " + row->name + " within the limits of " + caps.name;
  plan.steps = svd_steps(p, *row, caps);
  // One piece after the other.
  for (const Step& s : plan.steps) {
    for (const Step::Arg& a : s.args) {
      if (a.operand < 0) plan.scratch_bytes = std::max(plan.scratch_bytes, a.offset + a.bytes);
    }
  }
  if (Status bad = check_limits(plan, caps)) plan.error = "svd: " + *bad;
  return plan;
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

std::string host_plan_json(const SvdProblem& p) {
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

constexpr Handler<SvdPlan> kHandler = {"svd", parse_problem, plan_svd_device};

std::string plan_json(const std::string& text) { return kHandler.plan_json(text, host_plan_json); }

// Pure: for a call that has come here, and so must be ours.
SvdPlan plan_native(const SvdProblem& p) {
  SvdPlan plan = plan_svd(p);
  if (plan.error.empty() && plan.variant->kernels == nullptr) {
    plan.error =
        wrong("variant", "a native row (interleaved, column or block)", plan.variant->name);
  }
  return plan;
}

ffi::ErrorOr<std::unique_ptr<SvdPlan>> instantiate(std::string_view config) {
  return kHandler.instantiate(config, plan_native);
}

ffi::Error check_shapes(const SvdProblem& p, const ffi::AnyBuffer& a, ffi::RemainingRets& rets,
                        int64_t* batch) {
  const DTypeRow& row = *dtype_row(p.dtype);
  ffi::AnyBuffer::Dimensions lead;
  ffi::Error e = check_matrices("svd", p, a, row.element, &lead, batch);
  if (e.failure()) return e;
  const size_t want = p.compute_uv ? 6 : 4;
  if (rets.size() != want) {
    return invalid("svd", "results", "", std::to_string(want), std::to_string(rets.size()));
  }
  size_t at = 0;
  auto next = [&](const char* name, ffi::DataType dtype, std::initializer_list<int64_t> tail) {
    return check_result("svd", name, rets, at++, dtype, lead, tail);
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
  const HandedOver handed_over;
  const SvdProblem& p = plan->problem;
  int64_t batch = 0;
  ffi::Error e = check_shapes(p, a, rets, &batch);
  if (e.failure()) return e;
  if (batch == 0) return ffi::Error::Success();
  if (plan->runner != nullptr) return kHandler.run(*plan, {batch, 1}, call_buffers(a, rets));

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

  // Whole vectors of matrices for the interleaved layout, single matrices otherwise.
  const VariantRow& row = *plan->variant;
  const int64_t grain = row.kernels == &SvdKernels::interleaved ? kernels().lanes(t.dtype) : 1;
  return SharedPool(pool).run("svd", kernels().*(row.kernels), t, row.parallel_inside, batch, grain,
                              "one " + p.size() + " " + p.dtype + " matrix");
}

// ---- the handler on the CUDA platform ----

ffi::Error instantiate_cuda(std::string_view config) { return kHandler.instantiate_cuda(config); }

ffi::Error execute_cuda(void* stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer a,
                        ffi::RemainingRets rets, std::string_view config) {
  const auto svd = kHandler.cuda(config);
  if (svd.error) return ffi::Error::InvalidArgument(*svd.error);
  int64_t batch = 0;
  ffi::Error e = check_shapes(svd.value->problem, a, rets, &batch);
  if (e.failure() || batch == 0) return e;
  return kHandler.enqueue(*svd.value, {batch, 1}, call_buffers(a, rets), stream, scratch);
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

XLA_FFI_DEFINE_HANDLER(kInstantiateCuda, instantiate_cuda,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("config"));
// Only launches, and the same ones each time: XLA may capture it into a graph.
XLA_FFI_DEFINE_HANDLER(kExecuteCuda, execute_cuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::ScratchAllocator>()
                           .Arg<ffi::AnyBuffer>()  // a
                           .RemainingRets()        // u, s, vh, status, sweeps, off_norm
                           .Attr<std::string_view>("config"),
                       {ffi::Traits::kCmdBufferCompatible});

ffi::TypeId SvdPlan::id = {};
const ffi::TypeInfo SvdPlan::info = ffi::MakeTypeInfo<SvdPlan>();

const RegisterOp kRegister({"svd", "jml_svd_v1", "cpu", "jml_svd_plan_v1", kInstantiate, kExecute,
                            &SvdPlan::id, &SvdPlan::info, plan_json});
const RegisterOp kRegisterCuda({"svd", "jml_svd_v1", "CUDA", nullptr, kInstantiateCuda,
                                kExecuteCuda, nullptr, nullptr, plan_json});

}  // namespace

DevicePlan plan_square_svd(int64_t batch, int64_t n, int64_t max_sweeps, const Caps& caps) {
  SvdProblem p;
  p.batch = batch;
  p.m = p.n = n;
  p.dtype = "float32";
  p.full_matrices = false;
  p.max_sweeps = max_sweeps;
  return plan_svd_device(p, caps);
}

}  // namespace jml
