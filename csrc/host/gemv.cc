// The host gemv kernels of one instruction-set level (JML_ISA): a table for csrc/gemv.cc.
//
// Everything is a real product. A complex row of n is a real row of 2n whose even and odd sums are
// kept apart; a complex x is two vectors ("planes"), its real and its imaginary part:
//   re = E(re x) - s O(im x),  im = s O(re x) + E(im x),  s = -1 for a conjugated matrix.
// Sums run along the depth in one chain a lane (rows of a) or a column (columns of a), cut into
// chunks that only the depth decides: how many rows or vectors are worked on at once moves no bit.
#include "csrc/host/gemv.h"

#include "csrc/host/matrix_io.h"

namespace jml::host {
namespace JML_ISA {

// Terms of one chain of additions; a chain of T terms errs by at most T ulp.
constexpr int64_t kRowChunk = 32768, kColumnChunk = 2048;
constexpr int64_t kRowBlock = 64;       // outputs whose sums are held before the epilogue
constexpr int64_t kColumnBlock = 4096;  // columns summed at once: their sums stay in the L1 cache
// Of several vectors x a piece at a time is used on some rows, so that it stays in the L1 cache.
constexpr int64_t kPieceBytes = 2048, kPieceRows = 32, kPieceVectors = 3;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 16;  // vectors of sums held in registers
#else
constexpr int kSums = 8;
#endif

// A matrix that is narrower than its sums: rare, so one row and one vector at a time must do. The
// tiles of all the others are most of what this file compiles to.
template <class S, class C>
constexpr bool kMixed = __is_same(C, double) && !__is_same(S, double);

template <class T>
JML_INLINE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
JML_INLINE constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}

// ---- loads that widen ----

template <class T, int Bytes>
struct ShortVec {
  typedef T Type __attribute__((vector_size(Bytes)));
};

// kLanes<C> elements at p, as C.
template <class C, class S>
JML_INLINE Vec<C> load_as(const S* p) {
  if constexpr (__is_same(C, S)) {
    return load<C>(p);
  } else if constexpr (__is_same(C, float) && __is_same(S, BF16)) {
    typename ShortVec<uint16_t, kVectorBytes / 2>::Type half;
    __builtin_memcpy(&half, p, sizeof(half));
    using Wide = typename ShortVec<uint32_t, kVectorBytes>::Type;
    return (Vec<float>)(__builtin_convertvector(half, Wide) << 16);
  } else if constexpr (__is_same(C, float) && __is_same(S, _Float16)) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
    return (Vec<float>)vcvt_f32_f16(vld1_f16((const __fp16*)p));
#else
    typename ShortVec<uint16_t, kVectorBytes / 2>::Type half;
    __builtin_memcpy(&half, p, sizeof(half));
    const Mask<float> wide = __builtin_convertvector(half, Mask<float>);
    const Mask<float> magnitude = (wide & 0x7fff) << 13;
    // The exponent's bias differs by 112; a product also normalises what was subnormal.
    Mask<float> bits = (Mask<float>)((Vec<float>)magnitude * 0x1p112f);
    bits |= (magnitude >= (0x7c00 << 13)) & 0x7f800000;
    return (Vec<float>)(bits | ((wide & 0x8000) << 16));
#endif
  } else if constexpr (__is_same(S, float)) {
    typename ShortVec<float, kVectorBytes / 2>::Type half;
    __builtin_memcpy(&half, p, sizeof(half));
    return __builtin_convertvector(half, Vec<double>);
  } else {
    Vec<C> v;
    for (int l = 0; l < kLanes<C>; ++l) v[l] = C(widen(p[l]));
    return v;
  }
}

// bfloat16 rows are read two to a 32-bit word, the even terms and the odd ones apart, which takes
// half of the work of widening them in order. x lies as they do then (prepare): so many terms at a
// time, as [W even, W odd] again and again; a remainder in order; and behind it the last W terms,
// with zeros for those that are no part of a tail.
constexpr int64_t kPairedTerms = 32;
template <class S, class C>
constexpr bool kPaired = __is_same(S, BF16) && __is_same(C, float);

JML_INLINE void load_pairs(const BF16* p, Vec<float>& even, Vec<float>& odd) {
  typename ShortVec<uint32_t, kVectorBytes>::Type words;
  __builtin_memcpy(&words, p, sizeof(words));
  even = (Vec<float>)(words << 16);
  odd = (Vec<float>)(words & 0xffff0000u);
}

// All bits set in the last `count` lanes.
template <class C>
JML_INLINE Mask<C> last_lanes(int64_t count) {
  Mask<C> lane;
  for (int l = 0; l < kLanes<C>; ++l) lane[l] = l;
  return lane >= typename SimdOf<C>::Bits(kLanes<C> - count);
}
template <class C>
JML_INLINE Vec<C> masked(Vec<C> v, Mask<C> m) {
  return (Vec<C>)((Mask<C>)v & m);
}

// ---- rows: one dot product an output ----

// Sums of the even and of the odd lanes.
template <class T, int S = kLanes<T> / 2>
JML_INLINE Vec<T> sum_pairs(Vec<T> v) {
  if constexpr (S > 1) {
    return sum_pairs<T, S / 2>(v +
                               rotate_lanes<T, S>(v, std::make_integer_sequence<int, kLanes<T>>{}));
  }
  return v;
}

// Where a piece of the depth lies.
struct Piece {
  bool first, last;
};

// out[x * ldo + row * Parts] = a[row] . x, for Rows rows at stride lda and X vectors at stride ldx;
// with Parts == 2 the sum of the even terms, behind it that of the odd ones. `carry` takes the sums
// of a piece of the depth, lane by lane, to the next one; only the last piece goes to `out`.
template <class S, class C, int Parts, int Rows, int X>
static void dot_tile(const S* a, int64_t lda, const C* x, int64_t ldx, int64_t depth, C* out,
                     int64_t ldo, Vec<C>* carry, Piece piece) {
  constexpr int W = kLanes<C>;
  constexpr int kStep = max_of<int>(1, 64 / (W * int(sizeof(S))));  // vectors in a cache line
  if (depth < W && piece.first) {
    for (int r = 0; r < Rows; ++r) {
      for (int h = 0; h < X; ++h) {
        C sum[2] = {0, 0};
        for (int64_t j = 0; j < depth; ++j) {
          sum[j % Parts] += C(widen(a[r * lda + j])) * x[h * ldx + j];
        }
        for (int part = 0; part < Parts; ++part) out[h * ldo + r * Parts + part] = sum[part];
      }
    }
    return;
  }
  Vec<C> acc[Rows][X];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int h = 0; h < X; ++h) acc[r][h] = piece.first ? Vec<C>{} : carry[r * X + h];
  }
  auto step = [&](int64_t j) __attribute__((always_inline)) {
    Vec<C> xv[X];
#pragma GCC unroll 8
    for (int h = 0; h < X; ++h) xv[h] = load<C>(x + h * ldx + j);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec<C> av = load_as<C>(a + r * lda + j);
#pragma GCC unroll 8
      for (int h = 0; h < X; ++h) acc[r][h] += av * xv[h];
    }
  };
  // A cache line of every row.
  auto line = [&](int64_t j) __attribute__((always_inline)) {
    if constexpr (kPaired<S, C>) {
      static_assert(kStep * W == kPairedTerms);
#pragma GCC unroll 8
      for (int u = 0; u < kStep; u += 2) {
        const int64_t at = j + u * W;
        Vec<C> xv[2][X];
#pragma GCC unroll 8
        for (int h = 0; h < X; ++h) {
          xv[0][h] = load<C>(x + h * ldx + at);
          xv[1][h] = load<C>(x + h * ldx + at + W);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          Vec<C> av[2];
          load_pairs(a + r * lda + at, av[0], av[1]);
#pragma GCC unroll 8
          for (int h = 0; h < X; ++h) acc[r][h] += av[0] * xv[0][h];
#pragma GCC unroll 8
          for (int h = 0; h < X; ++h) acc[r][h] += av[1] * xv[1][h];
        }
      }
    } else {
#pragma GCC unroll 8
      for (int u = 0; u < kStep; ++u) step(j + u * W);
    }
  };
  int64_t j = 0;
  // `ahead` is what row r is to fetch with each line, from a on.
  constexpr int64_t kLine = 64 / int64_t(sizeof(S));
  auto lines = [&](auto... ahead) __attribute__((always_inline)) {
    for (; j + kStep * W <= depth; j += kStep * W) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) (__builtin_prefetch(a + ahead(r), 0, 3), ...);
      line(j);
    }
  };
  if (!piece.first || !piece.last) {
    lines([&](int r) { return (r + Rows) * lda + j; });  // the piece below
  } else if (lda * int64_t(sizeof(S)) < kPageBytes) {
    // The next tile, in order. On an EPYC 9004, eight rows of 1792 bytes came at half of the
    // memory's speed side by side. Long rows are best left to the processor: 0.93 of the time with
    // prefetches 1 KiB ahead.
    lines([&](int r) { return Rows * lda + j * Rows + r * kLine; });
  } else {
    lines();
  }
  for (; j + W <= depth; j += W) step(j);
  if (!piece.last) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int h = 0; h < X; ++h) carry[r * X + h] = acc[r][h];
    }
    return;
  }
  if (j < depth) {
    // The last W terms again, those that are already in the sum as zeros.
    const Mask<C> tail = last_lanes<C>(depth - j);
    const int64_t at = depth - W;
    Vec<C> xv[X];
    for (int h = 0; h < X; ++h) {
      xv[h] =
          kPaired<S, C> ? load<C>(x + h * ldx + depth) : masked<C>(load<C>(x + h * ldx + at), tail);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec<C> av = masked<C>(load_as<C>(a + r * lda + at), tail);
#pragma GCC unroll 8
      for (int h = 0; h < X; ++h) acc[r][h] += av * xv[h];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int h = 0; h < X; ++h) {
      C* to = out + h * ldo + r * Parts;
      if constexpr (Parts == 1) {
        to[0] = sum<C>(acc[r][h]);
      } else {
        // Which lanes are even does not depend on where a tail begins: depth and W are even.
        const Vec<C> pair = sum_pairs<C>(acc[r][h]);
        to[0] = pair[0];
        to[1] = pair[1];
      }
    }
  }
}

template <class S, class C, int Parts, int X>
static void dot_rows(const S* a, int64_t lda, const C* x, int64_t ldx, int64_t depth, C* out,
                     int64_t ldo, int64_t count, int rows_in_flight, Vec<C>* carry, Piece piece) {
  constexpr int kRows = kMixed<S, C> ? 1 : max_of(1, min_of(8, kSums / X));
  constexpr int kFew = max_of(1, kRows / 2);
  int64_t i = 0;
  auto tiles = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    for (; i + R <= count; i += R) {
      dot_tile<S, C, Parts, R, X>(a + i * lda, lda, x, ldx, depth, out + i * Parts, ldo,
                                  carry + i * X, piece);
    }
  };
  if (rows_in_flight >= 8) tiles(std::integral_constant<int, kRows>{});
  if constexpr (kFew > 1) tiles(std::integral_constant<int, kFew>{});
  tiles(std::integral_constant<int, 1>{});
}

// ---- columns: an output is the sum of a column, rows are added one after the other ----

// acc[x * lda + j] += sum over rows of a[row][j] xs[x * ldx + row].
template <class S, class C, int Rows, int X>
static void add_rows(const S* a, int64_t lda, int64_t cols, const C* xs, int64_t ldx, C* acc,
                     int64_t ld_acc) {
  constexpr int W = kLanes<C>;
  Vec<C> scale[X][Rows];
#pragma GCC unroll 8
  for (int h = 0; h < X; ++h) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) scale[h][r] = splat(xs[h * ldx + r]);
  }
  int64_t j = 0;
  auto step = [&](int64_t at, auto put) __attribute__((always_inline)) {
    Vec<C> av[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) av[r] = load_as<C>(a + r * lda + at);
#pragma GCC unroll 8
    for (int h = 0; h < X; ++h) {
      Vec<C> v = load<C>(acc + h * ld_acc + at);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) v += av[r] * scale[h][r];
      put(acc + h * ld_acc + at, v);
    }
  };
  if (cols < W) {
    for (int h = 0; h < X; ++h) {
      for (; j < cols; ++j) {
        C v = acc[h * ld_acc + j];
        for (int r = 0; r < Rows; ++r) v += C(widen(a[r * lda + j])) * xs[h * ldx + r];
        acc[h * ld_acc + j] = v;
      }
      j = 0;
    }
    return;
  }
  constexpr int kStep = max_of<int>(1, 64 / (W * int(sizeof(S))));
  for (; j + kStep * W <= cols; j += kStep * W) {
    // The rows that are added next.
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) __builtin_prefetch(a + (r + Rows) * lda + j, 0, 3);
#pragma GCC unroll 8
    for (int u = 0; u < kStep; ++u) {
      step(j + u * W, [](C* to, Vec<C> v) __attribute__((always_inline)) { store(to, v); });
    }
  }
  for (; j + W <= cols; j += W) {
    step(j, [](C* to, Vec<C> v) __attribute__((always_inline)) { store(to, v); });
  }
  if (j < cols) {
    const Mask<C> tail = last_lanes<C>(cols - j);
    step(cols - W, [&](C* to, Vec<C> v) __attribute__((always_inline)) {
      store(to, (Vec<C>)(((Mask<C>)v & tail) | ((Mask<C>)load<C>(to) & ~tail)));
    });
  }
}

template <class S, class C, int X>
static void add_all_rows(const S* a, int64_t lda, int64_t cols, const C* xs, int64_t ldx,
                         int64_t depth, C* acc, int64_t ld_acc, int rows_in_flight) {
  int64_t i = 0;
  auto tiles = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    for (; i + R <= depth; i += R) {
      add_rows<S, C, R, X>(a + i * lda, lda, cols, xs + i, ldx, acc, ld_acc);
    }
  };
  if constexpr (!kMixed<S, C>) {
    if (rows_in_flight >= 8) tiles(std::integral_constant<int, 8>{});
    tiles(std::integral_constant<int, 4>{});
  }
  tiles(std::integral_constant<int, 1>{});
}

// fn(first, X) for groups of X = Most, Most / 2, ..., 1 that make up `count` vectors.
template <int Most, class Fn>
JML_INLINE void in_groups(int64_t count, Fn fn, int64_t at = 0) {
  for (; at + Most <= count; at += Most) fn(at, std::integral_constant<int, Most>{});
  if constexpr (Most > 1) in_groups<Most / 2>(count, fn, at);
}

// ---- activations ----

static JML_INLINE float exp_(float x) { return __builtin_expf(x); }
static JML_INLINE double exp_(double x) { return __builtin_exp(x); }
static JML_INLINE float tanh_(float x) { return __builtin_tanhf(x); }
static JML_INLINE double tanh_(double x) { return __builtin_tanh(x); }
static JML_INLINE float erfc_(float x) { return __builtin_erfcf(x); }
static JML_INLINE double erfc_(double x) { return __builtin_erfc(x); }

template <class C>
static void activate(Activation activation, C* z, int64_t count) {
  auto each = [&](auto f) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i) z[i] = f(z[i]);
  };
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return each([](C v) { return v < 0 ? C(0) : v; });  // a NaN stays
    case Activation::kGelu:
      return each([](C v) { return C(0.5) * v * erfc_(v * C(-0.70710678118654752440)); });
    case Activation::kGeluTanh:
      return each([](C v) {
        const C u = C(0.79788456080286535588) * (v + C(0.044715) * v * v * v);
        return C(0.5) * v * (1 + tanh_(u));
      });
    case Activation::kSilu:
      return each([](C v) { return v / (1 + exp_(-v)); });
    case Activation::kTanh:
      return each([](C v) { return tanh_(v); });
    case Activation::kSigmoid:
      return each([](C v) { return 1 / (1 + exp_(-v)); });
  }
}

// ---- one call ----

static bool is_complex(DType d) { return d == DType::kC64 || d == DType::kC128; }
static bool is_double(DType d) { return d == DType::kF64 || d == DType::kC128; }
static bool in_double(const GemvTask& t) {
  return is_double(t.a_dtype) || is_double(t.x_dtype) || is_double(t.out_dtype);
}
static int64_t parts(const GemvTask& t) { return is_complex(t.a_dtype) ? 2 : 1; }
static int64_t planes(const GemvTask& t) { return is_complex(t.x_dtype) ? 2 : 1; }

// Terms of a product in real numbers, and how many of them a chunk has.
static int64_t real_depth(const GemvTask& t) { return t.transpose ? t.m : t.n * parts(t); }
static int64_t chunk_terms(const GemvTask& t) { return t.transpose ? kColumnChunk : kRowChunk; }
static int64_t chunks(const GemvTask& t) {
  return max_of<int64_t>(1, divide_up(real_depth(t), chunk_terms(t)));
}
static int64_t compute_bytes(const GemvTask& t) { return in_double(t) ? 8 : 4; }

static bool paired(const GemvTask& t) {
  return t.a_dtype == DType::kBF16 && !t.transpose && !in_double(t);
}
static bool reads_x_as_it_lies(const GemvTask& t) {
  const DType compute = in_double(t) ? DType::kF64 : DType::kF32;
  return t.x_dtype == compute && !paired(t) && (t.transpose || parts(t) == 1) &&
         t.nrhs < kPieceVectors;
}
// From one vector to the next. Several at a distance of some 4 KiB would share a few sets of the
// L1 cache: eight of 4096 floats took three times as long.
static int64_t x_stride(const GemvTask& t) {
  const int64_t length = real_depth(t) + (paired(t) ? kLanes<float> : 0);
  if (reads_x_as_it_lies(t) || t.nrhs * planes(t) < kPieceVectors) return length;
  return (divide_up(length * compute_bytes(t), 4096) * 4096 + 2048) / compute_bytes(t);
}
static int64_t x_bytes(const GemvTask& t) {
  if (reads_x_as_it_lies(t)) return 0;
  return t.nrhs * planes(t) * x_stride(t) * compute_bytes(t);
}
static int64_t partial_bytes(const GemvTask& t) {
  const int64_t n = chunks(t);
  return n == 1 ? 0 : n * t.nrhs * planes(t) * t.outputs() * parts(t) * compute_bytes(t);
}
static int64_t block_outputs(const GemvTask& t) {
  return t.transpose ? max_of<int64_t>(256, kColumnBlock / min_of<int64_t>(8, t.nrhs)) : kRowBlock;
}
static int64_t carry_bytes(const GemvTask& t) {
  const int64_t vectors = t.nrhs * planes(t);
  return t.transpose || vectors < kPieceVectors ? 0 : vectors * kPieceRows * kVectorBytes;
}
// Sums on their way from piece to piece, the sums of a block, and the epilogue's values.
static int64_t scratch_bytes(const GemvTask& t) {
  const int64_t block = min_of(block_outputs(t), t.outputs());
  return carry_bytes(t) + (t.nrhs * planes(t) * block * parts(t) + 2 * block) * compute_bytes(t) +
         128;
}

template <class C>
static void prepare_as(const GemvTask& t, int64_t matrix, C* to) {
  const int64_t depth = t.depth(), width = real_depth(t);
  const int64_t repeat = width / max_of<int64_t>(depth, 1);
  with_format(t.x_dtype, [&](auto f) {
    using F = decltype(f);
    const auto* from =
        static_cast<const typename F::Stored*>(t.x) + matrix * t.nrhs * depth * F::kPlanes;
    for (int64_t h = 0; h < t.nrhs; ++h) {
      for (int plane = 0; plane < F::kPlanes; ++plane, to += x_stride(t)) {
        const auto* row = from + h * depth * F::kPlanes + plane;
        if (paired(t)) {
          constexpr int64_t kWidth = kLanes<float>;
          const int64_t whole = depth / kPairedTerms * kPairedTerms;
          for (int64_t i = 0; i < depth; ++i) {
            const int64_t in = i % (2 * kWidth);
            to[i < whole ? i - in + in % 2 * kWidth + in / 2 : i] = C(widen(row[i * F::kPlanes]));
          }
          for (int64_t l = 0, i = depth - kWidth; l < kWidth; ++l, ++i) {
            to[depth + l] = i < depth / kWidth * kWidth ? C(0) : C(widen(row[i * F::kPlanes]));
          }
        } else if (repeat == 1) {
          for (int64_t i = 0; i < depth; ++i) to[i] = C(widen(row[i * F::kPlanes]));
        } else {
          for (int64_t i = 0; i < depth; ++i) {
            to[2 * i] = to[2 * i + 1] = C(widen(row[i * F::kPlanes]));
          }
        }
      }
    }
  });
}
static void prepare(const GemvTask& t, int64_t matrix, void* x) {
  if (in_double(t)) return prepare_as(t, matrix, static_cast<double*>(x));
  prepare_as(t, matrix, static_cast<float*>(x));
}

// Writes outputs [first, first + count) of one matrix from their sums: vector x plane p is at
// sums + (x * planes + p) * lds, `parts` numbers an output. `z` has room for 2 * count.
template <class C>
static void epilogue(const GemvTask& t, int64_t matrix, int64_t first, int64_t count, const C* sums,
                     int64_t lds, C* z) {
  const bool a_complex = parts(t) == 2;
  with_format(t.out_dtype, [&](auto f) {
    using F = decltype(f);
    using Stored = typename F::Stored;
    for (int64_t h = 0; h < t.nrhs; ++h) {
      const C* s0 = sums + h * planes(t) * lds;
      const int64_t at = ((matrix * t.nrhs + h) * t.outputs() + first) * F::kPlanes;
      auto operand = [&](const void* p) { return static_cast<const Stored*>(p) + at; };
      Stored* out = static_cast<Stored*>(t.out) + at;
      if constexpr (!F::kComplex) {
        const C alpha = C(t.alpha_re), beta = C(t.beta_re);
        for (int64_t i = 0; i < count; ++i) z[i] = alpha * s0[i];
        if (t.y != nullptr) {
          const Stored* y = operand(t.y);
          for (int64_t i = 0; i < count; ++i) z[i] += beta * C(widen(y[i]));
        }
        if (t.bias != nullptr) {
          const Stored* bias = operand(t.bias);
          for (int64_t i = 0; i < count; ++i) z[i] += C(widen(bias[i]));
        }
        activate(t.activation, z, count);
        if (t.residual != nullptr) {
          const Stored* residual = operand(t.residual);
          for (int64_t i = 0; i < count; ++i) z[i] += C(widen(residual[i]));
        }
        using Real = typename F::Real;
        for (int64_t i = 0; i < count; ++i) out[i] = narrow<F>(Real(z[i]));
      } else {
        const C* s1 = s0 + lds;
        const C sign = t.conjugate ? C(-1) : C(1);
        const bool x_complex = planes(t) == 2;
        const C ar = C(t.alpha_re), ai = C(t.alpha_im), br = C(t.beta_re), bi = C(t.beta_im);
        for (int64_t i = 0; i < count; ++i) {
          C re, im;
          if (a_complex) {
            re = s0[2 * i] - (x_complex ? sign * s1[2 * i + 1] : C(0));
            im = sign * s0[2 * i + 1] + (x_complex ? s1[2 * i] : C(0));
          } else {
            re = s0[i];
            im = x_complex ? s1[i] : C(0);
          }
          z[2 * i] = ai == 0 ? ar * re : ar * re - ai * im;
          z[2 * i + 1] = ai == 0 ? ar * im : ar * im + ai * re;
        }
        if (t.y != nullptr) {
          const Stored* y = operand(t.y);
          for (int64_t i = 0; i < count; ++i) {
            const C re = C(y[2 * i]), im = C(y[2 * i + 1]);
            z[2 * i] += bi == 0 ? br * re : br * re - bi * im;
            z[2 * i + 1] += bi == 0 ? br * im : br * im + bi * re;
          }
        }
        for (const void* p : {t.bias, t.residual}) {
          if (p == nullptr) continue;
          const Stored* more = operand(p);
          for (int64_t i = 0; i < 2 * count; ++i) z[i] += C(more[i]);
        }
        for (int64_t i = 0; i < 2 * count; ++i) out[i] = Stored(z[i]);
      }
    }
  });
}

// Sums of `count` outputs from `first` on, over terms [from, from + terms) of the depth.
template <class S, class C>
static void block_sums(const GemvTask& t, const S* a, const C* x, int64_t from, int64_t terms,
                       int64_t first, int64_t count, C* sums, int64_t lds, Vec<C>* carry) {
  const int64_t vectors = t.nrhs * planes(t), ldx = x_stride(t), width = t.n * parts(t);
  if (!t.transpose) {
    // Every vector on some rows, a piece at a time if they are many: later ones find the rows in
    // the cache.
    const bool pieces = vectors >= kPieceVectors;
    const int64_t length = kPieceBytes / int64_t(sizeof(C));
    // The last piece is no shorter than a vector, so that its tail can be read as one.
    const int64_t n = pieces ? max_of<int64_t>(1, terms / length) : 1;
    const int64_t step = pieces ? kPieceRows : 8;
    for (int64_t i = 0; i < count; i += step) {
      const int64_t rows = min_of(step, count - i);
      for (int64_t p = 0; p < n; ++p) {
        const int64_t at = p * length;
        const Piece piece{p == 0, p == n - 1};
        const int64_t some = piece.last ? terms - at : length;
        const S* tile = a + (first + i) * width + from + at;
        // Four of them: eight on two rows took 1.5 to 2 times as long as twice four on four rows.
        in_groups<kMixed<S, C> ? 1 : 4>(vectors, [&](int64_t h, auto group) {
          constexpr int X = decltype(group)::value;
          C* to = sums + h * lds + i * parts(t);
          auto run = [&](auto parts) {
            dot_rows<S, C, decltype(parts)::value, X>(tile, width, x + h * ldx + from + at, ldx,
                                                      some, to, lds, rows, t.rows_in_flight,
                                                      carry + h * kPieceRows, piece);
          };
          if (parts(t) == 2) {
            if constexpr (__is_same(S, float) || __is_same(S, double)) {
              run(std::integral_constant<int, 2>{});
            }
          } else {
            run(std::integral_constant<int, 1>{});
          }
        });
      }
    }
    return;
  }
  const int64_t cols = count * parts(t);
  for (int64_t h = 0; h < vectors; ++h) {
    __builtin_memset(sums + h * lds, 0, size_t(cols) * sizeof(C));
  }
  // Eight rows at a time, every vector on them. Sixteen vectors at most between reads of the
  // matrix: the sums of more would not stay in the cache.
  for (int64_t h0 = 0; h0 < vectors; h0 += 16) {
    for (int64_t i = 0; i < terms; i += 8) {
      const int64_t rows = min_of<int64_t>(8, terms - i);
      const S* tile = a + (from + i) * width + first * parts(t);
      in_groups<kMixed<S, C> ? 1 : 8>(
          min_of<int64_t>(16, vectors - h0), [&](int64_t h, auto group) {
            constexpr int X = decltype(group)::value;
            add_all_rows<S, C, X>(tile, width, cols, x + (h0 + h) * ldx + from + i, ldx, rows,
                                  sums + (h0 + h) * lds, lds, t.rows_in_flight);
          });
    }
  }
}

template <class S, class C>
static void run_as(const GemvTask& t, int64_t matrix, const C* x, int64_t chunk, int64_t first,
                   int64_t count, C* partial, char* scratch) {
  const int64_t width = t.n * parts(t), vectors = t.nrhs * planes(t);
  auto* carry = reinterpret_cast<Vec<C>*>(scratch);
  const S* a = static_cast<const S*>(t.a) + matrix * t.m * width;
  if (x == nullptr) x = static_cast<const C*>(t.x) + matrix * vectors * real_depth(t);
  const int64_t from = chunk * chunk_terms(t);
  const int64_t terms = min_of(chunk_terms(t), real_depth(t) - from);
  const int64_t block = min_of(block_outputs(t), t.outputs());
  C* sums = reinterpret_cast<C*>(scratch + carry_bytes(t));
  C* z = sums + vectors * block * parts(t);
  for (int64_t i = 0; i < count; i += block) {
    const int64_t some = min_of(block, count - i);
    block_sums<S, C>(t, a, x, from, terms, first + i, some, sums, block * parts(t), carry);
    if (partial == nullptr) {
      epilogue<C>(t, matrix, first + i, some, sums, block * parts(t), z);
      continue;
    }
    for (int64_t h = 0; h < vectors; ++h) {
      C* to = partial + ((chunk * vectors + h) * t.outputs() + first + i) * parts(t);
      __builtin_memcpy(to, sums + h * block * parts(t), size_t(some * parts(t)) * sizeof(C));
    }
  }
}

static void run(const GemvTask& t, int64_t matrix, const void* x, int64_t chunk, int64_t first,
                int64_t count, void* partial, void* scratch) {
  with_format(t.a_dtype, [&](auto f) {
    using S = typename decltype(f)::Stored;
    auto as = [&](auto c) {
      using C = decltype(c);
      run_as<S, C>(t, matrix, static_cast<const C*>(x), chunk, first, count,
                   static_cast<C*>(partial), static_cast<char*>(scratch));
    };
    if constexpr (!__is_same(S, double)) {
      if (!in_double(t)) return as(0.0f);
    }
    as(0.0);
  });
}

template <class C>
static void finish_as(const GemvTask& t, int64_t matrix, int64_t first, int64_t count,
                      const C* partial, C* scratch) {
  const int64_t vectors = t.nrhs * planes(t), lds = t.outputs() * parts(t), n = chunks(t);
  const int64_t block = min_of(block_outputs(t), t.outputs());
  C* z = scratch + vectors * block * parts(t);
  for (int64_t i = 0; i < count; i += block) {
    const int64_t some = min_of(block, count - i);
    for (int64_t h = 0; h < vectors; ++h) {
      C* to = scratch + h * block * parts(t);
      const C* from = partial + h * lds + (first + i) * parts(t);
      for (int64_t j = 0; j < some * parts(t); ++j) {
        C sum = from[j];
        for (int64_t c = 1; c < n; ++c) sum += from[c * vectors * lds + j];
        to[j] = sum;
      }
    }
    epilogue<C>(t, matrix, first + i, some, scratch, block * parts(t), z);
  }
}
static void finish(const GemvTask& t, int64_t matrix, int64_t first, int64_t count,
                   const void* partial, void* scratch) {
  if (in_double(t)) {
    return finish_as(t, matrix, first, count, static_cast<const double*>(partial),
                     static_cast<double*>(scratch));
  }
  finish_as(t, matrix, first, count, static_cast<const float*>(partial),
            static_cast<float*>(scratch));
}

}  // namespace JML_ISA

#define JML_CONCAT_(a, b) a##b
#define JML_CONCAT(a, b) JML_CONCAT_(a, b)

const GemvKernels* JML_CONCAT(gemv_kernels_, JML_ISA)() {
  static constexpr GemvKernels kKernels = {JML_ISA::chunks,        64,
                                           JML_ISA::x_bytes,       JML_ISA::prepare,
                                           JML_ISA::partial_bytes, JML_ISA::scratch_bytes,
                                           JML_ISA::run,           JML_ISA::finish};
  return &kKernels;
}

}  // namespace jml::host
