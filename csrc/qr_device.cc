// The plan of a qr on a device: which rows of kernels/qr.metal, and their launches.
#include <algorithm>
#include <climits>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/plan.h"
#include "csrc/problem.h"
#include "csrc/qr.h"

namespace jml {
namespace {

// The parameters and the tables of kernels.
#define JM_HOST
#include "kernels/qr.metal"
#undef JM_HOST

// One row of QR_SMALL_VARIANTS. tools/msl/layout.py says the same of all rows; tests compare.
struct SmallRow {
  const char *name, *function, *storage;
  int64_t width, n, simdgroups;

  bool with_q() const { return std::strcmp(function, "qr_small_q") == 0; }
  int64_t matrices() const { return simdgroups * 32 / n; }
  int64_t threadgroup_bytes() const { return with_q() ? 4 * matrices() * width * n * (n + 1) : 0; }
};
#define JML_ROW(name, function, T, W, N, S) {#name, #function, #T, W, N, S},
constexpr SmallRow kSmall[] = {QR_SMALL_VARIANTS(JML_ROW)};
#undef JML_ROW

// One row of QR_TSQR_VARIANTS; that of the same lanes which applies has the same blocks.
struct TsqrRow {
  const char *name, *function;
  int64_t width, lanes, block, simdgroups;

  int64_t workers() const { return 32 / lanes * simdgroups; }  // a threadgroup
};
#define JML_ROW(name, function, W, L, B, S) {#name, #function, W, L, B, S},
constexpr TsqrRow kTsqr[] = {QR_TSQR_VARIANTS(JML_ROW)};
#undef JML_ROW

// Floats a number.
int64_t width_of(const QrProblem& p) { return p.dtype == "complex64" ? 2 : 1; }
const char* storage_of(const QrProblem& p) {
  return width_of(p) == 2 ? "float" : dtype_row(p.dtype)->storage;
}

const TsqrRow& tsqr_row(const char* function, int64_t width, int64_t n) {
  const TsqrRow* best = nullptr;
  for (const TsqrRow& r : kTsqr) {
    if (std::strcmp(r.function, function) != 0 || r.width != width) continue;
    const bool fits = best != nullptr && best->lanes >= n;
    if (best == nullptr || (fits ? r.lanes >= n && r.lanes < best->lanes : r.lanes > best->lanes)) {
      best = &r;
    }
  }
  return *best;
}

const SmallRow* small_row(const QrProblem& p) {
  const std::string storage = storage_of(p);
  for (const SmallRow& r : kSmall) {  // smallest first
    if (r.storage == storage && r.width == width_of(p) && r.with_q() == p.want_q() &&
        r.n >= p.longest()) {
      return &r;
    }
  }
  return nullptr;
}

Step small_step(const QrProblem& p, const SmallRow& row) {
  QrParams q{};
  q.batch = int(p.batch);
  q.m = int(p.m);
  q.n = int(p.n);
  q.q_cols = int(p.kq());
  const int64_t element = p.batch * dtype_row(p.dtype)->bytes;
  std::vector<Step::Arg> args = {{0, 0, 0, element * p.m * p.n}};
  if (p.want_q()) args.push_back({1, 1, 0, element * p.m * p.kq()});
  const int last = int(args.size());
  args.push_back({last, last, 0, element * p.kq() * p.n});
  Step s = make_step(row.name, divide_up(p.batch, row.matrices()), 32 * row.simdgroups,
                     std::move(args), q);
  s.threadgroup_bytes = p.threadgroup_argument(row.threadgroup_bytes());
  s.work = 8.0 * double(p.batch * row.width * row.width * row.n * row.n * row.n);
  return s;
}

// The dispatches of "tsqr" (head of kernels/qr.metal), for any size; tools/msl/layout.py says the
// same, and tests hold one against the other.
class TsqrPlanner {
 public:
  TsqrPlanner(const QrProblem& p, const Caps& caps)
      : p_(p),
        width_(width_of(p)),
        factor_(tsqr_row("qr_tsqr_factor", width_, p.n)),
        apply_(tsqr_row("qr_tsqr_apply", width_, p.n)),
        lanes_(factor_.lanes),
        half_(std::strcmp(storage_of(p), "float") != 0),
        parts_(std::min<int64_t>(divide_up(p.m, 1024), 1024)) {
    // A wave of pieces for the whole device, of four blocks at least. The batch does not count, so
    // that it does not change the sums.
    const int64_t cores = caps.cores > 0 ? caps.cores : kCores;
    const int64_t share = p.m / (16 * cores * (32 / lanes_));
    const int64_t blocks = std::max<int64_t>(4, divide_up(share - lanes_, factor_.block));
    piece_ = lanes_ + factor_.block * blocks;
    fan_ = 1 + 2 * factor_.block / lanes_;
    q_ = {};
    q_.batch = int(p.batch);
    q_.m = int(p.m);
    q_.n = int(p.n);
    q_.q_cols = int(p.kq());
    q_.parts = int(parts_);
    lay_out();
  }

  // Of any dispatch, or more.
  int64_t most_threadgroups() const {
    const int64_t columns = divide_up(std::max(p_.n, p_.kq()), 4);
    return p_.batch * (divide_up(p_.m, 4) * columns + parts_ * columns);
  }
  int64_t scratch_bytes() const { return regions_.scratch_bytes(); }
  static constexpr int64_t kCores = 64;  // of a GPU that has not said
  int64_t lanes() const { return lanes_; }
  int64_t piece() const { return piece_; }

  std::vector<Step> steps() {
    const int64_t m = p_.m, n = p_.n, kq = p_.kq();
    q_.width = int(lanes_);
    add(typed("qr_tsqr_scan"), p_.batch * parts_ * divide_up(n, lanes_), 256, {"a", "largest"},
        1024);
    q_.width = 0;
    add("qr_tsqr_scale", p_.batch, 256, {"largest", "exponent", "status"}, 1024);
    add(typed("qr_tsqr_load"), p_.batch * divide_up(m * n, 1024), 256,
        {"a", "exponent", "status", "f"});
    for (int64_t base = 0; base < p_.k(); base += lanes_) {
      const std::vector<QrTsqrParams> tree = levels(base);
      for (const QrTsqrParams& level : tree) {
        q_ = level;
        q_.chunks = 1;
        add(factor_.name, divide_up(p_.batch * q_.pieces, factor_.workers()),
            32 * factor_.simdgroups, {"f"},
            4 * width_ * factor_.workers() * (lanes_ * lanes_ + 2 * (factor_.block + 4)));
      }
      if (base + lanes_ < n) {
        for (const QrTsqrParams& level : tree) apply(level, "f", n, base + lanes_, false);
      }
    }
    q_ = plain();
    add(typed("qr_tsqr_triangle"), p_.batch * divide_up(kq * n, 1024), 256,
        {"f", "exponent", "status", "r"});
    if (!p_.want_q()) return std::move(steps_);
    const char* q = half_ ? "y" : "q";
    const int64_t every = p_.batch * divide_up(m * kq, 1024);
    add(typed("qr_tsqr_start", "float"), every, 256, {"f", "status", q});
    for (int64_t base = (p_.k() - 1) / lanes_ * lanes_; base >= 0; base -= lanes_) {
      const std::vector<QrTsqrParams> tree = levels(base);
      for (auto level = tree.rbegin(); level != tree.rend(); ++level) {
        apply(*level, q, kq, base, true);
      }
    }
    q_ = plain();
    if (half_) add(typed("qr_tsqr_store"), every, 256, {"y", "q"});
    return std::move(steps_);
  }

 private:
  std::string typed(const char* function) const { return typed(function, storage_of(p_)); }
  std::string typed(const char* function, const char* storage) const {
#define JML_ROW(name, function, T, W) {#name, #function, #T "x" #W},
    constexpr StorageRow kTable[] = {QR_TSQR_STORAGE(JML_ROW)};
#undef JML_ROW
    return kernel_for(kTable, function, std::string(storage) + "x" + std::to_string(width_));
  }

  void lay_out() {
    const int64_t element = dtype_row(p_.dtype)->bytes, m = p_.m, n = p_.n, kq = p_.kq();
    auto call = [&](const char* name, int64_t numbers) {
      regions_.add_operand(name, p_.batch * numbers * element);
    };
    call("a", m * n);
    if (p_.want_q()) call("q", m * kq);
    call("r", kq * n);
    auto scratch = [&](const char* name, int64_t words) {
      regions_.add_scratch(name, 4 * p_.batch * words);
    };
    scratch("largest", parts_ * n);
    scratch("exponent", n);
    scratch("status", 1);
    scratch("f", width_ * m * n);
    if (p_.want_q() && half_) scratch("y", m * kq);
  }

  QrTsqrParams plain() const {
    QrTsqrParams q{};
    q.batch = q_.batch;
    q.m = q_.m;
    q.n = q_.n;
    q.q_cols = q_.q_cols;
    q.parts = q_.parts;
    return q;
  }

  // The levels of the panel that begins at row and column `base`.
  std::vector<QrTsqrParams> levels(int64_t base) const {
    std::vector<QrTsqrParams> out;
    const int64_t width = std::min(lanes_, p_.n - base);
    int64_t rows = p_.m - base, piece = piece_, spacing = lanes_;
    for (;;) {
      // Rows that are too few for a piece go to the last one.
      const int64_t pieces = std::max<int64_t>(1, rows / piece + (rows % piece >= lanes_ ? 1 : 0));
      const int64_t longest = std::max(std::min(rows, piece), rows - (pieces - 1) * piece);
      QrTsqrParams q = plain();
      q.base = int(base);
      q.width = int(width);
      q.reflectors = int(std::min(width, p_.m - base));
      q.level = int(out.size());
      q.spacing = int(spacing);
      q.rows = int(rows);
      q.piece = int(piece);
      q.pieces = int(pieces);
      q.blocks = int(divide_up(std::max<int64_t>(longest - lanes_, 0), factor_.block));
      out.push_back(q);
      if (pieces == 1) return out;
      spacing = out.size() == 1 ? piece_ : spacing * fan_;
      rows = pieces * lanes_;
      piece = fan_ * lanes_;
    }
  }

  void apply(const QrTsqrParams& level, const char* target, int64_t columns, int64_t first,
             bool reverse) {
    q_ = level;
    q_.columns = int(columns);
    q_.first = int(first);
    q_.chunks = int(divide_up(columns - first, lanes_));
    q_.reverse = reverse ? 1 : 0;
    add(apply_.name, divide_up(p_.batch * q_.pieces * q_.chunks, apply_.workers()),
        32 * apply_.simdgroups, {"f", target, "status"},
        4 * width_ * apply_.workers() * lanes_ * (lanes_ + apply_.block + 4));
  }

  void add(const std::string& kernel, int64_t groups, int64_t threads,
           std::initializer_list<const char*> buffers, int64_t bytes = 0) {
    Step s = make_step(kernel, groups, threads, regions_.args(buffers), q_);
    s.threadgroup_bytes = p_.threadgroup_argument(bytes);
    s.work = 4.0 * double(width_ * width_ * p_.batch) * double(q_.rows) * double(lanes_) *
             double(q_.chunks > 1 ? q_.chunks * lanes_ : lanes_);
    steps_.push_back(std::move(s));
  }

  const QrProblem& p_;
  int64_t width_;
  const TsqrRow &factor_, &apply_;
  int64_t lanes_;
  bool half_;
  int64_t parts_, piece_ = 0, fan_ = 0;
  QrTsqrParams q_;
  Regions regions_;
  std::vector<Step> steps_;
};

}  // namespace

DevicePlan plan_qr_device(const QrProblem& p, const Caps& caps) {
  DevicePlan plan;
  auto fail = [&](const char* argument, const std::string& expected, const std::string& got) {
    plan.error = not_on_device("qr", caps, argument, expected, got);
    return plan;
  };
  if (p.method != "auto" && p.method != "householder" && p.method != "tsqr") {
    return fail("method", "auto, householder or tsqr", p.method);
  }
  if (p.method == "tsqr" && (p.m < p.n || (p.mode == "complete" && p.m != p.n))) {
    return fail("method", "one that serves mode " + p.mode + " at " + p.size(),
                "tsqr, which needs m >= n and gives reduced factors");
  }
  if (dtype_row(p.dtype)->is_double()) {
    return fail("a", kKernelDTypeNames, p.dtype);
  }
  if (!p.variant.empty() && p.variant != "small" && p.variant != "tsqr") {
    return fail("variant", "one of small, tsqr", p.variant);
  }
  const SmallRow* small = small_row(p);
  if (small == nullptr && p.variant == "small") {
    return fail("a", "m and n up to 32 for row small", p.size());
  }
  const bool tree = p.variant == "tsqr" || (p.variant.empty() && p.method == "tsqr");
  if (p.batch > INT_MAX || p.m * std::max(p.n, p.kq()) > INT_MAX) {
    return fail("a", "at most " + std::to_string(INT_MAX) + " matrices and numbers in one",
                std::to_string(p.batch) + " of " + p.size());
  }
  const std::string asked = !p.variant.empty() ? "asked for by name (JAXMETAL_VARIANT)"
                            : tree             ? "method=\"tsqr\" was asked for"
                                               : "";
  if (small != nullptr && !tree) {
    plan.variant = "small";
    plan.reason = (asked.empty() ? "m and n <= 32: a column a lane" : asked) + "; " + small->name;
    plan.steps = {small_step(p, *small)};
  } else {
    TsqrPlanner planner(p, caps);
    if (planner.most_threadgroups() > INT_MAX) {
      return fail("a", "a smaller batch", std::to_string(p.batch) + " of " + p.size());
    }
    plan.variant = "tsqr";
    plan.scratch_bytes = planner.scratch_bytes();
    plan.steps = planner.steps();
    plan.reason = (asked.empty() ? "max(m, n) > 32" : asked) + ": panels of " +
                  std::to_string(planner.lanes()) + " columns, rows in pieces of " +
                  std::to_string(planner.piece());
  }
  // Unlike svd's, these launches are not cut for the watchdog.
  for (const Step& s : plan.steps) {
    if (caps.max_submission_work > 0 && s.work > caps.max_submission_work) {
      return fail("a", "work that one launch does before the GPU's watchdog ends it",
                  std::to_string(p.batch) + " of " + p.size());
    }
  }
  plan.reason += " within the limits of " + caps.name;
  if (Status bad = check_limits(plan, caps)) plan.error = "qr: " + *bad;
  return plan;
}

}  // namespace jml
