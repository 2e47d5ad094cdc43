// The plan of a gemv on a device: which row of kernels/gemv.metal, and its launches.
#include <algorithm>
#include <climits>
#include <string>
#include <vector>

#include "csrc/gemv.h"
#include "csrc/plan.h"
#include "csrc/problem.h"

namespace jml {
namespace {

// GemvParams, the flags and the table of kernels.
#define JM_HOST
#include "kernels/gemv.metal"
#undef JM_HOST

// One row of GEMV_VARIANTS that multiplies. tools/msl/layout.py says the same; tests compare.
struct KernelRow {
  std::string name, variant, tag;  // gemv_rows_f16_m1, rows, f16
  bool transpose, split, shared;
  int64_t chunk;  // floats that a lane loads at once
  int64_t width, words, lanes, rows, simdgroups, vectors;
  int flags;

  int64_t threads() const { return 32 * simdgroups; }
  int64_t outputs() const {
    if (transpose) return 32 * chunk / width;
    return rows * (split ? 1 : 32 / lanes * simdgroups);
  }
  int64_t threadgroup_bytes() const {
    if (!split) return 0;
    if (!transpose) return 4 * simdgroups * rows * vectors * width;
    return 4 * simdgroups * 32 * vectors * (chunk + (shared ? width : 0));
  }
  // Whether rows of A of so many numbers are whole chunks.
  bool fits(int64_t length) const { return length * width % chunk == 0; }
  // What parts share out: chunks of a row, or rows.
  int64_t chunks(int64_t depth) const { return transpose ? depth : depth * width / chunk; }
};

const std::vector<KernelRow>& kernel_rows() {
  static const std::vector<KernelRow> rows = [] {
    struct Entry {
      const char *name, *function;
      int64_t kind, width, words, lanes, rows, simdgroups, vectors;
      int flags;
    };
#define JML_ROW(name, function, T, X, KIND, XKIND, W, WORDS, L, R, U, S, M, FLAGS) \
  {#name, #function, KIND, W, WORDS, L, R, S, M, FLAGS},
    constexpr Entry kTable[] = {GEMV_VARIANTS(JML_ROW)};
#undef JML_ROW
    std::vector<KernelRow> out;
    for (const Entry& e : kTable) {
      const std::string name = e.name, function = e.function;
      if (function == "gemv_finish" || function == "gemv_convert") continue;
      const size_t first = name.find('_') + 1, second = name.find('_', first) + 1;
      const bool transpose = function.find("columns") != std::string::npos;
      out.push_back({name, name.substr(first, second - 1 - first),
                     name.substr(second, name.rfind('_') - second), transpose,
                     function != "gemv_rows", function == "gemv_columns_shared",
                     GEMV_V(e.kind, e.width, e.words), e.width, e.words, e.lanes, e.rows,
                     e.simdgroups, e.vectors, e.flags});
    }
    return out;
  }();
  return rows;
}

int flags_of(const GemvProblem& p) {
  return (p.bias ? kGemvBias : 0) | (p.y ? kGemvAccumulate : 0) | (p.residual ? kGemvResidual : 0) |
         (p.activation != "none" ? kGemvActivation : 0);
}

// Vectors of a matrix that a kernel reads it once for; more are done so many at a time. On an H200
// 16 at once took 1.09 (float32: 1.59) of the time of 8 and 8, the second time from the cache.
int64_t most_vectors(const Caps& caps) { return caps.device == "cuda" ? 8 : 16; }
// Offsets inside of a matrix's row, and of 16 vectors, are ints in the kernels.
constexpr int64_t kLongest = 1 << 25;
constexpr int64_t kThreadsOfFinish = 256;

// Variants in the order of preference, and why.
struct Choice {
  std::vector<const char*> variants;
  std::string reason;
};

Choice choose(const GemvProblem& p, const Caps& caps, int64_t bytes) {
  const int64_t outputs = p.outputs();
  const int64_t lanes = divide_up(p.depth() * bytes, 16);  // that a row keeps busy, 16 bytes each
  if (p.transpose) {
    // At 16 bytes a lane a simdgroup reads 512 of a row: too many where rows are shorter.
    if (outputs * bytes >= 512) {
      return {{"wide", "pair", "column"},
              "columns of the stored matrix, 16 bytes a lane if they fit"};
    }
    return {{"pair", "column"}, "short rows of the stored matrix: at most 4 bytes a lane"};
  }
  if (lanes < 32) {
    return {{"tiny", "any"}, "short sums: several outputs a simdgroup"};
  }
  // On an H200, bfloat16: split took 0.87 of rows' time at 896x4864 and 0.97 at 8192x8192, but 1.30
  // at 896x896.
  if (lanes >= 512 || (lanes >= 256 && outputs < 32 * caps.cores)) {
    return {{"split", "anysplit", "rows", "any"}, "long sums: simdgroups share them"};
  }
  return {{"rows", "any"}, "an output or more a simdgroup"};
}

// Reading is what takes the time. An Apple core gets some 8 GB/s where csrc/caps.cc counts on 60
// GFLOP/s of it, so a byte counts as 8 operations.
double work_of_matrix(const GemvProblem& p, int64_t element_bytes, int64_t vectors) {
  return 8 * double(p.m) * double(p.n) * double(element_bytes) * double(divide_up(p.nrhs, vectors));
}

// All at once, however much it is; `vectors_a_read` gets the vectors of the row that it picks.
DevicePlan plan_at_once(const GemvProblem& p, const Caps& caps, int64_t* vectors_a_read) {
  DevicePlan plan;
  auto fail = [&](const char* argument, const std::string& expected, const std::string& got) {
    plan.error = not_on_device("gemv", caps, argument, expected, got);
    return plan;
  };
  const DTypeRow *sa = dtype_row(p.a_dtype), *sx = dtype_row(p.x_dtype),
                 *so = dtype_row(p.out_dtype);
  if (sa->is_double()) return fail("a", kKernelDTypeNames, p.a_dtype);
  if (sx->is_double()) return fail("x", kKernelDTypeNames, p.x_dtype);
  if (so->is_double()) return fail("out", kKernelDTypeNames, p.out_dtype);
  const std::string tag = p.a_dtype == p.out_dtype ? sa->tag() : sa->tag() + so->tag();
  const int64_t width = p.out_dtype == "complex64" ? 2 : 1;
  if (p.longest() > kLongest) {
    return fail("a", "m and n up to " + std::to_string(kLongest), p.size());
  }

  std::string names;
  bool known = false, served = false;
  for (const KernelRow& r : kernel_rows()) {
    if (r.transpose == p.transpose) add_name(&names, r.variant);
    known = known || (r.variant == p.variant && r.transpose == p.transpose);
    served = served || r.tag == tag;
  }
  if (!served) return fail("a", "a dtype that x does not widen to complex numbers", p.a_dtype);
  if (!p.variant.empty() && !known) return fail("variant", "one of " + names, p.variant);

  const int asked = flags_of(p);
  const int64_t wanted = std::min(p.nrhs, most_vectors(caps));
  Choice choice{{p.variant.c_str()}, "asked for by name (JAXMETAL_VARIANT)"};
  if (p.variant.empty()) choice = choose(p, caps, sa->bytes);
  // Rows of short sums must keep their lanes busy, unless asked for by name.
  const bool small_k =
      p.variant.empty() && !p.transpose && divide_up(p.depth() * sa->bytes, 16) < 32;
  const int needed = asked | (small_k ? kGemvSmallK : 0);
  const KernelRow* row = nullptr;
  for (const char* variant : choice.variants) {
    const KernelRow* largest = nullptr;
    for (const KernelRow& r : kernel_rows()) {
      if (r.variant != variant || r.tag != tag || r.transpose != p.transpose) continue;
      if ((r.flags & needed) != needed || !r.fits(p.n)) continue;
      if (p.variant.empty() && (r.flags & kGemvOff) != 0) continue;
      if (r.threads() > caps.max_threads_per_threadgroup ||
          r.threadgroup_bytes() > caps.max_threadgroup_bytes)
        continue;
      if (r.vectors >= wanted && (row == nullptr || r.vectors < row->vectors)) row = &r;
      if (largest == nullptr || r.vectors > largest->vectors) largest = &r;
    }
    if (row == nullptr && !p.variant.empty()) row = largest;
    if (row != nullptr) break;
  }
  if (row == nullptr) {
    return fail("variant", "a row that reads " + p.a_dtype + " rows of " + std::to_string(p.n),
                p.variant);
  }

  GemvParams q{};
  q.a_batch = p.m * p.n * width;
  q.batch = int(p.batch);
  q.outputs = int(p.outputs());
  q.depth = int(p.depth());
  q.stride = int(p.n * width);
  q.nrhs = int(p.nrhs);
  q.rhs_groups = int(divide_up(p.nrhs, row->vectors));
  *vectors_a_read = row->vectors;
  q.blocks = int(divide_up(p.outputs(), row->outputs()));
  // Threadgroups share a sum until there are four for each core, but each takes whole rounds of
  // all its lanes. Neither batch nor vectors count, so that they do not change the sums.
  const int64_t chunks = row->chunks(p.depth()), round = 32 * row->simdgroups;
  int64_t part = chunks, parts = 1;
  if (row->split) {
    parts = std::min(divide_up(chunks, round), std::max<int64_t>(1, 4 * caps.cores / q.blocks));
    part = divide_up(divide_up(chunks, round), parts) * round;
    parts = divide_up(chunks, part);
  }
  q.parts = int(parts);
  q.part = int(part);
  q.flags = asked & ~kGemvActivation;
  q.activation = int(std::find(std::begin(kActivations), std::end(kActivations), p.activation) -
                     std::begin(kActivations));
  q.alpha_re = float(p.alpha_re);
  q.alpha_im = float(p.alpha_im);
  q.beta_re = float(p.beta_re);
  q.beta_im = float(p.beta_im);
  q.conjugate = p.conjugate ? -1.0f : 1.0f;

  const int64_t groups = p.batch * q.rhs_groups * parts * q.blocks;
  const int64_t results = p.batch * p.nrhs * p.outputs(), terms = p.batch * p.nrhs * p.depth();
  if (p.batch > INT_MAX || p.nrhs > INT_MAX || groups > INT_MAX || results / 32 > INT_MAX ||
      terms > INT_MAX) {
    return fail("a", "at most " + std::to_string(INT_MAX) + " threadgroups and numbers in x",
                std::to_string(groups) + " and " + std::to_string(terms));
  }

  // Scratch: x in the type of the result, if it has another, then the sums of the parts.
  const bool convert = p.x_dtype != p.out_dtype;
  const int64_t x_bytes = terms * so->bytes;
  const int64_t partial_at = convert ? divide_up(x_bytes, 256) * 256 : 0;
  const int64_t partial_bytes = parts > 1 ? results * parts * width * 4 : 16;
  plan.scratch_bytes = row->split ? partial_at + partial_bytes : (convert ? x_bytes : 0);
  const int64_t out_bytes = results * so->bytes;
  int operand = 2;
  const int y = p.y ? operand++ : -1, bias = p.bias ? operand++ : -1;
  const int residual = p.residual ? operand++ : -1;
  const int out = operand;
  const Step::Arg x = convert ? Step::Arg{1, -1, 0, x_bytes} : Step::Arg{1, 1, 0, x_bytes};
  // What a call does not have is not read, but something must be bound.
  auto end = [&](int index, int which) {
    if (which >= 0) return Step::Arg{index, which, 0, out_bytes};
    return Step::Arg{index, x.operand, 0, x_bytes};
  };
  auto add = [&](const std::string& kernel, int64_t grid, int64_t threads,
                 std::vector<Step::Arg> args, const GemvParams& params) -> Step& {
    plan.steps.push_back(make_step(kernel, grid, threads, std::move(args), params));
    return plan.steps.back();
  };

  if (convert) {
    GemvParams c{};
    c.outputs = int(terms);
    add("gemv_convert_" + sx->tag() + so->tag(), divide_up(terms, kThreadsOfFinish),
        kThreadsOfFinish, {{0, 1, 0, terms * sx->bytes}, {1, -1, 0, x_bytes}}, c);
  }
  std::vector<Step::Arg> args = {{0, 0, 0, p.batch * p.m * p.n * sa->bytes}, x};
  args.insert(args.end(), {end(2, y), end(3, bias), end(4, residual), {5, out, 0, out_bytes}});
  if (row->split) args.push_back({6, -1, partial_at, partial_bytes});
  Step& main = add(row->name, groups, row->threads(), args, q);
  main.work = double(p.batch) * work_of_matrix(p, sa->bytes, row->vectors);
  main.threadgroup_bytes = p.threadgroup_argument(row->threadgroup_bytes());
  main.ahead = std::min<int64_t>(args[0].bytes, kGemvAhead);
  if (parts > 1) {
    add("gemv_finish_" + so->tag(), divide_up(results, kThreadsOfFinish), kThreadsOfFinish,
        {end(0, y),
         end(1, bias),
         end(2, residual),
         {3, out, 0, out_bytes},
         {4, -1, partial_at, partial_bytes}},
        q);
  }
  plan.variant = row->variant;
  plan.reason = choice.reason + "; " + row->name + " within the limits of " + caps.name;
  if (p.nrhs > 1) {
    plan.reason += ", " + std::to_string(std::min(p.nrhs, row->vectors)) + " vectors a read";
  }
  if (parts > 1) plan.reason += ", each sum in " + std::to_string(parts) + " parts";
  if (Status bad = check_limits(plan, caps)) plan.error = "gemv: " + *bad;
  return plan;
}

}  // namespace

DevicePlan plan_gemv_device(const GemvProblem& p, const Caps& caps) {
  int64_t vectors = 1;
  DevicePlan plan = plan_at_once(p, caps, &vectors);
  const double limit = p.submission_work(caps);
  if (!plan.error.empty() || limit <= 0) return plan;
  // In pieces that the device's watchdog lets pass: of the batch, or of one matrix's vectors.
  const double each = work_of_matrix(p, dtype_row(p.a_dtype)->bytes, vectors);
  const bool by_matrix = p.batch > 1;
  const int64_t whole = by_matrix ? p.batch : p.nrhs, together = by_matrix ? 1 : vectors;
  const double unit = by_matrix ? each : each / double(divide_up(p.nrhs, vectors));
  const int64_t most =
      together * std::max<int64_t>(1, int64_t(std::min(limit / unit, double(INT_MAX))));
  if (most >= whole) return plan;
  DevicePlan pieces = plan;
  pieces.steps.clear();
  for (int64_t first = 0; first < whole; first += most) {
    GemvProblem part = p;
    const int64_t count = std::min(most, whole - first);
    (by_matrix ? part.batch : part.nrhs) = count;
    // Fewer vectors might be given to another row, with other sums.
    if (!by_matrix && count < most) part.variant = plan.variant;
    DevicePlan piece = plan_at_once(part, caps, &vectors);
    pieces.scratch_bytes = std::max(pieces.scratch_bytes, piece.scratch_bytes);
    for (Step& s : piece.steps) {
      for (Step::Arg& a : s.args) {
        if (a.operand > 0 || (a.operand == 0 && by_matrix)) a.offset = first * (a.bytes / count);
      }
      pieces.steps.push_back(std::move(s));
    }
  }
  return pieces;
}

}  // namespace jml
