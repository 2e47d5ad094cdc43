// Singular value decomposition by one-sided Jacobi: small matrices with their columns in registers,
// larger ones in device memory.
//
// Up to N = 32 a matrix belongs to N / C lanes of one simdgroup. It starts with a QR with column
// pivoting, A = Q R. Then the rotations J make the columns of X = R^T orthogonal, X J = W S, which
// takes about the same number of sweeps whatever the singular values are; V stands for Q J in the
// loops, the U of the result, and W is its V. Each lane has C columns of X and of V:
//   C = 1 ("xor")   lane owns one column; step k pairs lane with lane ^ k, nothing moves; N - 1
//   steps
//                   a sweep. Suits a device whose shuffles are as fast as its arithmetic (Apple).
//   C = 2 ("ring")  lane owns two columns and rotates them; then one column moves to a neighbour
//                   (odd-even order with every pair swapped); N steps a sweep, half the shuffles.
//                   Complex vectors have it up to N = 16, real matrices also at 12 and 24: 6 of 8
//                   and 12 of 16 lanes have columns then.
// A simdgroup holds M = 32 / L matrices, L being N / C rounded up to a power of two, a threadgroup
// SIMDGROUPS times as many.
//   Grid: ceil(batch / (M * SIMDGROUPS)) threadgroups of 32 * SIMDGROUPS threads.
//   Threadgroup bytes: SIMDGROUPS * M * N * (N + 1) * 4 (the tile that turns R, Q and at the end W,
//   so that its columns are written in order), 0 for complex matrices, whose R and Q turn in
//   registers. Twice that for float64. 32 x 32 complex128 matrices keep V in
//   SIMDGROUPS * 2 * N * 32 * 8 of them.
//
// N = 40 to 128 ("block"): a threadgroup a matrix. Each simdgroup owns C columns, rows spread over
// its lanes (H of them, N rounded up to 32). QR with column pivoting first, then Jacobi on R^T:
// hard matrices take as few sweeps as random ones. (N = 128, Gaussian and condition 1e6: 7.3
// and 7.0; without the QR 9.8 and 22.) Rotations begin with V = Q, so that Q need not be kept.
//
// The columns of a simdgroup are two blocks of C / 2. It rotates every column of one with every
// column of the other, C / 2 disjoint pairs at a time, so that their dot products are summed and
// their angles found together. Then one block moves to the neighbouring simdgroup through
// threadgroup memory, in the ring's order. Pairs inside of a block meet once a sweep.
//   Grid: batch threadgroups of 32 * SIMDGROUPS threads, SIMDGROUPS = N / C.
//   Threadgroup bytes: 4 * max(N * H / 2 * P, 32 * (H + 1)), P = 2 where A and V travel together
//   (N <= 64 with vectors), else 1; values only N * H / 2 * 4. The QR fits into them.
//
// N = 40 to 192 ("twin"), for GPUs with registers for it: a threadgroup a matrix, first for A and
// then, in a second dispatch, for V. In that of A a lane has four whole columns, six above N = 128,
// or a slice of their rows, so that one step finds the angles of N / 2 pairs at once: dot products
// need next to no exchange, and a step moves one column of a lane to another. QR and Jacobi as
// above; R^T goes to its lanes through device memory, and the reflectors of the QR and all
// rotations stay there. In that of V, svd_twin_rows, a lane has rows of V, or parts of them: it
// makes Q of the reflectors and does the rotations again, which takes no exchange but of what they
// read. The rotations of kTwinKept sweeps have room; matrices that take more, of which few are
// known, go on in two more dispatches, from what the first two left.
//   Grid: batch threadgroups of 32 * SIMDGROUPS threads: one simdgroup for N <= 64, four up to 128,
//   then N / 24.
//   Threadgroup bytes: 4 * Twin::kNumbers or, with vectors, 16 * kSlices * (N + 1) if more; of
//   svd_twin_rows 4 * TwinRows::kNumbers. Device memory: 4 * Twin::kScratch bytes a matrix, 4 * N *
//   N for values only.
//
// Any size ("grid"): many threadgroups a matrix, in a sequence of dispatches. QR with the columns
// in order of size, then Jacobi on R^T by blocks of 32 columns: for each two blocks the Gram matrix
// of their 64 columns, one sweep of rotations on it, and its product with the columns of X and V.
//   dispatch           grid, batch times       threads
//   svd_grid_scan      side / 32               1024      largest entry of each column
//   svd_grid_rank      side / 32               256       their order; scaling; status
//   svd_grid_load      side / 32 * rows / 128  256       F = A, scaled and in order
//   svd_grid_panel     1                       <= 512    a panel of the QR, n / 16 times, each with
//   svd_grid_reflect   columns behind / C      256       the columns behind it; C = 4, 8, 16, 32
//   svd_grid_start     (side / 32)^2           256       X = R^T, V = I
//   svd_grid_gram      side / 64 * slices      128       a round, of side / 32 - 1 a sweep; thrice
//   svd_grid_solve     side / 64               288       that in the first
//   svd_grid_turn      side / 64 * slices      64        other slices
//   svd_grid_check     1                       32        once a sweep
//   svd_grid_norms     side / 8                256       singular values
//   svd_grid_lengths   side / 32               256       the same, nearer: without vectors, and
//                                                        behind what follows below
//   svd_grid_rank      side / 32               256       their order
//   svd_grid_complete  1                       256       with vectors: columns that vanished
//   svd_grid_merge     ceil(n / 32)            256       with vectors: two panels become one, twice
//   svd_grid_back      u_cols / C              256       with vectors: U = Q V, V = Q V; C >= 8
//   svd_grid_values    n / 256                 256       the results, in the storage type
//   svd_grid_factors   squares of 32 in U, Vt  256
//
// n <= 256 ("quarters"), for GPUs with registers for it: as "grid", but one dispatch a round in
// place of gram, solve, turn and check. Each threadgroup has half of a matrix's columns in
// registers and does the steps of "twin" on them; three rounds of it are a sweep. The first has two
// more threadgroups a matrix, which do the sweep before again for V.
//   svd_quarters_n256  2, or 4 with V          256       a round
//   Threadgroup bytes: 4 * Twin<128, 8>::kNumbers.
//
// n <= 2048 ("fused", "fused16"): as "grid", but one dispatch of a threadgroup a matrix in place of
// gram, solve, turn and check. PER_PAIR lanes rotate a pair of columns in device memory. In the row
// for N of "fused" they are 2048 / N, so that the N / 2 pairs of a round take 1024 threads at once;
// in "fused16" they are 16, and a round takes several steps.
//   svd_fused_nN       1                       32 * SIMDGROUPS, as few as in "pairs"; in pieces
//   svd_fused16_nN     1                       where a watchdog asks for it
//   Threadgroup bytes: 4 * SIMDGROUPS.
//
// Complex matrices of any size ("pairs"): a threadgroup a matrix, its columns in device memory. QR
// with the columns in order of size, QR of R^H, then Jacobi on the second R^H; a simdgroup rotates
// a pair of columns at a time.
//   dispatch           grid, batch times  threads
//   svd_pairs_load     1                  32 * SIMDGROUPS: so few that pairs of columns take as
//   svd_pairs_factor   1                  many steps as with 1024 threads. Twice, and like the next
//   svd_pairs_turn     1                  in pieces where a watchdog asks for it
//   svd_pairs_finish   1
//   svd_pairs_back     (u_cols + n) / 8   256: with vectors
//   Threadgroup bytes: 4 * SIMDGROUPS for svd_pairs_turn and svd_pairs_finish, else 0.
//
// Sizes: 1 <= n <= m <= N; m < n is the same problem with the strides of A swapped, and U and Vt
// exchanged. Rows and columns beyond m and n are zeros in registers, which rotations leave alone.
//
// Arithmetic is float32, also for 16-bit storage. The rows up to N = 32 are written for any type
// that Real knows: those of SVD_DOUBLE_VARIANTS compute in 64 bits, on GPUs that can. Their columns
// of V do not fit beside complex ones of A at N = 32, and lie in threadgroup memory.
//
// Edges. Lanes of matrices past the end of the batch compute on zeros and store nothing: no lane
// returns early, because simd functions need all 32. Results of a matrix do not depend on its
// neighbours. A is scaled by a power of two first, read by its bits so that denormals survive a
// device that flushes them. A matrix with a NaN or Inf, or not converged, gets NaN in its outputs.
// Columns that vanish are replaced by vectors orthonormal to the rest, so U and V are orthonormal
// always; u_cols > n completes U to more columns (u_cols <= m).

#ifndef JM_HOST
#include <metal_stdlib>
using namespace metal;
#endif

// Strides count elements. Offsets inside one matrix must fit in an int.
struct SvdParams {
  long a_batch;
  long u_batch;
  long vt_batch;
  int batch;
  int m;
  int n;
  int u_cols;
  int a_row;
  int a_col;
  int u_row;
  int u_col;
  int vt_row;
  int vt_col;
  int max_sweeps;
  int first;  // of the sweeps of a dispatch of "twin" with vectors
  int last;   // behind the last of them
  // Columns with |cosine| <= tol count as orthogonal: max(1, sqrt(m) / 4) * 2^-23, or 2^-52 in the
  // rows of SVD_DOUBLE_VARIANTS.
  float tol;
};

enum SvdGridSize {
  kGridBlock = 16,         // columns of a panel of the QR
  kGridHalf = 32,          // columns of a block that meets another
  kGridPair = 64,          // of two blocks
  kGridRows = 64,          // rows of them that a threadgroup holds at a time
  kGridSquare = 72,        // pitch of their Gram matrix
  kGridKept = 544,         // numbers of that of a block, between rounds
  kGridGramThreads = 128,  // of svd_grid_gram
  kGridSolveThreads = 288,
  kGridTurnThreads = 64,  // of svd_grid_turn
  kGridTurnRows = 32,     // that it holds at a time, at these pitches of a column and of a row of
  kGridTurnPitch = 40,    // the rotations: loads of a matrix of 8 x 8 then hit each bank once, on
  kGridTurnsPitch = 72,   // GPUs with 32 of them
  kGridTile = 128,        // rows that a threadgroup loads
  kGridReflected = 4,     // columns that svd_grid_reflect_4 takes a threadgroup
  kGridMerged = 32,       // reflections that svd_grid_back does at once
  kLengthsRows = 128,     // of svd_grid_lengths: rows and columns of the product,
  kLengthsColumns = 32,
  kLengthsDepth = 16  // and how many products a sum of it gains at a time
};

enum SvdTwinSize {
  kTwinKept = 12  // sweeps of "twin" whose rotations are kept, from one dispatch to the next
};

enum SvdQuartersSize {
  kQuarter = 64,  // columns; and steps of a part of a sweep, of which the first round has two
  kQuartersSide = 4 * kQuarter,
  kQuartersRows = 4 * (kQuarter + 1),  // kept of a sweep: rotations of a step, factors of a part
  kQuartersSlots = 24  // numbers of a matrix: cosine and tangent of 6 rounds' two halves
};

// Of the dispatches of "grid". The strides of SvdParams, then the layout of what lies between.
struct SvdGridParams {
  long a_batch;
  long u_batch;
  long vt_batch;
  int batch;
  int m;
  int n;
  int u_cols;
  int a_row;
  int a_col;
  int u_row;
  int u_col;
  int vt_row;
  int vt_col;
  int rows;    // of a column of F and Z: m rounded up to 64
  int side;    // of R, X and V: n rounded up to 64
  int height;  // of a column of W: side, twice that with vectors
  int step;    // panel, round, or which ranking
  int slices;  // threadgroups that share a pair; of "quarters", rounds of all sweeps
  float tol;
};

// Of the dispatches of "pairs" and of svd_fused. The strides of SvdParams, then the layout of what
// lies between.
struct SvdPairsParams {
  long a_batch;
  long u_batch;
  long vt_batch;
  int batch;
  int m;
  int n;
  int u_cols;
  int a_row;
  int a_col;
  int u_row;
  int u_col;
  int vt_row;
  int vt_col;
  int rows;    // of a column of F: m rounded up to 32, to 64 in svd_fused
  int side;    // of a column of X, and of V: n rounded up so
  int height;  // of a column of W: side, twice that with vectors
  int first;   // the dispatch does the columns of the QR, or the rounds, first <= i < last
  int last;
  float tol;
};

// status: one value a matrix.
enum SvdStatus { kSvdConverged = 0, kSvdNotConverged = 2, kSvdNonFinite = 3 };

// X(name, function, storage type, N, C, SIMDGROUPS)
#define SVD_SIZES(X, kind, function, tag, T, C)      \
  X(svd_##kind##_##tag##_n8, function, T, 8, C, 4)   \
  X(svd_##kind##_##tag##_n16, function, T, 16, C, 2) \
  X(svd_##kind##_##tag##_n32, function, T, 32, C, 2)
// Between the powers of two, where "ring" leaves lanes without columns.
#define SVD_RINGS_BETWEEN(X, tag, T)                        \
  X(svd_ring_vectors_##tag##_n12, svd_vectors, T, 12, 2, 2) \
  X(svd_ring_vectors_##tag##_n24, svd_vectors, T, 24, 2, 2) \
  X(svd_ring_values_##tag##_n12, svd_values, T, 12, 2, 2)   \
  X(svd_ring_values_##tag##_n24, svd_values, T, 24, 2, 2)
#define SVD_BLOCK(X, kind, tag, T, N, C)                                  \
  X(svd_##kind##_vectors_##tag##_n##N, svd_block_vectors, T, N, C, N / C) \
  X(svd_##kind##_values_##tag##_n##N, svd_block_values, T, N, C, N / C)
#define SVD_BLOCKS(X, kind, tag, T, C) \
  SVD_BLOCK(X, kind, tag, T, 64, C)    \
  SVD_BLOCK(X, kind, tag, T, 128, C)
// Between the powers of two. On an H200 40 columns took 2.3 times as long in the kernel for 64.
#define SVD_BLOCKS_BETWEEN(X, kind, tag, T, C) \
  SVD_BLOCK(X, kind, tag, T, 40, C)            \
  SVD_BLOCK(X, kind, tag, T, 48, C)            \
  SVD_BLOCK(X, kind, tag, T, 56, C)            \
  SVD_BLOCK(X, kind, tag, T, 80, C)            \
  SVD_BLOCK(X, kind, tag, T, 96, C)            \
  SVD_BLOCK(X, kind, tag, T, 112, C)
#define SVD_TWIN(X, tag, T, N, G)                                \
  X(svd_twin_vectors_##tag##_n##N, svd_twin_vectors, T, N, G, G) \
  X(svd_twin_rows_##tag##_n##N, svd_twin_rows, T, N, G, G)       \
  X(svd_twin_values_##tag##_n##N, svd_twin_values, T, N, G, G)
#define SVD_TWINS(X, tag, T)  \
  SVD_TWIN(X, tag, T, 64, 1)  \
  SVD_TWIN(X, tag, T, 128, 4) \
  SVD_TWIN(X, tag, T, 192, 8)
#define SVD_TWINS_BETWEEN(X, tag, T) \
  SVD_TWIN(X, tag, T, 40, 1)         \
  SVD_TWIN(X, tag, T, 48, 1)         \
  SVD_TWIN(X, tag, T, 56, 1)         \
  SVD_TWIN(X, tag, T, 80, 4)         \
  SVD_TWIN(X, tag, T, 96, 4)         \
  SVD_TWIN(X, tag, T, 112, 4)        \
  SVD_TWIN(X, tag, T, 144, 6)
#define SVD_KINDS(X, tag, T)                         \
  SVD_SIZES(X, xor_vectors, svd_vectors, tag, T, 1)  \
  SVD_SIZES(X, ring_vectors, svd_vectors, tag, T, 2) \
  SVD_SIZES(X, xor_values, svd_values, tag, T, 1)    \
  SVD_SIZES(X, ring_values, svd_values, tag, T, 2)   \
  SVD_RINGS_BETWEEN(X, tag, T)                       \
  SVD_BLOCKS(X, block8, tag, T, 8)                   \
  SVD_BLOCKS_BETWEEN(X, block8, tag, T, 8)           \
  SVD_BLOCKS(X, block16, tag, T, 16)                 \
  SVD_TWINS(X, tag, T)
#define SVD_VARIANTS(X)                                              \
  SVD_KINDS(X, f32, float)                                           \
  SVD_TWINS_BETWEEN(X, f32, float)                                   \
  SVD_KINDS(X, f16, half)                                            \
  SVD_KINDS(X, bf16, bfloat)                                         \
  SVD_SIZES(X, xor_vectors, svd_complex_vectors, c64, float2, 1)     \
  X(svd_ring_vectors_c64_n8, svd_complex_vectors, float2, 8, 2, 4)   \
  X(svd_ring_vectors_c64_n16, svd_complex_vectors, float2, 16, 2, 2) \
  SVD_SIZES(X, xor_values, svd_complex_values, c64, float2, 1)       \
  SVD_SIZES(X, ring_values, svd_complex_values, c64, float2, 2)
// The same for GPUs that have 64-bit floating point. Not expanded below: tools/msl makes them.
#define SVD_DOUBLE_VARIANTS(X)                                             \
  SVD_SIZES(X, xor_vectors, svd_vectors, f64, double, 1)                   \
  SVD_SIZES(X, xor_values, svd_values, f64, double, 1)                     \
  X(svd_xor_vectors_c128_n8, svd_complex_vectors, double2, 8, 1, 4)        \
  X(svd_xor_vectors_c128_n16, svd_complex_vectors, double2, 16, 1, 2)      \
  X(svd_xor_vectors_c128_n32, svd_complex_tile_vectors, double2, 32, 1, 2) \
  SVD_SIZES(X, xor_values, svd_complex_values, c128, double2, 1)

// X(name, function, storage type): what of "grid" depends on the storage type.
#define SVD_GRID_KERNELS(X, tag, T)            \
  X(svd_grid_scan_##tag, svd_grid_scan, T)     \
  X(svd_grid_load_##tag, svd_grid_load, T)     \
  X(svd_grid_values_##tag, svd_grid_values, T) \
  X(svd_grid_factors_##tag, svd_grid_factors, T)
#define SVD_GRID_VARIANTS(X)      \
  SVD_GRID_KERNELS(X, f32, float) \
  SVD_GRID_KERNELS(X, f16, half)  \
  SVD_GRID_KERNELS(X, bf16, bfloat)

// X(name, function, N, PER_PAIR): up to N columns.
#define SVD_FUSED_VARIANTS(X)               \
  X(svd_fused_n256, svd_fused, 256, 8)      \
  X(svd_fused_n512, svd_fused, 512, 4)      \
  X(svd_fused_n1024, svd_fused, 1024, 2)    \
  X(svd_fused_n2048, svd_fused, 2048, 1)    \
  X(svd_fused16_n2048, svd_fused, 2048, 16) \
  X(svd_quarters_n256, svd_quarters, 256, 8)

#ifndef JM_HOST

constant float kTiny = 1e-37f;              // below it a squared norm or a dot product is rounding
constant float kVanished = 8.8817842e-16f;  // 2^-50: dot products of such columns underflow
constant float kLift = 1.8446744e19f;       // 2^64: squares of what is above kTiny do not underflow
constant float kHeavy = 1.0995116e12f;      // 2^40: above it a column is rescaled

// What a kernel computes in, by the type that it stores, and what it has to know of it. Rows of
// SVD_DOUBLE_VARIANTS have theirs in msl_double.h; Apple's compiler sees neither.
template <typename T>
struct Real {
  typedef float type;
  typedef uint bits;
  enum {
    kMantissa = 23,  // bits
    kBias = 127,     // of the exponent
    kSign = 31,      // its bit
    kRoot = 64       // squares of 2^-kRoot underflow
  };
  static float tiny() { return kTiny; }
  static float vanished() { return kVanished; }
};
template <typename T>
using RealOf = typename Real<T>::type;
template <typename T>
using BitsOf = typename Real<T>::bits;

// Of infinity; those of a NaN are above, those of other numbers below.
template <typename F>
inline BitsOf<F> exponent_bits() {
  return BitsOf<F>(2 * Real<F>::kBias + 1) << Real<F>::kMantissa;
}

// Columns are kept scaled: the true column is the stored one over the square root of its weight,
// the squared length of its column of V. Then a rotation of x and y takes half the products:
//   x <- x - a y,   y <- y + b x,   both weights times 1 + a b   (fast scaled rotation, as xROTM)
template <typename F>
struct Rotation {
  F a;
  F b;
  F growth;  // a b
  F t;       // tangent
  F change;  // what the squared norm of x loses and that of y gains
  F cosine;  // |cosine| of the angle between the two columns, before rotating
};

// A weight and what rounding took from it: weights that drift would turn V away from orthogonal.
template <typename F>
struct Weight {
  F w;
  F lost;
};

template <typename F>
inline Weight<F> grown(Weight<F> k, F growth) {
  F sum = fma(k.w, growth, k.w);
  F lost = fma(k.lost, growth, k.lost + fma(k.w, growth, k.w - sum));
  Weight<F> r;
  r.w = sum + lost;
  r.lost = lost + (sum - r.w);
  return r;
}

// The same for the two apart.
inline void grow(thread float& weight, thread float& lost, float growth) {
  Weight<float> k;
  k.w = weight;
  k.lost = lost;
  k = grown(k, growth);
  weight = k.w;
  lost = k.lost;
}

// Has a sweep with these as largest |cosine| and tangent left all columns orthogonal? What it
// leaves behind is a product of two angles. Cosines alone cannot tell: inside a cluster small
// cosines need large rotations. Nor can tangents: a tiny column has a tiny one.
template <typename F>
inline bool orthogonal_behind(F max_cos, F max_tan, int n, float tol) {
  return max_cos <= tol || max_cos * max(max_cos, max_tan) * sqrt(F(n)) < tol;
}

// 2^k, k above -kBias and up to it.
template <typename F>
inline F power_of_two(int k) {
  return as_type<F>(BitsOf<F>(k + Real<F>::kBias) << Real<F>::kMantissa);
}

// Bits of |x|, in the order of size.
template <typename F>
inline BitsOf<F> size_bits(F x) {
  return as_type<BitsOf<F>>(x) & ~(BitsOf<F>(1) << Real<F>::kSign);
}

// The least positive number is 2^-least_exponent (float: 149).
template <typename F>
inline int least_exponent() {
  return Real<F>::kBias - 1 + Real<F>::kMantissa;
}

// k for which a number with these bits lies in [1, 4) times 2^-k; denormals become whole numbers.
template <typename F>
inline int scale_of(BitsOf<F> bits) {
  const int bias = Real<F>::kBias;
  const int digits = Real<F>::kMantissa;
  bool normal = bits >= BitsOf<F>(1) << digits;
  return normal ? max(bias - int(bits >> digits), 1 - bias) : least_exponent<F>();
}

// x * 2^k with no flush of a denormal x: a denormal is its mantissa bits times the least number.
template <typename F>
inline F scale_in(F x, int k) {
  const int bias = Real<F>::kBias;
  const int digits = Real<F>::kMantissa;
  BitsOf<F> bits = as_type<BitsOf<F>>(x);
  if ((bits & exponent_bits<F>()) == 0u) {
    F units = F(bits & ((BitsOf<F>(1) << digits) - 1u));
    F y = units * power_of_two<F>(clamp(k - least_exponent<F>(), 1 - bias, bias));
    y = k < digits ? F(0) : y;
    return (bits >> Real<F>::kSign) != 0u ? -y : y;
  }
  return x * power_of_two<F>(min(k, bias));
}

// x * 2^-k for 0 <= x < 2^38, building a denormal result from its bits. Where k is smaller, only
// what is nothing beside the matrix's largest entry could become one.
template <typename F>
inline F scale_out(F x, int k) {
  const int digits = Real<F>::kMantissa;
  if (k > least_exponent<F>() - Real<F>::kBias + 38) {
    F units = x * power_of_two<F>(least_exponent<F>() - k);  // of the least number
    if (units < power_of_two<F>(digits)) return as_type<F>(BitsOf<F>(units + F(0.5f)));
    return as_type<F>(as_type<BitsOf<F>>(units) - (BitsOf<F>(least_exponent<F>()) << digits));
  }
  return x * power_of_two<F>(-k);
}

// x, or NaN. Chosen by bits, so that a compiler told to expect no NaN still stores one.
template <typename F>
inline F or_nan(F x, bool good) {
  BitsOf<F> nan = exponent_bits<F>() | BitsOf<F>(1) << (Real<F>::kMantissa - 1);
  return as_type<F>(good ? as_type<BitsOf<F>>(x) : nan);
}

template <int L, typename F>
inline F group_sum(F x) {
#pragma unroll
  for (int o = L / 2; o > 0; o /= 2) x += simd_shuffle_xor(x, ushort(o));
  return x;
}

template <int L, typename F>
inline F group_max(F x) {
#pragma unroll
  for (int o = L / 2; o > 0; o /= 2) x = max(x, simd_shuffle_xor(x, ushort(o)));
  return x;
}

// Four partial sums: a chain of N dependent additions would be most of a step's latency.
template <int N, typename F>
inline F dot_product(thread const F (&x)[N], thread const F (&y)[N]) {
  F part[4] = {F(0), F(0), F(0), F(0)};
#pragma unroll
  for (int i = 0; i < N; ++i) part[i % 4] = fma(x[i], y[i], part[i % 4]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The angle that makes columns with squared norms a, b and dot product `dot` orthogonal. It may be
// rough, hence approximate divisions and roots. Sets all but a, b and growth.
template <typename F>
inline Rotation<F> rotation_angle(F a, F b, F dot, float tol) {
  const F tiny = Real<F>::tiny();
  F size = fabs(dot);
  Rotation<F> r;
  r.cosine = min(min(size * rsqrt(max(a, tiny)), F(1e18f)) * rsqrt(max(b, tiny)), F(1));
  bool rotate = r.cosine > tol && size > tiny;
  F h = b - a;
  F w = F(2) * size;
  F inverse = fast::divide(F(1), max(max(fabs(h), w), tiny));  // h and w may be tiny squares
  F hs = fabs(h) * inverse;
  F ws = w * inverse;
  // tan(theta) = w / (|h| + sqrt(h^2 + w^2)), the smaller root.
  F squares = fma(hs, hs, ws * ws);
  F t = fast::divide(ws, max(hs + squares * rsqrt(max(squares, F(0.5f))), F(0.5f)));
  F sign = (h < F(0)) != (dot < F(0)) ? F(-1) : F(1);
  r.t = rotate ? sign * t : F(0);
  r.change = r.t * dot;
  return r;
}

// The rotation of stored columns with dot product g, weights wa and wb and the true ones' squared
// norms a and b. b wa must equal a wb to the last bit or so, or V drifts: one Newton step there.
template <typename F>
inline Rotation<F> rotation(F a, F b, F g, F wa, F wb, float tol) {
  F unscale = rsqrt(wa) * rsqrt(wb);
  Rotation<F> r = rotation_angle(a, b, g * unscale, tol);
  F over = fast::divide(F(1), wa);
  over = fma(over, fma(-wa, over, F(1)), over);
  r.a = r.t * (wa * unscale);
  r.b = r.a * (wb * over);
  r.growth = r.a * r.b;
  return r;
}

// The same rotation for columns that are not scaled, in Rutishauser's form: x <- x - s (y + tau x),
// y <- y + s (x - tau y). It keeps V orthonormal to rounding if s matches tau to the last bit or
// so. Three shears, x <- x - tau y, y <- y + s x, x <- x - tau y, take 3 products for 4. Of V they
// do as well; where they turned A too, singular values of entries over 36 decades were off by 8 ulp
// for 5.
template <typename F>
struct PlainRotation {
  F s;    // sine
  F tau;  // tangent of half the angle
};

template <typename F>
inline PlainRotation<F> plain_rotation(F t) {
  F secant = fma(t, t, F(1));
  PlainRotation<F> r;
  r.tau = fast::divide(t, fma(secant, rsqrt(secant), F(1)));
  F below = fma(r.tau, r.tau, F(1));
  F over = fast::divide(F(1), below);
  over = fma(over, fma(-below, over, F(1)), over);
  r.s = F(2) * r.tau * over;
  return r;
}

// A complex column is 2 N numbers: real parts, then imaginary ones.

// A number by its phase, of length 1 to the last bit or so (0 for zero), and its size.
template <typename F>
struct Phase {
  F re;
  F im;
  F size;
};

template <typename F>
inline Phase<F> phase_of(F re, F im) {
  F largest = max(fabs(re), fabs(im));
  F inverse = fast::divide(F(1), max(largest, Real<F>::tiny()));
  re *= inverse;
  im *= inverse;
  F squares = max(fma(re, re, im * im), Real<F>::tiny());
  F over = rsqrt(squares);
  Phase<F> e;
  e.size = largest * (squares * over);
  re *= over;
  im *= over;
  over = fma(F(-0.5f), fma(re, re, im * im), F(1.5f));
  e.re = re * over;
  e.im = im * over;
  return e;
}

// Partial sums of the products of real and imaginary parts of two columns, as in dot_product.
template <typename F>
struct ComplexSums {
  F re[4];
  F im[4];
  F re_im[4];
  F im_re[4];
};

template <typename F>
inline void clear(thread ComplexSums<F>& sums) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums.re[i] = F(0);
    sums.im[i] = F(0);
    sums.re_im[i] = F(0);
    sums.im_re[i] = F(0);
  }
}

template <typename F>
inline void add_products(thread ComplexSums<F>& sums, int i, F xr, F xi, F yr, F yi) {
  sums.re[i % 4] = fma(xr, yr, sums.re[i % 4]);
  sums.im[i % 4] = fma(xi, yi, sums.im[i % 4]);
  sums.re_im[i % 4] = fma(xr, yi, sums.re_im[i % 4]);
  sums.im_re[i % 4] = fma(xi, yr, sums.im_re[i % 4]);
}

template <typename F>
inline F total(thread const F (&part)[4]) {
  return (part[0] + part[1]) + (part[2] + part[3]);
}

template <typename F>
inline Phase<F> phase_of_sums(thread const ComplexSums<F>& sums) {
  return phase_of(total(sums.re) + total(sums.im), total(sums.re_im) - total(sums.im_re));
}

// How the lanes of a simdgroup are shared: N / C of every kSpan, a power of two, hold columns.
template <int N, int C>
struct Lanes {
  enum {
    kSpan = N / C > 16 ? 32 : (N / C > 8 ? 16 : (N / C > 4 ? 8 : 4)),
    kMatrices = 32 / kSpan,
    kTile = kMatrices * N * (N + 1)  // numbers of threadgroup memory, a simdgroup
  };
};

// Makes a stored column the true one.
template <int N, int C, bool VECTORS, typename F>
inline void unit_column(thread F (&x)[N], thread F (&v)[N], thread Weight<F>& weight) {
  F down = F(1) / sqrt(weight.w);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= down;
  if (VECTORS) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= down;
  }
  weight.w = F(1);
  weight.lost = F(0);
}

// One sweep, lane ^ k order.
template <int N, int C, bool VECTORS, typename F>
inline void sweep_xor(thread F (&x)[C][N], thread F (&v)[C][N], thread F (&norm)[C],
                      thread Weight<F> (&weight)[C], bool live, float tol, uint lane,
                      thread F& max_cos, thread F& max_tan) {
  for (uint k = 1; k < uint(N); ++k) {
    F y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = simd_shuffle_xor(x[0][i], ushort(k));
    F g = dot_product<N>(x[0], y);
    F other = simd_shuffle_xor(norm[0], ushort(k));
    bool first = (lane ^ k) > lane;
    F across = simd_shuffle_xor(weight[0].w, ushort(k));
    Rotation<F> r = rotation(first ? norm[0] : other, first ? other : norm[0], g,
                             first ? weight[0].w : across, first ? across : weight[0].w, tol);
    bool rotate = live && r.t != F(0);
    max_cos = max(max_cos, r.cosine);
    if (simd_any(rotate)) {
      F s = rotate ? (first ? -r.a : r.b) : F(0);
      max_tan = max(max_tan, fabs(r.t));
      norm[0] += rotate ? (first ? -r.change : r.change) : F(0);
      weight[0] = grown(weight[0], rotate ? r.growth : F(0));
#pragma unroll
      for (int i = 0; i < N; ++i) x[0][i] = fma(s, y[i], x[0][i]);
      if (VECTORS) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          F w = simd_shuffle_xor(v[0][i], ushort(k));
          v[0][i] = fma(s, w, v[0][i]);
        }
      }
    }
  }
}

// x <- x - a y,   y <- y + b x.
template <int L, typename F>
inline void rotate_real(thread F (&x)[L], thread F (&y)[L], F a, F b) {
#pragma unroll
  for (int i = 0; i < L; ++i) {
    F q = x[i];
    x[i] = fma(-a, y[i], q);
    y[i] = fma(b, q, y[i]);
  }
}

// x <- x - a conj(e) y,   y <- y + b e x   for complex columns.
template <int N, int L, typename F>
inline void rotate_complex(thread F (&x)[L], thread F (&y)[L], F a, F b, Phase<F> e) {
  const F ar = a * e.re;
  const F ai = a * e.im;
  const F br = b * e.re;
  const F bi = b * e.im;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int j = L - N + i;
    F xr = x[i];
    F xi = x[j];
    F yr = y[i];
    F yi = y[j];
    x[i] = fma(-ar, yr, fma(-ai, yi, xr));
    x[j] = fma(-ar, yi, fma(ai, yr, xi));
    y[i] = fma(br, xr, fma(-bi, xi, yr));
    y[j] = fma(br, xi, fma(bi, xr, yi));
  }
}

// Rotates the two columns of this lane, of L numbers: N, or 2 N of complex columns. There the phase
// of the dot product turns each column towards the other, so that the angle is that of two real
// ones.
template <int N, int C, bool VECTORS, int L, typename F>
inline void rotate_pair(thread F (&x)[C][L], thread F (&v)[C][L], thread F (&norm)[C],
                        thread Weight<F> (&weight)[C], bool live, float tol, thread F& max_cos,
                        thread F& max_tan) {
  const bool complex = L > N;
  F g = F(0);
  Phase<F> e;
  e.re = F(1);
  e.im = F(0);
  if (complex) {
    ComplexSums<F> sums;
    clear(sums);
#pragma unroll
    for (int i = 0; i < N; ++i)
      add_products(sums, i, x[0][i], x[0][L - N + i], x[C - 1][i], x[C - 1][L - N + i]);
    e = phase_of_sums(sums);
    g = e.size;
  } else {
    g = dot_product<L>(x[0], x[C - 1]);
  }
  Rotation<F> r = rotation(norm[0], norm[C - 1], g, weight[0].w, weight[C - 1].w, tol);
  bool rotate = live && r.t != F(0);
  max_cos = live ? max(max_cos, r.cosine) : max_cos;
  // With 64 numbers a column no registers are left for both sides of a branch.
  if (L > 32 || simd_any(rotate)) {
    F ra = rotate ? r.a : F(0);
    F rb = rotate ? r.b : F(0);
    F change = rotate ? r.change : F(0);
    F growth = rotate ? r.growth : F(0);
    max_tan = max(max_tan, rotate ? fabs(r.t) : F(0));
    norm[0] -= change;
    norm[C - 1] += change;
    weight[0] = grown(weight[0], growth);
    weight[C - 1] = grown(weight[C - 1], growth);
    if (complex) {
      rotate_complex<N>(x[0], x[C - 1], ra, rb, e);
      if (VECTORS) rotate_complex<N>(v[0], v[C - 1], ra, rb, e);
    } else {
      rotate_real(x[0], x[C - 1], ra, rb);
      if (VECTORS) rotate_real(v[0], v[C - 1], ra, rb);
    }
  }
}

// One sweep, odd-even order. Columns stand at positions 0..N-1, lane l at 2l and 2l+1. Each step
// swaps the pairs it rotates, so that after N steps every two columns have met once. In an odd step
// the pairs are (2l+1, 2l+2); the last lane then holds positions N-1 and 0, which do not meet. L:
// numbers of a column.
template <int N, int C, bool VECTORS, int L, typename F>
inline void sweep_ring(thread F (&x)[C][L], thread F (&v)[C][L], thread F (&norm)[C],
                       thread Weight<F> (&weight)[C], bool live, float tol, uint lane,
                       thread F& max_cos, thread F& max_tan) {
  const uint lanes = uint(N / C);
  const uint span = uint(Lanes<N, C>::kSpan);
  const uint own = lane & (span - 1u);
  // The columns of a finished matrix stay where they are, however long its neighbours go on.
  live = live && own < lanes;
  const uint base = lane - own;
  ushort right = ushort(live ? base + (own + 1u) % lanes : lane);
  ushort left = ushort(live ? base + (own + lanes - 1u) % lanes : lane);
  bool last = live && own == lanes - 1u;
  for (int step = 0; step < N; step += 2) {
    rotate_pair<N, C, VECTORS>(x, v, norm, weight, live, tol, max_cos, max_tan);
    norm[C - 1] = simd_shuffle(norm[C - 1], right);
    weight[C - 1].w = simd_shuffle(weight[C - 1].w, right);
    weight[C - 1].lost = simd_shuffle(weight[C - 1].lost, right);
#pragma unroll
    for (int i = 0; i < L; ++i) x[C - 1][i] = simd_shuffle(x[C - 1][i], right);
    if (VECTORS) {
#pragma unroll
      for (int i = 0; i < L; ++i) v[C - 1][i] = simd_shuffle(v[C - 1][i], right);
    }
    rotate_pair<N, C, VECTORS>(x, v, norm, weight, live && !last, tol, max_cos, max_tan);
    F move = last ? norm[C - 1] : norm[0];
    norm[C - 1] = last ? norm[0] : norm[C - 1];
    norm[0] = simd_shuffle(move, left);
    F heavy = last ? weight[C - 1].w : weight[0].w;
    F light = last ? weight[C - 1].lost : weight[0].lost;
    weight[C - 1].w = last ? weight[0].w : weight[C - 1].w;
    weight[C - 1].lost = last ? weight[0].lost : weight[C - 1].lost;
    weight[0].w = simd_shuffle(heavy, left);
    weight[0].lost = simd_shuffle(light, left);
#pragma unroll
    for (int i = 0; i < L; ++i) {
      F m = last ? x[C - 1][i] : x[0][i];
      x[C - 1][i] = last ? x[0][i] : x[C - 1][i];
      x[0][i] = simd_shuffle(m, left);
    }
    if (VECTORS) {
#pragma unroll
      for (int i = 0; i < L; ++i) {
        F m = last ? v[C - 1][i] : v[0][i];
        v[C - 1][i] = last ? v[0][i] : v[C - 1][i];
        v[0][i] = simd_shuffle(m, left);
      }
    }
  }
}

// rank[c] = place of this lane's column c when all N are sorted by key, largest first.
template <int N, int C, typename F>
inline void rank_columns(thread const F (&key)[C], thread int (&rank)[C], uint lane) {
  int own = int(lane) & (Lanes<N, C>::kSpan - 1);
  int base = int(lane) - own;
  for (int c = 0; c < C; ++c) rank[c] = 0;
  for (int j = 0; j < N / C; ++j) {
    for (int d = 0; d < C; ++d) {
      F other = simd_shuffle(key[d], ushort(base + j));
      for (int c = 0; c < C; ++c) {
        bool before = other > key[c] || (other == key[c] && j * C + d < own * C + c);
        rank[c] += before ? 1 : 0;
      }
    }
  }
}

// Replaces the missing columns by vectors orthonormal to all others: the unit vector that lies
// furthest from their span, orthogonalised twice.
template <int N, int C, typename F>
inline void complete_columns(thread F (&x)[C][N], thread const int (&rank)[C],
                             thread const bool (&missing)[C], int m, int u_cols) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[c][i] = missing[c] ? F(0) : x[c][i];
  }
  for (int r = 0; r < u_cols; ++r) {
    bool here = false;
    for (int c = 0; c < C; ++c) here = here || (missing[c] && rank[c] == r);
    if (!simd_any(here)) continue;
    int row = 0;
    F least = F(4);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      F part = F(0);
      for (int c = 0; c < C; ++c) part = fma(x[c][i], x[c][i], part);
      part = group_sum<Lanes<N, C>::kSpan>(part);
      bool better = i < m && part < least;
      row = better ? i : row;
      least = better ? part : least;
    }
    F w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = i == row ? F(1) : F(0);
    for (int pass = 0; pass < 2; ++pass) {
      F along[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        along[c] = F(0);
#pragma unroll
        for (int i = 0; i < N; ++i) along[c] = fma(x[c][i], w[i], along[c]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        F part = F(0);
        for (int c = 0; c < C; ++c) part = fma(along[c], x[c][i], part);
        w[i] -= group_sum<Lanes<N, C>::kSpan>(part);
      }
    }
    F squares = F(0);
#pragma unroll
    for (int i = 0; i < N; ++i) squares = fma(w[i], w[i], squares);
    F inverse = F(1) / sqrt(max(squares, Real<F>::tiny()));
#pragma unroll
    for (int c = 0; c < C; ++c) {
      bool take = missing[c] && rank[c] == r;
#pragma unroll
      for (int i = 0; i < N; ++i) x[c][i] = take ? w[i] * inverse : x[c][i];
    }
  }
}

// Product of the first L elements, but FIRST of them.
template <int FIRST, int L, int N, int M, typename F>
inline F top_product(thread const F (&x)[N], thread const F (&y)[M]) {
  F part[4] = {F(0), F(0), F(0), F(0)};
#pragma unroll
  for (int i = FIRST; i < L; ++i) part[i % 4] = fma(x[i], y[i], part[i % 4]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// x + g w without its first element, which is returned, moved up by one.
template <int N, int L, typename F>
inline F shift_out(thread F (&x)[N], thread const F (&w)[L], F g) {
  F top = fma(g, w[0], x[0]);
#pragma unroll
  for (int i = 1; i < L; ++i) x[i - 1] = fma(g, w[i], x[i]);
  return top;
}

// Up to eight steps of a QR with column pivoting, on the L rows that are left, in x[.][0..L-1]. A
// step reflects the longest column that is left, wherever it is, to a multiple of the first unit
// vector, with it all others, and the rows of Q in q. Their first elements are final then: x's go
// to the tile, as a row of R, q's behind the others, and these move up by one register, so that all
// steps are one loop. (Written out it took 1.09 of the time in "ring" and the same in "xor" on an
// H200.) No column moves: Jacobi works on rows of R, and these are in order. Below its row a column
// is zeros, which is said only where R leaves. Nothing is reflected once all that is left vanished.
template <int N, int C, int L, bool VECTORS, typename F>
inline void reflect_rows(thread F (&x)[C][N], thread F (&q)[C][N], thread bool (&taken)[C],
                         threadgroup F* tile, uint lane) {
  const int span = Lanes<N, C>::kSpan;
  const int mask = span * C - 1;
  const int own = int(lane) & (span - 1);
  const int first = own * C;
  threadgroup F* row = tile + (N - L) * (N + 1) + first;
  const F least = Real<F>::vanished() * Real<F>::vanished();
  for (int step = 0; step < min(L, 8); ++step) {
    F below[C];  // squares of what is to vanish
    BitsOf<F> best = 0u;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      below[c] = top_product<1, L>(x[c], x[c]);
      F squares = fma(x[c][0], x[c][0], below[c]);
      // The column's number stands in the last bits.
      BitsOf<F> key = (as_type<BitsOf<F>>(squares) | BitsOf<F>(mask)) ^ BitsOf<F>(first + c);
      best = max(best, taken[c] ? BitsOf<F>(0u) : key);
    }
    best = group_max<Lanes<N, C>::kSpan>(best);
    const bool reflect = as_type<F>(best) > least;
    const int column = int(best & BitsOf<F>(mask)) ^ mask;
    const ushort owner = ushort(int(lane) - own + column / C);
    const bool odd = column % C != 0;
    F w[L];  // the column, and then what it is reflected along
#pragma unroll
    for (int i = 0; i < L; ++i) w[i] = simd_shuffle(odd ? x[C - 1][i] : x[0][i], owner);
    F rest = simd_shuffle(odd ? below[C - 1] : below[0], owner);
    // Q is as orthonormal as the root and the quotient are right: one Newton step each.
    F squares = max(fma(w[0], w[0], rest), least);
    F over = rsqrt(squares);
    F size = squares * over;
    size = fma(F(0.5f) * over, fma(-size, size, squares), size);
    F edge = size + fabs(w[0]);
    F halved = size * edge;  // half of w's squared length
    F tau = fast::divide(F(1), halved);
    tau = fma(tau, fma(-halved, tau, F(1)), tau);
    tau = reflect && rest > F(0) ? -tau : F(0);
    F made = rest > F(0) ? (w[0] < F(0) ? size : -size) : w[0];
    w[0] = w[0] < F(0) ? -edge : edge;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const bool mine = reflect && first + c == column;
      F r = shift_out(x[c], w, tau * top_product<0, L>(x[c], w));
      x[c][L - 1] = F(0);
      if (first < N) row[step * (N + 1) + c] = mine ? made : (taken[c] ? F(0) : r);
      taken[c] = taken[c] || mine;
      if (VECTORS) {
        r = shift_out(q[c], w, tau * top_product<0, L>(q[c], w));
        q[c][L - 1] = r;
      }
    }
  }
}

// The same where all columns are taken, or have vanished.
template <int N, int C, int L, bool VECTORS, typename F>
inline void pass_rows(thread F (&x)[C][N], thread F (&q)[C][N], thread const bool (&taken)[C],
                      threadgroup F* tile, uint lane) {
  const int first = (int(lane) & (Lanes<N, C>::kSpan - 1)) * C;
  threadgroup F* row = tile + (N - L) * (N + 1) + first;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    F top[8];
#pragma unroll
    for (int i = 0; i < min(L, 8); ++i) {
      if (first < N) row[i * (N + 1) + c] = taken[c] ? F(0) : x[c][i];
      top[i] = q[c][i];
    }
#pragma unroll
    for (int i = 8; i < L; ++i) {
      x[c][i - 8] = x[c][i];
      if (VECTORS) q[c][i - 8] = q[c][i];
    }
#pragma unroll
    for (int i = 0; i < min(L, 8); ++i) {
      if (VECTORS) q[c][max(L - 8, 0) + i] = top[i];
    }
  }
}

// A = Q R with the columns of A in x. Leaves the columns of R^T in x, and in q those of Q, cut off
// after m rows. The tile holds N * (N + 1) numbers.
template <int N, int C, bool VECTORS, typename F>
inline void factor_columns(thread F (&x)[C][N], thread F (&q)[C][N], int m, int n,
                           threadgroup F* tile, uint lane) {
  const int pitch = N + 1;
  const int first = (int(lane) & (Lanes<N, C>::kSpan - 1)) * C;
  bool taken[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    taken[c] = false;
#pragma unroll
    for (int i = 0; i < N; ++i) q[c][i] = i == first + c && i < m ? F(1) : F(0);
  }
  reflect_rows<N, C, N, VECTORS>(x, q, taken, tile, lane);
  if (N > 8) {
    if (n > 8)
      reflect_rows<N, C, (N > 8 ? N - 8 : 8), VECTORS>(x, q, taken, tile, lane);
    else
      pass_rows<N, C, (N > 8 ? N - 8 : 8), VECTORS>(x, q, taken, tile, lane);
  }
  if (N > 16) {
    if (n > 16)
      reflect_rows<N, C, (N > 16 ? N - 16 : 8), VECTORS>(x, q, taken, tile, lane);
    else
      pass_rows<N, C, (N > 16 ? N - 16 : 8), VECTORS>(x, q, taken, tile, lane);
  }
  if (N > 24) {
    if (n > 24)
      reflect_rows<N, C, (N > 24 ? N - 24 : 8), VECTORS>(x, q, taken, tile, lane);
    else
      pass_rows<N, C, (N > 24 ? N - 24 : 8), VECTORS>(x, q, taken, tile, lane);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[c][i] = first < N ? tile[(first + c) * pitch + i] : F(0);
  }
  if (VECTORS) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = max(N - 8 - i / 8 * 8, 0);
        if (first < N) tile[i * pitch + first + c] = q[c][at + i % 8];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) q[c][i] = first < N ? tile[(first + c) * pitch + i] : F(0);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

template <typename T, int N, int C, bool VECTORS>
inline void svd_simdgroup(device const T* a, device T* u, device T* s, device T* vt,
                          device int* status, device int* sweeps, device float* off_norm,
                          constant SvdParams& p, threadgroup RealOf<T>* tile, uint simdgroup,
                          uint lane) {
  typedef RealOf<T> F;
  const uint lanes = uint(Lanes<N, C>::kSpan);
  uint within = lane / lanes;  // which of the simdgroup's matrices
  uint own = lane % lanes;     // which of the matrix's lanes
  long matrix = long(simdgroup) * long(Lanes<N, C>::kMatrices) + long(within);
  bool active = matrix < long(p.batch);

  F x[C][N];
  F v[C][N];
  BitsOf<F> bits = 0u;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = int(own) * C + c;
    bool inside = active && column < p.n;
    device const T* from = a + (inside ? matrix * p.a_batch + long(column * p.a_col) : long(0));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[c][i] = F(0);
      if (inside && i < p.m) x[c][i] = F(from[i * p.a_row]);
      bits = max(bits, size_bits(x[c][i]));
    }
  }
  bits = group_max<Lanes<N, C>::kSpan>(bits);
  bool finite = bits < exponent_bits<F>();
  int k = scale_of<F>(bits);

  const int digits = Real<F>::kMantissa;
  F factor = power_of_two<F>(min(k, int(Real<F>::kBias)));
  // Below it denormals are part of the result.
  bool small = bits < BitsOf<F>(digits + 8) << digits;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (simd_any(small)) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[c][i] = small ? scale_in(x[c][i], k) : x[c][i] * factor;
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[c][i] *= factor;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[c][i] = finite ? x[c][i] : F(0);
  }

  const int pitch = N + 1;
  threadgroup F* corner = tile + within * uint(N * pitch);
  factor_columns<N, C, VECTORS>(x, v, p.m, p.n, corner, lane);

  bool done = !(active && finite);
  bool converged = false;
  int count = 0;
  F off = F(0);
  Weight<F> weight[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    weight[c].w = F(1);
    weight[c].lost = F(0);
  }
  for (int sweep = 0; sweep < p.max_sweeps; ++sweep) {
    if (!simd_any(!done)) break;
    F norm[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (simd_any(weight[c].w > kHeavy)) unit_column<N, C, VECTORS>(x[c], v[c], weight[c]);
      norm[c] = dot_product<N>(x[c], x[c]) / weight[c].w;
      // Products of columns so short underflow. Beside a length of 1 they are orthogonal to all;
      // what they hold is lost in rounding, and another takes their place at the end.
      norm[c] = norm[c] < F(0.25f) * Real<F>::vanished() * Real<F>::vanished() ? F(1) : norm[c];
    }
    F max_cos = F(0);
    F max_tan = F(0);
    if (C == 1)
      sweep_xor<N, C, VECTORS>(x, v, norm, weight, !done, p.tol, lane, max_cos, max_tan);
    else
      sweep_ring<N, C, VECTORS>(x, v, norm, weight, !done, p.tol, lane, max_cos, max_tan);
    max_cos = group_max<Lanes<N, C>::kSpan>(max_cos);
    max_tan = group_max<Lanes<N, C>::kSpan>(max_tan);
    if (!done) {
      count = sweep + 1;
      off = max_cos;
      converged = orthogonal_behind(max_cos, max_tan, p.n, p.tol);
      done = converged;
    }
  }
  bool good = active && finite && converged;
#pragma unroll
  for (int c = 0; c < C; ++c) unit_column<N, C, VECTORS>(x[c], v[c], weight[c]);

  F sigma[C];
  F key[C];
  int rank[C];
  bool missing[C];
  bool any_missing = false;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    // Squares of a small column would underflow.
    F largest = F(0);
#pragma unroll
    for (int i = 0; i < N; ++i) largest = max(largest, fabs(x[c][i]));
    const int root = Real<F>::kRoot;
    F up = largest < power_of_two<F>(-root / 2) ? power_of_two<F>(root) : F(1);
    F squares = F(0);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      F y = x[c][i] * up;
      squares = fma(y, y, squares);
    }
    F length = sqrt(squares);
    missing[c] = !(length > Real<F>::vanished() * up);
    F inverse = missing[c] ? F(0) : up / length;
#pragma unroll
    for (int i = 0; i < N; ++i) x[c][i] *= inverse;
    sigma[c] = good ? length / up : F(0);
    key[c] = sigma[c];
    if (VECTORS) {
      // The reflections' rounding leaves no length of exactly one.
      F square = dot_product<N>(v[c], v[c]);
      bool padding = square < F(0.5f);
      key[c] = good && padding ? F(-1) : key[c];  // comes last
      F down = padding ? F(0) : F(1) / sqrt(square);
#pragma unroll
      for (int i = 0; i < N; ++i) v[c][i] *= down;
    }
  }
  rank_columns<N, C>(key, rank, lane);

  if (active) {
    for (int c = 0; c < C; ++c) {
      if (rank[c] < p.n) s[matrix * p.n + rank[c]] = T(or_nan(scale_out(sigma[c], k), good));
    }
    if (own == 0u) {
      status[matrix] = good ? kSvdConverged : (finite ? kSvdNotConverged : kSvdNonFinite);
      sweeps[matrix] = count;
      off_norm[matrix] = float(off);
    }
  }

  if (VECTORS) {
    if (active) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (rank[c] < p.u_cols) {
          device T* to = u + matrix * p.u_batch + long(rank[c] * p.u_col);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if (i < p.m) to[i * p.u_row] = T(or_nan(v[c][i], good));
          }
        }
      }
    }
    for (int c = 0; c < C; ++c) {
      missing[c] = missing[c] && good && rank[c] < p.n;
      any_missing = any_missing || missing[c];
    }
    if (simd_any(any_missing)) complete_columns<N, C>(x, rank, missing, p.n, p.n);
    // W goes through threadgroup memory so that lanes write neighbouring elements of Vt.
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (rank[c] < p.n && i < p.n) corner[rank[c] * pitch + i] = x[c][i];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (active) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        int column = int(own) * C + c;
        if (column < p.n) {
          device T* to = vt + matrix * p.vt_batch + long(column * p.vt_col);
          for (int i = 0; i < p.n; ++i) {
            F y = corner[i * pitch + column];
            to[i * p.vt_row] = T(or_nan(y, good));
          }
        }
      }
    }
  }
}

template <typename T, int N, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void svd_vectors(
    device const T* a [[buffer(0)]], device T* u [[buffer(1)]], device T* s [[buffer(2)]],
    device T* vt [[buffer(3)]], device int* status [[buffer(4)]], device int* sweeps [[buffer(5)]],
    device float* off_norm [[buffer(6)]], constant SvdParams& p [[buffer(7)]],
    threadgroup RealOf<T>* tiles [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint tile_floats = uint(Lanes<N, C>::kTile);
  svd_simdgroup<T, N, C, true>(a, u, s, vt, status, sweeps, off_norm, p,
                               tiles + simdgroup * tile_floats, group * simdgroups + simdgroup,
                               lane);
}

template <typename T, int N, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void svd_values(
    device const T* a [[buffer(0)]], device T* s [[buffer(1)]], device int* status [[buffer(2)]],
    device int* sweeps [[buffer(3)]], device float* off_norm [[buffer(4)]],
    constant SvdParams& p [[buffer(5)]], threadgroup RealOf<T>* tiles [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint tile_floats = uint(Lanes<N, C>::kTile);
  svd_simdgroup<T, N, C, false>(a, nullptr, s, nullptr, status, sweeps, off_norm, p,
                                tiles + simdgroup * tile_floats, group * simdgroups + simdgroup,
                                lane);
}

// --- complex, N <= 32 -------------------------------------------------------------------------
//
// "xor" and "ring" as above. X is R^T, not its adjoint: what leaves is then W's conjugate, as Vt
// has it, and V is that of U.

// Element i of what a lane holds, in registers or (TILE) in a tile of 32 lanes a row.
template <bool TILE, int L, typename F>
inline F held(thread const F (&x)[L], threadgroup F* tile, int i) {
  return TILE ? tile[i * 32] : x[i];
}

template <bool TILE, int L, typename F>
inline void hold(thread F (&x)[L], threadgroup F* tile, int i, F value) {
  if (TILE)
    tile[i * 32] = value;
  else
    x[i] = value;
}

// Keeps a compiler from loading all elements of a tile before it uses the first: no registers are
// left for them.
template <bool TILE>
inline void in_order() {
  if (TILE) simdgroup_barrier(mem_flags::mem_none);
}

// Element i of what a step of the QR reflects along: none above its row.
template <int FIRST, typename F>
inline F reflected_along(F x, F first, int i, int row) {
  return i > FIRST + 7 || i > row ? x : (i == row ? first : F(0));
}

// One sweep, lane ^ k order. Both lanes of a pair find the same angle to the bit, or columns would
// not stay orthogonal: hence the products that only one side needs. Where registers cannot hold the
// partner's column, it comes twice.
template <int N, bool VECTORS, bool TILE, typename F>
inline void sweep_complex(thread F (&x)[2 * N], thread F (&v)[2 * N], threadgroup F* tile,
                          thread F& norm, bool live, float tol, uint lane, thread F& max_cos,
                          thread F& max_tan) {
  const bool twice = sizeof(F) * N > 128;
  for (uint k = 1; k < uint(N); ++k) {
    F y[2 * N];
    ComplexSums<F> sums;
    clear(sums);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      y[i] = simd_shuffle_xor(x[i], ushort(k));
      y[N + i] = simd_shuffle_xor(x[N + i], ushort(k));
      add_products(sums, i, x[i], x[N + i], y[i], y[N + i]);
    }
    F other = simd_shuffle_xor(norm, ushort(k));
    bool first = (lane ^ k) > lane;
    Phase<F> e = phase_of_sums(sums);
    Rotation<F> r = rotation_angle(first ? norm : other, first ? other : norm, e.size, tol);
    PlainRotation<F> plain = plain_rotation(r.t);
    bool rotate = live && r.t != F(0);
    max_cos = max(max_cos, e.size > Real<F>::tiny() ? r.cosine : F(0));
    if (simd_any(rotate)) {
      F s = rotate ? (first ? -plain.s : plain.s) : F(0);
      F tau = first ? plain.tau : -plain.tau;
      max_tan = max(max_tan, fabs(r.t));
      norm += rotate ? (first ? -r.change : r.change) : F(0);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        F wr = twice ? simd_shuffle_xor(x[i], ushort(k)) : y[i];
        F wi = twice ? simd_shuffle_xor(x[N + i], ushort(k)) : y[N + i];
        F zr = fma(e.re, wr, e.im * wi);
        F zi = fma(e.re, wi, -e.im * wr);
        x[i] = fma(s, fma(tau, x[i], zr), x[i]);
        x[N + i] = fma(s, fma(tau, x[N + i], zi), x[N + i]);
      }
      if (VECTORS) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          in_order<TILE>();
          F re = held<TILE>(v, tile, i);
          F im = held<TILE>(v, tile, N + i);
          F wr = simd_shuffle_xor(re, ushort(k));
          F wi = simd_shuffle_xor(im, ushort(k));
          F zr = fma(e.re, wr, e.im * wi);
          F zi = fma(e.re, wi, -e.im * wr);
          hold<TILE>(v, tile, i, fma(s, fma(tau, re, zr), re));
          hold<TILE>(v, tile, N + i, fma(s, fma(tau, im, zi), im));
        }
      }
    }
  }
}

// Eight steps of a QR with column pivoting, as in reflect_rows, for the rows from FIRST on; the
// lane's columns of Q^H are reflected like those of A. Nothing leaves or moves up: below its row,
// the step `order` that took it, a column holds what rounding left.
template <int N, int C, int FIRST, bool VECTORS, bool TILE, typename F>
inline void reflect_complex(thread F (&x)[C][2 * N], thread F (&q)[C][2 * N], threadgroup F* tile,
                            thread int (&order)[C], uint lane) {
  const bool twice = sizeof(F) * N * C > 128;
  const uint own = lane % uint(N / C);
  const F least = Real<F>::vanished() * Real<F>::vanished();
  for (int row = FIRST; row < FIRST + 8; ++row) {
    F tops_r[C];
    F tops_i[C];
    F below[C];  // squares of what is to vanish
    BitsOf<F> best = 0u;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      tops_r[c] = F(0);
      tops_i[c] = F(0);
      F part[4] = {F(0), F(0), F(0), F(0)};
#pragma unroll
      for (int i = FIRST; i < N; ++i) {
        tops_r[c] = i <= FIRST + 7 && i == row ? x[c][i] : tops_r[c];
        tops_i[c] = i <= FIRST + 7 && i == row ? x[c][N + i] : tops_i[c];
        F squares = fma(x[c][i], x[c][i], fma(x[c][N + i], x[c][N + i], part[i % 4]));
        part[i % 4] = i <= FIRST + 7 && i <= row ? part[i % 4] : squares;
      }
      below[c] = total(part);
      F squares = fma(tops_r[c], tops_r[c], fma(tops_i[c], tops_i[c], below[c]));
      // The column's number stands in the last bits.
      BitsOf<F> key =
          (as_type<BitsOf<F>>(squares) | BitsOf<F>(N - 1)) ^ BitsOf<F>(own * uint(C) + uint(c));
      best = max(best, order[c] == N ? key : BitsOf<F>(0u));
    }
    best = group_max<N / C>(best);
    const bool take = as_type<F>(best) > least;
    const uint column = uint(best & BitsOf<F>(N - 1)) ^ uint(N - 1);
    const ushort owner = ushort(lane - own + column / uint(C));
    const bool odd = column % uint(C) != 0u;
#pragma unroll
    for (int c = 0; c < C; ++c)
      order[c] = take && own * uint(C) + uint(c) == column ? row : order[c];
    F rest = simd_shuffle(odd ? below[C - 1] : below[0], owner);
    F first_r = simd_shuffle(odd ? tops_r[C - 1] : tops_r[0], owner);
    F first_i = simd_shuffle(odd ? tops_i[C - 1] : tops_i[0], owner);
    const bool reflect = take && rest > F(0);
    F squares = max(fma(first_r, first_r, fma(first_i, first_i, rest)), least);
    F over = rsqrt(squares);
    F size = squares * over;
    size = fma(F(0.5f) * over, fma(-size, size, squares), size);
    Phase<F> e = phase_of(first_r, first_i);
    e.re = e.re == F(0) && e.im == F(0) ? F(1) : e.re;
    first_r = fma(size, e.re, first_r);
    first_i = fma(size, e.im, first_i);
    // By the vector as it is, for Q is as unitary as this quotient is right: one Newton step.
    F halved = max(F(0.5f) * fma(first_r, first_r, fma(first_i, first_i, rest)), least);
    F tau = fast::divide(F(1), halved);
    tau = fma(tau, fma(-halved, tau, F(1)), tau);
    tau = reflect ? -tau : F(0);

    F w[2 * N];  // what the columns are reflected along
    F along_r[C][4];
    F along_i[C][4];
    F of_q_r[C][4];
    F of_q_i[C][4];
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        along_r[c][i] = F(0);
        along_i[c][i] = F(0);
        of_q_r[c][i] = F(0);
        of_q_i[c][i] = F(0);
      }
    }
    // A branch for every eight rows, or a compiler shuffles all before it uses the first.
#pragma unroll
    for (int eight = FIRST; eight < N; eight += 8) {
      if (simd_any(reflect)) {
#pragma unroll
        for (int i = eight; i < eight + 8; ++i) {
          F zr = simd_shuffle(odd ? x[C - 1][i] : x[0][i], owner);
          F zi = simd_shuffle(odd ? x[C - 1][N + i] : x[0][N + i], owner);
          w[i] = reflected_along<FIRST>(zr, first_r, i, row);
          w[N + i] = reflected_along<FIRST>(zi, first_i, i, row);
#pragma unroll
          for (int c = 0; c < C; ++c) {
            F re = x[c][i];
            F im = x[c][N + i];
            along_r[c][i % 4] = fma(w[i], re, fma(w[N + i], im, along_r[c][i % 4]));
            along_i[c][i % 4] = fma(w[i], im, fma(-w[N + i], re, along_i[c][i % 4]));
            if (VECTORS) {
              in_order<TILE>();
              re = held<TILE>(q[c], tile, i);
              im = held<TILE>(q[c], tile, N + i);
              of_q_r[c][i % 4] = fma(w[i], re, fma(w[N + i], im, of_q_r[c][i % 4]));
              of_q_i[c][i % 4] = fma(w[i], im, fma(-w[N + i], re, of_q_i[c][i % 4]));
            }
          }
        }
      }
    }
    F gr[C];
    F gi[C];
    F hr[C];
    F hi[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      gr[c] = tau * total(along_r[c]);
      gi[c] = tau * total(along_i[c]);
      hr[c] = tau * total(of_q_r[c]);
      hi[c] = tau * total(of_q_i[c]);
    }
#pragma unroll
    for (int eight = FIRST; eight < N; eight += 8) {
      if (simd_any(reflect)) {
#pragma unroll
        for (int i = eight; i < eight + 8; ++i) {
          F zr = w[i];
          F zi = w[N + i];
          if (twice) {
            zr = simd_shuffle(odd ? x[C - 1][i] : x[0][i], owner);
            zi = simd_shuffle(odd ? x[C - 1][N + i] : x[0][N + i], owner);
            zr = reflected_along<FIRST>(zr, first_r, i, row);
            zi = reflected_along<FIRST>(zi, first_i, i, row);
          }
#pragma unroll
          for (int c = 0; c < C; ++c) {
            x[c][i] = fma(gr[c], zr, fma(-gi[c], zi, x[c][i]));
            x[c][N + i] = fma(gr[c], zi, fma(gi[c], zr, x[c][N + i]));
            if (VECTORS) {
              in_order<TILE>();
              F re = held<TILE>(q[c], tile, i);
              F im = held<TILE>(q[c], tile, N + i);
              hold<TILE>(q[c], tile, i, fma(hr[c], zr, fma(-hi[c], zi, re)));
              hold<TILE>(q[c], tile, N + i, fma(hr[c], zi, fma(hi[c], zr, im)));
            }
          }
        }
      }
    }
  }
}

// Element i of column l and element l of column i change places, both of them complex.
template <int N, int C, bool TILE, typename F>
inline void transpose_lanes(thread F (&x)[C][2 * N], threadgroup F* tile, uint lane) {
#pragma unroll
  for (int o = N / 2; o >= C; o /= 2) {
    const bool upper = (lane & uint(o / C)) != 0u;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        if ((i & o) == 0) {
          in_order<TILE>();
          F low = held<TILE>(x[c], tile, i);
          F high = held<TILE>(x[c], tile, i | o);
          F across = simd_shuffle_xor(upper ? low : high, ushort(o / C));
          hold<TILE>(x[c], tile, i, upper ? across : low);
          hold<TILE>(x[c], tile, i | o, upper ? high : across);
        }
      }
    }
  }
  if (C == 2) {
#pragma unroll
    for (int i = 0; i < 2 * N; i += 2) {
      F high = x[0][i + 1];
      x[0][i + 1] = x[C - 1][i];
      x[C - 1][i] = high;
    }
  }
}

// A = Q R with the columns of A in x. Leaves the columns of R^T in x, and in q those of Q,
// conjugate and cut off after m rows.
template <int N, int C, bool VECTORS, bool TILE, typename F>
inline void factor_complex(thread F (&x)[C][2 * N], thread F (&q)[C][2 * N], threadgroup F* tile,
                           int m, uint lane) {
  const int first = int(lane) % (N / C) * C;
  int order[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    order[c] = N;
    if (VECTORS) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        hold<TILE>(q[c], tile, i, i == first + c && i < m ? F(1) : F(0));
        hold<TILE>(q[c], tile, N + i, F(0));
      }
    }
  }
  reflect_complex<N, C, 0, VECTORS, TILE>(x, q, tile, order, lane);
  if (N > 8) reflect_complex<N, C, (N > 8 ? 8 : 0), VECTORS, TILE>(x, q, tile, order, lane);
  if (N > 16) {
    reflect_complex<N, C, (N > 16 ? 16 : 0), VECTORS, TILE>(x, q, tile, order, lane);
    reflect_complex<N, C, (N > 24 ? 24 : 0), VECTORS, TILE>(x, q, tile, order, lane);
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[c][i] = order[c] < i ? F(0) : x[c][i];
      x[c][N + i] = order[c] < i ? F(0) : x[c][N + i];
    }
  }
  transpose_lanes<N, C, false>(x, tile, lane);
  if (VECTORS) transpose_lanes<N, C, TILE>(q, tile, lane);
}

// As complete_columns. w and the tile are room for the vector.
template <int N, int C, bool TILE, typename F>
inline void complete_complex(thread F (&x)[C][2 * N], thread F (&w)[2 * N], threadgroup F* tile,
                             thread const int (&rank)[C], thread const bool (&missing)[C], int m,
                             int u_cols) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) x[c][i] = missing[c] ? F(0) : x[c][i];
  }
  for (int target = 0; target < u_cols; ++target) {
    bool here = false;
    for (int c = 0; c < C; ++c) here = here || (missing[c] && rank[c] == target);
    if (!simd_any(here)) continue;
    int row = 0;
    F least = F(4);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      F part = F(0);
      for (int c = 0; c < C; ++c) part = fma(x[c][i], x[c][i], fma(x[c][N + i], x[c][N + i], part));
      part = group_sum<N / C>(part);
      bool better = i < m && part < least;
      row = better ? i : row;
      least = better ? part : least;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      hold<TILE>(w, tile, i, i == row ? F(1) : F(0));
      hold<TILE>(w, tile, N + i, F(0));
    }
    ComplexSums<F> sums;
    for (int pass = 0; pass < 2; ++pass) {
      F ar[C];
      F ai[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        clear(sums);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          in_order<TILE>();
          add_products(sums, i, x[c][i], x[c][N + i], held<TILE>(w, tile, i),
                       held<TILE>(w, tile, N + i));
        }
        ar[c] = total(sums.re) + total(sums.im);
        ai[c] = total(sums.re_im) - total(sums.im_re);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        in_order<TILE>();
        F pr = F(0);
        F pi = F(0);
        for (int c = 0; c < C; ++c) {
          pr = fma(ar[c], x[c][i], fma(-ai[c], x[c][N + i], pr));
          pi = fma(ar[c], x[c][N + i], fma(ai[c], x[c][i], pi));
        }
        hold<TILE>(w, tile, i, held<TILE>(w, tile, i) - group_sum<N / C>(pr));
        hold<TILE>(w, tile, N + i, held<TILE>(w, tile, N + i) - group_sum<N / C>(pi));
      }
    }
    F squares = F(0);
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      F y = held<TILE>(w, tile, i);
      squares = fma(y, y, squares);
    }
    F inverse = F(1) / sqrt(max(squares, Real<F>::tiny()));
#pragma unroll
    for (int c = 0; c < C; ++c) {
      bool take = missing[c] && rank[c] == target;
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        in_order<TILE>();
        x[c][i] = take ? held<TILE>(w, tile, i) * inverse : x[c][i];
      }
    }
  }
}

template <typename T>
inline T complex_or_nan(RealOf<T> re, RealOf<T> im, bool good) {
  T z;
  z.x = or_nan(re, good);
  z.y = or_nan(im, good);
  return z;
}

// V is in registers, or with one column a lane in a tile of 2 N rows of 32 lanes.
template <typename T, int N, int C, bool VECTORS, bool TILE>
inline void svd_complex(device const T* a, device T* u, device RealOf<T>* s, device T* vt,
                        device int* status, device int* sweeps, device float* off_norm,
                        constant SvdParams& p, threadgroup RealOf<T>* tile, uint simdgroup,
                        uint lane) {
  typedef RealOf<T> F;
  const uint lanes = uint(N / C);
  uint own = lane % lanes;
  if (TILE) tile += int(lane);
  long matrix = long(simdgroup) * long(32 / int(lanes)) + long(lane / lanes);
  bool active = matrix < long(p.batch);
  F x[C][2 * N];
  F v[C][2 * N];
  BitsOf<F> bits = 0u;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = int(own) * C + c;
    bool inside = active && column < p.n;
    device const T* from = a + (inside ? matrix * p.a_batch + long(column * p.a_col) : long(0));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[c][i] = F(0);
      x[c][N + i] = F(0);
      if (inside && i < p.m) {
        T z = from[i * p.a_row];
        x[c][i] = z.x;
        x[c][N + i] = z.y;
      }
      bits = max(bits, size_bits(x[c][i]));
      bits = max(bits, size_bits(x[c][N + i]));
    }
  }
  bits = group_max<N / C>(bits);
  bool finite = bits < exponent_bits<F>();
  int k = scale_of<F>(bits);
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) x[c][i] = finite ? scale_in(x[c][i], k) : F(0);
  }

  factor_complex<N, C, VECTORS, TILE>(x, v, tile, p.m, lane);

  bool done = !(active && finite);
  bool converged = false;
  int count = 0;
  F off = F(0);
  Weight<F> weight[C];  // with one column a lane always 1
#pragma unroll
  for (int c = 0; c < C; ++c) {
    weight[c].w = F(1);
    weight[c].lost = F(0);
  }
  for (int sweep = 0; sweep < p.max_sweeps; ++sweep) {
    if (!simd_any(!done)) break;
    F norm[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (C > 1 && simd_any(weight[c].w > kHeavy))
        unit_column<2 * N, C, VECTORS>(x[c], v[c], weight[c]);
      norm[c] = dot_product<2 * N>(x[c], x[c]) / weight[c].w;
      norm[c] = norm[c] < F(0.25f) * Real<F>::vanished() * Real<F>::vanished() ? F(1) : norm[c];
    }
    F max_cos = F(0);
    F max_tan = F(0);
    if (C == 1)
      sweep_complex<N, VECTORS, TILE>(x[0], v[0], tile, norm[0], !done, p.tol, lane, max_cos,
                                      max_tan);
    else
      sweep_ring<N, C, VECTORS>(x, v, norm, weight, !done, p.tol, lane, max_cos, max_tan);
    max_cos = group_max<N / C>(max_cos);
    max_tan = group_max<N / C>(max_tan);
    if (!done) {
      count = sweep + 1;
      off = max_cos;
      converged = orthogonal_behind(max_cos, max_tan, p.n, p.tol);
      done = converged;
    }
  }
  bool good = active && finite && converged;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (C > 1) unit_column<2 * N, C, VECTORS>(x[c], v[c], weight[c]);
  }

  F sigma[C];
  F key[C];
  F down[C];
  int rank[C];
  bool missing[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    F largest = F(0);
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) largest = max(largest, fabs(x[c][i]));
    const int root = Real<F>::kRoot;
    F up = largest < power_of_two<F>(-root / 2) ? power_of_two<F>(root) : F(1);
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) x[c][i] *= up;
    F length = sqrt(dot_product<2 * N>(x[c], x[c]));
    missing[c] = !(length > Real<F>::vanished() * up);
    F inverse = missing[c] ? F(0) : F(1) / length;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) x[c][i] *= inverse;
    sigma[c] = good ? length / up : F(0);
    key[c] = sigma[c];
    down[c] = F(0);
    if (VECTORS) {
      F square = F(0);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        in_order<TILE>();
        F y = held<TILE>(v[c], tile, i);
        square = fma(y, y, square);
      }
      bool padding = square < F(0.5f);
      key[c] = good && padding ? F(-1) : key[c];  // comes last
      down[c] = padding ? F(0) : F(1) / sqrt(square);
    }
  }
  rank_columns<N, C>(key, rank, lane);

  if (active) {
    for (int c = 0; c < C; ++c) {
      if (rank[c] < p.n) s[matrix * p.n + rank[c]] = or_nan(scale_out(sigma[c], k), good);
    }
    if (own == 0u) {
      status[matrix] = good ? kSvdConverged : (finite ? kSvdNotConverged : kSvdNonFinite);
      sweeps[matrix] = count;
      off_norm[matrix] = float(off);
    }
  }

  if (VECTORS) {
    bool any_missing = false;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (active && rank[c] < p.u_cols) {
        device T* to = u + matrix * p.u_batch + long(rank[c] * p.u_col);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          F re = held<TILE>(v[c], tile, i) * down[c];
          F im = held<TILE>(v[c], tile, N + i) * -down[c];
          if (i < p.m) to[i * p.u_row] = complex_or_nan<T>(re, im, good);
        }
      }
      missing[c] = missing[c] && good && rank[c] < p.n;
      any_missing = any_missing || missing[c];
    }
    if (simd_any(any_missing)) complete_complex<N, C, TILE>(x, v[0], tile, rank, missing, p.n, p.n);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (active && rank[c] < p.n) {
        device T* to = vt + matrix * p.vt_batch + long(rank[c] * p.vt_row);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i < p.n) to[i * p.vt_col] = complex_or_nan<T>(x[c][i], x[c][N + i], good);
        }
      }
    }
  }
}

template <typename T, int N, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void svd_complex_vectors(
    device const T* a [[buffer(0)]], device T* u [[buffer(1)]], device RealOf<T>* s [[buffer(2)]],
    device T* vt [[buffer(3)]], device int* status [[buffer(4)]], device int* sweeps [[buffer(5)]],
    device float* off_norm [[buffer(6)]], constant SvdParams& p [[buffer(7)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  svd_complex<T, N, C, true, false>(a, u, s, vt, status, sweeps, off_norm, p, nullptr,
                                    group * simdgroups + simdgroup, lane);
}

template <typename T, int N, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void svd_complex_tile_vectors(
    device const T* a [[buffer(0)]], device T* u [[buffer(1)]], device RealOf<T>* s [[buffer(2)]],
    device T* vt [[buffer(3)]], device int* status [[buffer(4)]], device int* sweeps [[buffer(5)]],
    device float* off_norm [[buffer(6)]], constant SvdParams& p [[buffer(7)]],
    threadgroup RealOf<T>* tiles [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  svd_complex<T, N, C, true, true>(a, u, s, vt, status, sweeps, off_norm, p,
                                   tiles + simdgroup * uint(2 * N * 32),
                                   group * simdgroups + simdgroup, lane);
}

template <typename T, int N, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void svd_complex_values(
    device const T* a [[buffer(0)]], device RealOf<T>* s [[buffer(1)]],
    device int* status [[buffer(2)]], device int* sweeps [[buffer(3)]],
    device float* off_norm [[buffer(4)]], constant SvdParams& p [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  svd_complex<T, N, C, false, false>(a, nullptr, s, nullptr, status, sweeps, off_norm, p, nullptr,
                                     group * simdgroups + simdgroup, lane);
}

// --- one threadgroup a matrix
// ---------------------------------------------------------------------

// Half of WIDTH values goes to the lane across, half comes from there; LANES sum W values together.
// (% W: for the calls that the branches below leave out.)
template <int WIDTH, int W, int LANES>
inline void halve_among(thread float (&g)[W], uint lane) {
  const uint across = uint(LANES / 2 * WIDTH / W);
  bool upper = (lane & across) != 0u;
#pragma unroll
  for (int j = 0; j < WIDTH / 2; ++j) {
    float low = g[j % W];
    float high = g[(j + WIDTH / 2) % W];
    g[j % W] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, ushort(across));
  }
}

template <int WIDTH, int W>
inline void halve(thread float (&g)[W], uint lane) {
  halve_among<WIDTH, W, 32>(g, lane);
}

// Sums W values over the simdgroup together; a lane gets the sum of value lane / (32 / W).
template <int W>
inline float transposed_sum(thread float (&g)[W], uint lane) {
  if (W >= 16) halve<16, W>(g, lane);
  if (W >= 8) halve<8, W>(g, lane);
  if (W >= 4) halve<4, W>(g, lane);
  halve<2, W>(g, lane);
  float sum = g[0];
#pragma unroll
  for (int o = 16 / W; o > 0; o /= 2) sum += simd_shuffle_xor(sum, ushort(o));
  return sum;
}

// Squared norms of this simdgroup's C columns; a lane gets that of column lane / (32 / C).
template <int C, int R>
inline float column_norms(thread const float (&x)[C][R], uint lane) {
  float g[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    g[c] = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) g[c] = fma(x[c][r], x[c][r], g[c]);
  }
  return transposed_sum<C>(g, lane);
}

// The C / 2 disjoint pairs of one step. Across blocks, step k: column p with C / 2 + (p + k) % (C /
// 2). Inside of the two blocks, step k > 0: column i with i ^ k, where i lacks the highest bit of
// k.
struct Pairing {
  bool inside;
  int k;
  int half;  // C / 2
};

inline int high_bit(int k) { return k < 2 ? 1 : (k < 4 ? 2 : (k < 8 ? 4 : (k < 16 ? 8 : 16))); }

inline int first_of(Pairing s, int p) {
  if (!s.inside) return p;
  int bit = high_bit(s.k);
  int q = p % (s.half / 2);
  int i = ((q & ~(bit - 1)) << 1) | (q & (bit - 1));
  return p / (s.half / 2) * s.half + i;
}

inline int second_of(Pairing s, int p) {
  return s.inside ? first_of(s, p) ^ s.k : s.half + (p + s.k) % s.half;
}

inline int pair_of(Pairing s, int column) {
  if (!s.inside) return column < s.half ? column : (column - s.k) % s.half;
  int bit = high_bit(s.k);
  int c = column % s.half;
  int i = (c & bit) != 0 ? c ^ s.k : c;
  return column / s.half * (s.half / 2) + (((i >> 1) & ~(bit - 1)) | (i & (bit - 1)));
}

// Rotates the pairs of one step. norm: of column lane / (32 / C), kept up to date.
template <int C, int R, bool VECTORS>
inline void rotate_step(thread float (&x)[C][R], thread float (&v)[C][R], thread float& norm,
                        Pairing step, float tol, uint lane, thread float& max_cos,
                        thread float& max_tan) {
  const int pairs = C / 2;
  const int lanes = 32 / C;  // that keep the norm of one column
  float g[pairs];
#pragma unroll
  for (int p = 0; p < pairs; ++p) {
    g[p] = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) g[p] = fma(x[first_of(step, p)][r], x[second_of(step, p)][r], g[p]);
  }
  float dot = transposed_sum<pairs>(g, lane);
  int own = int(lane) / (2 * lanes);
  float a = simd_shuffle(norm, ushort(first_of(step, own) * lanes));
  float b = simd_shuffle(norm, ushort(second_of(step, own) * lanes));
  Rotation<float> rotated = rotation_angle(a, b, dot, tol);
  PlainRotation<float> plain = plain_rotation(rotated.t);
  // What is too small to be rotated is no reason to go on.
  max_cos = max(max_cos, fabs(dot) > kTiny ? rotated.cosine : 0.0f);
  if (simd_any(rotated.t != 0.0f)) {
    max_tan = max(max_tan, fabs(rotated.t));
    int column = int(lane) / lanes;
    int mine = pair_of(step, column);
    float change = simd_shuffle(rotated.change, ushort(mine * 2 * lanes));
    norm += first_of(step, mine) == column ? -change : change;
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      float s = simd_shuffle(plain.s, ushort(p * 2 * lanes));
      float tau = simd_shuffle(plain.tau, ushort(p * 2 * lanes));
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float f = x[first_of(step, p)][r];
        float h = x[second_of(step, p)][r];
        x[first_of(step, p)][r] = fma(-s, fma(tau, f, h), f);
        x[second_of(step, p)][r] = fma(s, fma(-tau, h, f), h);
        // As three shears: a product less, and a rounding more in half of the columns.
        if (VECTORS) {
          f = fma(-tau, v[second_of(step, p)][r], v[first_of(step, p)][r]);
          h = fma(s, f, v[second_of(step, p)][r]);
          v[first_of(step, p)][r] = fma(-tau, h, f);
          v[second_of(step, p)][r] = h;
        }
      }
    }
  }
}

template <int C, int R, bool VECTORS>
inline void rotate_across(thread float (&x)[C][R], thread float (&v)[C][R], thread float& norm,
                          float tol, uint lane, thread float& max_cos, thread float& max_tan) {
#pragma unroll
  for (int k = 0; k < C / 2; ++k) {
    Pairing step = {false, k, C / 2};
    rotate_step<C, R, VECTORS>(x, v, norm, step, tol, lane, max_cos, max_tan);
  }
}

// Moves one block of columns to threadgroup memory, and one back. FIRST: the block's first column.
template <int C, int R, int FIRST>
inline void put_block(thread const float (&x)[C][R], threadgroup float* tile, uint simdgroup,
                      uint lane) {
  threadgroup float* block = tile + simdgroup * uint(C / 2 * R * 32) + lane;
#pragma unroll
  for (int c = 0; c < C / 2; ++c) {
#pragma unroll
    for (int r = 0; r < R; ++r) block[(c * R + r) * 32] = x[FIRST + c][r];
  }
}

template <int C, int R, int FIRST>
inline void get_block(thread float (&x)[C][R], threadgroup const float* tile, uint simdgroup,
                      uint lane) {
  threadgroup const float* block = tile + simdgroup * uint(C / 2 * R * 32) + lane;
#pragma unroll
  for (int c = 0; c < C / 2; ++c) {
#pragma unroll
    for (int r = 0; r < R; ++r) x[FIRST + c][r] = block[(c * R + r) * 32];
  }
}

// After an even step every second block goes to the simdgroup on the left.
template <int C, int R>
inline void pass_left(thread float (&x)[C][R], threadgroup float* tile, uint simdgroup,
                      uint simdgroups, uint lane) {
  put_block<C, R, C / 2>(x, tile, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  get_block<C, R, C / 2>(x, tile, (simdgroup + 1u) % simdgroups, lane);
}

// After an odd step every first block goes to the right. The last simdgroup held the two ends of
// the row: its second block goes round to the front, its first stays as its second.
template <int C, int R>
inline void pass_right(thread float (&x)[C][R], threadgroup float* tile, uint simdgroup,
                       uint simdgroups, uint lane) {
  if (simdgroup == simdgroups - 1u) {
    put_block<C, R, C / 2>(x, tile, simdgroup, lane);
#pragma unroll
    for (int c = 0; c < C / 2; ++c) {
#pragma unroll
      for (int r = 0; r < R; ++r) x[C / 2 + c][r] = x[c][r];
    }
  } else {
    put_block<C, R, 0>(x, tile, simdgroup, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  get_block<C, R, 0>(x, tile, (simdgroup + simdgroups - 1u) % simdgroups, lane);
}

// The largest of one value a thread; the same for all.
inline float threadgroup_max(float x, threadgroup float* tile, uint simdgroup, uint simdgroups,
                             uint lane) {
  x = simd_max(x);
  if (lane == 0u) tile[simdgroup] = x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  x = simd_max(lane < simdgroups ? tile[lane] : x);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return x;
}

// rank[c] = place of column first + c among all N when sorted by key, largest first.
template <int N, int C>
inline void rank_block(thread const float (&key)[C], thread int (&rank)[C], int first,
                       threadgroup float* tile, uint lane) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (lane == 0u) tile[first + c] = key[c];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int before = 0;
    for (int j = int(lane); j < N; j += 32) {
      float other = tile[j];
      before += other > key[c] || (other == key[c] && j < first + c) ? 1 : 0;
    }
    rank[c] = simd_sum(before);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// As complete_columns, for a matrix spread over a threadgroup.
template <int N, int C, int R>
inline void complete_block(thread float (&x)[C][R], thread const int (&rank)[C],
                           thread const bool (&missing)[C], int m, int u_cols,
                           threadgroup float* tile, uint simdgroup, uint simdgroups, uint lane) {
  const int H = 32 * R;
  threadgroup float* absent = tile + simdgroups * uint(H);  // 1 where no column has this rank
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (lane == 0u) absent[rank[c]] = missing[c] ? 1.0f : 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) x[c][r] = missing[c] ? 0.0f : x[c][r];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int target = 0; target < u_cols; ++target) {
    if (absent[target] == 0.0f) continue;
    float w[R];
    // pass 0 finds the row that the columns fill least; passes 1 and 2 orthogonalise.
    for (int pass = 0; pass < 3; ++pass) {
      float part[R];
#pragma unroll
      for (int r = 0; r < R; ++r) part[r] = 0.0f;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float along = 0.0f;
        if (pass > 0) {
#pragma unroll
          for (int r = 0; r < R; ++r) along = fma(x[c][r], w[r], along);
          along = simd_sum(along);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) part[r] = fma(pass > 0 ? along : x[c][r], x[c][r], part[r]);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) tile[simdgroup * uint(H) + uint(r * 32) + lane] = part[r];
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        part[r] = 0.0f;
        for (uint i = 0u; i < simdgroups; ++i) part[r] += tile[i * uint(H) + uint(r * 32) + lane];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (pass == 0) {
        float least = 4.0f;
#pragma unroll
        for (int r = 0; r < R; ++r) least = r * 32 + int(lane) < m ? min(least, part[r]) : least;
        least = simd_min(least);
        int row = H;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          int at = r * 32 + int(lane);
          row = at < m && part[r] == least ? min(row, at) : row;
        }
        row = simd_min(row);
#pragma unroll
        for (int r = 0; r < R; ++r) w[r] = r * 32 + int(lane) == row ? 1.0f : 0.0f;
      } else {
#pragma unroll
        for (int r = 0; r < R; ++r) w[r] -= part[r];
      }
    }
    float squares = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) squares = fma(w[r], w[r], squares);
    float inverse = 1.0f / sqrt(max(simd_sum(squares), kTiny));
#pragma unroll
    for (int c = 0; c < C; ++c) {
      bool take = missing[c] && rank[c] == target;
#pragma unroll
      for (int r = 0; r < R; ++r) x[c][r] = take ? w[r] * inverse : x[c][r];
    }
  }
  // What is missing ranks last, so the barriers of the last target were the last of all.
}

// What the QR with column pivoting leaves in a lane, of column lane / (32 / C).
struct Pivot {
  int step;    // at which it was the largest column; 32 R where it never was
  float head;  // of its Householder vector; the rest is what it has below row `step`
};

// Householder QR with column pivoting of at most `steps` steps; columns stay where they are.
// Returns the number of steps: it ends early where only rounding is left. One barrier a step: each
// simdgroup shows its largest column, and works out the reflector of the largest of all by itself.
template <int N, int C, int R>
inline int factor_block(thread float (&x)[C][R], thread Pivot& pivot, int steps,
                        threadgroup float* tile, uint simdgroup, uint lane) {
  const int H = 32 * R;
  const int lanes = 32 / C;  // that keep what there is of one column
  const uint simdgroups = uint(N / C);
  const int own = int(lane) / lanes;
  pivot.step = H;
  pivot.head = 0.0f;
  // Squared norms of what is left of the columns, and what they were when last summed.
  float norm = column_norms<C, R>(x, lane);
  float summed = norm;
  bool flat = false;
  int made = 0;
  // Rows below 32 b are done.
#pragma unroll
  for (int b = 0; b < R; ++b) {
    const int last = min(steps, 32 * b + 32);
    for (int j = 32 * b; j < last && !flat; ++j) {
      const int at = j - 32 * b;
      float g[C];
      if (simd_any(norm < 1e-3f * summed)) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          float y = int(lane) >= at ? x[c][b] : 0.0f;
          g[c] = y * y;
#pragma unroll
          for (int r = b + 1; r < R; ++r) g[c] = fma(x[c][r], x[c][r], g[c]);
        }
        summed = transposed_sum<C>(g, lane);
        summed = pivot.step == H ? summed : 0.0f;
        norm = summed;
      }
      // Nine bits less of the norm tell whose it is.
      uint key = (as_type<uint>(norm) & ~511u) | (simdgroup << 4u) | uint(own);
      int candidate = int(simd_max(key) & 15u);
      threadgroup float* slots = tile + uint(j & 1) * simdgroups * uint(H + 1);
      threadgroup uint* keys = (threadgroup uint*)(slots + simdgroups * uint(H));
      float row = 0.0f;  // its entry of row j
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float entry = simd_shuffle(x[c][b], ushort(at));
        row = c == own ? entry : row;
        if (c == candidate) {
#pragma unroll
          for (int r = b; r < R; ++r) slots[simdgroup * uint(H) + uint(r * 32) + lane] = x[c][r];
        }
      }
      if (int(lane) == candidate * lanes) keys[simdgroup] = key;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint top = simd_max(lane < simdgroups ? keys[lane] : 0u);
      const uint winner = (top >> 4u) & 31u;
      threadgroup const float* largest = slots + winner * uint(H);
      float y[R];
#pragma unroll
      for (int r = b; r < R; ++r) y[r] = largest[r * 32 + int(lane)];
      y[b] = int(lane) < at ? 0.0f : y[b];
      float squares = y[b] * y[b];
#pragma unroll
      for (int r = b + 1; r < R; ++r) squares = fma(y[r], y[r], squares);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        g[c] = y[b] * x[c][b];
#pragma unroll
        for (int r = b + 1; r < R; ++r) g[c] = fma(y[r], x[c][r], g[c]);
      }
      squares = simd_sum(squares);
      float dot = transposed_sum<C>(g, lane);
      // In all lanes; a vote tells the compiler so. Columns that had their step have no norm.
      flat = simd_any((top >> 9u) == 0u || !(squares > kTiny));
      if (flat) break;
      // I - scale y y^T, with `head` for alpha, makes beta of column `largest` in row j.
      float alpha = largest[j];
      float length = sqrt(squares);
      float beta = alpha > 0.0f ? -length : length;
      float head = alpha - beta;
      float scale = 1.0f / fma(fabs(alpha), length, squares);
      y[b] = int(lane) == at ? head : y[b];
      bool mine = simdgroup == winner && own == int(top & 15u);
      pivot.step = mine ? j : pivot.step;
      pivot.head = mine ? head : pivot.head;
      bool done = pivot.step != H;
      float by = done ? 0.0f : fma(-beta, row, dot) * scale;
      row = fma(-by, head, row);
      norm = done ? 0.0f : max(fma(-row, row, norm), 0.0f);
      summed = done ? 0.0f : summed;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float f = simd_shuffle(by, ushort(c * lanes));
#pragma unroll
        for (int r = b; r < R; ++r) x[c][r] = fma(-f, y[r], x[c][r]);
        bool here = simdgroup == winner && c == int(top & 15u) && int(lane) == at;
        x[c][b] = here ? beta : x[c][b];
      }
      made = j + 1;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return made;
}

// v = Q, the product of the reflectors, 32 of them in threadgroup memory at a time. Column i of it
// is e_i, reflected.
template <int N, int C, int R>
inline void form_block(thread const float (&x)[C][R], thread float (&v)[C][R], Pivot pivot,
                       int made, int m, threadgroup float* tile, int first, uint lane) {
  const int H = 32 * R;
  const int lanes = 32 / C;
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      int i = r * 32 + int(lane);
      v[c][r] = i == first + c && i < m ? 1.0f : 0.0f;
    }
  }
  threadgroup float* scales = tile + 32 * H;
#pragma unroll
  for (int b = R - 1; b >= 0; --b) {
    const int steps = min(made - 32 * b, 32);
    if (steps <= 0) continue;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      int at = simd_shuffle(pivot.step, ushort(c * lanes)) - 32 * b;
      float head = simd_shuffle(pivot.head, ushort(c * lanes));
      if (at >= 0 && at < 32) {
        float y = x[c][b];
        if (int(lane) == at) scales[at] = -1.0f / (y * head);
        y = int(lane) < at ? 0.0f : (int(lane) == at ? head : y);
        threadgroup float* to = tile + at * H + int(lane);
        to[32 * b] = y;
#pragma unroll
        for (int r = b + 1; r < R; ++r) to[32 * r] = x[c][r];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Columns in front of a reflector's own have nothing where it has something.
    for (int at = min(steps, first + C - 32 * b) - 1; simd_any(at >= 0); --at) {
      threadgroup const float* from = tile + at * H + int(lane);
      float y[R];
      float g[C];
#pragma unroll
      for (int r = b; r < R; ++r) y[r] = from[32 * r];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        g[c] = y[b] * v[c][b];
#pragma unroll
        for (int r = b + 1; r < R; ++r) g[c] = fma(y[r], v[c][r], g[c]);
      }
      float by = transposed_sum<C>(g, lane) * scales[at];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float f = simd_shuffle(by, ushort(c * lanes));
#pragma unroll
        for (int r = b; r < R; ++r) v[c][r] = fma(-f, y[r], v[c][r]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// x = R^T, by squares of 32 x 32 that change places with those across the diagonal. What lies below
// R is left out. The rows that the QR did not reach are part of R, as far as there are n.
template <int N, int C, int R>
inline void turn_block(thread float (&x)[C][R], Pivot pivot, int n, threadgroup float* tile,
                       int first, uint lane) {
  const int H = 32 * R;
  const int lanes = 32 / C;
  const int block = first / 32;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int step = simd_shuffle(pivot.step, ushort(c * lanes));
    int last = step == H ? n - 1 : step;
#pragma unroll
    for (int r = 0; r < R; ++r) x[c][r] = r * 32 + int(lane) <= last ? x[c][r] : 0.0f;
  }
  for (int s = 0; s < (R > 2 ? 4 : 2); ++s) {
    const int across = block ^ s;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      int column = first + c;
      float y = x[c][0];
#pragma unroll
      for (int r = 1; r < R; ++r) y = r == across ? x[c][r] : y;
      tile[column * 32 + (int(lane) ^ (column % 32))] = y;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int column = across * 32 + int(lane);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float y = 0.0f;
      if (column < N) y = tile[column * 32 + (int(lane) ^ ((first + c) % 32))];
#pragma unroll
      for (int r = 0; r < R; ++r) x[c][r] = r == across ? y : x[c][r];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

template <typename T, int N, int C, bool VECTORS>
inline void svd_threadgroup(device const T* a, device T* u, device T* s, device T* vt,
                            device int* status, device int* sweeps, device float* off_norm,
                            constant SvdParams& p, threadgroup float* tile, uint matrix,
                            uint simdgroup, uint lane) {
  const int R = (N + 31) / 32;
  const int H = 32 * R;
  const uint simdgroups = uint(N / C);
  // A and V travel together where both fit into the 32 KB that every Apple GPU has.
  const bool together = N <= 64;
  threadgroup float* tile_v = together ? tile + N * H / 2 : tile;
  device const T* am = a + long(matrix) * p.a_batch;
  const int first = int(simdgroup) * C;

  float x[C][R];
  float v[C][R];
  uint bits = 0u;
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      int i = r * 32 + int(lane);
      x[c][r] = 0.0f;
      if (i < p.m && first + c < p.n) x[c][r] = float(am[i * p.a_row + (first + c) * p.a_col]);
      bits = max(bits, as_type<uint>(x[c][r]) & 0x7fffffffu);
    }
  }
  threadgroup uint* words = (threadgroup uint*)tile;
  bits = simd_max(bits);
  if (lane == 0u) words[simdgroup] = bits;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0u; i < simdgroups; ++i) bits = max(bits, words[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  bool finite = bits < exponent_bits<float>();
  int k = scale_of<float>(bits);
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int r = 0; r < R; ++r) x[c][r] = finite ? scale_in(x[c][r], k) : 0.0f;
  }

  // A P = Q R, and R^T V = W S: then A = (Q V) S (P W)^T. Rotations begin with v = Q; the rows of
  // x = R^T are the columns of A as they were, which is P W in the end. Of a square matrix the last
  // row is R already.
  Pivot pivot;
  int made = factor_block<N, C, R>(x, pivot, min(p.n, p.m - 1), tile, simdgroup, lane);
  if (VECTORS) form_block<N, C, R>(x, v, pivot, made, p.m, tile, first, lane);
  turn_block<N, C, R>(x, pivot, p.n, tile, first, lane);

  bool converged = false;
  int count = 0;
  float off = 0.0f;
  // Votes, where all lanes agree anyway, tell the compiler that they do.
  const bool at_end = simd_any(simdgroup == simdgroups - 1u);
  for (int sweep = 0; sweep < p.max_sweeps; ++sweep) {
    if (!simd_any(finite && !converged)) break;
    float max_cos = 0.0f;
    float max_tan = 0.0f;
    float norm = column_norms<C, R>(x, lane);
#pragma unroll
    for (int j = 1; j < C / 2; ++j) {
      Pairing step = {true, j, C / 2};
      rotate_step<C, R, VECTORS>(x, v, norm, step, p.tol, lane, max_cos, max_tan);
    }
    for (uint round = 0u; round < simdgroups; ++round) {
      rotate_across<C, R, VECTORS>(x, v, norm, p.tol, lane, max_cos, max_tan);
      pass_left<C, R>(x, tile, simdgroup, simdgroups, lane);
      if (!together) threadgroup_barrier(mem_flags::mem_threadgroup);
      if (VECTORS) pass_left<C, R>(v, tile_v, simdgroup, simdgroups, lane);
      norm = column_norms<C, R>(x, lane);
      if (!at_end) rotate_across<C, R, VECTORS>(x, v, norm, p.tol, lane, max_cos, max_tan);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      pass_right<C, R>(x, tile, simdgroup, simdgroups, lane);
      if (!together) threadgroup_barrier(mem_flags::mem_threadgroup);
      if (VECTORS) pass_right<C, R>(v, tile_v, simdgroup, simdgroups, lane);
      norm = column_norms<C, R>(x, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    max_cos = threadgroup_max(max_cos, tile, simdgroup, simdgroups, lane);
    max_tan = threadgroup_max(max_tan, tile, simdgroup, simdgroups, lane);
    count = sweep + 1;
    off = max_cos;
    converged = orthogonal_behind(max_cos, max_tan, p.n, p.tol);
  }
  bool good = finite && converged;

  float key[C];
  int rank[C];
  float sigma[C];
  bool missing[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float largest = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) largest = max(largest, fabs(x[c][r]));
    largest = simd_max(largest);
    float up = largest < 5.4210109e-20f ? 1.8446744e19f : 1.0f;  // 2^-64, 2^64
    float squares = 0.0f;
    float weight = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float y = x[c][r] * up;
      squares = fma(y, y, squares);
      weight = fma(v[c][r], v[c][r], weight);
    }
    float length = sqrt(simd_sum(squares));
    missing[c] = !(length > kVanished * up);
    float inverse = missing[c] ? 0.0f : up / length;
#pragma unroll
    for (int r = 0; r < R; ++r) x[c][r] *= inverse;
    sigma[c] = good ? length / up : 0.0f;
    weight = simd_sum(weight);
    key[c] = VECTORS && good && weight < 0.5f ? -1.0f : sigma[c];
  }
  rank_block<N, C>(key, rank, first, tile, lane);

#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (lane == 0u && rank[c] < p.n)
      s[long(matrix) * p.n + rank[c]] = T(or_nan(scale_out(sigma[c], k), good));
  }
  if (simdgroup == 0u && lane == 0u) {
    status[matrix] = good ? kSvdConverged : (finite ? kSvdNotConverged : kSvdNonFinite);
    sweeps[matrix] = count;
    off_norm[matrix] = off;
  }

  if (VECTORS) {
    // U goes out in chunks of 32 columns, turned so that lanes write neighbouring elements.
    device T* um = u + long(matrix) * p.u_batch;
    const int pitch = H + 1;
    for (int chunk = 0; chunk < p.u_cols; chunk += 32) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        int place = rank[c] - chunk;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (place >= 0 && place < 32) tile[place * pitch + r * 32 + int(lane)] = v[c][r];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = int(simdgroup); i < p.m; i += int(simdgroups)) {
        int column = chunk + int(lane);
        if (column < p.u_cols) {
          float y = tile[int(lane) * pitch + i];
          um[i * p.u_row + column * p.u_col] = T(or_nan(y, good));
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    float any_missing = 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      missing[c] = missing[c] && good && rank[c] < p.n;
      any_missing = missing[c] ? 1.0f : any_missing;
    }
    any_missing = threadgroup_max(any_missing, tile, simdgroup, simdgroups, lane);
    if (any_missing > 0.0f)
      complete_block<N, C, R>(x, rank, missing, p.n, p.n, tile, simdgroup, simdgroups, lane);

    device T* vm = vt + long(matrix) * p.vt_batch;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        int i = r * 32 + int(lane);
        if (rank[c] < p.n && i < p.n)
          vm[rank[c] * p.vt_row + i * p.vt_col] = T(or_nan(x[c][r], good));
      }
    }
  }
}

template <typename T, int N, int C>
[[kernel, max_total_threads_per_threadgroup(32 * N / C)]] void svd_block_vectors(
    device const T* a [[buffer(0)]], device T* u [[buffer(1)]], device T* s [[buffer(2)]],
    device T* vt [[buffer(3)]], device int* status [[buffer(4)]], device int* sweeps [[buffer(5)]],
    device float* off_norm [[buffer(6)]], constant SvdParams& p [[buffer(7)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  svd_threadgroup<T, N, C, true>(a, u, s, vt, status, sweeps, off_norm, p, tile, group, simdgroup,
                                 lane);
}

template <typename T, int N, int C>
[[kernel, max_total_threads_per_threadgroup(32 * N / C)]] void svd_block_values(
    device const T* a [[buffer(0)]], device T* s [[buffer(1)]], device int* status [[buffer(2)]],
    device int* sweeps [[buffer(3)]], device float* off_norm [[buffer(4)]],
    constant SvdParams& p [[buffer(5)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  svd_threadgroup<T, N, C, false>(a, nullptr, s, nullptr, status, sweeps, off_norm, p, tile, group,
                                  simdgroup, lane);
}

// --- A first, then V ("twin")
// ---------------------------------------------------------------------

inline float threadgroup_sum(float x, threadgroup float* tile, uint simdgroup, uint simdgroups,
                             uint lane) {
  x = simd_sum(x);
  if (lane == 0u) tile[simdgroup] = x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  x = simd_sum(lane < simdgroups ? tile[lane] : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return x;
}

// As complete_columns, for the columns `present` and on of X in device memory, by a threadgroup.
// Column c stands in place column[c], or IN_ORDER. work: 3 * side.
template <bool IN_ORDER>
inline void complete_in_memory(device float* x, int height, device const int* column, int present,
                               int n, device float* work, int side, threadgroup float* tile,
                               uint thread_index, uint threads, uint simdgroup, uint simdgroups,
                               uint lane) {
  device float* fill = work;  // squared lengths of the rows of X
  device float* fresh = fill + side;
  device float* along = fresh + side;
  for (int r = int(thread_index); r < n; r += int(threads)) {
    float sum = 0.0f;
    for (int c = 0; c < present; ++c) {
      float y = x[long(IN_ORDER ? c : column[c]) * long(height) + long(r)];
      sum = fma(y, y, sum);
    }
    fill[r] = sum;
  }
  for (int target = present; target < n; ++target) {
    float least = 4.0f;
    int row = 0;
    for (int r = int(thread_index); r < n; r += int(threads)) {
      float y = fill[r];
      row = y < least ? r : row;
      least = min(least, y);
    }
    float best = -threadgroup_max(-least, tile, simdgroup, simdgroups, lane);
    float found = least == best ? float(-row) : -1e9f;
    row = int(-threadgroup_max(found, tile, simdgroup, simdgroups, lane));
    // The unit vector of that row less its part along the columns, twice.
    for (int pass = 0; pass < 2; ++pass) {
      if (pass > 0) {
        for (int of = int(simdgroup); of < target; of += int(simdgroups)) {
          device const float* from = x + long(IN_ORDER ? of : column[of]) * long(height);
          float dot = 0.0f;
          for (int r = int(lane); r < n; r += 32) dot = fma(from[r], fresh[r], dot);
          dot = simd_sum(dot);
          if (lane == 0u) along[of] = dot;
        }
        threadgroup_barrier(mem_flags::mem_device);
      }
      for (int r = int(thread_index); r < n; r += int(threads)) {
        float y = pass > 0 ? fresh[r] : (r == row ? 1.0f : 0.0f);
        for (int c = 0; c < target; ++c) {
          device const float* from = x + long(IN_ORDER ? c : column[c]) * long(height);
          y = fma(pass > 0 ? -along[c] : -from[row], from[r], y);
        }
        fresh[r] = y;
      }
      threadgroup_barrier(mem_flags::mem_device);
    }
    float squares = 0.0f;
    for (int r = int(thread_index); r < n; r += int(threads))
      squares = fma(fresh[r], fresh[r], squares);
    squares = threadgroup_sum(squares, tile, simdgroup, simdgroups, lane);
    float inverse = 1.0f / sqrt(max(squares, kTiny));
    device float* to = x + long(IN_ORDER ? target : column[target]) * long(height);
    for (int r = int(thread_index); r < n; r += int(threads)) {
      float y = fresh[r] * inverse;
      to[r] = y;
      fill[r] = fma(y, y, fill[r]);
    }
    threadgroup_barrier(mem_flags::mem_device);
  }
}

// How a matrix is spread: a lane has kColumns columns and a slice of their rows. N <= 64: 16 lanes
// a slice, two of them in one simdgroup (G = 1). Above: a slice a simdgroup, G of them. And where
// the numbers of threadgroup memory stand, and those of device memory, in floats.
template <int N, int G>
struct Twin {
  enum {
    kColumns = N <= 128 ? 4 : 6,  // of a lane
    kLanes = N / kColumns,        // that have columns
    kSpan = N <= 64 ? 16 : 32,    // lanes from slice to slice
    kSlices = 32 / kSpan * G,
    kRows = N / kSlices,  // of a slice
    kTurns = 0,           // two steps' rotations; a row in the QR
    // What slices add up: kColumns numbers a lane and simdgroup, twice.
    kSums = 4 * kColumns * kSpan,
    kSumsNumbers = N <= 64 ? 0 : 32 * kColumns * G,
    kVector = kSums + 2 * kSumsNumbers,  // what the QR reflects along, twice
    kFlags = kVector + 2 * N,
    kKeys = kFlags + 16,
    kOrder = kVector,  // ranks of columns
    kPage = 0,         // at the end, with vectors: rows of Vt, kSlices * 4 * (N + 1) numbers
    kNumbers = kKeys + N,
    // Device memory, behind R and X.
    kReflectors = N * N,  // or V, from one dispatch to the next
    kTaus = 2 * N * N,
    kRecords = kTaus + N,
    // Of a sweep. A step may double a weight: 64 of them at once.
    kParts = N <= 64 ? 1 : (N <= 128 ? 2 : 4),
    kRecord = (N / kParts + 1) * N,  // of a part: factors of columns, steps
    // Singular values; what the next dispatch needs: weights, what they lost, the exponent.
    kKept = kRecords + kTwinKept * kParts * kRecord,
    kScratch = kKept + 4 * N + 4
  };
};

// The slice that a lane has.
template <int N, int G>
inline int slice_of(uint simdgroup, uint lane) {
  const int span = Twin<N, G>::kSpan;
  return int(simdgroup) * (32 / span) + int(lane) / span;
}

inline float4 four_numbers(float x, float y, float z, float w) {
  float4 r;
  r.x = x;
  r.y = y;
  r.z = z;
  r.w = w;
  return r;
}

inline float4 four_zeros() { return four_numbers(0.0f, 0.0f, 0.0f, 0.0f); }

// Four numbers of an array, from x[at] on.
template <int H>
inline float4 four_from(thread const float (&x)[H], int at) {
  return four_numbers(x[at], x[at + 1], x[at + 2], x[at + 3]);
}

template <int H>
inline void put_four(thread float (&x)[H], int at, float4 four) {
  x[at] = four.x;
  x[at + 1] = four.y;
  x[at + 2] = four.z;
  x[at + 3] = four.w;
}

inline float2 two_numbers(float x, float y) {
  float2 r;
  r.x = x;
  r.y = y;
  return r;
}

template <int C>
inline void put_numbers(thread const float (&g)[C], threadgroup float2* to) {
#pragma unroll
  for (int j = 0; j < C / 2; ++j) to[32 * j] = two_numbers(g[2 * j], g[2 * j + 1]);
}

template <int G, int C>
inline void add_slices(thread float (&g)[C], threadgroup const float2* from) {
#pragma unroll
  for (int j = 0; j < C / 2; ++j) {
    float2 sum = from[32 * j];
#pragma unroll
    for (int i = 1; i < G; ++i) {
      const float2 more = from[32 * (C / 2 * i + j)];
      sum = two_numbers(sum.x + more.x, sum.y + more.y);
    }
    g[2 * j] = sum.x;
    g[2 * j + 1] = sum.y;
  }
}

// Sums over the slices, the same to the bit in all of them. One barrier if N > 64; `which` of the
// two places has to alternate.
template <int N, int G, int C>
inline void sum_slices(thread float (&g)[C], int which, threadgroup float* tile, uint simdgroup,
                       uint lane) {
  typedef Twin<N, G> Place;
  if (N <= 64) {
#pragma unroll
    for (int c = 0; c < C; ++c) g[c] += simd_shuffle_xor(g[c], ushort(16));
  } else {
    threadgroup float2* sums =
        (threadgroup float2*)(tile + int(Place::kSums) + which * int(Place::kSumsNumbers)) + lane;
    put_numbers(g, sums + simdgroup * uint(16 * C));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    add_slices<G>(g, sums);
  }
}

// Steps start <= k < end of factor_twin. norm: squared lengths of what is left of columns; summed:
// what they were when last summed; stale: to be summed anew. Only the first L registers hold rows
// that are left.
template <int N, int G, int L, int H, bool VECTORS, int C>
inline void reflect_twin(thread float (&x)[C][H], thread bool (&taken)[C], thread float (&norm)[C],
                         thread float (&summed)[C], thread bool& stale, int start, int end,
                         device float* w, threadgroup float* tile, uint simdgroup, uint lane) {
  typedef Twin<N, G> Place;
  const int lanes = Place::kLanes;
  const int slices = Place::kSlices;
  const int span = Place::kSpan;
  const int own = int(lane) % span;
  const int slice = slice_of<N, G>(simdgroup, lane);
  const bool there = own < lanes;
  const float least = kVanished * kVanished;
  const uint mask = N <= 128 ? 127u : 255u;
  threadgroup float2* rows = (threadgroup float2*)tile + own;
  threadgroup float2* sums = (threadgroup float2*)(tile + int(Place::kSums)) + lane;
  threadgroup float2* fresh = sums + int(Place::kSumsNumbers) / 2;
  const uint at = simdgroup * uint(16 * C);
  threadgroup float* flags = tile + int(Place::kFlags);
  threadgroup float* parts = flags + 4;  // of the squares
  device float* to = w + own;
  for (int first = start; first < end; first += slices) {
    for (int turn = 0; turn < slices; ++turn) {
      threadgroup float* vector = tile + int(Place::kVector) + (first + turn) % 2 * N;
      int column = -1;
      uint best = 0u;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        // The column's number stands in the last bits.
        uint key = (as_type<uint>(norm[c]) | mask) ^ uint(c * lanes + own);
        best = max(best, taken[c] ? 0u : key);
      }
      best = simd_max(best);
      if (best != 0u) column = int((best & mask) ^ mask);
      if (column % lanes == own) {
        threadgroup float4* put = (threadgroup float4*)(vector + slice * H);
        const int chosen = column / lanes;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          if (c == chosen) {
#pragma unroll
            for (int i = 0; i < L / 4; ++i) {
              put[i] = four_from(x[c], 4 * i);
            }
          }
        }
      }
      if (simdgroup == 0u && lane == 0u) flags[(first + turn) % 2] = best != 0u ? 1.0f : 0.0f;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const bool any = flags[(first + turn) % 2] != 0.0f;
      const float alpha = vector[turn * H];
      float y[L];
      threadgroup const float4* from = (threadgroup const float4*)(vector + slice * H);
#pragma unroll
      for (int i = 0; i < L / 4; ++i) {
        put_four(y, 4 * i, from[i]);
      }
      float g[C];
      float anew[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        g[c] = top_product<0, L>(x[c], y);
        anew[c] = 0.0f;
      }
      if (simd_any(stale)) {
#pragma unroll
        for (int c = 0; c < C; ++c) anew[c] = top_product<0, L>(x[c], x[c]);
      }
      float squares = top_product<0, L>(y, y);
      float row[C];
      if (N <= 64) {
        squares += simd_shuffle_xor(squares, ushort(16));
#pragma unroll
        for (int c = 0; c < C; ++c) {
          g[c] += simd_shuffle_xor(g[c], ushort(16));
          anew[c] += simd_shuffle_xor(anew[c], ushort(16));
          row[c] = simd_shuffle(x[c][0], ushort(turn * span + own));
        }
      } else {
        put_numbers(g, sums + at);
        if (simd_any(stale)) put_numbers(anew, fresh + at);
        if (slice == turn) {
#pragma unroll
          for (int j = 0; j < C / 2; ++j) rows[32 * j] = two_numbers(x[2 * j][0], x[2 * j + 1][0]);
        }
        if (lane == 0u) parts[simdgroup] = squares;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        add_slices<G>(g, sums);
        if (simd_any(stale)) add_slices<G>(anew, fresh);
        add_slices<1>(row, rows);
        squares = parts[0];
#pragma unroll
        for (int i = 1; i < G; ++i) squares += parts[i];
      }
      // I - v v^T / halved, where v has `head` for alpha, makes beta of the column. Q is as
      // orthonormal as the root and the quotient are right: a Newton step each.
      const bool reflect = any && squares > least;
      squares = max(squares, least);
      float over = rsqrt(squares);
      float size = squares * over;
      size = fma(0.5f * over, fma(-size, size, squares), size);
      const float edge = size + fabs(alpha);
      const float halved = size * edge;
      float tau = fast::divide(1.0f, halved);
      tau = fma(tau, fma(-halved, tau, 1.0f), tau);
      tau = reflect ? -tau : 0.0f;
      const float beta = alpha < 0.0f ? size : -size;
      const float head = alpha < 0.0f ? -edge : edge;
      if (VECTORS) {
        const int k = first + turn;
        for (int j = int(simdgroup) * 32 + int(lane); j < N; j += 32 * G) {
          const int r = max(j - first, 0);
          const float part = vector[r % slices * H + r / slices];
          w[int(Place::kReflectors) + k * N + j] = j < first ? 0.0f : (j == k ? head : part);
        }
        if (simdgroup == 0u && lane == 0u) w[int(Place::kTaus) + k] = tau;
      }
      bool gone = false;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const bool mine = c * lanes + own == column;
        g[c] = tau * fma(-beta, row[c], g[c]);
        const float r = fma(g[c], head, row[c]);
        norm[c] = max(fma(-r, r, stale ? anew[c] : norm[c]), 0.0f);
        summed[c] = stale ? norm[c] : summed[c];
        row[c] = mine && reflect ? beta : (taken[c] ? 0.0f : r);
        taken[c] = taken[c] || mine;
        gone = gone || (!taken[c] && norm[c] < 1e-3f * summed[c]);
      }
      if (slice == turn && there) {
#pragma unroll
        for (int c = 0; c < C; ++c) to[(first + turn) * N + c * lanes] = row[c];
      }
      // Once more from all rows, in the next step: one choice of a column may be a poor one.
      stale = simd_any(gone);
      if (turn == slices - 1) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
#pragma unroll
          for (int i = 1; i < L; ++i) x[c][i - 1] = fma(g[c], y[i], x[c][i]);
          x[c][L - 1] = 0.0f;
        }
      } else {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          x[c][0] = slice == turn ? 0.0f : fma(g[c], y[0], x[c][0]);
#pragma unroll
          for (int i = 1; i < L; ++i) x[c][i] = fma(g[c], y[i], x[c][i]);
        }
      }
    }
  }
}

// QR with column pivoting of the columns in x. Row i of a matrix is in slice i % slices, the first
// that are left in their first registers: step k ends with row k of R and, for Q, its reflector in
// device memory, and after each `slices` of them all rows move up by one register. Lane l has
// columns l, l + lanes, ... No column moves; rows of R are in order. Nothing is reflected where a
// column vanished.
template <int N, int G, int H, bool VECTORS, int C>
inline void factor_twin(thread float (&x)[C][H], int n, device float* w, threadgroup float* tile,
                        uint simdgroup, uint lane) {
  typedef Twin<N, G> Place;
  const int slices = Place::kSlices;
  const bool there = int(lane) % int(Place::kSpan) < int(Place::kLanes);
  bool taken[C];
  // Squared lengths of what is left of columns, and what they were when last summed.
  float norm[C];
  float summed[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    taken[c] = !there;
    norm[c] = dot_product<H>(x[c], x[c]);
  }
  sum_slices<N, G>(norm, 1, tile, simdgroup, lane);
#pragma unroll
  for (int c = 0; c < C; ++c) summed[c] = norm[c];
  bool stale = false;
  const int done = (n + slices - 1) / slices * slices;
  const int half = (H / 2 + 3) / 4 * 4;
  const int middle = (H - half) * slices;
  reflect_twin<N, G, H, H, VECTORS>(x, taken, norm, summed, stale, 0, min(done, middle), w, tile,
                                    simdgroup, lane);
  reflect_twin<N, G, half, H, VECTORS>(x, taken, norm, summed, stale, middle, done, w, tile,
                                       simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
}

constant float kLeastNorm = 1.9721523e-31f;  // 2^-102: products of shorter columns underflow
constant float kFar = 1e18f;

// What of a rotation is known before the dot product of the columns is.
struct Facing {
  float unscale;  // stored to true dot products
  float inverse;  // of the product of the true lengths
  float d;        // difference of the squared lengths, times that
  float up;
  float ratio;  // of the weights
};

// As in rotation().
inline Facing facing(float a, float b, float wa, float wb) {
  Facing f;
  f.unscale = rsqrt(wa) * rsqrt(wb);
  // Norms are at least kLeastNorm or have lost all digits since they were summed.
  f.inverse = rsqrt(max(a, kLeastNorm)) * rsqrt(max(b, kLeastNorm));
  f.d = (b - a) * f.inverse;
  f.up = wa * f.unscale;
  float over = fast::divide(1.0f, wa);
  over = fma(over, fma(-wa, over, 1.0f), over);
  f.ratio = wb * over;
  return f;
}

// tan(theta) = 2 |cos| / (|d| + sqrt(d^2 + 4 cos^2)), the smaller root.
inline Rotation<float> rotation_facing(Facing f, float g, bool live, float tol) {
  const float dot = g * f.unscale;
  const float c = fabs(dot * f.inverse);
  Rotation<float> r;
  r.cosine = live ? min(c, 1.0f) : 0.0f;
  const bool rotate = r.cosine > tol && fabs(dot) > kTiny;
  // Squares of what is beyond kFar overflow, and of d and its root there is nothing between.
  const float d = fabs(f.d);
  const float near_d = min(d, kFar);
  const float near_c = min(c, kFar);
  const float squares = max(fma(4.0f * near_c, near_c, near_d * near_d), kTiny);
  const float t = min(fast::divide(2.0f * c, d + max(d, squares * rsqrt(squares))), 1.0f);
  r.t = rotate ? ((f.d < 0.0f) != (dot < 0.0f) ? -t : t) : 0.0f;
  r.a = r.t * f.up;
  r.b = r.a * f.ratio;
  r.change = r.t * dot;
  r.growth = r.a * r.b;
  return r;
}

// The registers of a step in the order of sweep_ring, in which a column goes to the right or to the
// left, one place a step. A lane has C / 2 of each kind, in order of their places, and the j-th
// that goes right meets the j-th that goes left. Behind an even step the first that goes left moves
// to the lane on the left and is its last; behind an odd step the last that goes right moves to the
// right and is the first there. All others stay in their registers, so that these change names:
// hence C kinds of steps.
template <int C, int PHASE>
inline int to_right(int j) {
  return 2 * ((j + C - PHASE / 2) % (C / 2));
}

template <int C, int PHASE>
inline int to_left(int j) {
  return 2 * ((j + (PHASE + 1) / 2) % (C / 2)) + 1;
}

// Moves a number of the column that goes to another lane. In an odd step the last lane has both
// ends of the row: one stays, one goes round to the front.
template <int PHASE, int C>
inline void move_twin(thread float (&x)[C], bool last, ushort from) {
  if (PHASE % 2 == 0) {
    const int l = to_left<C, PHASE>(0);
    x[l] = simd_shuffle(x[l], from);
  } else {
    const int r = to_right<C, PHASE>(C / 2 - 1);
    const int l = to_left<C, PHASE>(C / 2 - 1);
    const float move = last ? x[l] : x[r];
    x[l] = last ? x[r] : x[l];
    x[r] = simd_shuffle(move, from);
  }
}

// Rotates each pair by its a and b, and moves a column: that of the first pair or the last, which
// is rotated before the others.
template <int PHASE, int C, int H>
inline void turn_twin(thread float (&x)[C][H], thread const float (&a)[C / 2],
                      thread const float (&b)[C / 2], bool last, ushort from) {
  const int first = PHASE % 2 == 0 ? 0 : C / 2 - 1;
  const int r = to_right<C, PHASE>(first);
  const int l = to_left<C, PHASE>(first);
  rotate_real(x[r], x[l], a[first], b[first]);
#pragma unroll
  for (int i = 0; i < H; ++i) {
    if (PHASE % 2 == 0) {
      x[l][i] = simd_shuffle(x[l][i], from);
    } else {
      const float move = last ? x[l][i] : x[r][i];
      x[l][i] = last ? x[r][i] : x[l][i];
      x[r][i] = simd_shuffle(move, from);
    }
  }
#pragma unroll
  for (int j = 0; j < C / 2; ++j) {
    if (j != first) rotate_real(x[to_right<C, PHASE>(j)], x[to_left<C, PHASE>(j)], a[j], b[j]);
  }
}

// One step. Slices add up their dot products. The first C / 2 simdgroups find the angles, those of
// the pairs of number `which` of each lane, and put them into threadgroup memory for all. For V
// they are kept in `record`, `pitch` of them a step. Columns that go to the right turn at the end
// of the row of lanes where it is CLOSED; else they begin anew, and meet only columns that go to
// the left.
template <int N, int G, int H, bool VECTORS, bool CLOSED, int PHASE, int C>
inline void step_twin(thread float (&x)[C][H], thread float (&norm)[C], thread float (&heavy)[C],
                      thread float (&light)[C], float tol, device float2* record, uint pitch,
                      threadgroup float* tile, uint simdgroup, uint lane, thread float& max_cos,
                      thread float& max_tan) {
  typedef Twin<N, G> Place;
  const int pairs = C / 2;
  const uint lanes = uint(Place::kLanes);
  const uint span = uint(Place::kSpan);
  const uint own = lane % span;
  const uint base = lane - own;
  const bool odd = PHASE % 2 != 0;
  const bool last = CLOSED && own == lanes - 1u;
  const uint right = base + (own == lanes - 1u ? 0u : own + 1u);
  const uint left = base + (own == 0u ? lanes : own) - 1u;
  const ushort other = ushort(own < lanes ? (odd ? left : right) : lane);
  threadgroup float4* turns =
      (threadgroup float4*)tile + uint(PHASE % 2) * uint(pairs) * span + own;
  threadgroup float* sums = tile + int(Place::kSums) + PHASE % 2 * (32 * pairs * G) + int(lane);
  const uint which = N <= 64 ? lane / span : simdgroup % uint(pairs);
  float g = 0.0f;
  float dots[C / 2];
  float norm_r = norm[to_right<C, PHASE>(0)];
  float norm_l = norm[to_left<C, PHASE>(0)];
  float heavy_r = heavy[to_right<C, PHASE>(0)];
  float heavy_l = heavy[to_left<C, PHASE>(0)];
#pragma unroll
  for (int j = 0; j < pairs; ++j) {
    dots[j] = dot_product<H>(x[to_right<C, PHASE>(j)], x[to_left<C, PHASE>(j)]);
    const bool here = N <= 64 ? which == uint(j) : simd_any(which == uint(j));
    norm_r = here ? norm[to_right<C, PHASE>(j)] : norm_r;
    norm_l = here ? norm[to_left<C, PHASE>(j)] : norm_l;
    heavy_r = here ? heavy[to_right<C, PHASE>(j)] : heavy_r;
    heavy_l = here ? heavy[to_left<C, PHASE>(j)] : heavy_l;
  }
  if (N <= 64) {
    const bool second = which != 0u;
    g = (second ? dots[1] : dots[0]) + simd_shuffle_xor(second ? dots[0] : dots[1], ushort(16));
  } else {
#pragma unroll
    for (int j = 0; j < pairs; ++j) sums[(simdgroup + uint(j * G)) * 32u] = dots[j];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  // Where there are more simdgroups than a core of NVIDIA's has schedulers, the others find none:
  // it would hold up those that do.
  const bool speaks = N <= 64 || simdgroup < uint(pairs);
  if (speaks || G <= 4) {
    const Facing f = facing(norm_r, norm_l, heavy_r, heavy_l);
    if (N > 64) {
      threadgroup const float* from = sums + which * uint(32 * G);
#pragma unroll
      for (int i = 0; i < G; ++i) g += from[32 * i];
    }
    const bool live = own < lanes && !(odd && last && which == uint(pairs - 1));
    const Rotation<float> r = rotation_facing(f, g, live, tol);
    max_cos = max(max_cos, r.cosine);
    max_tan = max(max_tan, fabs(r.t));
    if (speaks) turns[which * span] = four_numbers(r.a, r.b, r.change, 0.0f);
    if (VECTORS && speaks && own < lanes)
      record[uint(PHASE) * pitch + own * uint(pairs) + which] = two_numbers(r.a, r.b);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float a[C / 2];
  float b[C / 2];
  float change[C / 2];
#pragma unroll
  for (int j = 0; j < pairs; ++j) {
    const float4 turn = turns[uint(j) * span];
    a[j] = turn.x;
    b[j] = turn.y;
    change[j] = turn.z;
  }
  turn_twin<PHASE>(x, a, b, last, other);
#pragma unroll
  for (int j = 0; j < pairs; ++j) {
    const int p = to_right<C, PHASE>(j);
    const int q = to_left<C, PHASE>(j);
    norm[p] -= change[j];
    norm[q] += change[j];
    grow(heavy[p], light[p], a[j] * b[j]);
    grow(heavy[q], light[q], a[j] * b[j]);
  }
  move_twin<PHASE>(norm, last, other);
  move_twin<PHASE>(heavy, last, other);
  move_twin<PHASE>(light, last, other);
}

// How rows of V are spread in svd_twin_rows: a lane has kR rows and a part of their columns, the
// lanes beside it the other parts. And where the numbers of threadgroup memory stand, in floats.
template <int N, int G>
struct TwinRows {
  enum {
    kParts = N <= 64 ? 2 : (N <= 144 ? 4 : 8),
    kR = N <= 128 ? 4 : 3 * (kParts / 4),
    kColumns = N / kParts,
    kApart = 32 * G / kParts,  // one row of a lane from the next
    kScale = 0,                // of columns
    kOrder = N,
    kFours = 2 * N,  // rotations of as many steps as there are kinds, or four reflectors
    kPad = kColumns * (kParts / 2) % 32 == 0 ? 1 : 0,  // so that parts are in different banks
    kPart = kColumns / 4 + kPad,                       // fours
    kStep = kParts * kPart,
    kTaus = kFours + 4 * kStep * Twin<N, G>::kColumns,
    kKeys = kTaus + N,
    kSquares = kKeys + N,                 // of columns, from each simdgroup
    kPage = kFours,                       // at the end: rows of U
    kHeight = N <= 128 ? 8 * G : 4 * G,   // of the page
    kNumbers = kPage + kHeight * (N + 1)  // more than the others take
  };
};

// A step again: column C l + i of a row is what lane l had in register i. Of a part's columns one
// goes to the part on the left or on the right; `left` and `right` are the lanes that have these.
template <int C, int PHASE, int R, int W>
inline void replay_step(thread float (&v)[R][W], threadgroup const float4* turns, bool top,
                        ushort left, ushort right) {
  const int groups = W / C;
  const int pairs = C / 2;
  float moving[R];
#pragma unroll
  for (int r = 0; r < R; ++r) moving[r] = 0.0f;
#pragma unroll
  for (int l = 0; l < groups; ++l) {
#pragma unroll
    for (int j = 0; j < pairs; ++j) {
      const float4 turn = turns[(l * pairs + j) / 2];
      const float a = (l * pairs + j) % 2 == 0 ? turn.x : turn.z;
      const float b = (l * pairs + j) % 2 == 0 ? turn.y : turn.w;
      const int p = l * C + to_right<C, PHASE>(j);
      const int q = l * C + to_left<C, PHASE>(j);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float y = v[r][p];
        const float z = v[r][q];
        const float new_p = fma(-a, z, y);
        const float new_q = fma(b, y, z);
        v[r][p] = new_p;
        v[r][q] = new_q;
        if (PHASE % 2 == 0 && j == 0) {
          if (l == 0)
            moving[r] = new_q;
          else
            v[r][max(q - C, 0)] = new_q;
        }
        if (PHASE % 2 != 0 && j == pairs - 1) {
          v[r][p] = moving[r];
          moving[r] = new_p;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (PHASE % 2 == 0) {
      v[r][W - C + to_left<C, PHASE>(0)] = simd_shuffle(moving[r], right);
    } else {
      // The last lane of all has both ends of the row: one goes round.
      const int q = W - C + to_left<C, PHASE>(pairs - 1);
      const float end = v[r][q];
      v[r][to_right<C, PHASE>(pairs - 1)] = simd_shuffle(top ? end : moving[r], left);
      v[r][q] = top ? moving[r] : end;
    }
  }
}

// Rows of the identity become rows of Q: v H_0 H_1 ....
template <int P, int R, int W>
inline void times_reflector(thread float (&v)[R][W], threadgroup const float4* along, float tau) {
  float dot[R][4];
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dot[r][i] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < W / 4; ++j) {
    const float4 y = along[j];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      dot[r][0] = fma(v[r][4 * j], y.x, dot[r][0]);
      dot[r][1] = fma(v[r][4 * j + 1], y.y, dot[r][1]);
      dot[r][2] = fma(v[r][4 * j + 2], y.z, dot[r][2]);
      dot[r][3] = fma(v[r][4 * j + 3], y.w, dot[r][3]);
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float sum = (dot[r][0] + dot[r][1]) + (dot[r][2] + dot[r][3]);
#pragma unroll
    for (int o = 1; o < P; o *= 2) sum += simd_shuffle_xor(sum, ushort(o));
    dot[r][0] = tau * sum;
  }
#pragma unroll
  for (int j = 0; j < W / 4; ++j) {
    const float4 y = along[j];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      v[r][4 * j] = fma(dot[r][0], y.x, v[r][4 * j]);
      v[r][4 * j + 1] = fma(dot[r][0], y.y, v[r][4 * j + 1]);
      v[r][4 * j + 2] = fma(dot[r][0], y.z, v[r][4 * j + 2]);
      v[r][4 * j + 3] = fma(dot[r][0], y.w, v[r][4 * j + 3]);
    }
  }
}

// F fours of device memory that all lanes will read, by way of registers: K of them a thread. Those
// from `end` on are zeros.
template <int F, int G, int K>
inline void fetch_fours(device const float4* from, int end, thread float4 (&next)[K],
                        uint thread_index) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const int at = int(thread_index) + 32 * G * i;
    next[i] = four_zeros();
    if (at < min(end, F)) next[i] = from[at];
  }
}

template <typename Place, int F, int G, int K>
inline void put_fours(thread const float4 (&next)[K], threadgroup float4* to, uint thread_index) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // what was there has been read
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const int at = int(thread_index) + 32 * G * i;
    const int pads = at / (int(Place::kColumns) / 4) * int(Place::kPad);
    if (at < F) to[at + pads] = next[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Rows of Q from those of the identity, for the first m of them.
template <int N, int G, int R, int W>
inline void rows_of_q(thread float (&v)[R][W], int m, int n, device const float* w,
                      threadgroup float* tile, uint thread_index) {
  typedef Twin<N, G> Memory;
  typedef TwinRows<N, G> Place;
  const int P = Place::kParts;
  const int K = (N + 32 * G - 1) / (32 * G);
  const int which = int(thread_index) % P;
  threadgroup float4* fours = (threadgroup float4*)(tile + int(Place::kFours));
  threadgroup float* taus = tile + int(Place::kTaus);
  float4 next[K];
  for (int k = int(thread_index); k < N; k += 32 * G)
    taus[k] = k < n ? w[int(Memory::kTaus) + k] : 0.0f;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = int(thread_index) / P + int(Place::kApart) * r;
#pragma unroll
    for (int j = 0; j < W; ++j) v[r][j] = row == which * W + j && row < m ? 1.0f : 0.0f;
  }
  device const float4* from = (device const float4*)(w + int(Memory::kReflectors));
  fetch_fours<N, G>(from, n * (N / 4), next, thread_index);
  for (int k = 0; k < n; k += 4) {
    put_fours<Place, N, G>(next, fours, thread_index);
    fetch_fours<N, G>(from + (k + 4) * (N / 4), (n - k - 4) * (N / 4), next, thread_index);
    for (int i = 0; i < 4; ++i)
      times_reflector<P>(v, fours + (i * int(Place::kStep) + which * int(Place::kPart)),
                         taus[k + i]);
  }
}

// The first C steps are in `next` already, those behind them from `from` on; `steps` in all.
// Columns go from lane to lane of each RING, as in step_twin.
template <typename Place, int G, int C, int RING, int R, int W, int K>
inline void replay_steps(thread float (&v)[R][W], device const float4* from, int steps, bool closed,
                         thread float4 (&next)[K], threadgroup float* tile, uint thread_index) {
  const int F = C * W / 4 * int(Place::kParts);
  const int stride = Place::kStep;
  const uint which = thread_index % uint(RING);
  const uint first = thread_index % 32u - which;
  const bool top = closed && which == uint(RING - 1);
  const ushort left = ushort(first + (which + uint(RING - 1)) % uint(RING));
  const ushort right = ushort(first + (which + 1u) % uint(RING));
  threadgroup float4* fours = (threadgroup float4*)(tile + int(Place::kFours));
  threadgroup const float4* own = fours + thread_index % uint(Place::kParts) * uint(Place::kPart);
  for (int step = 0; step < steps; step += C) {
    put_fours<Place, F, G>(next, fours, thread_index);
    fetch_fours<F, G>(from, step + C < steps ? F : 0, next, thread_index);
    from += F;
    replay_step<C, 0>(v, own, top, left, right);
    replay_step<C, 1>(v, own + stride, top, left, right);
    replay_step<C, 2>(v, own + 2 * stride, top, left, right);
    replay_step<C, 3>(v, own + 3 * stride, top, left, right);
    if (C > 4) {
      replay_step<C, 4 % C>(v, own + 4 * stride, top, left, right);
      replay_step<C, 5 % C>(v, own + 5 * stride, top, left, right);
    }
  }
}

// Each column times its number.
template <int R, int W>
inline void scale_columns(thread float (&v)[R][W], threadgroup const float4* by) {
#pragma unroll
  for (int i = 0; i < W / 4; ++i) {
    const float4 down = by[i];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      v[r][4 * i] *= down.x;
      v[r][4 * i + 1] *= down.y;
      v[r][4 * i + 2] *= down.z;
      v[r][4 * i + 3] *= down.w;
    }
  }
}

// `parts` of sweeps again.
template <int N, int G, int R, int W>
inline void replay(thread float (&v)[R][W], int parts, device const float* w,
                   threadgroup float* tile, uint thread_index) {
  typedef Twin<N, G> Memory;
  typedef TwinRows<N, G> Place;
  const int C = Memory::kColumns;
  const int F = C * N / 4;
  const int K = (F + 32 * G - 1) / (32 * G);
  const int steps = N / int(Memory::kParts);
  threadgroup float4* fours = (threadgroup float4*)(tile + int(Place::kFours));
  device const float4* from = (device const float4*)(w + int(Memory::kRecords));
  float4 next[K];
  for (int part = 0; part < parts; ++part) {
    fetch_fours<F, G>(from, N / 4, next, thread_index);
    put_fours<Place, F, G>(next, fours, thread_index);
    from += N / 4;
    fetch_fours<F, G>(from, F, next, thread_index);
    scale_columns(v, fours + int(thread_index) % int(Place::kParts) * int(Place::kPart));
    replay_steps<Place, G, C, Place::kParts>(v, from + F, steps, true, next, tile, thread_index);
    from += steps * (N / 4);
  }
}

// Ranks of N columns by their keys, the first of equals first.
template <int N, int G>
inline void rank_twin(threadgroup const float* keys, threadgroup int* order, uint thread_index) {
  for (int j = int(thread_index); j < N; j += 32 * G) {
    const float key = keys[j];
    int rank = 0;
    for (int i = 0; i < N; ++i) rank += keys[i] > key || (keys[i] == key && i < j) ? 1 : 0;
    order[j] = rank;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// V's columns have the lengths that scaled rotations gave them, and none where they are padding,
// which comes last in the order. Rows go by threadgroup memory, so that lanes write neighbours.
template <typename T, int N, int G, int R, int W>
inline void put_rows(thread float (&v)[R][W], device T* u, device const float* w, bool good,
                     constant SvdParams& p, threadgroup float* tile, uint simdgroup, uint lane) {
  typedef TwinRows<N, G> Place;
  const int thread_index = int(simdgroup) * 32 + int(lane);
  const int P = Place::kParts;
  const int first_column = thread_index % P * W;
  threadgroup float* keys = tile + int(Place::kKeys);
  threadgroup float* squares = tile + int(Place::kSquares);
  threadgroup float* scale = tile + int(Place::kScale);
  threadgroup int* order = (threadgroup int*)(tile + int(Place::kOrder));
  threadgroup float* page = tile + int(Place::kPage);
#pragma unroll
  for (int j = 0; j < W; ++j) {
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) sum = fma(v[r][j], v[r][j], sum);
#pragma unroll
    for (int o = 16; o >= P; o /= 2) sum += simd_shuffle_xor(sum, ushort(o));
    if (lane < uint(P)) squares[int(simdgroup) * N + first_column + j] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = thread_index; j < N; j += 32 * G) {
    float sum = squares[j];
#pragma unroll
    for (int i = 1; i < G; ++i) sum += squares[i * N + j];
    const bool padding = sum < 0.25f;
    scale[j] = padding ? 0.0f : 1.0f / sqrt(sum);
    keys[j] = padding && good ? -1.0f : w[int(Twin<N, G>::kKept) + j];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  rank_twin<N, G>(keys, order, uint(thread_index));
  const int height = Place::kHeight;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    for (int first = 0; first < int(Place::kApart); first += height) {
      const int top = int(Place::kApart) * r + first;
      const int own = thread_index / P - first;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (own >= 0 && own < height) {
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const int column = first_column + j;
          page[own * (N + 1) + order[column]] = v[r][j] * scale[column];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int e = thread_index; e < height * N; e += 32 * G) {
        const int column = p.u_row == 1 ? e / height : e % N;
        const int i = p.u_row == 1 ? e % height : e / N;
        const float y = page[i * (N + 1) + column];
        if (column < p.u_cols && top + i < p.m)
          u[column * p.u_col + (top + i) * p.u_row] = T(or_nan(y, good));
      }
    }
  }
}

// V, which becomes U, of what svd_twin_vectors recorded.
template <typename T, int N, int G>
[[kernel, max_total_threads_per_threadgroup(32 * G)]] void svd_twin_rows(
    device T* u [[buffer(0)]], device const int* status [[buffer(1)]],
    device const int* sweeps [[buffer(2)]], device float* w [[buffer(3)]],
    constant SvdParams& p [[buffer(4)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  typedef TwinRows<N, G> Place;
  const int R = Place::kR;
  const int W = Place::kColumns;
  const int P = Place::kParts;
  const uint thread_index = simdgroup * 32u + lane;
  const long matrix = long(group);
  const int count = sweeps[matrix];
  if (p.first > 0 && count <= p.first) return;  // an earlier dispatch had its last sweep
  const bool good = status[matrix] == kSvdConverged;
  const bool done = status[matrix] != kSvdNotConverged || count >= p.max_sweeps;
  device float* wm = w + matrix * long(Twin<N, G>::kScratch);
  device float4* rows = (device float4*)(wm + int(Twin<N, G>::kReflectors));
  const int which = int(thread_index) % P;
  float v[R][W];
  if (p.first == 0) {
    rows_of_q<N, G>(v, p.m, p.n, wm, tile, thread_index);
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int row = int(thread_index) / P + int(Place::kApart) * r;
#pragma unroll
      for (int j = 0; j < W / 4; ++j) {
        float4 four = four_zeros();
        if (row < N) four = rows[row * (N / 4) + which * (W / 4) + j];
        put_four(v[r], 4 * j, four);
      }
    }
  }
  replay<N, G>(v, (count - p.first) * int(Twin<N, G>::kParts), wm, tile, thread_index);
  if (simd_any(done)) {
    put_rows<T, N, G>(v, u + matrix * p.u_batch, wm, good, p, tile, simdgroup, lane);
  } else {
    threadgroup_barrier(mem_flags::mem_device);  // all have read the reflectors
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int row = int(thread_index) / P + int(Place::kApart) * r;
#pragma unroll
      for (int j = 0; j < W / 4; ++j) {
        if (row < N) rows[row * (N / 4) + which * (W / 4) + j] = four_from(v[r], 4 * j);
      }
    }
  }
}

// A lane's part of the first `columns` of its columns; zeros for the others.
template <int N, int C, int H>
inline void load_twin(thread float (&x)[C][H], device const float4* from, bool there, int columns) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < H / 4; ++i) {
      float4 four = four_zeros();
      if (there && c < columns) four = from[c * (N / 4) + i];
      put_four(x[c], 4 * i, four);
    }
  }
}

template <typename T, int N, int G, bool VECTORS>
inline void svd_twin(device const T* a, device T* s, device T* vt, device int* status,
                     device int* sweeps, device float* off_norm, device float* w,
                     constant SvdParams& p, threadgroup float* tile, uint matrix, uint simdgroup,
                     uint lane) {
  typedef Twin<N, G> Place;
  const int C = Place::kColumns;
  const int H = Place::kRows;
  const int lanes = Place::kLanes;
  const int slices = Place::kSlices;
  const int span = Place::kSpan;
  const int parts = Place::kParts;
  const int own = int(lane) % span;
  const int slice = slice_of<N, G>(simdgroup, lane);
  const uint thread_index = simdgroup * 32u + lane;
  const bool there = own < lanes;
  const bool speaker = there && slice == 0;  // for all slices
  device const T* am = a + long(matrix) * p.a_batch;
  device float* wm = w + long(matrix) * long(VECTORS ? int(Place::kScratch) : N * N);
  device float* kept = wm + (VECTORS ? int(Place::kKept) : 0);
  const bool later = VECTORS && p.first > 0;
  if (later && status[matrix] != kSvdNotConverged) return;

  float x[C][H];
  bool finite = true;
  int k = 0;
  if (!later) {
    uint bits = 0u;
    const int m = p.m;
    const int step = slices * p.a_row;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = c * lanes + own;
      const bool inside = there && column < p.n;
      device const T* from = am + (inside ? slice * p.a_row + column * p.a_col : 0);
#pragma unroll
      for (int i = 0; i < H; ++i) {
        x[c][i] = 0.0f;
        if (inside && i * slices + slice < m) x[c][i] = float(from[i * step]);
        bits = max(bits, size_bits(x[c][i]));
      }
    }
    threadgroup uint* words = (threadgroup uint*)(tile + int(Place::kFlags));
    bits = simd_max(bits);
    if (lane == 0u) words[simdgroup] = bits;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0u; i < uint(G); ++i) bits = max(bits, words[i]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    finite = bits < exponent_bits<float>();
    k = scale_of<float>(bits);
    // Denormals are part of the result below it.
    const bool denormal = bits < 31u << 23u;
    const float factor = finite ? power_of_two<float>(min(k, 127)) : 0.0f;
    if (simd_any(denormal)) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int i = 0; i < H; ++i) x[c][i] = scale_in(x[c][i], k);
      }
    } else {
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int i = 0; i < H; ++i) x[c][i] = finite ? x[c][i] * factor : 0.0f;
      }
    }

    // A P = Q R, and R^T V = W S: then A = (Q V) S (P W)^T. Rotations begin with V = Q.
    factor_twin<N, G, H, VECTORS>(x, p.n, wm, tile, simdgroup, lane);
  }

  bool converged = false;
  int count = p.first;
  float off = 0.0f;
  float norm[C];
  // Weights, and what rounding took from them.
  float heavy[C];
  float light[C];
  float sigma[C];
  bool missing[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    norm[c] = 1.0f;
    heavy[c] = later && there ? kept[N + own * C + c] : 1.0f;
    light[c] = later && there ? kept[2 * N + own * C + c] : 0.0f;
    sigma[c] = 0.0f;
    missing[c] = false;
  }
  if (later) {
    k = ((device const int*)kept)[4 * N];
    threadgroup_barrier(mem_flags::mem_device);  // all have read what will be written anew
  }
  threadgroup float* keys = tile + int(Place::kKeys);
  device float4* mine = (device float4*)(wm + own * C * N + slice * H);
  load_twin<N>(x, mine, there, later ? C : p.n - own * C);
  const int end = VECTORS ? p.last : p.max_sweeps;
  device float2* record = (device float2*)(wm + (VECTORS ? int(Place::kRecords) : 0));
  while (simd_any(count < end && finite && !converged)) {
    float max_cos = 0.0f;
    float max_tan = 0.0f;
    for (int part = 0; part < parts; ++part) {
      float down[C];
      bool any_down = false;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        // Powers of two, so that nothing is rounded; so early that tests come here.
        const int exponent = (int(as_type<uint>(heavy[c]) >> 23u) - 127) / 2;
        const int half = heavy[c] > 1024.0f ? exponent : 0;
        down[c] = power_of_two<float>(-half);
        any_down = any_down || half > 0;
        heavy[c] *= down[c] * down[c];
        light[c] *= down[c] * down[c];
      }
      if (simd_any(any_down)) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
#pragma unroll
          for (int i = 0; i < H; ++i) x[c][i] *= down[c];
        }
      }
      if (VECTORS) {
        if (speaker) {
#pragma unroll
          for (int j = 0; j < C / 2; ++j)
            record[own * (C / 2) + j] = two_numbers(down[2 * j], down[2 * j + 1]);
        }
        record += N / 2;
      }
      float g[C];
#pragma unroll
      for (int c = 0; c < C; ++c) g[c] = dot_product<H>(x[c], x[c]);
      sum_slices<N, G>(g, 1, tile, simdgroup, lane);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        norm[c] = g[c] / heavy[c];
        // Products of columns so short underflow. Beside a length of 1 they are orthogonal to
        // all; what they hold is lost in rounding, and another takes their place at the end.
        norm[c] = norm[c] < kLeastNorm ? 1.0f : norm[c];
      }
      for (int i = 0; i < N / parts; i += C) {
        step_twin<N, G, H, VECTORS, true, 0>(x, norm, heavy, light, p.tol, record, uint(N / 2),
                                             tile, simdgroup, lane, max_cos, max_tan);
        step_twin<N, G, H, VECTORS, true, 1>(x, norm, heavy, light, p.tol, record, uint(N / 2),
                                             tile, simdgroup, lane, max_cos, max_tan);
        step_twin<N, G, H, VECTORS, true, 2>(x, norm, heavy, light, p.tol, record, uint(N / 2),
                                             tile, simdgroup, lane, max_cos, max_tan);
        step_twin<N, G, H, VECTORS, true, 3>(x, norm, heavy, light, p.tol, record, uint(N / 2),
                                             tile, simdgroup, lane, max_cos, max_tan);
        if (C > 4) {
          step_twin<N, G, H, VECTORS, true, 4 % C>(x, norm, heavy, light, p.tol, record,
                                                   uint(N / 2), tile, simdgroup, lane, max_cos,
                                                   max_tan);
          step_twin<N, G, H, VECTORS, true, 5 % C>(x, norm, heavy, light, p.tol, record,
                                                   uint(N / 2), tile, simdgroup, lane, max_cos,
                                                   max_tan);
        }
        if (VECTORS) record += C * (N / 2);
      }
    }
    threadgroup float* found = tile + int(Place::kFlags);
    max_cos = simd_max(max_cos);
    max_tan = simd_max(max_tan);
    if (lane == 0u) {
      found[simdgroup * 2u] = max_cos;
      found[simdgroup * 2u + 1u] = max_tan;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int i = 0; i < G; ++i) {
      max_cos = max(max_cos, found[2 * i]);
      max_tan = max(max_tan, found[2 * i + 1]);
    }
    count += 1;
    off = max_cos;
    converged = orthogonal_behind(max_cos, max_tan, p.n, p.tol);
  }
  const bool good = finite && converged;
  const bool done = !finite || converged || count >= p.max_sweeps;
  if (simdgroup == 0u && lane == 0u) {
    status[matrix] = good ? kSvdConverged : (finite ? kSvdNotConverged : kSvdNonFinite);
    sweeps[matrix] = count;
    off_norm[matrix] = off;
  }
  if (VECTORS && !simd_any(done)) {
    // For the next dispatch.
    if (there) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int i = 0; i < H / 4; ++i) mine[c * (N / 4) + i] = four_from(x[c], 4 * i);
        if (slice == 0) {
          kept[N + own * C + c] = heavy[c];
          kept[2 * N + own * C + c] = light[c];
        }
      }
    }
    if (thread_index == 0u) ((device int*)kept)[4 * N] = k;
    return;
  }
  // Singular values are lengths of columns.
  float g[C];
  float small[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const float down = 1.0f / sqrt(heavy[c]);
#pragma unroll
    for (int i = 0; i < H; ++i) x[c][i] *= down;
    g[c] = dot_product<H>(x[c], x[c]);
    small[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < H; ++i) {
      float y = x[c][i] * kLift;
      small[c] = fma(y, y, small[c]);
    }
  }
  sum_slices<N, G>(g, 0, tile, simdgroup, lane);
  sum_slices<N, G>(small, 1, tile, simdgroup, lane);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    // Squares of a short column underflow.
    const float length = g[c] >= kVanished * kVanished ? sqrt(g[c]) : sqrt(small[c]) / kLift;
    missing[c] = !(length > kVanished);
    const float inverse = missing[c] ? 0.0f : 1.0f / length;
#pragma unroll
    for (int i = 0; i < H; ++i) x[c][i] *= inverse;
    sigma[c] = finite && converged ? length : 0.0f;
    if (speaker) keys[own * C + c] = sigma[c];
    if (VECTORS && speaker) kept[own * C + c] = sigma[c];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup int* order = (threadgroup int*)(tile + int(Place::kOrder));
  rank_twin<N, G>(keys, order, thread_index);
  int rank[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    rank[c] = N;
    if (there) rank[c] = order[own * C + c];
    if (speaker && rank[c] < p.n)
      s[long(matrix) * p.n + rank[c]] = T(or_nan(scale_out(sigma[c], k), good));
  }
  if (VECTORS) {
    int present = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) present += speaker && rank[c] < p.n && !missing[c] ? 1 : 0;
    // The flags' place; all slices but one count nothing.
    threadgroup int* counts = (threadgroup int*)(tile + int(Place::kFlags));
    present = simd_sum(present);
    if (lane == 0u && simdgroup == 0u) counts[0] = present;
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
    present = counts[0];
    // By a vote, so that it counts as the same for all.
    if (simd_any(good && present < p.n)) {
      if (there) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
#pragma unroll
          for (int i = 0; i < H; ++i) {
            if (rank[c] < p.n) wm[rank[c] * N + slice * H + i] = x[c][i];
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_device);
      complete_in_memory<true>(wm, N, nullptr, present, p.n, kept + N, N, tile, thread_index,
                               uint(32 * G), simdgroup, uint(G), lane);
      if (there) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
#pragma unroll
          for (int i = 0; i < H; ++i) {
            if (rank[c] < p.n) x[c][i] = wm[rank[c] * N + slice * H + i];
          }
        }
      }
    }
    // Four rows of each slice at a time go through threadgroup memory, so that lanes write
    // neighbouring elements.
    device T* to = vt + long(matrix) * p.vt_batch;
    threadgroup float* page = tile + int(Place::kPage);
#pragma unroll
    for (int first = 0; first < H; first += 4) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (there) page[(slice * 4 + i) * (N + 1) + rank[c]] = x[c][first + i];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int e = int(thread_index); e < slices * 4 * N; e += 32 * G) {
        const int column = p.vt_col == 1 ? e / (slices * 4) : e % N;
        const int i = p.vt_col == 1 ? e % (slices * 4) : e / N;
        const int row = i / 4 * H + first + i % 4;
        const float y = page[i * (N + 1) + column];
        if (column < p.n && row < p.n) to[column * p.vt_row + row * p.vt_col] = T(or_nan(y, good));
      }
    }
  }
}

template <typename T, int N, int G>
[[kernel, max_total_threads_per_threadgroup(32 * G)]] void svd_twin_vectors(
    device const T* a [[buffer(0)]], device T* s [[buffer(1)]], device T* vt [[buffer(2)]],
    device int* status [[buffer(3)]], device int* sweeps [[buffer(4)]],
    device float* off_norm [[buffer(5)]], device float* w [[buffer(6)]],
    constant SvdParams& p [[buffer(7)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  svd_twin<T, N, G, true>(a, s, vt, status, sweeps, off_norm, w, p, tile, group, simdgroup, lane);
}

template <typename T, int N, int G>
[[kernel, max_total_threads_per_threadgroup(32 * G)]] void svd_twin_values(
    device const T* a [[buffer(0)]], device T* s [[buffer(1)]], device int* status [[buffer(2)]],
    device int* sweeps [[buffer(3)]], device float* off_norm [[buffer(4)]],
    device float* w [[buffer(5)]], constant SvdParams& p [[buffer(6)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  svd_twin<T, N, G, false>(a, s, nullptr, status, sweeps, off_norm, w, p, tile, group, simdgroup,
                           lane);
}

// --- many threadgroups a matrix
// ---------------------------------------------------------------------
//
// Everything lies in device memory, column by column: F (A with its columns in descending order of
// size, then the Householder vectors below R), W (X = R^T with V below it), Z (U). A dispatch that
// finds its matrix done returns at once, so the host enqueues every sweep and reads nothing back.

// Largest entry of each column, as bits. Threadgroup bytes: 4 a thread.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(1024)]] void svd_grid_scan(
    device const T* a [[buffer(0)]], device uint* keys [[buffer(1)]],
    constant SvdGridParams& p [[buffer(2)]], threadgroup uint* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint parts = uint(p.side / 32);
  const long matrix = long(group / parts);
  const int column = int(group % parts * 32u + lane);
  device const T* from = a + (matrix * p.a_batch + long(column) * long(p.a_col));
  uint bits = 0u;
  for (int first = int(simdgroup); first < p.m; first += 8 * int(simdgroups)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int r = first + i * int(simdgroups);
      float x = 0.0f;
      if (column < p.n && r < p.m) x = float(from[long(r) * long(p.a_row)]);
      bits = max(bits, as_type<uint>(x) & 0x7fffffffu);
    }
  }
  tile[simdgroup * 32u + lane] = bits;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0u) {
    for (uint i = 1u; i < simdgroups; ++i) bits = max(bits, tile[i * 32u + lane]);
    keys[matrix * long(p.side) + long(column)] = bits;
  }
}

struct Place {
  int rank;  // by key, largest first
  uint top;  // the largest key
};

inline Place place_of(device const uint* key, int n, int column, uint own) {
  Place p;
  p.rank = 0;
  p.top = 0u;
  for (int j = 0; j < n; ++j) {
    uint other = key[j];
    p.top = max(p.top, other);
    p.rank += other > own || (other == own && j < column) ? 1 : 0;
  }
  return p;
}

// order[i] = the column with the i-th largest key; columns of the padding, whose keys are zeros,
// stay where they are. Step 0 also decides the scaling, and what is finite. A lane has a column, a
// simdgroup some of the keys: the side is a multiple of what eight take. Threadgroup bytes: 8 a
// thread.
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_rank(
    device const uint* keys [[buffer(0)]], device int* order [[buffer(1)]],
    device int* exponent [[buffer(2)]], device int* status [[buffer(3)]],
    device int* sweeps [[buffer(4)]], device float* off_norm [[buffer(5)]],
    constant SvdGridParams& p [[buffer(6)]], threadgroup uint* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint parts = uint(p.side / 32);
  const long matrix = long(group / parts);
  const int column = int(group % parts * 32u + lane);
  device const uint* key = keys + matrix * long(p.side);
  device int* to = order + matrix * long(p.side);
  const uint own = key[column];
  uint rank = 0u;
  uint top = 0u;
  for (int first = int(simdgroup); first < p.side; first += 8 * int(simdgroups)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int j = first + i * int(simdgroups);
      uint other = key[j];
      top = max(top, other);
      rank += other > own || (other == own && j < column) ? 1u : 0u;
    }
  }
  tile[thread_index] = rank;
  tile[threads + thread_index] = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0u) {
    for (uint i = 1u; i < simdgroups; ++i) {
      rank += tile[i * 32u + lane];
      top = max(top, tile[threads + i * 32u + lane]);
    }
    to[rank] = column;
    if (p.step == 0 && column == 0) {
      exponent[matrix] = scale_of<float>(top);
      status[matrix] = top < exponent_bits<float>() ? kSvdNotConverged : kSvdNonFinite;
      sweeps[matrix] = 0;
      off_norm[matrix] = 0.0f;
    }
  }
}

// F = A, scaled, with its columns in order. A threadgroup takes 32 columns and kGridTile rows.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_load(
    device const T* a [[buffer(0)]], device const int* order [[buffer(1)]],
    device const int* exponent [[buffer(2)]], device const int* status [[buffer(3)]],
    device float* f [[buffer(4)]], constant SvdGridParams& p [[buffer(5)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint across = uint(p.side / 32);
  const uint down = uint((p.rows + kGridTile - 1) / kGridTile);
  const long matrix = long(group / (across * down));
  if (status[matrix] != kSvdNotConverged) return;
  const int k = exponent[matrix];
  const int column = int(group % across) * 32;
  const int row = int(group / across % down) * kGridTile;
  // Lanes along the direction in which A is contiguous.
  const bool by_row = p.a_col <= p.a_row;
  for (int first = row; first < min(row + kGridTile, p.rows); first += 32) {
    for (int i = int(simdgroup); i < 32; i += int(simdgroups)) {
      int r = by_row ? i : int(lane);
      int c = by_row ? int(lane) : i;
      float x = 0.0f;
      if (first + r < p.m && column + c < p.n) {
        long from = long(order[matrix * long(p.side) + long(column + c)]);
        x = float(a[matrix * p.a_batch + long(first + r) * long(p.a_row) + from * long(p.a_col)]);
      }
      tile[c * 33 + r] = scale_in(x, k);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int c = int(simdgroup); c < 32; c += int(simdgroups)) {
      long at = (matrix * long(p.side) + long(column + c)) * long(p.rows);
      f[at + long(first + int(lane))] = tile[c * 33 + int(lane)];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Householder vectors and R of one panel of kGridBlock columns, and the triangle T of its compact
// form I - Y T Y^T. One threadgroup a matrix. A thread keeps four rows of the panel in registers;
// of the rows beyond those, if TALL, it works in memory. The columns rotate through the registers:
// at step j, register i holds column (j + i) % kGridBlock. Rows behind m are zeros, and stay so.
// Short code on purpose: a GPU that switches kernels reads it anew. Threadgroup bytes: 4 * (688 +
// 16 * simdgroups).
template <bool TALL>
[[ kernel, max_total_threads_per_threadgroup(TALL ? 384 : 512) ]] void svd_grid_panel(
    device float* f [[buffer(0)]], device float* triangles [[buffer(1)]],
    device const int* status [[buffer(2)]], constant SvdGridParams& p [[buffer(3)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long matrix = long(group);
  if (status[matrix] != kSvdNotConverged) return;
  const int corner = p.step * kGridBlock;
  const int pitch = p.rows / 4;
  const int quads = (p.rows - corner) / 4;  // of rows from the corner down
  const int first = int(thread_index) * 4;
  device float4* x =
      (device float4*)(f + (matrix * long(p.side) + long(corner)) * long(p.rows) + long(corner));
  threadgroup float* mine = tile + 672u + simdgroup * 16u;
  threadgroup float* products = tile + 672u + simdgroups * 16u;
  const int own = int(lane / 2u);  // the register whose sum this lane keeps
  float own_rows[4][kGridBlock];
  float triangle[kGridBlock];  // row `own` of T
#pragma unroll
  for (int k = 0; k < kGridBlock; ++k) {
    float4 v = four_zeros();
    if (int(thread_index) < quads) v = x[k * pitch + int(thread_index)];
    own_rows[0][k] = v.x;
    own_rows[1][k] = v.y;
    own_rows[2][k] = v.z;
    own_rows[3][k] = v.w;
    triangle[k] = 0.0f;
  }
  for (int e = int(thread_index); e < 672; e += int(threads)) tile[e] = 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = 0; j < kGridBlock; ++j) {
    threadgroup float* part = tile + (j & 1) * 336;  // part[i * 20 + simdgroup]: of register i
    threadgroup float* head = part + 320;
    // Below row j: column j, made larger, with all of the panel's columns.
    float g[kGridBlock];
#pragma unroll
    for (int k = 0; k < kGridBlock; ++k) g[k] = 0.0f;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float y = first + q > j ? own_rows[q][0] * kLift : 0.0f;
#pragma unroll
      for (int k = 0; k < kGridBlock; ++k) g[k] = fma(y, own_rows[q][k], g[k]);
      if (first + q == j) {
#pragma unroll
        for (int k = 0; k < kGridBlock; ++k) head[k] = own_rows[q][k];
      }
    }
    if (TALL) {
      for (int at = int(thread_index + threads); at < quads; at += int(threads)) {
        float4 y = x[j * pitch + at];
        y.x *= kLift;
        y.y *= kLift;
        y.z *= kLift;
        y.w *= kLift;
#pragma unroll
        for (int k = 0; k < kGridBlock; ++k) {
          float4 v = x[((j + k) & (kGridBlock - 1)) * pitch + at];
          g[k] = fma(y.x, v.x, fma(y.y, v.y, fma(y.z, v.z, fma(y.w, v.w, g[k]))));
        }
      }
    }
    float sum = transposed_sum<kGridBlock>(g, lane);
    if ((lane & 1u) == 0u) part[own * 20 + int(simdgroup)] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup const float4* half_of = (threadgroup const float4*)(part + own * 20);
    float4 low = half_of[(lane & 1u) * 2u];
    float4 high = half_of[(lane & 1u) * 2u + 1u];
    sum = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
    sum += simd_shuffle_xor(sum, ushort(1));
    float below = simd_shuffle(sum, ushort(0));
    float alpha = head[0];
    bool flat = !(below > kTiny * kLift);
    // All wait for these: a root and a quotient by approximations and a Newton step, for |alpha|.
    float squares = max(fma(alpha * kLift, alpha, below), kTiny);
    float over = rsqrt(squares);
    over = fma(0.5f * over, fma(-squares * over, over, 1.0f), over);
    float norm = squares * over;
    norm = fma(0.5f * over, fma(-norm, norm, squares), norm) * 2.3283064e-10f;  // 2^-32
    float longer = norm + fabs(alpha);
    float inverse = fast::divide(1.0f, longer);
    inverse = fma(inverse, fma(-longer, inverse, 1.0f), inverse);
    float beta = flat ? alpha : (alpha > 0.0f ? -norm : norm);
    float tau = flat ? 0.0f : longer * (over * 4.2949673e9f);
    float down = flat ? 0.0f : (alpha > 0.0f ? inverse : -inverse);
    // tau times the product of the new vector with register `own`.
    float along = tau * fma(down * 5.4210109e-20f, sum, head[own]);
    if ((lane & 1u) == 0u) {
      mine[own] = own < kGridBlock - j ? along : 0.0f;  // vectors stay as they are
      if (simdgroup == 0u) products[own] = along;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int k = 0; k < kGridBlock; k += 4) {
      float4 by = ((threadgroup const float4*)mine)[k / 4];
      g[k] = by.x;
      g[k + 1] = by.y;
      g[k + 2] = by.z;
      g[k + 3] = by.w;
    }
    if (TALL) {
      for (int at = int(thread_index + threads); at < quads; at += int(threads)) {
        float4 y = x[j * pitch + at];
        y.x *= down;
        y.y *= down;
        y.z *= down;
        y.w *= down;
        x[j * pitch + at] = y;
#pragma unroll
        for (int k = 1; k < kGridBlock; ++k) {
          const int to = ((j + k) & (kGridBlock - 1)) * pitch + at;
          float4 v = x[to];
          v.x = fma(-g[k], y.x, v.x);
          v.y = fma(-g[k], y.y, v.y);
          v.z = fma(-g[k], y.z, v.z);
          v.w = fma(-g[k], y.w, v.w);
          x[to] = v;
        }
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      int r = first + q;
      float top = own_rows[q][0];
      float y = r > j ? top * down : (r == j ? 1.0f : 0.0f);
#pragma unroll
      for (int k = 1; k < kGridBlock; ++k) own_rows[q][k - 1] = fma(-g[k], y, own_rows[q][k]);
      own_rows[q][kGridBlock - 1] = r > j ? y : (r == j ? beta : top);
    }
    if (simdgroup == 0u) {
      // T(:, j) = -tau_j T (Y^T y_j) above the diagonal.
      float turned = 0.0f;
#pragma unroll
      for (int k = 1; k < kGridBlock; ++k) {
        turned = fma(-triangle[k], products[k], turned);
        triangle[k - 1] = triangle[k];
      }
      triangle[kGridBlock - 1] = own == j ? tau : turned;
    }
  }
#pragma unroll
  for (int k = 0; k < kGridBlock; ++k) {
    float4 v;
    v.x = own_rows[0][k];
    v.y = own_rows[1][k];
    v.z = own_rows[2][k];
    v.w = own_rows[3][k];
    if (int(thread_index) < quads) x[k * pitch + int(thread_index)] = v;
  }
  device float* to = triangles + (matrix * long(p.side / kGridBlock) + long(p.step)) * 256l;
  if (simdgroup == 0u && (lane & 1u) == 0u) {
#pragma unroll
    for (int k = 0; k < kGridBlock; ++k) to[own * 16 + k] = triangle[k];
  }
}

template [[host_name(
    "svd_grid_panel")]] [[kernel]] decltype(svd_grid_panel<false>) svd_grid_panel<false>;
template [[host_name(
    "svd_grid_panel_tall")]] [[kernel]] decltype(svd_grid_panel<true>) svd_grid_panel<true>;

// A threadgroup applies one panel's reflections to kGridReflected columns: Y T^T Y^T is taken from
// them. Threadgroup bytes: 4 * 64 * (simdgroups + 1), of at least kGridReflected simdgroups.
inline void reflect_columns(device const float* panel, device const float* triangle,
                            device float* y, int rows, int corner, int m, threadgroup float* tile,
                            uint simdgroup, uint simdgroups, uint lane) {
  const int stride = int(simdgroups) * 32;
  const int start = corner / stride * stride + int(simdgroup * 32u + lane);
  const int own = int(lane / 2u);
  threadgroup float* turned = tile + 64u * simdgroups;
  float w[kGridReflected][kGridBlock];
#pragma unroll
  for (int c = 0; c < kGridReflected; ++c) {
#pragma unroll
    for (int k = 0; k < kGridBlock; ++k) w[c][k] = 0.0f;
  }
  for (int r = start; r < m; r += stride) {
    float v[kGridBlock];
#pragma unroll
    for (int k = 0; k < kGridBlock; ++k) {
      v[k] = r - corner > k ? panel[k * rows + r] : (r - corner == k ? 1.0f : 0.0f);
    }
#pragma unroll
    for (int c = 0; c < kGridReflected; ++c) {
      float from = y[c * rows + r];
#pragma unroll
      for (int k = 0; k < kGridBlock; ++k) w[c][k] = fma(v[k], from, w[c][k]);
    }
  }
#pragma unroll
  for (int c = 0; c < kGridReflected; ++c) {
    float g[kGridBlock];
#pragma unroll
    for (int k = 0; k < kGridBlock; ++k) g[k] = w[c][k];
    float along = transposed_sum<kGridBlock>(g, lane);
    if ((lane & 1u) == 0u) tile[(uint(c) * simdgroups + simdgroup) * 16u + lane / 2u] = along;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup < uint(kGridReflected)) {
    float along = 0.0f;
    for (uint i = lane & 1u; i < simdgroups; i += 2u)
      along += tile[(simdgroup * simdgroups + i) * 16u + lane / 2u];
    along += simd_shuffle_xor(along, ushort(1));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kGridBlock; ++i) {
      sum = fma(triangle[i * 16 + own], simd_shuffle(along, ushort(2 * i)), sum);
    }
    if ((lane & 1u) == 0u) turned[simdgroup * 16u + lane / 2u] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int c = 0; c < kGridReflected; ++c) {
#pragma unroll
    for (int k = 0; k < kGridBlock; ++k) w[c][k] = turned[c * 16 + k];
  }
  for (int r = start; r < m; r += stride) {
    float v[kGridBlock];
#pragma unroll
    for (int k = 0; k < kGridBlock; ++k) {
      v[k] = r - corner > k ? panel[k * rows + r] : (r - corner == k ? 1.0f : 0.0f);
    }
#pragma unroll
    for (int c = 0; c < kGridReflected; ++c) {
      float from = y[c * rows + r];
#pragma unroll
      for (int k = 0; k < kGridBlock; ++k) from = fma(-v[k], w[c][k], from);
      y[c * rows + r] = from;
    }
  }
}

// Four rows of a reflection's vector, d below its diagonal: ones there and zeros above.
inline float4 unit_below(float4 x, int d) {
  x.x = d > 0 ? x.x : (d == 0 ? 1.0f : 0.0f);
  x.y = d > -1 ? x.y : (d == -1 ? 1.0f : 0.0f);
  x.z = d > -2 ? x.z : (d == -2 ? 1.0f : 0.0f);
  x.w = d > -3 ? x.w : (d == -3 ? 1.0f : 0.0f);
  return x;
}

// What 256 threads apply K reflections to C columns with. A tile has `quads` times four rows of the
// vectors and of the columns, a column at a pitch that keeps eight neighbours apart.
template <int K, int C>
struct Tiling {
  enum {
    kQuads = K + C > 48 ? 16 : 32,
    kPitch = kQuads + 1,             // in float4
    kEach = (K + C) * kQuads / 256,  // that a thread brings
    kPatches = K / 4 * (C / 4),      // of 4 x 4 products, one a thread
    kSlices = 256 / kPatches,        // of the rows
    kTile = (K + C) * kPitch > 1024 ? (K + C) * kPitch * 4 : 4096,  // floats
    kOwn = C > 16 ? 8 : 4  // columns of four rows that a thread has in the end
  };
};

// A thread's part of the tile that begins with row `first`: vectors with their diagonal in row
// `diagonal` and the next, then columns of y, or of another panel's vectors.
template <int K, int C, int EACH>
inline void fetch_tile(device const float* panel, int diagonal, device const float* y,
                       int y_diagonal, int columns, int rows, int first, thread float4 (&q)[EACH],
                       uint thread_index) {
  const int quads = Tiling<K, C>::kQuads;
  const int r = first + int(thread_index) % quads * 4;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const bool of_panel = i * 256 / quads < K;
    const int c = int(thread_index) / quads + i * (256 / quads) - (of_panel ? 0 : K);
    q[i] = four_zeros();
    if (r < rows && (of_panel || c < columns)) {
      q[i] = ((device const float4*)((of_panel ? panel : y) + c * rows))[r / 4];
      const int d = r - (of_panel ? diagonal : y_diagonal) - c;
      if (d <= 0) q[i] = unit_below(q[i], d);
    }
  }
}

// w[c * (K + 1) + k] = product of vector k with column c, over the rows from `first`. The caller
// puts a barrier behind it.
template <int K, int C>
inline void panel_products(device const float* panel, int diagonal, device const float* y,
                           int y_diagonal, int columns, int rows, int first,
                           threadgroup float* tile, threadgroup float* w, uint thread_index) {
  const int quads = Tiling<K, C>::kQuads;
  const int pitch = Tiling<K, C>::kPitch;
  const int each = Tiling<K, C>::kEach;
  const int patches = Tiling<K, C>::kPatches;
  const int slices = Tiling<K, C>::kSlices;
  const int patch = int(thread_index) % patches;
  const int slice = int(thread_index) / patches;
  const int i = patch % (K / 4);
  const int j = patch / (K / 4);
  threadgroup float4* to = (threadgroup float4*)tile;
  float4 next[each];
  float g[4][4];
#pragma unroll
  for (int a = 0; a < 4; ++a) {
#pragma unroll
    for (int b = 0; b < 4; ++b) g[a][b] = 0.0f;
  }
  fetch_tile<K, C, each>(panel, diagonal, y, y_diagonal, columns, rows, first, next, thread_index);
  for (int row = first; row < rows; row += quads * 4) {
#pragma unroll
    for (int e = 0; e < each; ++e) {
      int c = int(thread_index) / quads + e * (256 / quads);
      to[c * pitch + int(thread_index) % quads] = next[e];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    fetch_tile<K, C, each>(panel, diagonal, y, y_diagonal, columns, rows, row + quads * 4, next,
                           thread_index);
    const int last = min(quads, (rows - row) / 4);
    for (int q = slice; q < last; q += slices) {
      float4 x[4];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        float4 z = to[(i + K / 4 * a) * pitch + q];
        x[a].x = z.x;
        x[a].y = z.y;
        x[a].z = z.z;
        x[a].w = z.w;
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        float4 z = to[(K + j + C / 4 * b) * pitch + q];
#pragma unroll
        for (int a = 0; a < 4; ++a) {
          // Sums of sums: a long one of equal terms would err the same way again and again.
          float s = x[a].x * z.x;
          s = fma(x[a].y, z.y, s);
          s = fma(x[a].z, z.z, s);
          g[a][b] += fma(x[a].w, z.w, s);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
#pragma unroll
  for (int a = 0; a < 4; ++a) {
#pragma unroll
    for (int b = 0; b < 4; ++b) tile[(slice * 16 + a * 4 + b) * patches + patch] = g[a][b];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = int(thread_index); e < K * C; e += 256) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int s = 0; s < slices; ++s) sums[s % 4] += tile[s * K * C + e];
    int k = e % patches % (K / 4) + K / 4 * (e / patches / 4);
    int c = e % patches / (K / 4) + C / 4 * (e / patches % 4);
    w[c * (K + 1) + k] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// y less the vectors times w[k * C + c].
template <int K, int C>
inline void subtract_products(device const float* panel, int diagonal, device float* y, int columns,
                              int rows, threadgroup const float* w, uint thread_index) {
  const int own = Tiling<K, C>::kOwn;
  const int some = own > 4 ? 4 : 8;  // vectors, brought ahead of their use
  const int quads = 256 / (C / own);
  const int column = int(thread_index) / quads * own;
  threadgroup const float4* by = (threadgroup const float4*)w;
  for (int r = diagonal + int(thread_index) % quads * 4; r < rows; r += quads * 4) {
    device float4* at = (device float4*)(y + column * rows + r);
    float4 sum[own];
#pragma unroll
    for (int c = 0; c < own; ++c) {
      sum[c] = four_zeros();
      if (column + c < columns) sum[c] = at[c * (rows / 4)];
    }
    device const float4* from = (device const float4*)(panel + r);
    float4 next[some];
#pragma unroll
    for (int i = 0; i < some; ++i) {
      float4 x = from[i * (rows / 4)];
      next[i].x = x.x;
      next[i].y = x.y;
      next[i].z = x.z;
      next[i].w = x.w;
    }
    for (int k = 0; k < K; k += some) {
      float4 v[some];
#pragma unroll
      for (int i = 0; i < some; ++i) {
        v[i] = next[i];
        if (k + some < K) next[i] = from[(k + some + i) * (rows / 4)];
      }
      if (r < diagonal + K) {
#pragma unroll
        for (int i = 0; i < some; ++i) v[i] = unit_below(v[i], r - diagonal - k - i);
      }
#pragma unroll
      for (int i = 0; i < some; ++i) {
#pragma unroll
        for (int c = 0; c < own; c += 4) {
          float4 x = by[((k + i) * C + column + c) / 4];
          float times[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            sum[c + b].x = fma(-v[i].x, times[b], sum[c + b].x);
            sum[c + b].y = fma(-v[i].y, times[b], sum[c + b].y);
            sum[c + b].z = fma(-v[i].z, times[b], sum[c + b].z);
            sum[c + b].w = fma(-v[i].w, times[b], sum[c + b].w);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < own; ++c) {
      if (column + c < columns) at[c * (rows / 4)] = sum[c];
    }
  }
}

// The same as reflect_columns for C columns, of which `columns` are there, and K reflections: T is
// K x K. Threadgroup bytes: 4 * (kTile + (C + K) * (K + 1)).
template <int K, int C, bool TRANSPOSED>
inline void reflect_tiles(device const float* panel, device const float* triangle, device float* y,
                          int rows, int corner, int columns, threadgroup float* tile,
                          uint thread_index) {
  threadgroup float* w = tile + int(Tiling<K, C>::kTile);
  threadgroup float* t = w + C * (K + 1);
  float some[K * K / 256];
#pragma unroll
  for (int i = 0; i < K * K / 256; ++i) some[i] = triangle[int(thread_index) + 256 * i];
  panel_products<K, C>(panel, corner, y, -rows, columns, rows, corner, tile, w, thread_index);
#pragma unroll
  for (int i = 0; i < K * K / 256; ++i) {
    int e = int(thread_index) + 256 * i;
    t[TRANSPOSED ? e % K * (K + 1) + e / K : e / K * (K + 1) + e % K] = some[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = int(thread_index); e < K * C; e += 256) {
    int k = e / C;
    int c = e % C;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < K; ++i) sum = fma(t[k * (K + 1) + i], w[c * (K + 1) + i], sum);
    tile[e] = sum;
  }
  // Of y, what is written next, other threads have read.
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  subtract_products<K, C>(panel, corner, y, columns, rows, tile, thread_index);
}

// The columns behind panel p.step, C a threadgroup. 256 threads run this and svd_grid_back;
// allowing 512 makes a compiler leave registers for two threadgroups at once.
template <int C>
[[kernel, max_total_threads_per_threadgroup(512)]] void svd_grid_reflect(
    device const float* panels [[buffer(0)]], device const float* triangles [[buffer(1)]],
    device float* f [[buffer(2)]], device const int* status [[buffer(3)]],
    constant SvdGridParams& p [[buffer(4)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int corner = p.step * kGridBlock;
  const uint parts = uint((p.n - corner - kGridBlock + C - 1) / C);
  const long matrix = long(group / parts);
  if (status[matrix] != kSvdNotConverged) return;
  const int column = corner + kGridBlock + int(group % parts) * C;
  const long start = matrix * long(p.side) * long(p.rows);
  const long panel = matrix * long(p.side / kGridBlock) + long(p.step);
  reflect_tiles<kGridBlock, C, true>(panels + (start + long(corner) * long(p.rows)),
                                     triangles + panel * 256l,
                                     f + (start + long(column) * long(p.rows)), p.rows, corner,
                                     min(C, p.n - column), tile, thread_index);
}

template [[host_name(
    "svd_grid_reflect_8")]] [[kernel]] decltype(svd_grid_reflect<8>) svd_grid_reflect<8>;
template [[host_name(
    "svd_grid_reflect_16")]] [[kernel]] decltype(svd_grid_reflect<16>) svd_grid_reflect<16>;
template [[host_name(
    "svd_grid_reflect_32")]] [[kernel]] decltype(svd_grid_reflect<32>) svd_grid_reflect<32>;

// The same for so few columns that they do not fill the device.
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_reflect_4(
    device const float* panels [[buffer(0)]], device const float* triangles [[buffer(1)]],
    device float* f [[buffer(2)]], device const int* status [[buffer(3)]],
    constant SvdGridParams& p [[buffer(4)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int corner = p.step * kGridBlock;
  const uint parts = uint((p.n - corner - kGridBlock + kGridReflected - 1) / kGridReflected);
  const long matrix = long(group / parts);
  if (status[matrix] != kSvdNotConverged) return;
  const int column = corner + kGridBlock + int(group % parts) * kGridReflected;
  const long start = matrix * long(p.side) * long(p.rows);
  const long panel = matrix * long(p.side / kGridBlock) + long(p.step);
  reflect_columns(panels + (start + long(corner) * long(p.rows)), triangles + panel * 256l,
                  f + (start + long(column) * long(p.rows)), p.rows, corner, p.m, tile, simdgroup,
                  simdgroups, lane);
}

// R^T of one QR, for the next QR or, with V = I below it, for Jacobi. A square of 32 a threadgroup.
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_start(
    device const float* f [[buffer(0)]], device const int* status [[buffer(1)]],
    device float* w [[buffer(2)]], constant SvdGridParams& p [[buffer(3)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint across = uint(p.side / 32);
  const long matrix = long(group / (across * across));
  if (status[matrix] != kSvdNotConverged) return;
  const int column = int(group % across) * 32;
  const int row = int(group / across % across) * 32;
  for (int i = int(simdgroup); i < 32; i += int(simdgroups)) {
    int c = column + int(lane);
    float x = 0.0f;
    if (c <= row + i) x = f[(matrix * long(p.side) + long(row + i)) * long(p.rows) + long(c)];
    tile[int(lane) * 33 + i] = x;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int c = int(simdgroup); c < 32; c += int(simdgroups)) {
    int r = row + int(lane);
    long at = (matrix * long(p.side) + long(column + c)) * long(p.height) + long(r);
    w[at] = tile[c * 33 + int(lane)];
    if (p.height > p.side) w[at + long(p.side)] = r == column + c && r < p.n ? 1.0f : 0.0f;
  }
}

// The two blocks of columns that meet: round-robin, the last block stays.
struct BlockPair {
  int first;
  int second;
};

inline BlockPair pair_of_blocks(int blocks, int round, int pair) {
  int others = blocks - 1;
  int i = pair == 0 ? others : (round + pair) % others;
  int j = (round + others - pair) % others;
  BlockPair b;
  b.first = min(i, j);
  b.second = max(i, j);
  return b;
}

// kGridRows rows of a block's columns, from `row` on; column c of the tile starts at c * kGridRows.
// All loads of a thread are under way before the first is waited for.
inline void load_tile(device const float* columns, int height, int row, threadgroup float* tile,
                      uint thread_index) {
  const uint quads = uint(kGridRows / 4);
  const int each = kGridHalf * kGridRows / 4 / kGridGramThreads;
  threadgroup float4* to = (threadgroup float4*)tile;
  float4 held[each];
#pragma unroll
  for (int i = 0; i < each; ++i) {
    uint e = thread_index + uint(i * kGridGramThreads);
    held[i] =
        ((device const float4*)(columns + (long(e / quads) * long(height) + long(row))))[e % quads];
  }
#pragma unroll
  for (int i = 0; i < each; ++i) to[thread_index + uint(i * kGridGramThreads)] = held[i];
}

// First dispatch of a round: the inner products of the columns of each pair's two blocks, entry 32
// * second + first, in p.slices parts that share the rows. In the first round of a sweep also those
// of the columns of each block: three matrices a pair. Threads take the 16 squares with rows i + 4
// a and columns j + 4 b; eight lanes make a square, each from every eighth row quad. Threadgroup
// bytes: 4 * kGridPair * kGridRows.
[[kernel, max_total_threads_per_threadgroup(128)]] void svd_grid_gram(
    device const float* w [[buffer(0)]], device float* grams [[buffer(1)]],
    device const int* status [[buffer(2)]], constant SvdGridParams& p [[buffer(3)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint pairs = uint(p.side / kGridPair);
  const uint slices = uint(p.slices);
  const uint kinds = p.step == 0 ? 3u : 1u;
  const long matrix = long(group / (pairs * slices * kinds));
  if (status[matrix] != kSvdNotConverged) return;
  const uint kind = group / slices % kinds;  // both blocks, the first, the second
  const BlockPair b = pair_of_blocks(2 * int(pairs), p.step, int(group / (slices * kinds) % pairs));
  device const float* x = w + matrix * long(p.side) * long(p.height);
  device const float* one =
      x + long((kind == 2u ? b.second : b.first) * kGridHalf) * long(p.height);
  device const float* two =
      x + long((kind == 1u ? b.first : b.second) * kGridHalf) * long(p.height);
  const int share = (p.side / kGridRows + p.slices - 1) / p.slices * kGridRows;
  const int first = int(group % slices) * share;
  const int part = int(lane % 8u);
  const int i = int(thread_index / 8u % 4u);
  const int j = int(thread_index / 32u);
  const int pitch = kGridRows / 4;
  threadgroup const float4* from = (threadgroup const float4*)tile;
  float g[64];
#pragma unroll
  for (int e = 0; e < 64; ++e) g[e] = 0.0f;
  for (int row = first; row < min(first + share, p.side); row += kGridRows) {
    load_tile(one, p.height, row, tile, thread_index);
    load_tile(two, p.height, row, tile + kGridHalf * kGridRows, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int q = part; q < pitch; q += 8) {
      float4 left[8];
#pragma unroll
      for (int a = 0; a < 8; ++a) left[a] = from[(i + 4 * a) * pitch + q];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float4 right = from[(kGridHalf + j + 4 * c) * pitch + q];
#pragma unroll
        for (int a = 0; a < 8; ++a) {
          float sum = g[a * 8 + c];
          sum = fma(left[a].x, right.x, sum);
          sum = fma(left[a].y, right.y, sum);
          sum = fma(left[a].z, right.z, sum);
          g[a * 8 + c] = fma(left[a].w, right.w, sum);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  // The sums of a = part are left to this lane.
  halve_among<64, 64, 8>(g, lane);
  halve_among<32, 64, 8>(g, lane);
  halve_among<16, 64, 8>(g, lane);
  device float* to = grams + long(group) * 1024l + long(j * 32 + i + 4 * part);
#pragma unroll
  for (int c = 0; c < 8; ++c) to[c * 4 * 32] = g[c];
}

// The rotation of plain_rotation by the angle of rotation_angle, in one go and with fewer roots in
// a row: it is what a round waits for.
struct Turn {
  float s;
  float tau;
  float t;
  float cosine;
};

inline Turn turn_of(float a, float b, float dot, float tol) {
  float size = fabs(dot);
  Turn r;
  r.cosine = min(min(size * rsqrt(max(a, kTiny)), 1e18f) * rsqrt(max(b, kTiny)), 1.0f);
  bool rotate = r.cosine > tol && size > kTiny;
  // Products that small are not rotated, whatever their cosine. Nor do columns count whose squares
  // underflow: each turn of longer ones brings such products back above kTiny or below.
  r.cosine = size > kTiny && min(a, b) > kTiny ? r.cosine : 0.0f;
  float h = b - a;
  float w = 2.0f * size;
  uint exponent = as_type<uint>(max(max(fabs(h), w), kTiny)) & exponent_bits<float>();
  float scale = as_type<float>(0x7f000000u - exponent);  // the larger one comes to lie in [1, 2)
  float hs = fabs(h) * scale;
  float ws = w * scale;
  float over = rsqrt(max(fma(hs, hs, ws * ws), 1.0f));
  float squared = fma(0.5f * hs, over, 0.5f);  // of the cosine
  float secant = rsqrt(squared);
  float sine = 0.5f * ws * over * secant;
  float tau = fast::divide(sine, fma(squared, secant, 1.0f));
  float below = fma(tau, tau, 1.0f);
  over = fast::divide(1.0f, below);
  over = fma(over, fma(-below, over, 1.0f), over);
  float sign = (h < 0.0f) != (dot < 0.0f) ? -1.0f : 1.0f;
  r.tau = rotate ? sign * tau : 0.0f;
  r.s = 2.0f * r.tau * over;
  r.t = rotate ? sign * sine * secant : 0.0f;
  return r;
}

// Entries where pair i of rows meets pair j of columns: x (first, first), y (first, second), z
// (second, first), w (second, second).
struct Meeting {
  float x;
  float y;
  float z;
  float w;
};

// Both rotations, that of the columns first.
inline Meeting turn_meeting(Meeting e, float s, float tau, float row_s, float row_tau) {
  float x = fma(-s, fma(tau, e.x, e.y), e.x);
  float y = fma(s, fma(-tau, e.y, e.x), e.y);
  float z = fma(-s, fma(tau, e.z, e.w), e.z);
  float w = fma(s, fma(-tau, e.w, e.z), e.w);
  Meeting r;
  r.x = fma(-row_s, fma(row_tau, x, z), x);
  r.y = fma(-row_s, fma(row_tau, y, w), y);
  r.z = fma(row_s, fma(-row_tau, z, x), z);
  r.w = fma(row_s, fma(-row_tau, w, y), w);
  return r;
}

// The pair itself: its dot product becomes zero.
inline Meeting turn_itself(Meeting e, Turn r) {
  Meeting m;
  m.x = fma(-r.t, e.y, e.x);
  m.w = fma(r.t, e.y, e.w);
  m.y = r.t == 0.0f ? e.y : 0.0f;
  m.z = m.y;
  return m;
}

// All pairs of columns inside of the two blocks: g is the Gram matrix with pitch kGridSquare.
// Simdgroups 0 to 7 turn the entries of four row pairs each and rows 8 * simdgroup + r of the
// product of the rotations, less I; low and high: columns lane and 32 + lane of it.
inline void solve_inside(threadgroup float* g, thread float (&low)[8], thread float (&high)[8],
                         float tol, uint simdgroup, uint lane, thread float& max_cos,
                         thread float& max_tan) {
  const bool busy = simdgroup < 8u;
  const int pitch = kGridSquare;
  for (int k = 1; k < kGridHalf; ++k) {
    Pairing step = {true, k, kGridHalf};
    const int c0 = first_of(step, int(lane));
    const int c1 = second_of(step, int(lane));
    Turn r = turn_of(g[c0 * pitch + c0], g[c1 * pitch + c1], g[c0 * pitch + c1], tol);
    max_cos = max(max_cos, r.cosine);
    max_tan = max(max_tan, fabs(r.t));
    Meeting e[4];
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int i = int(simdgroup % 8u) * 4 + a;
      const int r0 = first_of(step, i);
      const int r1 = second_of(step, i);
      e[a].x = g[r0 * pitch + c0];
      e[a].y = g[r0 * pitch + c1];
      e[a].z = g[r1 * pitch + c0];
      e[a].w = g[r1 * pitch + c1];
      float row_s = simd_shuffle(r.s, ushort(i));
      float row_tau = simd_shuffle(r.tau, ushort(i));
      Meeting turned = turn_meeting(e[a], r.s, r.tau, row_s, row_tau);
      Meeting itself = turn_itself(e[a], r);
      bool same = i == int(lane);
      e[a].x = same ? itself.x : turned.x;
      e[a].y = same ? itself.y : turned.y;
      e[a].z = same ? itself.z : turned.z;
      e[a].w = same ? itself.w : turned.w;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (busy) {
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int i = int(simdgroup) * 4 + a;
        const int r0 = first_of(step, i);
        const int r1 = second_of(step, i);
        g[r0 * pitch + c0] = e[a].x;
        g[r0 * pitch + c1] = e[a].y;
        g[r1 * pitch + c0] = e[a].z;
        g[r1 * pitch + c1] = e[a].w;
      }
    }
    const int pair = pair_of(step, int(lane));
    const float sign = (int(lane) & high_bit(k)) != 0 ? 1.0f : -1.0f;
    const float s0 = sign * simd_shuffle(r.s, ushort(pair));
    const float tau0 = sign * simd_shuffle(r.tau, ushort(pair));
    const float s1 = sign * simd_shuffle(r.s, ushort(pair + kGridHalf / 2));
    const float tau1 = sign * simd_shuffle(r.tau, ushort(pair + kGridHalf / 2));
#pragma unroll
    for (int a = 0; a < 8; ++a) {
      const int row = int(simdgroup) * 8 + a;
      float x = low[a] + (row == int(lane) ? 1.0f : 0.0f);
      float y = high[a] + (row == kGridHalf + int(lane) ? 1.0f : 0.0f);
      low[a] = fma(s0, fma(-tau0, x, simd_shuffle_xor(x, ushort(k))), low[a]);
      high[a] = fma(s1, fma(-tau1, y, simd_shuffle_xor(y, ushort(k))), high[a]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Every column of one block with every one of the other: at step k column i of the first with i' =
// (i + k) % 32 of the second. The simdgroups up to 7 have the entries of pairs i = lane and j = (i
// + o) % 32, each for two o from 1 to 16; the others are these transposed. Those inside of a block,
// one and two, stay in their registers or move along the lanes by one, (i, j') is at meet[(j' - i)
// % 32 * 32 + i]. Simdgroup 8 keeps the pairs themselves in `diagonal`, twice: (i, i), (i', i'),
// and what (i, i') became a step before. low and high as above.
inline void solve_across(threadgroup float* meet, threadgroup float* diagonal,
                         thread float (&one)[2], thread float (&two)[2], thread float (&low)[8],
                         thread float (&high)[8], float tol, uint simdgroup, uint lane,
                         thread float& max_cos, thread float& max_tan) {
  const int i = int(lane);
  const bool keeper = simdgroup == 8u;
  const ushort after = ushort((lane + 1u) & 31u);
  // Rows 8 * simdgroup.. of I are in columns of the first block, or of the second.
  const bool of_first = simdgroup < 4u;
  const int eight = int(simdgroup & 3u) * 8;
  for (int k = 0; k < kGridHalf; ++k) {
    threadgroup const float* from = diagonal + (k & 1) * 96;
    threadgroup float* to = diagonal + (1 - (k & 1)) * 96;
    const int across = (i + k) & 31;
    Meeting own;
    own.x = from[i];
    own.w = from[kGridHalf + across];
    own.y = meet[k * 32 + i];
    own.z = own.y;
    Meeting e[2];
    int upper[2];
    int lower[2];
    int other[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int o = keeper ? 0 : 2 * int(simdgroup) + 1 + q;
      other[q] = (i + o) & 31;
      upper[q] = ((o + k) & 31) * 32 + i;
      lower[q] = ((k - o) & 31) * 32 + other[q];
      e[q].x = one[q];
      e[q].w = two[q];
      e[q].y = meet[upper[q]];
      threadgroup const float* last = o == 1 ? from + (64 + other[q]) : meet + lower[q];
      e[q].z = last[0];
    }
    Turn r = turn_of(own.x, own.w, own.y, tol);
    max_cos = max(max_cos, r.cosine);
    max_tan = max(max_tan, fabs(r.t));
    // With o = 16 a lane and the one across have the same entries, and one of them writes these.
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (keeper) {
      own = turn_itself(own, r);
      to[i] = own.x;
      to[kGridHalf + across] = own.w;
      to[64 + i] = own.y;
    } else {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float s = simd_shuffle(r.s, ushort(other[q]));
        float tau = simd_shuffle(r.tau, ushort(other[q]));
        e[q] = turn_meeting(e[q], s, tau, r.s, r.tau);
        one[q] = e[q].x;
        two[q] = simd_shuffle(e[q].w, after);
        if (q == 0 || simdgroup < 7u || i < 16) {
          meet[upper[q]] = e[q].y;
          meet[lower[q]] = e[q].z;
        }
      }
      // What the rotation makes of I itself.
      const int hit = (of_first ? i : across) - eight;
      const float stays = -r.s * r.tau;
      const float add_low = of_first ? stays : -r.s;
      const float add_high = of_first ? r.s : stays;
#pragma unroll
      for (int a = 0; a < 8; ++a) {
        float x = fma(-r.s, fma(r.tau, low[a], high[a]), low[a]);
        float y = fma(r.s, fma(-r.tau, high[a], low[a]), high[a]);
        if (hit == a) {
          x += add_low;
          y += add_high;
        }
        low[a] = x;
        high[a] = simd_shuffle(y, after);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// The cosine from which columns are turned. The sweep that finds them orthogonal leaves them more
// so than it asks for: U's would be 5 test ratios away from it at n = 4096, and are 1.
inline float turned_from(float tol) { return max(0.25f * tol, 1.1920929e-7f); }

// Second dispatch of a round: one sweep of Jacobi over each pair's Gram matrix, two-sided, every
// column of one block with every one of the other, in the first round of a sweep before that all
// pairs inside of a block. blocks: what the Gram matrix of each block has become, of which later
// rounds need no more than that for their angles; entry 32 o + i of (i, (i + o) % 32). turns: the
// product of the rotations less I, which is what rounding must not lose when they are small. slots:
// the largest cosine and tangent of this sweep, and whether anything turned. Threadgroup bytes: 4 *
// (64 * kGridSquare + 1024 + 192).
[[kernel, max_total_threads_per_threadgroup(288)]] void svd_grid_solve(
    device const float* grams [[buffer(0)]], device float* blocks [[buffer(1)]],
    device float* turns [[buffer(2)]], device float* slots [[buffer(3)]],
    device const int* status [[buffer(4)]], constant SvdGridParams& p [[buffer(5)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint pairs = uint(p.side / kGridPair);
  const long matrix = long(group / pairs);
  if (status[matrix] != kSvdNotConverged) return;
  threadgroup float* g = tile;
  threadgroup float* meet = tile + kGridPair * kGridSquare;
  threadgroup float* diagonal = meet + kGridHalf * kGridHalf;
  const BlockPair b = pair_of_blocks(2 * int(pairs), p.step, int(group % pairs));
  const int i = int(lane);
  // Of (i, (i + o) % 32) in the two blocks; the last simdgroup has the diagonal.
  const int o = simdgroup < 8u ? 2 * int(simdgroup) + 1 : 0;
  device float* of_block =
      blocks + (matrix * 2l * long(pairs) * long(kGridKept) + long(o * 32 + i));
  device float* first = of_block + long(b.first) * long(kGridKept);
  device float* second = of_block + long(b.second) * long(kGridKept);
  const float tol = turned_from(p.tol);
  float one[2];
  float two[2];
  float max_cos = 0.0f;
  float max_tan = 0.0f;
  float low[8];
  float high[8];
#pragma unroll
  for (int a = 0; a < 8; ++a) {
    low[a] = 0.0f;
    high[a] = 0.0f;
  }
  const int kinds = p.step == 0 ? 3 : 1;
  device const float* sums = grams + long(group) * long(kinds * p.slices) * 1024l;
  for (int kind = kinds - 1; kind >= 0; --kind) {
    // A simdgroup but the last has the columns simdgroup + 8 c, a lane a row.
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    device const float* from =
        sums + (long(kind * p.slices) * 1024l + long(int(simdgroup) * 32 + i));
    const int parts = simdgroup < 8u ? p.slices : 0;
    for (int four = 0; four < parts; four += 4) {
#pragma unroll
      for (int slice = 0; slice < 4; ++slice) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (four + slice < parts) sum[c] += from[(four + slice) * 1024 + c * 256];
        }
      }
    }
    if (simdgroup < 8u) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = int(simdgroup) + 8 * c;
        const int away = (column - i) & 31;
        const int r = (kind == 2 ? kGridHalf : 0) + i;
        const int of = (kind == 1 ? 0 : kGridHalf) + column;
        if (p.step == 0) {
          g[r * kGridSquare + of] = sum[c];
          if (kind == 0) g[of * kGridSquare + r] = sum[c];
        } else {
          meet[away * 32 + i] = sum[c];
          if (away == 31) diagonal[64 + i] = sum[c];
        }
      }
    }
  }
  if (p.step == 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    solve_inside(g, low, high, tol, simdgroup, lane, max_cos, max_tan);
    for (int away = int(simdgroup); away < 32; away += 9) {
      float x = g[i * kGridSquare + kGridHalf + ((i + away) & 31)];
      meet[away * 32 + i] = x;
      if (away == 31) diagonal[64 + i] = x;
    }
  }
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    one[q] = 0.0f;
    two[q] = 0.0f;
    if (q == 0 || simdgroup < 8u) {
      int j = (i + o + q) & 31;
      one[q] = p.step == 0 ? g[i * kGridSquare + j] : first[q * 32];
      two[q] = p.step == 0 ? g[(kGridHalf + i) * kGridSquare + kGridHalf + j] : second[q * 32];
    }
  }
  if (simdgroup == 8u) {
    diagonal[i] = one[0];
    diagonal[kGridHalf + i] = two[0];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  solve_across(meet, diagonal, one, two, low, high, tol, simdgroup, lane, max_cos, max_tan);
  if (simdgroup < 8u) {
    device float* to = turns + long(group) * long(kGridPair * kGridPair) + long(lane) +
                       long(int(simdgroup) * 8 * kGridPair);
#pragma unroll
    for (int a = 0; a < 8; ++a) {
      to[a * kGridPair] = low[a];
      to[a * kGridPair + kGridHalf] = high[a];
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      first[q * 32] = one[q];
      second[q * 32] = two[q];
    }
  } else {
    first[0] = diagonal[i];
    second[0] = diagonal[kGridHalf + i];
    max_cos = simd_max(max_cos);
    max_tan = simd_max(max_tan);
    device float* slot = slots + long(group) * 3l;
    if (lane == 0u) {
      slot[0] = p.step == 0 ? max_cos : max(max_cos, slot[0]);
      slot[1] = p.step == 0 ? max_tan : max(max_tan, slot[1]);
      slot[2] = max_tan;
    }
  }
}

// Third dispatch of a round: the pair's columns of X and V times I + turns. p.slices threadgroups
// share a pair's rows, 32 of them at a time. A simdgroup multiplies for the columns of one block; a
// thread brings and takes away a row quad of every eighth column, and while products are made, its
// part of the next rows is under way. Allowing 384 threads makes a compiler leave registers for six
// threadgroups at once. Threadgroup bytes: 4 * 64 * (kGridTurnPitch + kGridTurnsPitch).
[[kernel, max_total_threads_per_threadgroup(384)]] void svd_grid_turn(
    device float* w [[buffer(0)]], device const float* turns [[buffer(1)]],
    device const float* slots [[buffer(2)]], device const int* status [[buffer(3)]],
    constant SvdGridParams& p [[buffer(4)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const uint pairs = uint(p.side / kGridPair);
  const uint slices = uint(p.slices);
  const long pair = long(group / slices);
  const long matrix = pair / long(pairs);
  if (status[matrix] != kSvdNotConverged) return;
  if (slots[pair * 3l + 2l] == 0.0f) return;
  const BlockPair b = pair_of_blocks(2 * int(pairs), p.step, int(group / slices % pairs));
  const long height = long(p.height);
  device float* all = w + matrix * long(p.side) * height;
  const int share = (p.height / kGridTurnRows + p.slices - 1) / p.slices * kGridTurnRows;
  const int first = int(group % slices) * share;
  const int last = min(first + share, p.height);
  if (first >= last) return;
  threadgroup float* by = tile + kGridPair * kGridTurnPitch;
  device const float4* turn = (device const float4*)(turns + pair * long(kGridPair * kGridPair));
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int e = int(thread_index) + i * kGridTurnThreads;
    ((threadgroup float4*)(by + e / 16 * kGridTurnsPitch))[e % 16] = turn[e];
  }
  const int quad = int(thread_index % 8u);
  const int of = int(thread_index / 8u);
  device float* one = all + (long(b.first * kGridHalf + of) * height + long(4 * quad));
  device float* two = all + (long(b.second * kGridHalf + of) * height + long(4 * quad));
  threadgroup float* own = tile + (of * kGridTurnPitch + 4 * quad);
  threadgroup float* made = tile + int(simdgroup) * kGridHalf * kGridTurnPitch;
  threadgroup const float* rotations = by + int(simdgroup) * kGridHalf;
  float4 next[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    device const float* from = i < 4 ? one : two;
    next[i] = ((device const float4*)(from + (long(i % 4 * 8) * height + long(first))))[0];
  }
  for (int row = first; row < last; row += kGridTurnRows) {
#pragma unroll
    for (int i = 0; i < 8; ++i) ((threadgroup float4*)(own + i * 8 * kGridTurnPitch))[0] = next[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (row + kGridTurnRows < last) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        device const float* from = (i < 4 ? one : two) + (row + kGridTurnRows);
        next[i] = ((device const float4*)(from + long(i % 4 * 8) * height))[0];
      }
    }
    simdgroup_float8x8 y[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) y[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (int k = 0; k < kGridPair; k += 8) {
      simdgroup_float8x8 t[4];
      simdgroup_float8x8 z[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        simdgroup_load(t[i], rotations + (k * kGridTurnsPitch + 8 * i), ulong(kGridTurnsPitch),
                       ulong2(0), true);
        simdgroup_load(z[i], tile + (k * kGridTurnPitch + 8 * i), ulong(kGridTurnPitch));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) simdgroup_multiply_accumulate(y[i][j], t[i], z[j], y[i][j]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        threadgroup float* at = made + (8 * i * kGridTurnPitch + 8 * j);
        simdgroup_float8x8 x;
        simdgroup_load(x, at, ulong(kGridTurnPitch));
        x.thread_elements().x += y[i][j].thread_elements().x;
        x.thread_elements().y += y[i][j].thread_elements().y;
        simdgroup_store(x, at, ulong(kGridTurnPitch));
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      device float* to = (i < 4 ? one : two) + row;
      ((device float4*)(to + long(i % 4 * 8) * height))[0] =
          ((threadgroup const float4*)(own + i * 8 * kGridTurnPitch))[0];
    }
  }
}

// The end of a sweep: is the matrix done? A simdgroup a matrix.
[[kernel, max_total_threads_per_threadgroup(32)]] void svd_grid_check(
    device const float* slots [[buffer(0)]], device int* status [[buffer(1)]],
    device int* sweeps [[buffer(2)]], device float* off_norm [[buffer(3)]],
    constant SvdGridParams& p [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int pairs = p.side / kGridPair;
  const long matrix = long(group);
  bool running = status[matrix] == kSvdNotConverged;
  float max_cos = 0.0f;
  float max_tan = 0.0f;
  if (running) {
    for (int i = int(lane); i < pairs; i += 32) {
      device const float* slot = slots + (matrix * long(pairs) + long(i)) * 3l;
      max_cos = max(max_cos, slot[0]);
      max_tan = max(max_tan, slot[1]);
    }
  }
  max_cos = simd_max(max_cos);
  max_tan = simd_max(max_tan);
  bool converged = orthogonal_behind(max_cos, max_tan, p.n, p.tol);
  simdgroup_barrier(mem_flags::mem_device);  // all lanes have read the status
  if (running && lane == 0u) {
    sweeps[matrix] = sweeps[matrix] + 1;
    off_norm[matrix] = max_cos;
    if (converged) status[matrix] = kSvdConverged;
  }
}

// A column of X and the one of V below it, each of a multiple of 64 rows, become of length 1;
// returns the singular value. `products`: with V its column says how much the products with rounded
// rotations have stretched both, which would be up to 6 ulp in a singular value at n = 1024.
// Columns turned pair by pair have each their own rounding errors: 4.8 ulp with it and 3.7 without
// at n = 300.
inline float unit_columns(device float* x, int side, bool vectors, bool products, uint lane) {
  float largest = 0.0f;
  for (int r = int(lane); r < side; r += 32) largest = max(largest, fabs(x[r]));
  largest = simd_max(largest);
  float up = largest < 5.4210109e-20f ? 1.8446744e19f : 1.0f;  // 2^-64, 2^64
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int r = int(lane); r < side; r += 128) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float y = r + 32 * i < side ? x[r + 32 * i] * up : 0.0f;
      part[i] = fma(y, y, part[i]);
    }
  }
  float length = sqrt(simd_sum((part[0] + part[1]) + (part[2] + part[3])));
  float inverse = length > kVanished * up ? up / length : 0.0f;
  for (int r = int(lane); r < side; r += 32) x[r] *= inverse;
  float stretched = 1.0f;
  if (vectors) {
    device float* v = x + side;
    float squares = 0.0f;
    float more = 0.0f;
    for (int r = int(lane); r < side; r += 64) {
      squares = fma(v[r], v[r], squares);
      more = fma(v[r + 32], v[r + 32], more);
    }
    stretched = sqrt(simd_sum(squares + more));
    inverse = 1.0f / stretched;
    for (int r = int(lane); r < side; r += 32) v[r] *= inverse;
  }
  return length / up / (products ? stretched : 1.0f);
}

// The columns of X and V become orthonormal; keys: the singular values. A simdgroup a column.
// p.step: 0 where V says how far columns were stretched.
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_norms(
    device float* w [[buffer(0)]], device uint* keys [[buffer(1)]],
    device const int* status [[buffer(2)]], constant SvdGridParams& p [[buffer(3)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint parts = (uint(p.side) + simdgroups - 1u) / simdgroups;
  const long matrix = long(group / parts);
  const int column = int(group % parts * simdgroups + simdgroup);
  if (column < p.n && status[matrix] == kSvdConverged) {
    device float* x = w + (matrix * long(p.side) + long(column)) * long(p.height);
    float sigma = unit_columns(x, p.side, p.height > p.side, p.step == 0, lane);
    if (lane == 0u) keys[matrix * long(p.side) + long(column)] = as_type<uint>(sigma);
  }
}

// Without a V that says how far columns were stretched, and behind svd_fused and svd_quarters,
// whose turns each round, singular values by the lengths of the columns of X = R^T were off by up
// to 8.6 ulp at n = 384. The length of R w is off by the square of what a column w is off by.
// Beside that of a short column it shows what w has of longer ones, and the column's own length is
// left.
//
// A threadgroup takes kLengthsColumns columns w, and of R kLengthsRows rows at a time, a lane four
// of each. Threadgroup bytes: 4 * kLengthsDepth * (kLengthsRows + kLengthsColumns + 4).
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_lengths(
    device const float* w [[buffer(0)]], device const float* r [[buffer(1)]],
    device uint* keys [[buffer(2)]], device const int* status [[buffer(3)]],
    constant SvdGridParams& p [[buffer(4)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int depth = kLengthsDepth;
  const int pitch = kLengthsColumns + 4;
  const uint parts = uint(p.side / kLengthsColumns);
  const long matrix = long(group / parts);
  if (status[matrix] != kSvdConverged) return;
  const int thread_index = int(simdgroup * 32u + lane);
  const int column = int(group % parts) * kLengthsColumns;
  threadgroup float* down = tile + depth * kLengthsRows;  // numbers of columns w
  // What a thread brings: rows 4 * lane and on of two columns of R, and of one column w two
  // numbers.
  device const float* entries =
      r + (matrix * long(p.side) + long(simdgroup)) * long(p.side) + long(4u * lane);
  const int own = thread_index / 8;
  device const float* along =
      w + (matrix * long(p.side) + long(column + own)) * long(p.height) + long(thread_index % 8);
  float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int top = 0; top < p.n; top += kLengthsRows) {
    float total[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) total[k][j] = 0.0f;
    }
    const bool inside = top + 4 * int(lane) < p.side;
    for (int first = top; first < p.n; first += depth) {
      float4 next[2];
      float number[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = first + int(simdgroup) + 8 * i;
        next[i] = four_zeros();
        if (inside) {
          next[i] =
              ((device const float4*)(entries + long(first + 8 * i) * long(p.side) + long(top)))[0];
        }
        // What lies below the diagonal is not of R.
        const int over = c - top - 4 * int(lane);
        next[i] = four_numbers(over >= 0 ? next[i].x : 0.0f, over >= 1 ? next[i].y : 0.0f,
                               over >= 2 ? next[i].z : 0.0f, over >= 3 ? next[i].w : 0.0f);
        number[i] = along[first + 8 * i];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ((threadgroup float4*)(tile + (int(simdgroup) + 8 * i) * kLengthsRows))[lane] = next[i];
        down[(thread_index % 8 + 8 * i) * pitch + own] = number[i];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float sum[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[k][j] = 0.0f;
      }
#pragma unroll
      for (int c = 0; c < depth; ++c) {
        const float4 row = ((threadgroup const float4*)(tile + c * kLengthsRows))[lane];
        const float4 by = ((threadgroup const float4*)(down + c * pitch))[simdgroup];
        const float y[4] = {row.x, row.y, row.z, row.w};
        const float x[4] = {by.x, by.y, by.z, by.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[k][j] = fma(y[j], x[k], sum[k][j]);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) total[k][j] += sum[k][j];
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) squares[k] = fma(total[k][j], total[k][j], squares[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float length = sqrt(simd_sum(squares[k]));
    const int c = column + 4 * int(simdgroup) + k;
    if (lane == 0u && c < p.n) {
      device uint* key = keys + (matrix * long(p.side) + long(c));
      const uint bits = key[0];
      const float sigma = as_type<float>(bits);
      if (fabs(length - sigma) < 0.00002f * sigma) key[0] = as_type<uint>(length);
    }
  }
}

// Columns of X that vanished become vectors orthonormal to the rest. One threadgroup a matrix,
// which is done at once where none is missing. work: 3 * side.
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_complete(
    device float* w [[buffer(0)]], device const uint* keys [[buffer(1)]],
    device const int* order [[buffer(2)]], device const int* status [[buffer(3)]],
    device float* work [[buffer(4)]], constant SvdGridParams& p [[buffer(5)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long matrix = long(group);
  if (status[matrix] != kSvdConverged) return;
  device const uint* key = keys + matrix * long(p.side);
  int there = 0;
  for (int c = int(thread_index); c < p.n; c += int(threads))
    there += as_type<float>(key[c]) > kVanished ? 1 : 0;
  // By a vote, so that it counts as the same for all.
  const int present =
      simd_max(int(threadgroup_sum(float(there), tile, simdgroup, simdgroups, lane)));
  if (present == p.n) return;
  complete_in_memory<false>(w + matrix * long(p.side) * long(p.height), p.height,
                            order + matrix * long(p.side), present, p.n,
                            work + matrix * long(p.side) * 3l, p.side, tile, thread_index, threads,
                            simdgroup, simdgroups, lane);
}

// T of two panels in a row as of one: T1 and T2 on its diagonal, -T1 Y1^T Y2 T2 above.
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_merge(
    device const float* f [[buffer(0)]], device const float* triangles [[buffer(1)]],
    device const int* status [[buffer(2)]], device float* merged [[buffer(3)]],
    constant SvdGridParams& p [[buffer(4)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const uint parts = uint((p.n + kGridMerged - 1) / kGridMerged);
  const long matrix = long(group / parts);
  if (status[matrix] != kSvdConverged) return;
  const int corner = int(group % parts) * kGridMerged;
  const int next = corner + kGridBlock;
  const long place = matrix * long(p.side / kGridMerged) + long(corner / kGridMerged);
  threadgroup float* w = tile + int(Tiling<kGridBlock, kGridBlock>::kTile);
  threadgroup float* one = w + 16 * 17;
  threadgroup float* two = one + 16 * 17;
  const int k = int(thread_index) / 16;
  const int c = int(thread_index) % 16;
  device const float* from = triangles + place * 512l;
  one[k * 17 + c] = from[k * 16 + c];
  two[k * 17 + c] = next < p.n ? from[256 + k * 16 + c] : 0.0f;
  device const float* x = f + (matrix * long(p.side) + long(corner)) * long(p.rows);
  panel_products<kGridBlock, kGridBlock>(x, corner, x + kGridBlock * p.rows, next, kGridBlock,
                                         p.rows, next, tile, w, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0.0f;
  for (int i = 0; i < kGridBlock; ++i) sum = fma(w[i * 17 + k], two[i * 17 + c], sum);
  tile[k * 17 + c] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = 0.0f;
  for (int i = 0; i < kGridBlock; ++i) sum = fma(-one[k * 17 + i], tile[i * 17 + c], sum);
  device float* to = merged + place * 1024l;
  to[k * 32 + c] = one[k * 17 + c];
  to[k * 32 + 16 + c] = sum;
  to[(16 + k) * 32 + c] = 0.0f;
  to[(16 + k) * 32 + 16 + c] = two[k * 17 + c];
}

// U = Q [X 0; 0 I], and then the same of V with the second QR: columns in order, C a threadgroup.
template <int C>
[[kernel, max_total_threads_per_threadgroup(512)]] void svd_grid_back(
    device const float* f [[buffer(0)]], device const float* merged [[buffer(1)]],
    device const float* w [[buffer(2)]], device const int* order [[buffer(3)]],
    device const int* status [[buffer(4)]], device float* z [[buffer(5)]],
    constant SvdGridParams& p [[buffer(6)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint parts = uint((p.u_cols + C - 1) / C);
  const long matrix = long(group / parts);
  if (status[matrix] != kSvdConverged) return;
  const int column = int(group % parts) * C;
  const long side = long(p.side);
  const long columns = long((p.u_cols + 31) / 32 * 32);
  device float* y = z + (matrix * columns + long(column)) * long(p.rows);
  for (int c = int(simdgroup); c < C; c += int(simdgroups)) {
    int at = column + c;
    int from = at < p.n ? order[matrix * side + long(at)] : 0;
    device const float* v =
        w + ((matrix * side + long(from)) * long(p.height) + long(p.step) * side);
    for (int r = int(lane); r < p.rows; r += 32) {
      float one = r == at ? 1.0f : 0.0f;
      if (at < p.n) one = r < p.n ? v[r] : 0.0f;
      y[c * p.rows + r] = one;
    }
  }
  for (int i = (p.n - 1) / kGridMerged; i >= 0; --i) {
    // What is read next, other threads have just written.
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
    const int corner = i * kGridMerged;
    reflect_tiles<kGridMerged, C, false>(
        f + (matrix * side + long(corner)) * long(p.rows),
        merged + (matrix * (side / long(kGridMerged)) + long(i)) * 1024l, y, p.rows, corner, C,
        tile, thread_index);
  }
}

template [[host_name("svd_grid_back_8")]] [[kernel]] decltype(svd_grid_back<8>) svd_grid_back<8>;
template [[host_name("svd_grid_back_16")]] [[kernel]] decltype(svd_grid_back<16>) svd_grid_back<16>;
template [[host_name("svd_grid_back_32")]] [[kernel]] decltype(svd_grid_back<32>) svd_grid_back<32>;

// The singular values. A thread a value.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_values(
    device const uint* keys [[buffer(0)]], device const int* order [[buffer(1)]],
    device const int* exponent [[buffer(2)]], device const int* status [[buffer(3)]],
    device T* s [[buffer(4)]], constant SvdGridParams& p [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  const uint parts = (uint(p.n) + threads - 1u) / threads;
  const long matrix = long(group / parts);
  const int i = int(group % parts * threads + thread_index);
  if (i < p.n) {
    bool good = status[matrix] == kSvdConverged;
    long from = matrix * long(p.side) + long(order[matrix * long(p.side) + long(i)]);
    float sigma = good ? as_type<float>(keys[from]) : 0.0f;
    s[matrix * long(p.n) + long(i)] = T(or_nan(scale_out(sigma, exponent[matrix]), good));
  }
}

// U and Vt, a square of 32 a threadgroup, turned so that lanes write neighbouring elements. origin:
// the order of A's columns in F.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_grid_factors(
    device const float* left [[buffer(0)]], device const float* right [[buffer(1)]],
    device const int* origin [[buffer(2)]], device const int* status [[buffer(3)]],
    device T* u [[buffer(4)]], device T* vt [[buffer(5)]], constant SvdGridParams& p [[buffer(6)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint down = uint(p.rows / 32);
  const uint squares = down * uint((p.u_cols + 31) / 32);
  const uint all = squares + uint(p.side / 32) * uint(p.side / 32);
  const long matrix = long(group / all);
  const bool good = status[matrix] == kSvdConverged;
  const bool of_u = group % all < squares;
  const uint square = of_u ? group % all : group % all - squares;
  const uint high = of_u ? down : uint(p.side / 32);
  const int row = int(square % high) * 32;
  const int column = int(square / high) * 32;
  const int last_row = of_u ? p.m : p.n;
  const int last_column = of_u ? p.u_cols : p.n;
  const long columns = long((last_column + 31) / 32 * 32);
  const long height = long(of_u ? p.rows : p.side);
  device const int* first = origin + matrix * long(p.side);
  device const float* from = (of_u ? left : right) + matrix * columns * height;
  for (int c = int(simdgroup); c < 32; c += int(simdgroups)) {
    float x = 0.0f;
    if (good && column + c < last_column && row + int(lane) < last_row) {
      x = from[long(column + c) * height + long(row + int(lane))];
    }
    tile[c * 33 + int(lane)] = x;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  device T* to = of_u ? u + matrix * p.u_batch : vt + matrix * p.vt_batch;
  const long down_by = long(of_u ? p.u_row : p.vt_col);
  const long across_by = long(of_u ? p.u_col : p.vt_row);
  const bool by_row = across_by <= down_by;
  for (int i = int(simdgroup); i < 32; i += int(simdgroups)) {
    int r = by_row ? i : int(lane);
    int c = by_row ? int(lane) : i;
    if (row + r < last_row && column + c < last_column) {
      long at = long(of_u ? row + r : first[row + r]) * down_by + long(column + c) * across_by;
      to[at] = T(or_nan<float>(tile[c * 33 + r], good));
    }
  }
}

// --- half of the columns a threadgroup ("quarters")
// -------------------------------------------------
//
// The rounds of "grid" for up to 256 columns. A dispatch is a round: half of the columns have their
// rows in the registers of a threadgroup, which does the steps of "twin" on them, the other half in
// those of another. In the first round of a sweep all columns of a half meet, in the two others
// those of one quarter the ones of another: registers 0 and 2 of the lanes have one, registers 1
// and 3 the other. Behind the first two rounds halves swap a quarter. V's columns make the
// rotations of a sweep in the first dispatch of the next, without going through memory.

// Where in memory, before and behind each round, the column is that register c of a lane has in the
// first, second and third.
inline int quarters_first(int side, int lane, int c) {
  return side * (kQuartersSide / 2) + c * 32 + lane;
}

// The steps of the first round have reversed the order, and odd registers been swapped.
inline int quarters_second(int side, int lane, int c) {
  return quarters_first(c % 2 != 0 ? 1 - side : side, 31 - lane, 3 - c);
}

// Those of the second have moved both quarters half way round.
inline int quarters_third(int side, int lane, int c) {
  const bool odd = c % 2 != 0;
  if (odd != (side == 0)) return quarters_second(side, lane ^ 16, c);
  return quarters_second(1 - side, lane ^ 16, odd ? c - 1 : c + 1);
}

inline int quarters_place(int round, int side, int lane, int c) {
  if (round == 0) return quarters_first(side, lane, c);
  return round == 1 ? quarters_second(side, lane, c) : quarters_third(side, lane, c);
}

// The same behind the steps of the round.
inline int quarters_behind(int round, int side, int lane, int c) {
  if (round == 0) return quarters_first(side, 31 - lane, 3 - c);
  return quarters_place(round, side, lane ^ 16, c);
}

// The largest |cosine| and tangent of a round of a half, for later dispatches. A cosine of -1 where
// nothing turned.
inline device float* quarters_slot(device float* slots, long matrix, int step, int side) {
  return slots + ((matrix * 6l + long(step % 6)) * 4l + long(side * 2));
}

inline device float4* quarters_record(device float4* records, long matrix, int sweep) {
  return records + (matrix * 2l + long(sweep % 2)) * long(kQuartersRows * kQuartersSide / 4);
}

enum QuartersTask { kQuartersTurn, kQuartersLeave, kQuartersNothing };

// What a half has to do: a round, or X's columns back to where they came from, once all sweeps are
// over. At the end of a sweep the first half says what came of it.
inline QuartersTask quarters_task(device float* slots, device int* status, device int* sweeps,
                                  device float* off_norm, constant SvdGridParams& p, long matrix,
                                  int side, bool speaker) {
  if (p.step == 0) {
    const bool turn = status[matrix] == kSvdNotConverged && p.slices > 0;
    return turn ? kQuartersTurn : kQuartersNothing;
  }
  if (p.step % 3 != 0) {
    const bool turned = quarters_slot(slots, matrix, p.step - 1, side)[0] >= 0.0f;
    return turned ? kQuartersTurn : kQuartersNothing;
  }
  float max_cos = -1.0f;
  float max_tan = 0.0f;
  for (int i = 0; i < 6; ++i) {
    device const float* slot = quarters_slot(slots, matrix, p.step - 1 - i / 2, i % 2);
    max_cos = max(max_cos, slot[0]);
    max_tan = max(max_tan, slot[1]);
  }
  if (max_cos < 0.0f) return kQuartersNothing;
  const bool converged = orthogonal_behind(max_cos, max_tan, p.n, p.tol);
  if (speaker && side == 0) {
    sweeps[matrix] = p.step / 3;
    off_norm[matrix] = max_cos;
    if (converged) status[matrix] = kSvdConverged;
  }
  return converged || p.step == p.slices ? kQuartersLeave : kQuartersTurn;
}

// X lies in fours of rows, of all columns the first, then the second: lanes read neighbours. At the
// end it goes back to W.
template <int G>
inline void leave_quarters(device const float4* x, device float4* w, int height, int side,
                           uint thread_index) {
  const int column = side * (kQuartersSide / 2) + int(thread_index) % (kQuartersSide / 2);
  const int each = 32 * G / (kQuartersSide / 2);
  for (int q = int(thread_index) / (kQuartersSide / 2); q < kQuartersSide / 4; q += each)
    w[column * (height / 4) + q] = x[q * kQuartersSide + column];
}

template <int N, int G, int H, bool CLOSED, int C>
inline void four_steps(thread float (&y)[C][H], thread float (&norm)[C], thread float (&heavy)[C],
                       thread float (&light)[C], float tol, device float2* record,
                       threadgroup float* tile, uint simdgroup, uint lane, thread float& max_cos,
                       thread float& max_tan) {
  step_twin<N, G, H, true, CLOSED, 0>(y, norm, heavy, light, tol, record, uint(N), tile, simdgroup,
                                      lane, max_cos, max_tan);
  step_twin<N, G, H, true, CLOSED, 1>(y, norm, heavy, light, tol, record, uint(N), tile, simdgroup,
                                      lane, max_cos, max_tan);
  step_twin<N, G, H, true, CLOSED, 2>(y, norm, heavy, light, tol, record, uint(N), tile, simdgroup,
                                      lane, max_cos, max_tan);
  step_twin<N, G, H, true, CLOSED, 3>(y, norm, heavy, light, tol, record, uint(N), tile, simdgroup,
                                      lane, max_cos, max_tan);
}

// A round of a half: X is in w before the first.
template <int G>
inline void turn_quarters(device float4* x, device const float4* w, device float2* record,
                          device float* slot, constant SvdGridParams& p, threadgroup float* tile,
                          int side, uint simdgroup, uint lane) {
  const int N = kQuartersSide / 2;
  const int C = Twin<N, G>::kColumns;
  const int H = kQuartersSide / G;
  const int round = p.step % 3;
  const bool closed = round == 0;
  typedef Twin<N, G> Place;
  const int top = int(simdgroup) * (H / 4);
  device const float4* before = p.step == 0 ? w + top : x + top * kQuartersSide;
  const int across = p.step == 0 ? p.height / 4 : 1;
  const int down = p.step == 0 ? 1 : kQuartersSide;
  float y[C][H];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    device const float4* from = before + quarters_place(round, side, int(lane), c) * across;
#pragma unroll
    for (int i = 0; i < H / 4; ++i) {
      put_four(y[c], 4 * i, from[i * down]);
    }
  }
  float max_cos = 0.0f;
  float max_tan = 0.0f;
  for (int part = 0; part < (closed ? 2 : 1); ++part) {
    float norm[C];
    // Weights, and what rounding took from them.
    float heavy[C];
    float light[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      norm[c] = dot_product<H>(y[c], y[c]);
      heavy[c] = 1.0f;
      light[c] = 0.0f;
    }
    sum_slices<N, G>(norm, 1, tile, simdgroup, lane);
    // As in svd_twin.
#pragma unroll
    for (int c = 0; c < C; ++c) norm[c] = norm[c] < kLeastNorm ? 1.0f : norm[c];
    for (int i = 0; i < int(kQuarter); i += C) {
      if (simd_any(closed))
        four_steps<N, G, H, true>(y, norm, heavy, light, p.tol, record, tile, simdgroup, lane,
                                  max_cos, max_tan);
      else
        four_steps<N, G, H, false>(y, norm, heavy, light, p.tol, record, tile, simdgroup, lane,
                                   max_cos, max_tan);
      record += C * N;
    }
    float factor[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      factor[c] = 1.0f / sqrt(heavy[c]);
#pragma unroll
      for (int i = 0; i < H; ++i) y[c][i] *= factor[c];
    }
    if (simdgroup == 0u) {
#pragma unroll
      for (int j = 0; j < C / 2; ++j)
        record[int(lane) * (C / 2) + j] = two_numbers(factor[2 * j], factor[2 * j + 1]);
    }
    record += N;
  }
  simdgroup_barrier(mem_flags::mem_device);  // columns go where those of other lanes were
#pragma unroll
  for (int c = 0; c < C; ++c) {
    device float4* to = x + (top * kQuartersSide + quarters_behind(round, side, int(lane), c));
#pragma unroll
    for (int i = 0; i < H / 4; ++i) to[i * kQuartersSide] = four_from(y[c], 4 * i);
  }
  threadgroup float* found = tile + int(Place::kFlags);
  max_cos = threadgroup_max(max_cos, found, simdgroup, uint(G), lane);
  max_tan = threadgroup_max(max_tan, found, simdgroup, uint(G), lane);
  if (simdgroup == 0u && lane == 0u) {
    slot[0] = max_cos;
    slot[1] = max_tan;
  }
}

// How V's rows are spread: as in TwinRows, but that a lane's rows are neighbours.
template <int G>
struct QuartersRows {
  enum {
    kR = 4,
    kParts = 8,
    kColumns = kQuartersSide / kParts,
    kHeight = 32 * G / kParts * kR,
    kFours = 0,  // rotations of four steps
    kPad = 1,
    kPart = kColumns / 4 + kPad,
    kStep = kParts * kPart
  };
};

// Halves swap columns: the first those of registers 1 and 3 of each four, the second those, or with
// `flip` those of registers 0 and 2.
template <int C, int R, int W>
inline void swap_quarters(thread float (&v)[R][W], int flip, bool second, ushort other) {
#pragma unroll
  for (int l = 0; l < W; l += C) {
#pragma unroll
    for (int c = 1; c < C; c += 2) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float high = v[r][l + c];
        const float low = v[r][l + c - 1];
        const bool of_low = second && flip != 0;
        const float came = simd_shuffle(of_low ? low : high, other);
        v[r][l + c] = of_low ? high : came;
        v[r][l + c - 1] = of_low ? came : low;
      }
    }
  }
}

// The rotations of a sweep, for kHeight rows of V.
template <int G>
inline void replay_quarters(device float* v, device const float4* record, constant SvdGridParams& p,
                            threadgroup float* tile, uint thread_index) {
  typedef QuartersRows<G> Place;
  const int C = 4;
  const int R = Place::kR;
  const int W = Place::kColumns;
  const int fours = kQuartersSide / 4;  // of a step
  const int F = C * fours;
  const int K = (F + 32 * G - 1) / (32 * G);
  const int which = int(thread_index) % int(Place::kParts);
  const int ring = int(Place::kParts) / 2;
  const int side = which / ring;
  const int first = which % ring * (W / C);  // lane that had these columns in turn_quarters
  const ushort other = ushort(thread_index % 32u ^ uint(ring));
  device float4* rows = (device float4*)v + int(thread_index) / int(Place::kParts);
  const int height = p.height / 4;
  float y[R][W];
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const float4 four = rows[quarters_first(side, first + j / C, j % C) * height];
    y[0][j] = four.x;
    y[1][j] = four.y;
    y[2][j] = four.z;
    y[3][j] = four.w;
  }
  float4 next[K];
  for (int part = 0; part < 4; ++part) {
    if (part > 1) swap_quarters<C>(y, part - 2, side == 1, other);
    fetch_fours<F, G>(record, F, next, thread_index);
    replay_steps<Place, G, C, ring>(y, record + F, kQuarter, part < 2, next, tile, thread_index);
    record += int(kQuarter) * fours;
    fetch_fours<F, G>(record, fours, next, thread_index);
    threadgroup float4* down = (threadgroup float4*)(tile + int(Place::kFours));
    put_fours<Place, F, G>(next, down, thread_index);
    scale_columns(y, down + which * int(Place::kPart));
    record += fours;
  }
  simdgroup_barrier(mem_flags::mem_device);  // as in turn_quarters
#pragma unroll
  for (int j = 0; j < W; ++j) {
    rows[quarters_behind(2, side, first + j / C, j % C) * height] =
        four_numbers(y[0][j], y[1][j], y[2][j], y[3][j]);
  }
}

// Threadgroup bytes: 4 * Twin<kQuartersSide / 2, G>::kNumbers.
template <int G>
[[kernel, max_total_threads_per_threadgroup(32 * G)]] void svd_quarters(
    device float* w [[buffer(0)]], device float4* x [[buffer(1)]],
    device float4* records [[buffer(2)]], device float* slots [[buffer(3)]],
    device int* status [[buffer(4)]], device int* sweeps [[buffer(5)]],
    device float* off_norm [[buffer(6)]], constant SvdGridParams& p [[buffer(7)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint of_x = 2u * uint(p.batch);
  const long matrix = long(group % of_x / 2u);
  const int side = int(group % 2u);
  const int sweep = p.step / 3;
  const int round = p.step % 3;
  device float* wm = w + matrix * long(p.side) * long(p.height);
  if (group < of_x) {
    device float* slot = quarters_slot(slots, matrix, p.step, side);
    device float4* xm = x + matrix * long(kQuartersSide * kQuartersSide / 4);
    const bool speaker = simdgroup == 0u && lane == 0u;
    const QuartersTask task =
        quarters_task(slots, status, sweeps, off_norm, p, matrix, side, speaker);
    if (simd_any(task != kQuartersTurn)) {
      if (task == kQuartersLeave)
        leave_quarters<G>(xm, (device float4*)wm, p.height, side, simdgroup * 32u + lane);
      if (speaker) slot[0] = -1.0f;
      return;
    }
    const int before = (round == 0 ? 0 : round + 1) * (kQuarter + 1);  // rows of the record
    device float2* record = (device float2*)quarters_record(records, matrix, sweep) +
                            (before * 2 + side) * (kQuartersSide / 4);
    turn_quarters<G>(xm, (device const float4*)wm, record, slot, p, tile, side, simdgroup, lane);
  } else if (quarters_slot(slots, matrix, p.step - 1, 0)[0] >= 0.0f) {
    replay_quarters<G>(wm + (p.side + side * int(QuartersRows<G>::kHeight)),
                       quarters_record(records, matrix, sweep - 1), p, tile,
                       simdgroup * 32u + lane);
  }
}

// --- complex of any size: one threadgroup a matrix, columns in device memory
//
// Two QRs in front let Jacobi take as few sweeps on hard matrices as on random ones. Source: Z.
// Drmac and K. Veselic, SIAM J. Matrix Anal. Appl. 29 (2008) 1322.
//
// Column by column: F (A with its columns in descending order of size) and G (R^H), both with what
// makes the Householder vectors below the diagonal, W (X, R^H of the second QR, with V below it), Z
// (U and V of A). A dispatch that finds its matrix done returns at once.

// I - tau v v^H with v = (1, down * what lies below the diagonal); beta is what it leaves on it.
struct Reflector {
  float2 down;
  float2 beta;
  float tau;
};

constant float kFlat = 1e-20f;  // squared length below which a column is scaled up, by kHeavy

inline float squares_below(device const float2* x, int j, int rows, float up, uint lane) {
  float squares = 0.0f;
  for (int r = j / 32 * 32 + int(lane); r < rows; r += 32) {
    float2 z = x[r];
    z.x *= r > j ? up : 0.0f;
    z.y *= r > j ? up : 0.0f;
    squares = fma(z.x, z.x, fma(z.y, z.y, squares));
  }
  return simd_sum(squares);
}

// Of column j. With beta of the phase that the diagonal element had, tau is real.
inline Reflector reflector_of(device const float2* x, int j, int rows, uint lane) {
  float2 alpha = x[j];
  float up = 1.0f;
  float below = squares_below(x, j, rows, up, lane);
  float corner = fma(alpha.x, alpha.x, alpha.y * alpha.y);
  if (simd_any(below + corner < kFlat)) {
    up = kHeavy;
    alpha.x *= up;
    alpha.y *= up;
    below = squares_below(x, j, rows, up, lane);
    corner = fma(alpha.x, alpha.x, alpha.y * alpha.y);
  }
  bool flat = below + corner < kFlat;  // what lies below is nothing beside the largest entry
  float norm = sqrt(below + corner);
  float size = corner > kTiny ? sqrt(corner) : 0.0f;
  float pr = corner > kTiny ? alpha.x / size : 1.0f;
  float pi = corner > kTiny ? alpha.y / size : 0.0f;
  float scale = flat ? 0.0f : up / (norm + size);
  Reflector h;
  h.down.x = pr * scale;
  h.down.y = -pi * scale;
  h.beta.x = (flat ? alpha.x : -pr * norm) / up;
  h.beta.y = (flat ? alpha.y : -pi * norm) / up;
  h.tau = flat ? 0.0f : 1.0f + size / norm;
  return h;
}

// Applies the reflector of column j, x, to the column y. A lane always has the same rows.
inline void reflect_column(device const float2* x, Reflector h, device float2* y, int j, int rows,
                           uint lane) {
  float g[2] = {0.0f, 0.0f};
  float2 corner;
  corner.x = 0.0f;
  corner.y = 0.0f;
  for (int r = j / 32 * 32 + int(lane); r < rows; r += 32) {
    float2 f = x[r];
    float2 z = y[r];
    if (r == j) corner = z;
    if (r > j) {
      g[0] = fma(f.x, z.x, fma(f.y, z.y, g[0]));
      g[1] = fma(f.x, z.y, fma(-f.y, z.x, g[1]));
    }
  }
  float sum = transposed_sum<2>(g, lane);
  float re = simd_shuffle(sum, ushort(0));
  float im = simd_shuffle(sum, ushort(16));
  float ar = h.tau * (simd_shuffle(corner.x, ushort(j % 32)) + fma(h.down.x, re, h.down.y * im));
  float ai = h.tau * (simd_shuffle(corner.y, ushort(j % 32)) + fma(h.down.x, im, -h.down.y * re));
  float br = fma(ar, h.down.x, -ai * h.down.y);
  float bi = fma(ar, h.down.y, ai * h.down.x);
  for (int r = j / 32 * 32 + int(lane); r < rows; r += 32) {
    if (r >= j) {
      float2 f = x[r];
      float2 z = y[r];
      z.x -= r == j ? ar : fma(br, f.x, -bi * f.y);
      z.y -= r == j ? ai : fma(br, f.y, bi * f.x);
      y[r] = z;
    }
  }
}

// Scaling, order, status, F.
[[kernel, max_total_threads_per_threadgroup(1024)]] void svd_pairs_load(
    device const float2* a [[buffer(0)]], device uint* keys [[buffer(1)]],
    device int* origin [[buffer(2)]], device int* exponent [[buffer(3)]],
    device int* status [[buffer(4)]], device int* sweeps [[buffer(5)]],
    device float* off_norm [[buffer(6)]], device float2* f [[buffer(7)]],
    constant SvdPairsParams& p [[buffer(8)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long matrix = long(group);
  device const float2* from = a + matrix * p.a_batch;
  device float2* x = f + matrix * long(p.n) * long(p.rows);
  device uint* key = keys + matrix * long(p.n);
  device int* column = origin + matrix * long(p.n);
  // Keys: the largest entry of each column, as bits.
  for (int c = int(simdgroup); c < p.n; c += int(simdgroups)) {
    uint bits = 0u;
    for (int r = int(lane); r < p.m; r += 32) {
      float2 z = from[long(r) * long(p.a_row) + long(c) * long(p.a_col)];
      bits = max(bits, as_type<uint>(z.x) & 0x7fffffffu);
      bits = max(bits, as_type<uint>(z.y) & 0x7fffffffu);
    }
    bits = simd_max(bits);
    if (lane == 0u) key[c] = bits;
  }
  threadgroup_barrier(mem_flags::mem_device);
  for (int c = int(thread_index); c < p.n; c += int(threads)) {
    Place place = place_of(key, p.n, c, key[c]);
    column[place.rank] = c;
    if (c == 0) {
      exponent[matrix] = scale_of<float>(place.top);
      status[matrix] = place.top < exponent_bits<float>() ? kSvdNotConverged : kSvdNonFinite;
      sweeps[matrix] = 0;
      off_norm[matrix] = 0.0f;
    }
  }
  threadgroup_barrier(mem_flags::mem_device);
  if (status[matrix] != kSvdNotConverged) return;
  const int k = exponent[matrix];
  for (int c = int(simdgroup); c < p.n; c += int(simdgroups)) {
    long at = long(column[c]) * long(p.a_col);
    for (int r = int(lane); r < p.rows; r += 32) {
      float2 z;
      z.x = 0.0f;
      z.y = 0.0f;
      if (r < p.m) z = from[long(r) * long(p.a_row) + at];
      z.x = scale_in(z.x, k);
      z.y = scale_in(z.y, k);
      x[long(c) * long(p.rows) + long(r)] = z;
    }
  }
}

// The columns first <= j < last of a QR of F. Behind the last R^H, with V = I below it where height
// has room. reflectors: five numbers a column, as in Reflector.
[[kernel, max_total_threads_per_threadgroup(1024)]] void svd_pairs_factor(
    device float2* f [[buffer(0)]], device float* reflectors [[buffer(1)]],
    device float2* w [[buffer(2)]], device const int* status [[buffer(3)]],
    constant SvdPairsParams& p [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long matrix = long(group);
  if (status[matrix] != kSvdNotConverged) return;
  const long rows = long(p.rows);
  device float2* x = f + matrix * long(p.n) * rows;
  device float* reflector = reflectors + matrix * long(p.n) * 5l;
  for (int j = p.first; j < p.last; ++j) {
    device const float2* pivot = x + long(j) * rows;
    Reflector h = reflector_of(pivot, j, p.rows, lane);
    if (thread_index == 0u) {
      reflector[5 * j] = h.down.x;
      reflector[5 * j + 1] = h.down.y;
      reflector[5 * j + 2] = h.beta.x;
      reflector[5 * j + 3] = h.beta.y;
      reflector[5 * j + 4] = h.tau;
    }
    for (int c = j + 1 + int(simdgroup); c < p.n; c += int(simdgroups))
      reflect_column(pivot, h, x + long(c) * rows, j, p.rows, lane);
    threadgroup_barrier(mem_flags::mem_device);
  }
  if (p.last == p.n) {
    device float2* to = w + matrix * long(p.n) * long(p.height);
    for (int c = int(simdgroup); c < p.n; c += int(simdgroups)) {
      for (int r = int(lane); r < p.side; r += 32) {
        float2 z;
        z.x = 0.0f;
        z.y = 0.0f;
        if (r > c && r < p.n) z = x[long(r) * rows + long(c)];
        if (r == c) {
          z.x = reflector[5 * c + 2];
          z.y = reflector[5 * c + 3];
        }
        z.y = -z.y;
        long at = long(c) * long(p.height) + long(r);
        to[at] = z;
        if (p.height > p.side) {
          z.x = r == c ? 1.0f : 0.0f;
          z.y = 0.0f;
          to[at + long(p.side)] = z;
        }
      }
    }
  }
}

// Makes the first `side` rows of two columns orthogonal. The lanes share the rows.
inline void turn_columns(device float2* x, device float2* y, int side, int height, float tol,
                         uint lane, thread float& max_cos, thread float& max_tan) {
  float g[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int r = int(lane); r < side; r += 32) {
    float2 f = x[r];
    float2 h = y[r];
    g[0] = fma(f.x, f.x, fma(f.y, f.y, g[0]));
    g[1] = fma(h.x, h.x, fma(h.y, h.y, g[1]));
    g[2] = fma(f.x, h.x, fma(f.y, h.y, g[2]));
    g[3] = fma(f.x, h.y, fma(-f.y, h.x, g[3]));
  }
  float sum = transposed_sum<4>(g, lane);
  Phase<float> e = phase_of(simd_shuffle(sum, ushort(16)), simd_shuffle(sum, ushort(24)));
  Turn t = turn_of(simd_shuffle(sum, ushort(0)), simd_shuffle(sum, ushort(8)), e.size, tol);
  max_cos = max(max_cos, t.cosine);
  max_tan = max(max_tan, fabs(t.t));
  if (t.t != 0.0f) {
    // Four rows at a time, whose loads need not wait for stores.
    for (int first = int(lane); first < height; first += 128) {
      float fr[4];
      float fi[4];
      float hr[4];
      float hi[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + 32 * i < height) {
          float2 f = x[first + 32 * i];
          float2 h = y[first + 32 * i];
          fr[i] = f.x;
          fi[i] = f.y;
          hr[i] = h.x;
          hi[i] = h.y;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + 32 * i < height) {
          // With the phase, y as x sees it and x as y does.
          float yr = fma(e.re, hr[i], e.im * hi[i]);
          float yi = fma(e.re, hi[i], -e.im * hr[i]);
          float xr = fma(e.re, fr[i], -e.im * fi[i]);
          float xi = fma(e.re, fi[i], e.im * fr[i]);
          float2 f;
          float2 h;
          f.x = fma(-t.s, fma(t.tau, fr[i], yr), fr[i]);
          f.y = fma(-t.s, fma(t.tau, fi[i], yi), fi[i]);
          h.x = fma(t.s, fma(-t.tau, hr[i], xr), hr[i]);
          h.y = fma(t.s, fma(-t.tau, hi[i], xi), hi[i]);
          x[first + 32 * i] = f;
          y[first + 32 * i] = h;
        }
      }
    }
  }
}

// Makes the first `side` rows of two real columns orthogonal, both multiples of 64. L lanes share
// the rows.
template <int L>
inline void turn_real_columns(device float* x, device float* y, int side, int height, float tol,
                              uint lane, thread float& max_cos, thread float& max_tan) {
  const int part = int(lane) % L;
  device float4* from = (device float4*)x;
  device float4* with = (device float4*)y;
  float a[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  float b[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  float dot[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int q = part; q < side / 4; q += L) {
    float4 f = from[q];
    float4 h = with[q];
    float fs[4] = {f.x, f.y, f.z, f.w};
    float hs[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = fma(fs[i], fs[i], a[i]);
      b[i] = fma(hs[i], hs[i], b[i]);
      dot[i] = fma(fs[i], hs[i], dot[i]);
    }
  }
  Turn t = turn_of(group_sum<L>((a[0] + a[1]) + (a[2] + a[3])),
                   group_sum<L>((b[0] + b[1]) + (b[2] + b[3])),
                   group_sum<L>((dot[0] + dot[1]) + (dot[2] + dot[3])), tol);
  max_cos = max(max_cos, t.cosine);
  max_tan = max(max_tan, fabs(t.t));
  if (t.t != 0.0f) {
    // Several at a time, whose loads need not wait for stores.
    const int together = L < 4 ? 4 : (L < 16 ? 16 / L : 1);
    for (int first = part; first < height / 4; first += L * together) {
      float f[4 * together];
      float h[4 * together];
#pragma unroll
      for (int i = 0; i < together; ++i) {
        float4 one = from[first + L * i];
        float4 two = with[first + L * i];
        f[4 * i] = one.x;
        f[4 * i + 1] = one.y;
        f[4 * i + 2] = one.z;
        f[4 * i + 3] = one.w;
        h[4 * i] = two.x;
        h[4 * i + 1] = two.y;
        h[4 * i + 2] = two.z;
        h[4 * i + 3] = two.w;
      }
#pragma unroll
      for (int e = 0; e < 4 * together; ++e) {
        float turned = fma(-t.s, fma(t.tau, f[e], h[e]), f[e]);
        h[e] = fma(t.s, fma(-t.tau, h[e], f[e]), h[e]);
        f[e] = turned;
      }
#pragma unroll
      for (int i = 0; i < together; ++i) {
        float4 one;
        float4 two;
        one.x = f[4 * i];
        one.y = f[4 * i + 1];
        one.z = f[4 * i + 2];
        one.w = f[4 * i + 3];
        two.x = h[4 * i];
        two.y = h[4 * i + 1];
        two.z = h[4 * i + 2];
        two.w = h[4 * i + 3];
        from[first + L * i] = one;
        with[first + L * i] = two;
      }
    }
  }
}

// The rounds first <= i < last, of which the sweeps have n - 1 each, or n where n is odd. L lanes
// rotate a pair of the columns in w. state: the largest cosine and tangent of a sweep that goes on
// in the next dispatch.
template <int L, bool COMPLEX>
inline void turn_rounds(device float* w, device float* state, device int* status,
                        device int* sweeps, device float* off_norm, constant SvdPairsParams& p,
                        float tol, threadgroup float* tile, long matrix, uint thread_index,
                        uint simdgroup, uint simdgroups, uint lane) {
  const int together = 32 / L;  // pairs of a simdgroup
  const long pitch = long(p.height) * (COMPLEX ? 2l : 1l);
  const int seats = p.n + p.n % 2;  // the last of an odd number of columns meets nobody
  const int rounds = seats - 1;
  float max_cos = 0.0f;
  float max_tan = 0.0f;
  if (p.first % rounds != 0) {
    max_cos = state[matrix * 2l];
    max_tan = state[matrix * 2l + 1l];
  }
  for (int round = p.first; round < p.last; ++round) {
    const int step = round % rounds;
    for (int of = int(simdgroup); of * together < seats / 2; of += int(simdgroups)) {
      const int pair = of * together + int(lane) / L;
      const BlockPair b = pair_of_blocks(seats, step, pair);
      // Lanes without a pair go along, with no rows: simd functions need all 32.
      const int side = pair < seats / 2 && b.second < p.n ? p.side : 0;
      device float* x = w + long(b.first) * pitch;
      device float* y = w + long(b.second) * pitch;
      if (COMPLEX)
        turn_columns((device float2*)x, (device float2*)y, side, p.height, tol, lane, max_cos,
                     max_tan);
      else
        turn_real_columns<L>(x, y, side, p.height, tol, lane, max_cos, max_tan);
    }
    threadgroup_barrier(mem_flags::mem_device);
    if (step == rounds - 1 || round == p.last - 1) {
      max_cos = threadgroup_max(max_cos, tile, simdgroup, simdgroups, lane);
      max_tan = threadgroup_max(max_tan, tile, simdgroup, simdgroups, lane);
    }
    if (step == rounds - 1) {
      bool converged = simd_any(orthogonal_behind(max_cos, max_tan, p.n, p.tol));
      if (thread_index == 0u) {
        sweeps[matrix] = round / rounds + 1;
        off_norm[matrix] = max_cos;
        if (converged) status[matrix] = kSvdConverged;
      }
      if (converged) return;
      max_cos = 0.0f;
      max_tan = 0.0f;
    }
  }
  if (thread_index == 0u) {
    state[matrix * 2l] = max_cos;
    state[matrix * 2l + 1l] = max_tan;
  }
}

// Threadgroup bytes: 4 * simdgroups.
[[kernel, max_total_threads_per_threadgroup(1024)]] void svd_pairs_turn(
    device float2* w [[buffer(0)]], device float* state [[buffer(1)]],
    device int* status [[buffer(2)]], device int* sweeps [[buffer(3)]],
    device float* off_norm [[buffer(4)]], constant SvdPairsParams& p [[buffer(5)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long matrix = long(group);
  if (status[matrix] != kSvdNotConverged) return;
  turn_rounds<32, true>((device float*)(w + matrix * long(p.n) * long(p.height)), state, status,
                        sweeps, off_norm, p, p.tol, tile, matrix, thread_index, simdgroup,
                        simdgroups, lane);
}

// Of "fused": the same for real columns, as svd_grid_start leaves them. Threadgroup bytes: 4 *
// simdgroups.
template <int PER_PAIR>
[[kernel, max_total_threads_per_threadgroup(1024)]] void svd_fused(
    device float* w [[buffer(0)]], device float* state [[buffer(1)]],
    device int* status [[buffer(2)]], device int* sweeps [[buffer(3)]],
    device float* off_norm [[buffer(4)]], constant SvdPairsParams& p [[buffer(5)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long matrix = long(group);
  if (status[matrix] != kSvdNotConverged) return;
  turn_rounds<PER_PAIR, false>(w + matrix * long(p.side) * long(p.height), state, status, sweeps,
                               off_norm, p, turned_from(p.tol), tile, matrix, thread_index,
                               simdgroup, simdgroups, lane);
}

// Columns of X that vanished become vectors orthonormal to the rest, as complete_columns makes
// them. fill: n, the squared lengths of the rows of X; work: 2 n.
inline void complete_pairs(device float2* x, device const uint* key, device const int* column,
                           device float* fill, device float2* work, int n, int height,
                           threadgroup float* tile, uint thread_index, uint threads, uint simdgroup,
                           uint simdgroups, uint lane) {
  device float2* fresh = work;
  device float2* along = work + n;
  int there = 0;
  for (int c = int(thread_index); c < n; c += int(threads))
    there += as_type<float>(key[c]) > kVanished ? 1 : 0;
  // By a vote, so that it counts as the same for all.
  const int present =
      simd_max(int(threadgroup_sum(float(there), tile, simdgroup, simdgroups, lane)));
  if (present < n) {
    for (int r = int(thread_index); r < n; r += int(threads)) {
      float sum = 0.0f;
      for (int c = 0; c < present; ++c) {
        float2 z = x[long(column[c]) * long(height) + long(r)];
        sum = fma(z.x, z.x, fma(z.y, z.y, sum));
      }
      fill[r] = sum;
    }
  }
  for (int target = present; target < n; ++target) {
    float least = 4.0f;
    int row = 0;
    for (int r = int(thread_index); r < n; r += int(threads)) {
      float y = fill[r];
      row = y < least ? r : row;
      least = min(least, y);
    }
    float best = -threadgroup_max(-least, tile, simdgroup, simdgroups, lane);
    float found = least == best ? float(-row) : -1e9f;
    row = int(-threadgroup_max(found, tile, simdgroup, simdgroups, lane));
    // The unit vector of that row less its part along the columns, twice.
    for (int pass = 0; pass < 2; ++pass) {
      if (pass > 0) {
        for (int of = int(simdgroup); of < target; of += int(simdgroups)) {
          float g[2] = {0.0f, 0.0f};
          for (int r = int(lane); r < n; r += 32) {
            float2 z = x[long(column[of]) * long(height) + long(r)];
            float2 y = fresh[r];
            g[0] = fma(z.x, y.x, fma(z.y, y.y, g[0]));
            g[1] = fma(z.x, y.y, fma(-z.y, y.x, g[1]));
          }
          float2 dot;
          dot.x = simd_sum(g[0]);
          dot.y = simd_sum(g[1]);
          if (lane == 0u) along[of] = dot;
        }
        threadgroup_barrier(mem_flags::mem_device);
      }
      for (int r = int(thread_index); r < n; r += int(threads)) {
        float2 y;
        y.x = r == row ? 1.0f : 0.0f;
        y.y = 0.0f;
        if (pass > 0) y = fresh[r];
        for (int c = 0; c < target; ++c) {
          device const float2* from = x + long(column[c]) * long(height);
          float2 z = from[r];
          float2 by = from[row];
          by.y = -by.y;
          if (pass > 0) by = along[c];
          y.x -= fma(by.x, z.x, -by.y * z.y);
          y.y -= fma(by.x, z.y, by.y * z.x);
        }
        fresh[r] = y;
      }
      threadgroup_barrier(mem_flags::mem_device);
    }
    float squares = 0.0f;
    for (int r = int(thread_index); r < n; r += int(threads)) {
      float2 y = fresh[r];
      squares = fma(y.x, y.x, fma(y.y, y.y, squares));
    }
    squares = threadgroup_sum(squares, tile, simdgroup, simdgroups, lane);
    float inverse = 1.0f / sqrt(max(squares, kTiny));
    for (int r = int(thread_index); r < n; r += int(threads)) {
      float2 y = fresh[r];
      y.x *= inverse;
      y.y *= inverse;
      x[long(column[target]) * long(height) + long(r)] = y;
      fill[r] += fma(y.x, y.x, y.y * y.y);
    }
    threadgroup_barrier(mem_flags::mem_device);
  }
}

// Singular values, their order, and with vectors columns of X and V that are orthonormal.
// Threadgroup bytes: 4 * simdgroups.
[[kernel, max_total_threads_per_threadgroup(1024)]] void svd_pairs_finish(
    device float2* w [[buffer(0)]], device uint* keys [[buffer(1)]],
    device int* order [[buffer(2)]], device const int* exponent [[buffer(3)]],
    device const int* status [[buffer(4)]], device float* fill [[buffer(5)]],
    device float2* work [[buffer(6)]], device float* s [[buffer(7)]],
    constant SvdPairsParams& p [[buffer(8)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long matrix = long(group);
  const long n = long(p.n);
  const bool good = status[matrix] == kSvdConverged;
  device float2* x = w + matrix * n * long(p.height);
  device uint* key = keys + matrix * n;
  device int* column = order + matrix * n;
  device float* values = s + matrix * n;
  if (!good) {
    for (int c = int(thread_index); c < p.n; c += int(threads)) values[c] = or_nan(0.0f, false);
    return;
  }
  for (int c = int(simdgroup); c < p.n; c += int(simdgroups)) {
    // As twice as many real numbers.
    device float* of = (device float*)(x + long(c) * long(p.height));
    float sigma = unit_columns(of, 2 * p.side, p.height > p.side, false, lane);
    if (lane == 0u) key[c] = as_type<uint>(sigma);
  }
  threadgroup_barrier(mem_flags::mem_device);
  for (int c = int(thread_index); c < p.n; c += int(threads)) {
    uint bits = key[c];
    int rank = place_of(key, p.n, c, bits).rank;
    column[rank] = c;
    values[rank] = scale_out(as_type<float>(bits), exponent[matrix]);
  }
  threadgroup_barrier(mem_flags::mem_device);
  if (p.height > p.side)
    complete_pairs(x, key, column, fill + matrix * n, work + matrix * n * 2l, p.n, p.height, tile,
                   thread_index, threads, simdgroup, simdgroups, lane);
}

// U = Q [X 0; 0 I] and V by the second QR, of which Vt is the adjoint with A's columns where they
// were. A simdgroup a column of one of them.
[[kernel, max_total_threads_per_threadgroup(256)]] void svd_pairs_back(
    device const float2* f [[buffer(0)]], device const float* f_reflectors [[buffer(1)]],
    device const float2* g [[buffer(2)]], device const float* g_reflectors [[buffer(3)]],
    device const float2* w [[buffer(4)]], device const int* origin [[buffer(5)]],
    device const int* order [[buffer(6)]], device const int* status [[buffer(7)]],
    device float2* left [[buffer(8)]], device float2* right [[buffer(9)]],
    device float2* u [[buffer(10)]], device float2* vt [[buffer(11)]],
    constant SvdPairsParams& p [[buffer(12)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint parts = (uint(p.u_cols + p.n) + simdgroups - 1u) / simdgroups;
  const long matrix = long(group / parts);
  const int either = int(group % parts * simdgroups + simdgroup);
  const bool of_u = either < p.u_cols;
  const int column = of_u ? either : either - p.u_cols;
  const bool good = status[matrix] == kSvdConverged;
  const long n = long(p.n);
  const int m = of_u ? p.m : p.n;
  const int rows = of_u ? p.rows : p.side;
  device const float2* panel = (of_u ? f : g) + matrix * n * long(rows);
  device const float* reflectors = (of_u ? f_reflectors : g_reflectors) + matrix * n * 5l;
  device const int* from = origin + matrix * n;
  if (either < p.u_cols + p.n) {
    const long columns = long(of_u ? p.u_cols : p.n);
    device float2* y = (of_u ? left : right) + (matrix * columns + long(column)) * long(rows);
    device float2* to = of_u ? u + (matrix * p.u_batch + long(column) * long(p.u_col))
                             : vt + (matrix * p.vt_batch + long(column) * long(p.vt_row));
    if (good) {
      int place = column < p.n ? order[matrix * n + long(column)] : 0;
      device const float2* x = w + ((matrix * n + long(place)) * long(p.height));
      for (int r = int(lane); r < rows; r += 32) {
        float2 one;
        one.x = r == column ? 1.0f : 0.0f;
        one.y = 0.0f;
        if (column < p.n) {
          one.x = 0.0f;
          if (r < p.n) one = x[of_u ? r : p.side + r];
        }
        y[r] = one;
      }
      for (int j = p.n - 1; j >= 0; --j) {
        Reflector h;
        h.down.x = reflectors[5 * j];
        h.down.y = reflectors[5 * j + 1];
        h.tau = reflectors[5 * j + 4];
        reflect_column(panel + long(j) * long(rows), h, y, j, rows, lane);
      }
    }
    for (int r = int(lane); r < m; r += 32) {
      float2 one;
      one.x = 0.0f;
      one.y = 0.0f;
      if (good) one = y[r];
      long at = of_u ? long(r) * long(p.u_row) : long(from[r]) * long(p.vt_col);
      to[at] = complex_or_nan<float2>(one.x, of_u ? one.y : -one.y, good);
    }
  }
}

#define SVD_INSTANTIATE(name, function, T, N, C, SIMDGROUPS) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T, N, C>) function<T, N, C>;
SVD_VARIANTS(SVD_INSTANTIATE)
#define SVD_GRID_INSTANTIATE(name, function, T) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T>) function<T>;
SVD_GRID_VARIANTS(SVD_GRID_INSTANTIATE)
#define SVD_FUSED_INSTANTIATE(name, function, N, PER_PAIR) \
  template [[host_name(#name)]] [[kernel]] decltype(function<PER_PAIR>) function<PER_PAIR>;
SVD_FUSED_VARIANTS(SVD_FUSED_INSTANTIATE)

#endif  // JM_HOST
