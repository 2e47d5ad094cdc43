// jml_rsvd_v1: check -> plan (a pure function) -> kernels/rsvd.metal on a device, and
// kernels/svd.metal for the small matrix. The host has no kernels of its own: there, and for what
// no kernel serves, rsvd is a composite of other primitives (primitives/rsvd.py).
//
// Custom call: a [batch..., m, n], omega [batch..., min(m, n), q] -> u [batch..., m, q],
// s [batch..., q], v [batch..., n, q]. The one attribute `config` is the flat JSON that the plan
// takes.
#include <algorithm>
#include <climits>
#include <cmath>
#include <string>
#include <vector>

#include "csrc/handler.h"
#include "csrc/registry.h"
#include "csrc/svd.h"

namespace jml {
namespace {

// The parameters and the tables of kernels.
#define JM_HOST
#include "kernels/gemm.metal"
#include "kernels/rsvd.metal"
#undef JM_HOST

// ---- the problem ----

// Whose products with A: our kernels', or the device's library's.
constexpr const char* kKernels = "cholesky";
constexpr const char* kLibrary = "library";

// Everything but a is float32.
struct RsvdProblem : MatrixProblem {
  std::string dtype, normalizer;
  int64_t q = 0;  // columns of the sketch, k and n_oversamples
  int64_t n_iter = 0;
  bool center = false;
  bool library = false;    // products with A are the device's library's
  int64_t max_sweeps = 0;  // of the small svd: jaxmetal_linalg/hardware_params.json

  bool by_library() const { return library || variant == kLibrary; }
};

std::string wrong(const char* argument, const std::string& expected, const std::string& got) {
  return jml::wrong("rsvd", argument, expected, got);
}

// Empty on success, else the error.
std::string parse_problem(const std::string& text, RsvdProblem* out) {
  const std::vector<Field> fields = {
      {"batch", &out->batch, 1}, {"m", &out->m, 1},
      {"n", &out->n, 1},         {"q", &out->q, 1},
      {"n_iter", &out->n_iter},  {"normalizer", &out->normalizer},
      {"center", &out->center},  {"max_sweeps", &out->max_sweeps},
      {"dtype", &out->dtype},    {"variant", &out->variant},
      {"device", &out->device},  {"library", &out->library, 0, true}};
  const std::string error = read_problem("rsvd", text, fields, {}, device_fields(out, false));
  if (!error.empty()) return error;
  if (dtype_row(out->dtype) == nullptr) return wrong("a", kDTypeNames, out->dtype);
  if (out->q > out->k()) {
    return wrong("q", "at most min(m, n) = " + std::to_string(out->k()), std::to_string(out->q));
  }
  return check_caps("rsvd", *out);
}

// ---- the plan ----

constexpr int64_t kMostColumns = 128;
constexpr int64_t kTileRows = 128, kLowTileRows = 32, kTileDepth = 16;
// Terms that a library sums at once. Tensor cores cut off what an addition does not hold, so the
// error of a sum grows with its length: 2^-25 for each 16 terms, of those of one sign. Only the
// product that the result comes from has to be as good as one of float32.
constexpr int64_t kLibraryLeast = 1024, kLibraryMost = 4096, kResultTerms = 256;
constexpr int64_t kWorkspace = int64_t{32} << 20;  // bytes; what cuBLAS asks for on sm_90
// As a basis of a result: no panel of the tests took more than five.
constexpr int64_t kMostRounds = 8;

// The dispatches (head of kernels/rsvd.metal).
class Planner {
 public:
  Planner(const RsvdProblem& p, const Caps& caps)
      : p_(p),
        caps_(caps),
        cores_(caps.cores > 0 ? caps.cores : 64),  // of a GPU that has not said
        wide_(p.m < p.n),
        long_(p.longest()),
        short_(p.k()),
        width_(p.q <= 32 ? 32 : (p.q <= 64 ? 64 : 128)),
        scan_parts_(std::clamp<int64_t>(p.m * p.n / 16384, 1, 4 * cores_)),
        library_(p.by_library()),
        split_(library_ && p.dtype == "float32"),
        pieces_(p.dtype == "bfloat16" ? 3 : 2),
        pitch_(split_ ? divide_up(p.n, 8) * 8 : p.n),
        small_(plan_square_svd(p.batch, p.q, p.max_sweeps, caps)) {
    lay_out();
  }

  int64_t scratch_bytes() const { return regions_.scratch_bytes(); }
  const std::string& small_reason() const { return small_.reason; }
  const std::string& small_error() const { return small_.error; }
  // Of any dispatch, or more.
  double most_threadgroups() const {
    const double tiles = double(divide_up(long_, kTileRows)) + 2 * double(cores_);
    return double(p_.batch) *
           std::max({tiles, double(scan_parts_), double(divide_up(long_ * panel_pitch(), 256)),
                     library_ ? double(p_.m) * double(divide_up(pitch_, 1024)) : 0.0});
  }

  std::vector<Step> steps() {
    scan();
    if (p_.center) mean();
    const double shift = 4 * double(p_.q) * kUlp;
    forward("omega");
    if (p_.n_iter > 0) {
      basis("y", "y2", long_, shift);
      backward();
      basis("z", "x", short_, shift);
      for (int64_t j = 1; j < p_.n_iter; ++j) {
        forward("x");
        basis("y", "y2", long_, shift);
        backward();
        if (p_.normalizer == "auto") {
          bound(j);
          // z -= root bound^2 x r^-1: the product with A^T A - root bound^2 I.
          RsvdParams q = plain(short_, p_.q, p_.q);
          q.flags = RSVD_COEFFICIENT | RSVD_ACCUMULATE;
          product("x", strides(p_.q, 1), "inverse", strides(p_.q, 1), "z", q);
        }
        basis("z", "x", short_, shift);
      }
      forward("x");
    }
    result_basis("y", "y2", long_, shift);
    backward(true);
    result_basis("z", "x", short_, shift);
    // A = y2 z^T on the subspace, and z = x (x^T z): what is left is z^T x.
    product("z", strides(1, p_.q), "x", strides(p_.q, 1), "core", plain(p_.q, p_.q, short_));
    RsvdParams q = plain(p_.q, p_.q, p_.q);
    q.noise = float(8 * kUlp);
    add("rsvd_triangle", p_.batch, 512, {"core"}, q, 4 * 18 * 128);
    small();
    const char* names[2] = {wide_ ? "v" : "u", wide_ ? "u" : "v"};
    q = plain(long_, p_.q, p_.q);
    q.flags = RSVD_RESULT;
    product("y2", strides(p_.q, 1), "us", strides(p_.q, 1), names[0], q);
    q.rows = int(short_);
    product("x", strides(p_.q, 1), "vt", strides(1, p_.q), names[1], q);
    q = plain(1, p_.q, 1);
    add("rsvd_values", p_.batch, 128, {"sigma", "exponent", "status", "s"}, q);
    return std::move(steps_);
  }

 private:
  static constexpr double kUlp = 0x1p-23;

  struct Strides {
    int64_t row, col;
  };
  static Strides strides(int64_t row, int64_t col) { return {row, col}; }

  RsvdParams plain(int64_t rows, int64_t columns, int64_t depth) const {
    RsvdParams q{};
    q.batch = int(p_.batch);
    q.rows = int(rows);
    q.columns = int(columns);
    q.depth = int(depth);
    q.parts = 1;
    q.alpha = 1;
    return q;
  }

  // How many threadgroups share the sums of a product, so that the device has two a core. The batch
  // does not count, so that it does not change the sums.
  int64_t parts(int64_t rows, int64_t depth) const {
    const int64_t tiles = divide_up(rows, kTileRows);
    return std::clamp<int64_t>(2 * cores_ / tiles, 1, std::max<int64_t>(depth / 128, 1));
  }

  // Of a panel's pieces; a multiple of 8, as tensor cores read them.
  int64_t panel_pitch() const { return pieces_ * divide_up(p_.q, 8) * 8; }

  // How a library forms a product: `parts` sums of so many terms at once, to which the next are
  // added. Several parts keep the device busy; several matrices do so too.
  struct Sums {
    int64_t terms, parts;
  };
  Sums library_sums(int64_t rows, int64_t depth, bool result) const {
    const int64_t tiles = divide_up(rows, kTileRows) * divide_up(panel_pitch(), kTileRows);
    const int64_t busy = p_.batch > 1 ? 1 : divide_up(4 * cores_, tiles);
    // A remainder is a call of its own, so parts of the same length are worth some less or more of
    // them; they begin at multiples of 16 bytes.
    for (int64_t step = 0; !result && step <= busy; ++step) {
      for (const int64_t n : {busy - step, busy + step}) {
        if (2 * n < busy || n < 1 || depth % (8 * n) != 0) continue;
        const int64_t terms = depth / n;
        if (terms >= kLibraryLeast && terms <= kLibraryMost) return {terms, n};
      }
    }
    const int64_t even = divide_up(divide_up(depth, busy), 8) * 8;
    const int64_t terms = result ? kResultTerms : std::clamp(even, kLibraryLeast, kLibraryMost);
    return {terms, std::clamp<int64_t>(depth / terms, 1, busy)};
  }

  void lay_out() {
    const int64_t element = dtype_row(p_.dtype)->bytes, l = p_.q;
    auto call = [&](const char* name, int64_t bytes) {
      regions_.add_operand(name, p_.batch * bytes);
    };
    call("a", p_.m * p_.n * element);
    call("omega", 4 * short_ * l);
    call("u", 4 * p_.m * l);
    call("s", 4 * l);
    call("v", 4 * p_.n * l);
    auto scratch = [&](const char* name, int64_t words) {
      regions_.add_scratch(name, 4 * p_.batch * words);
    };
    scratch("largest", scan_parts_);
    for (const char* name :
         {"exponent", "status", "state", "length", "scale", "bound", "coefficient"}) {
      scratch(name, 1);
    }
    for (const char* name : {"y", "y2"}) scratch(name, long_ * l);
    for (const char* name : {"x", "z"}) scratch(name, short_ * l);
    for (const char* name : {"gram", "inverse", "core", "us", "vt"}) scratch(name, l * l);
    scratch("sigma", l);
    for (const char* name : {"small_status", "small_sweeps", "small_off"}) scratch(name, 1);
    if (small_.scratch_bytes > 0) regions_.add_scratch("small", small_.scratch_bytes);
    int64_t partial = 0;
    auto product = [&](int64_t rows, int64_t columns, int64_t depth) {
      const int64_t n = parts(rows, depth);
      if (n > 1) partial = std::max(partial, n * rows * columns);
    };
    product(long_, l, short_);
    product(short_, l, long_);
    product(l, l, long_);
    product(1, l, long_);
    if (library_) {
      for (const auto& [rows, depth] : {std::pair(long_, short_), std::pair(short_, long_)}) {
        for (const bool result : {false, true}) {
          const int64_t most = library_sums(rows, depth, result).parts;
          partial = std::max(partial, most * rows * panel_pitch());
        }
      }
      regions_.add_scratch("pieces", 2 * p_.batch * long_ * panel_pitch());
      regions_.add_scratch("workspace", kWorkspace);
      for (const char* name : {"high", "low"}) {
        if (split_) regions_.add_scratch(name, 2 * p_.batch * p_.m * pitch_);
      }
    }
    if (partial > 0) scratch("partial", partial);
    if (p_.center) {
      regions_.add_scratch("ones", 4 * long_);
      scratch("mean", p_.n);
      scratch("row", l);
    }
  }

  void scan() {
    RsvdParams q = plain(p_.m, 1, p_.n);
    q.parts = int(scan_parts_);
    add(stored("rsvd_scan"), p_.batch * scan_parts_, 256, {"a", "largest"}, q, 1024);
    add("rsvd_scale", p_.batch, 256, {"largest", "exponent", "status", "state"}, q, 1024);
    if (!split_) return;
    q.b_row = int(pitch_);
    add("rsvd_split", p_.batch * p_.m * divide_up(pitch_, 1024), 256,
        {"a", "high", "low", "exponent", "status"}, q);
  }

  std::string stored(const char* function) const {
#define JML_ROW(name, function, T, KIND) {#name, #function, #T},
    constexpr StorageRow kTable[] = {RSVD_SCAN_VARIANTS(JML_ROW)};
#undef JML_ROW
    return kernel_for(kTable, function, dtype_row(p_.dtype)->storage);
  }
  std::string squared(const char* function) const {
    return std::string(function) + "_n" + std::to_string(width_);
  }

  // C = alpha A B in the words of `q`; `a` is A itself where the flags say so, `coefficient` a
  // number of each matrix.
  void product(const char* a, Strides a_strides, const char* b, Strides b_strides, const char* c,
               RsvdParams q, const char* coefficient = "coefficient") {
    const bool scaled = (q.flags & RSVD_SCALED) != 0;
    q.a_row = int(a_strides.row);
    q.a_col = int(a_strides.col);
    q.b_row = int(b_strides.row);
    q.b_col = int(b_strides.col);
    q.a_batch = scaled ? p_.m * p_.n : batch_stride(a, int64_t{q.rows} * q.depth);
    q.b_batch = batch_stride(b, int64_t{q.depth} * q.columns);
    q.parts = int(parts(q.rows, q.depth));
    q.part = int(divide_up(divide_up(q.depth, q.parts), kTileDepth) * kTileDepth);
    q.parts = int(divide_up(q.depth, q.part));
    const int64_t per_thread = q.columns <= 32 ? 2 : (q.columns <= 64 ? 4 : 8);
    // With low tiles, which read threadgroup memory more, where others leave most cores idle.
    const bool low = !scaled && 2 * p_.batch * q.parts * divide_up(q.rows, kTileRows) < cores_;
    const int64_t tile_rows = low ? kLowTileRows : kTileRows;
    const std::string name = "rsvd_product_" +
                             (scaled ? dtype_row(p_.dtype)->tag() : std::string("f32")) +
                             (low ? "_low_n" : "_n") + std::to_string(16 * per_thread);
    const char* to = q.parts > 1 ? "partial" : c;
    const int64_t tiles = divide_up(q.rows, tile_rows);
    // As many tiles at a time as the watchdog allows.
    const double each = 2.0 * double(p_.batch) * double(tile_rows * 16 * per_thread) * q.depth;
    const double limit = p_.submission_work(caps_);
    const int64_t most =
        limit > 0 ? std::clamp<int64_t>(int64_t(std::min(limit / each, 1e9)), 1, tiles) : tiles;
    for (int64_t first = 0; first < tiles; first += most) {
      q.first = int(first);
      q.tiles = int(std::min(most, tiles - first));
      add(name, p_.batch * q.parts * q.tiles, 256,
          {a, b, to, "exponent", "status", "state", coefficient}, q,
          4 * kTileDepth * (tile_rows + 4 + 16 * per_thread), each * q.tiles);
    }
    if (q.parts == 1) return;
    const int64_t size = int64_t{q.rows} * q.columns;
    add("rsvd_sum", p_.batch * divide_up(size, 256), 256,
        {"partial", c, "status", "state", coefficient}, q);
  }
  static int64_t batch_stride(const std::string& name, int64_t size) {
    return name == "ones" ? 0 : size;
  }

  // The strides of A, or of its transpose, with rows so long.
  static Strides of_matrix(bool transposed, int64_t pitch) {
    return transposed ? Strides{1, pitch} : Strides{pitch, 1};
  }

  // mean = A^T 1 / m.
  void mean() {
    RsvdParams q = plain(long_, 1, 1);
    add("rsvd_ones", divide_up(long_, 256), 256, {"ones"}, q);
    q = plain(p_.n, 1, p_.m);
    q.flags = RSVD_SCALED;
    q.alpha = float(1.0 / double(p_.m));
    product("a", {1, p_.n}, "ones", {1, 1}, "mean", q);
  }

  // y = A x, or A^T x of a wide matrix; and the other way round.
  void forward(const char* x) { times_matrix(long_, short_, x, "y", wide_, false); }
  void backward(bool result = false) { times_matrix(short_, long_, "y2", "z", !wide_, result); }

  void times_matrix(int64_t rows, int64_t depth, const char* x, const char* y, bool transposed,
                    bool result) {
    if (library_) {
      library_product(rows, depth, x, y, transposed, result);
    } else {
      RsvdParams q = plain(rows, p_.q, depth);
      q.flags = RSVD_SCALED;
      product("a", of_matrix(transposed, p_.n), x, strides(p_.q, 1), y, q);
    }
    if (!p_.center) return;
    // y -= 1 (mean^T x), or mean (1^T x) with the transpose.
    const char* left = transposed ? "mean" : "ones";
    product(transposed ? "ones" : "mean", {1, 1}, x, strides(p_.q, 1), "row",
            plain(1, p_.q, depth));
    RsvdParams q = plain(rows, p_.q, 1);
    q.flags = RSVD_ACCUMULATE;
    q.alpha = -1;
    product(left, {1, 1}, "row", strides(p_.q, 1), y, q);
  }

  // y = A x by pieces of 16 bits (head of kernels/rsvd.metal), summed in float32.
  void library_product(int64_t rows, int64_t depth, const char* x, const char* y, bool transposed,
                       bool result) {
    const Strides a = of_matrix(transposed, pitch_);
    const int64_t pitch = panel_pitch(), wide = pitch / pieces_;
    RsvdParams q = plain(rows, p_.q, depth);
    q.b_batch = depth * p_.q;
    q.b_row = int(pitch);
    const auto [terms, parts] = library_sums(rows, depth, result);
    q.parts = int(parts);
    q.part = int(pieces_);
    q.flags = split_ ? 0 : RSVD_SCALED;
    q.alpha = pieces_ == 2 ? 0x1p-11f : 1;
    const std::string tag = pieces_ == 2 ? "f16" : "bf16";
    add("rsvd_pieces_" + tag, p_.batch * divide_up(depth * wide, 256), 256,
        {x, "pieces", "exponent"}, q);

    GemmParams g{};
    g.rows = int(rows);
    g.a_row = int(a.row);
    g.a_col = int(a.col);
    g.b_row = g.c_row = int(pitch);
    g.c_next = rows * pitch;
    // From one sum to the next of those that are formed at once: matrices, or parts of the depth.
    g.a_next = p_.batch > 1 ? p_.m * pitch_ : terms * a.col;
    g.b_next = p_.batch > 1 ? depth * pitch : terms * pitch;
    for (int64_t first = 0; first < depth;) {
      const int64_t whole = (depth - first) / terms;
      g.depth = int(std::min(depth - first, terms));
      const int64_t chunks = std::clamp<int64_t>(whole, 1, parts);
      g.count = int(p_.batch * chunks);
      const auto sum = [&](const char* from, int64_t columns, int64_t to, int accumulate) {
        g.columns = int(columns);
        g.accumulate = accumulate;
        Step s = make_step("gemm_" + tag, g.count * divide_up(rows * columns, 256), 256,
                           regions_.args({from, "pieces", "partial", "workspace"}), g);
        const int64_t skip[3] = {2 * first * a.col, 2 * first * pitch, 4 * to};
        for (size_t i = 0; i < 3; ++i) {
          s.args[i].offset += skip[i];
          s.args[i].bytes -= skip[i];
        }
        s.work = 2.0 * double(g.count) * double(rows) * double(columns) * double(g.depth);
        steps_.push_back(std::move(s));
      };
      sum(split_ ? "high" : "a", pitch, 0, first > 0);
      if (split_) sum("low", wide, wide, 1);
      first += chunks * g.depth;
    }
    add("rsvd_gather", p_.batch * divide_up(rows * (wide / 4), 256), 256,
        {"partial", y, "exponent", "status"}, q);
  }

  void gram(const char* y, int64_t rows, int flags) {
    RsvdParams q = plain(p_.q, p_.q, rows);
    q.flags = flags;
    product(y, strides(1, p_.q), y, strides(p_.q, 1), "gram", q);
  }

  void factor(double shift, int flags) {
    RsvdParams q = plain(p_.q, p_.q, p_.q);
    q.flags = flags;
    q.alpha = float(shift);
    add(squared("rsvd_factor"), p_.batch, width_ * width_ / 32,
        {"gram", "inverse", "length", "state", "status", "scale"}, q, 4 * (34 * width_ + 32),
        2.0 * double(p_.batch) * double(width_ * width_ * width_));
  }

  void apply(const char* y, const char* to, int64_t rows, int flags) {
    RsvdParams q = plain(rows, p_.q, p_.q);
    q.flags = flags;
    q.noise = float(kUlp / 2 * std::sqrt(3.0 / double(rows)));
    product(y, strides(p_.q, 1), "inverse", strides(p_.q, 1), to, q);
  }

  // One factorisation, with a shift.
  void basis(const char* y, const char* to, int64_t rows, double shift) {
    gram(y, rows, 0);
    factor(shift, 0);
    apply(y, to, rows, 0);
  }

  // Until it is orthonormal to rounding.
  void result_basis(const char* y, const char* to, int64_t rows, double shift) {
    for (int64_t round = 0; round < kMostRounds; ++round) {
      const char* from = round == 0 ? y : to;
      gram(from, rows, round == 0 ? 0 : RSVD_UNLESS_NEAR);
      factor(shift, RSVD_BASIS | (round == 0 ? RSVD_FIRST : 0) |
                        (round == kMostRounds - 1 ? RSVD_LAST : 0));
      apply(from, to, rows, RSVD_NOISE | (round == 0 ? 0 : RSVD_UNLESS_DONE));
    }
  }

  // Of step j: the Chebyshev root, times the square of what singular values have at least.
  void bound(int64_t j) {
    RsvdParams q = plain(p_.q, p_.q, p_.q);
    q.flags = RSVD_COEFFICIENT;
    product("inverse", strides(p_.q, 1), "inverse", strides(1, p_.q), "gram", q, "scale");
    // To the eighth power; rsvd_bound says why by 2^-27 on the way.
    const char* powers[2] = {"gram", "core"};
    for (int i = 0; i < 3; ++i) {
      q = plain(p_.q, p_.q, p_.q);
      if (i == 1) q.alpha = 0x1p-27f;
      product(powers[i % 2], strides(p_.q, 1), powers[i % 2], strides(p_.q, 1), powers[1 - i % 2],
              q);
    }
    q = plain(p_.q, p_.q, p_.q);
    q.flags = j == 1 ? RSVD_FIRST : 0;
    q.alpha = float((1 - std::cos(double(2 * j + 1) * (M_PI / double(2 * p_.n_iter)))) / 2);
    q.noise = float(8 * kUlp);
    add("rsvd_bound", p_.batch, 256, {"core", "scale", "length", "bound", "coefficient"}, q, 128);
  }

  // svd's own steps, on our memory.
  void small() {
    const std::vector<Step::Arg> at =
        regions_.args({"core", "us", "sigma", "vt", "small_status", "small_sweeps", "small_off"});
    for (Step& s : small_.steps) {
      for (Step::Arg& a : s.args) {
        const Step::Arg to = a.operand >= 0 ? at[size_t(a.operand)] : regions_.args({"small"})[0];
        a.operand = to.operand;
        a.offset += to.offset;
      }
      steps_.push_back(std::move(s));
    }
  }

  void add(const std::string& kernel, int64_t groups, int64_t threads,
           std::initializer_list<const char*> buffers, const RsvdParams& q, int64_t bytes = 0,
           double work = 0) {
    Step s = make_step(kernel, groups, threads, regions_.args(buffers), q);
    s.threadgroup_bytes = p_.threadgroup_argument(bytes);
    s.work = work;
    steps_.push_back(std::move(s));
  }

  const RsvdProblem& p_;
  const Caps& caps_;
  int64_t cores_;
  bool wide_;
  int64_t long_, short_, width_, scan_parts_;
  bool library_, split_;
  int64_t pieces_, pitch_;
  DevicePlan small_;
  Regions regions_;
  std::vector<Step> steps_;
};

// Pure: which kernels with which launch sizes on a device with these limits.
DevicePlan plan_rsvd_device(const RsvdProblem& p, const Caps& caps) {
  DevicePlan plan;
  auto fail = [&](const char* argument, const std::string& expected, const std::string& got) {
    plan.error =
        jml::wrong("rsvd", argument, expected + " in one call (limits of " + caps.name + ")", got);
    return plan;
  };
  const DTypeRow& dtype = *dtype_row(p.dtype);
  if (dtype.is_double() || dtype.tag() == "c64") {
    return fail("a", "dtype float16, bfloat16 or float32", p.dtype);
  }
  if (!p.variant.empty() && p.variant != kKernels && p.variant != kLibrary) {
    return fail("variant", std::string("one of ") + kKernels + ", " + kLibrary, p.variant);
  }
  const bool library = p.by_library();
  if (library && p.device == "metal") return fail("variant", kKernels, kLibrary);
  if (library && p.k() < 8) return fail("a", "sides of at least 8 for library", p.size());
  if (p.normalizer != "auto" && p.normalizer != "LU") {
    return fail("power_iteration_normalizer", "auto or LU", p.normalizer);
  }
  if (p.q > kMostColumns) {
    return fail("k", "k + n_oversamples up to " + std::to_string(kMostColumns),
                std::to_string(p.q));
  }
  if (p.batch > INT_MAX || p.longest() > INT_MAX / kMostColumns) {
    return fail("a",
                "at most " + std::to_string(INT_MAX) + " matrices, of sides up to " +
                    std::to_string(INT_MAX / kMostColumns),
                std::to_string(p.batch) + " of " + p.size());
  }
  Planner planner(p, caps);
  if (!planner.small_error().empty()) {
    plan.error = planner.small_error();
    return plan;
  }
  if (planner.most_threadgroups() > double(INT_MAX)) {
    return fail("a", "a smaller batch", std::to_string(p.batch) + " of " + p.size());
  }
  plan.variant = library ? kLibrary : kKernels;
  plan.scratch_bytes = planner.scratch_bytes();
  plan.reason = std::string(p.variant.empty() ? "" : "asked for by name (JAXMETAL_VARIANT); ") +
                "k + n_oversamples = " + std::to_string(p.q) + " <= 128: products" +
                (library ? " (with A in 16 bits, by a library)" : "") +
                ", bases and the small svd (" + planner.small_reason() + ") in one call";
  plan.steps = planner.steps();
  for (const Step& s : plan.steps) {
    if (caps.max_submission_work > 0 && s.work > caps.max_submission_work) {
      return fail("a", "work that one launch does before the GPU's watchdog ends it",
                  std::to_string(p.batch) + " of " + p.size());
    }
  }
  if (Status bad = check_limits(plan, caps)) plan.error = "rsvd: " + *bad;
  return plan;
}

// ---- the handler ----

struct NoRow {};

struct RsvdPlan : CallPlan<RsvdProblem, NoRow> {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;
};

constexpr Handler<RsvdPlan> kHandler = {"rsvd", parse_problem, plan_rsvd_device};

std::string not_on_host() {
  return wrong("device", "sim, metal or cuda (the host runs a composite of other primitives)",
               "host");
}

std::string plan_json(const std::string& text) {
  return kHandler.plan_json(
      text, [](const RsvdProblem&) { return JsonWriter().field("error", not_on_host()).text(); });
}

ffi::ErrorOr<std::unique_ptr<RsvdPlan>> instantiate(std::string_view config) {
  return kHandler.instantiate(config, [](const RsvdProblem&) {
    RsvdPlan plan;
    plan.error = not_on_host();
    return plan;
  });
}

ffi::Error check_shapes(const RsvdProblem& p, const ffi::AnyBuffer& a, const ffi::AnyBuffer& omega,
                        ffi::RemainingRets& rets, int64_t* batch) {
  ffi::AnyBuffer::Dimensions lead;
  ffi::Error e = check_matrices("rsvd", p, a, dtype_row(p.dtype)->element, &lead, batch);
  if (e.failure()) return e;
  const ffi::DataType real = ffi::DataType::F32;
  e = check_buffer("rsvd", "argument", "omega", omega, real, lead, {p.k(), p.q});
  if (e.failure()) return e;
  if (rets.size() != 3) {
    return invalid("rsvd", "results", "", "3", std::to_string(rets.size()));
  }
  size_t at = 0;
  auto next = [&](const char* name, std::initializer_list<int64_t> tail) {
    return check_result("rsvd", name, rets, at++, real, lead, tail);
  };
  e = next("u", {p.m, p.q});
  if (e.failure()) return e;
  e = next("s", {p.q});
  if (e.failure()) return e;
  return next("v", {p.n, p.q});
}

std::vector<CallBuffer> buffers_of(const ffi::AnyBuffer& a, const ffi::AnyBuffer& omega,
                                   const ffi::RemainingRets& rets) {
  std::vector<CallBuffer> buffers = call_buffers(a, rets);
  buffers.insert(buffers.begin() + 1, call_buffer(omega, false));
  return buffers;
}

ffi::Error execute(RsvdPlan* plan, ffi::AnyBuffer a, ffi::AnyBuffer omega, ffi::RemainingRets rets,
                   std::string_view) {
  const HandedOver handed_over;
  int64_t batch = 0;
  ffi::Error e = check_shapes(plan->problem, a, omega, rets, &batch);
  if (e.failure() || batch == 0) return e;
  return kHandler.run(*plan, {batch, 1}, buffers_of(a, omega, rets));
}

// ---- the handler on the CUDA platform ----

ffi::Error instantiate_cuda(std::string_view config) { return kHandler.instantiate_cuda(config); }

ffi::Error execute_cuda(void* stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer a,
                        ffi::AnyBuffer omega, ffi::RemainingRets rets, std::string_view config) {
  const auto rsvd = kHandler.cuda(config);
  if (rsvd.error) return ffi::Error::InvalidArgument(*rsvd.error);
  int64_t batch = 0;
  ffi::Error e = check_shapes(rsvd.value->problem, a, omega, rets, &batch);
  if (e.failure() || batch == 0) return e;
  return kHandler.enqueue(*rsvd.value, {batch, 1}, buffers_of(a, omega, rets), stream, scratch);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("config"));
XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<RsvdPlan>>()
                           .Arg<ffi::AnyBuffer>()  // a
                           .Arg<ffi::AnyBuffer>()  // omega
                           .RemainingRets()        // u, s, v
                           .Attr<std::string_view>("config"));

XLA_FFI_DEFINE_HANDLER(kInstantiateCuda, instantiate_cuda,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("config"));
// Only launches, and the same ones each time: XLA may capture it into a graph.
XLA_FFI_DEFINE_HANDLER(kExecuteCuda, execute_cuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::ScratchAllocator>()
                           .Arg<ffi::AnyBuffer>()  // a
                           .Arg<ffi::AnyBuffer>()  // omega
                           .RemainingRets()        // u, s, v
                           .Attr<std::string_view>("config"),
                       {ffi::Traits::kCmdBufferCompatible});

ffi::TypeId RsvdPlan::id = {};
const ffi::TypeInfo RsvdPlan::info = ffi::MakeTypeInfo<RsvdPlan>();

const RegisterOp kRegister({"rsvd", "jml_rsvd_v1", "cpu", "jml_rsvd_plan_v1", kInstantiate,
                            kExecute, &RsvdPlan::id, &RsvdPlan::info, plan_json});
const RegisterOp kRegisterCuda({"rsvd", "jml_rsvd_v1", "CUDA", nullptr, kInstantiateCuda,
                                kExecuteCuda, nullptr, nullptr, plan_json});

}  // namespace
}  // namespace jml
