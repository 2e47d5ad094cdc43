// Randomised SVD: products with A in its storage type, bases by Cholesky factorisations.
//
// All panels are float, row-major and l columns wide, l <= 128. What is done with them is a product
// C = alpha op(A) B (+ C) in every case: A or its transpose with a panel, a panel's Gram matrix, a
// panel with the inverse of a triangle, with the small factors at the end. A is read as it is
// stored, by two strides, and scaled by a power of two on the way.
//
//   dispatch          threadgroups                     threads
//   rsvd_scan_*       batch * parts                    256       largest entries
//   rsvd_scale        batch                            256       exponents; status
//   rsvd_ones         ceil(count / 256)                256       where columns are centred
//   rsvd_product_*    batch * parts * tiles            256       a tile is ROWS rows of C
//   rsvd_sum          batch * ceil(rows columns / 256) 256       C from its parts, where several
//   rsvd_factor_n*    batch                            N^2 / 32  inverse of a triangle
//   rsvd_bound        batch                            256       the smallest singular value
//   rsvd_triangle     batch                            512       the l x l matrix that is left
//   rsvd_values       batch                            128       S
//   and between the last two those of kernels/svd.metal for that matrix.
// Where a library's matrix products in 16 bits are asked for ("library"), those with A are
//   rsvd_split         batch * m * ceil(pitch / 1024)   256       A in halves, once
//   rsvd_pieces_*      batch * ceil(depth pitch / 256)  256       a panel in pieces of 16 bits
//   gemm_*             of kernels/gemm.metal
//   rsvd_gather        batch * ceil(rows pitch / 1024 P) 256      C
// A = high + 2^-11 low, halves, is exact to 2^-22 of an entry and 2^-36 of the largest; a panel's
// pieces x0 + 2^-11 x1 are as good, and high x0 + 2^-11 (high x1 + low x0) leaves out 2^-22 of the
// product. A of 16 bits is its own high part; for bfloat a panel has three pieces, 24 bits.
//   Threadgroup bytes: scan and scale 1024, product 4 * 16 * (ROWS + 4 + N), factor
//   4 * (34 N + 32), bound 128, triangle 4 * 18 * 128.
//
// A basis. The columns of a panel Y are brought to length 1 within its Gram matrix, a shift of some
// ulp is added, and with the triangle R of its Cholesky factorisation Y R^-1 has singular values
// sigma / sqrt(sigma^2 + shift). A column with little more left than the shift keeps what is left,
// unscaled. Once is enough within an iteration. For a result it is done again until the Gram matrix
// is near the identity (state kNear), and then once more without a shift. Each time numbers of half
// an ulp are added, by a hash of their place: so that columns that are zero, or depend on others,
// become some direction orthogonal to those, in a step or two more. A matrix whose basis is done
// (kDone) is left alone by the dispatches that follow.
//
// Edges. Sums are split by the size of a matrix and the GPU alone, and parts added in order, so the
// bits of a matrix depend neither on the batch nor on the order of threads; with a library they
// are the same in every call of the same shapes. A matrix with a NaN or
// Inf is computed as zeros and gets NaN in its outputs; so would one whose basis were not done at
// the end. Rows, columns and depths past the end are zeros and never stored.

#ifndef JM_HOST
#include <metal_stdlib>
using namespace metal;
#endif

// Of all dispatches; each uses a part.
struct RsvdParams {
  long a_batch;  // numbers from one matrix to the next; 0: the same for all
  long b_batch;
  int batch;
  int rows;  // of C
  int columns;
  int depth;
  int a_row;  // strides of op(A)
  int a_col;
  int b_row;
  int b_col;
  int parts;  // threadgroups that share a sum, or scan a matrix
  int part;   // terms of one
  int first;  // tile of the dispatch
  int tiles;
  int flags;
  float alpha;
  float noise;
};

// What becomes of a product.
#define RSVD_SCALED 1       // A is the matrix: by its exponent
#define RSVD_COEFFICIENT 2  // times a number of each matrix
#define RSVD_ACCUMULATE 4   // added to C
#define RSVD_UNLESS_NEAR 8  // nothing where the basis is near or done
#define RSVD_UNLESS_DONE 16
#define RSVD_NOISE 32  // in a basis that is not near
#define RSVD_RESULT 64
// Of a factorisation: it is one of a result's basis, the first of them, the last of them.
#define RSVD_BASIS 128
#define RSVD_FIRST 256
#define RSVD_LAST 512

// X(name, function, storage type, C, R, ACROSS): a thread has C columns and R rows of C, and ACROSS
// of 256 threads stand side by side: a tile is N = C ACROSS columns and ROWS = R 256 / ACROSS rows.
// Low tiles are for products of few rows, which would keep few cores busy.
#define RSVD_PRODUCTS(X, tag, T)                         \
  X(rsvd_product_##tag##_n32, rsvd_product, T, 2, 8, 16) \
  X(rsvd_product_##tag##_n64, rsvd_product, T, 4, 8, 16) \
  X(rsvd_product_##tag##_n128, rsvd_product, T, 8, 8, 16)
#define RSVD_PRODUCT_VARIANTS(X)                             \
  RSVD_PRODUCTS(X, f32, float)                               \
  RSVD_PRODUCTS(X, f16, half)                                \
  RSVD_PRODUCTS(X, bf16, bfloat)                             \
  X(rsvd_product_f32_low_n32, rsvd_product, float, 2, 2, 16) \
  X(rsvd_product_f32_low_n64, rsvd_product, float, 4, 2, 16) \
  X(rsvd_product_f32_low_n128, rsvd_product, float, 4, 4, 32)

enum RsvdKind { kRsvdFloat = 0, kRsvdHalf = 1, kRsvdBfloat = 2 };

// X(name, function, storage type, its kind)
#define RSVD_SCAN_VARIANTS(X)                    \
  X(rsvd_scan_f32, rsvd_scan, float, kRsvdFloat) \
  X(rsvd_scan_f16, rsvd_scan, half, kRsvdHalf)   \
  X(rsvd_scan_bf16, rsvd_scan, bfloat, kRsvdBfloat)

// X(name, function, type of a piece, pieces)
#define RSVD_PIECES_VARIANTS(X)            \
  X(rsvd_pieces_f16, rsvd_pieces, half, 2) \
  X(rsvd_pieces_bf16, rsvd_pieces, bfloat, 3)

// X(name, function, N): l is at most N.
#define RSVD_SQUARE_VARIANTS(X)       \
  X(rsvd_factor_n32, rsvd_factor, 32) \
  X(rsvd_factor_n64, rsvd_factor, 64) \
  X(rsvd_factor_n128, rsvd_factor, 128)

#ifndef JM_HOST

constant int kFar = 0;
constant int kNear = 1;
constant int kDone = 2;
constant int kDepth = 16;            // of what a product holds of A and B at a time
constant float kTiny = 1e-37f;       // below it a squared length is rounding
constant float kNearEnough = 0.25f;  // squared distance of a Gram matrix from the identity
constant float kHuge = 1e30f;
constant uint kExponent = 0x7f800000u;

// 2^k for -126 <= k <= 127.
inline float power_of_two(int k) { return as_type<float>(uint(k + 127) << 23); }

// The power of two that takes numbers up to the one with these bits below 2.
inline int exponent_for(uint bits) {
  return bits >= 0x00800000u ? max(127 - int(bits >> 23), -126) : 149;
}

// x * 2^k with no flush of a denormal x: a denormal is its mantissa bits times 2^-149.
inline float scale_in(float x, int k) {
  uint bits = as_type<uint>(x);
  if ((bits & kExponent) == 0u) {
    float y = float(bits & 0x007fffffu) * power_of_two(clamp(k - 149, -126, 127));
    y = k < 23 ? 0.0f : y;
    return (bits >> 31) != 0u ? -y : y;
  }
  return x * power_of_two(min(k, 127));
}

// x * 2^-k for x >= 0 of at most 2^38, building a denormal result from its bits: below 2^-66, which
// is nothing beside the largest singular value, it may be flushed.
inline float scale_out(float x, int k) {
  if (k > 60) {
    float units = x * power_of_two(149 - k);  // in units of 2^-149
    if (units < 8388608.0f) return as_type<float>(uint(units + 0.5f));
    return as_type<float>(as_type<uint>(units) - (149u << 23));
  }
  return x * power_of_two(-k);
}

// x, or NaN. Chosen by bits, so that a compiler told to expect no NaN still stores one.
inline float or_nan(float x, bool good) {
  return as_type<float>(good ? as_type<uint>(x) : 0x7fc00000u);
}

// Between -1 and 1, the same for a place whatever the device.
inline float noise_at(uint place) {
  uint x = place * 2654435761u + 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 2246822519u;
  x = (x ^ (x >> 13)) * 3266489917u;
  x = x ^ (x >> 16);
  return float(x >> 8) * 1.1920929e-7f - 1.0f;
}

// The sum over a threadgroup, for all of its threads. Once a kernel, as max_over: `shared` may
// still be read.
inline float sum_over(float x, threadgroup float* shared, uint simdgroup, uint simdgroups,
                      uint lane) {
  x = simd_sum(x);
  if (lane == 0u) shared[simdgroup] = x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float all = 0.0f;
  for (uint i = 0u; i < simdgroups; ++i) all += shared[i];
  return all;
}

// The largest of one value a thread, for all of them.
template <typename X>
inline X max_over(X x, threadgroup X* shared, uint simdgroup, uint simdgroups, uint lane) {
  x = simd_max(x);
  if (lane == 0u) shared[simdgroup] = x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0u; i < simdgroups; ++i) x = max(x, shared[i]);
  return x;
}

// --- the matrix ----------------------------------------------------------------------------------

// The largest of the sizes in a word, by their bits; and those bits as a float's.
template <int KIND>
inline uint largest_of(uint word) {
  return KIND == kRsvdFloat ? word & 0x7fffffffu : max(word & 0x7fffu, (word >> 16) & 0x7fffu);
}
template <int KIND>
inline uint float_bits(uint bits) {
  if (KIND == kRsvdHalf) return as_type<uint>(float(as_type<half2>(bits).x));
  return KIND == kRsvdBfloat ? bits << 16 : bits;
}

// Largest entry, as bits, of a part of a matrix: 16 bytes at a time where all matrices begin so.
template <typename T, int KIND>
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_scan(
    device const T* a [[buffer(0)]], device uint* largest [[buffer(1)]],
    constant RsvdParams& p [[buffer(2)]], threadgroup uint* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  const long size = long(p.rows) * long(p.depth);
  device const T* from = a + long(group / uint(p.parts)) * size;
  const long each = 16l / long(sizeof(T));
  const long quads = (size + each - 1l) / each;
  const long share = (quads + long(p.parts) - 1l) / long(p.parts);
  const long begin = long(group % uint(p.parts)) * share;
  const long end = begin + share < quads ? begin + share : quads;
  uint top = 0u;
  if (size % each == 0l) {
    device const uint4* words = (device const uint4*)from;
    for (long i = begin + long(thread_index); i < end; i += long(threads)) {
      const uint4 w = words[i];
      top = max(top, max(max(largest_of<KIND>(w.x), largest_of<KIND>(w.y)),
                         max(largest_of<KIND>(w.z), largest_of<KIND>(w.w))));
    }
    top = float_bits<KIND>(top);
  } else {
    const long last = end * each < size ? end * each : size;
    for (long i = begin * each + long(thread_index); i < last; i += long(threads))
      top = max(top, as_type<uint>(float(from[i])) & 0x7fffffffu);
  }
  top = max_over(top, tile, simdgroup, simdgroups, lane);
  if (thread_index == 0u) largest[group] = top;
}

// A matrix's exponent and status.
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_scale(
    device const uint* largest [[buffer(0)]], device int* exponent [[buffer(1)]],
    device int* status [[buffer(2)]], device int* state [[buffer(3)]],
    constant RsvdParams& p [[buffer(4)]], threadgroup uint* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  device const uint* from = largest + long(group) * long(p.parts);
  uint top = 0u;
  for (int i = int(thread_index); i < p.parts; i += int(threads)) top = max(top, from[i]);
  top = max_over(top, tile, simdgroup, simdgroups, lane);
  if (thread_index == 0u) {
    exponent[group] = top < kExponent ? exponent_for(top) : 0;
    status[group] = top < kExponent ? 0 : 1;
    state[group] = kFar;
  }
}

[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_ones(
    device float* x [[buffer(0)]], constant RsvdParams& p [[buffer(1)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  uint at = group * threads + thread_index;
  if (at < uint(p.rows)) x[at] = 1.0f;
}

// --- products ------------------------------------------------------------------------------------

// Entry (place) of C.
inline void put(device float* c, long place, float x, long matrix, device const int* status,
                device const int* state, device const float* coefficient, constant RsvdParams& p) {
  const long at = matrix * long(p.rows) * long(p.columns) + place;
  x *= p.alpha;
  if ((p.flags & RSVD_COEFFICIENT) != 0) x *= coefficient[matrix];
  if ((p.flags & RSVD_ACCUMULATE) != 0) x += c[at];
  if ((p.flags & RSVD_NOISE) != 0 && state[matrix] == kFar)
    x = fma(p.noise, noise_at(uint(place)), x);
  if ((p.flags & RSVD_RESULT) != 0) x = or_nan(x, status[matrix] == 0);
  c[at] = x;
}

inline bool to_skip(int state, constant RsvdParams& p) {
  bool near = (p.flags & RSVD_UNLESS_NEAR) != 0 && state != kFar;
  return near || ((p.flags & RSVD_UNLESS_DONE) != 0 && state == kDone);
}

inline float4 four_of(float x, float y, float z, float w) {
  float4 v;
  v.x = x;
  v.y = y;
  v.z = z;
  v.w = w;
  return v;
}

// Four numbers of threadgroup memory that begin at a multiple of four.
inline void read_four(threadgroup const float* from, thread float (&to)[4]) {
  float4 v = ((threadgroup const float4*)from)[0];
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}

// The other way round, times a number.
inline void put_four(thread const float (&from)[4], float by, threadgroup float* to) {
  ((threadgroup float4*)to)[0] = four_of(from[0] * by, from[1] * by, from[2] * by, from[3] * by);
}

// Of so many threads one has `count` rows or columns of a tile, in fours so that threads side by
// side read threadgroup memory side by side. Number i of thread t:
inline int line_of(int i, int t, int count, int threads) {
  return count >= 4 ? i / 4 * 4 * threads + 4 * t + i % 4 : count * t + i;
}

template <int COUNT, int THREADS>
inline void read_lines(threadgroup const float* from, int t, thread float (&to)[COUNT]) {
  if (COUNT >= 4) {
    float four[4];
#pragma unroll
    for (int h = 0; h < COUNT / 4; ++h) {
      read_four(from + 4 * THREADS * h + 4 * t, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(4 * h + i) % COUNT] = four[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = from[COUNT * t + i];
  }
}

// A tile of C, or of one of its parts. The lanes of a simdgroup stand 8 by 4, so that they read the
// least of the tiles of A and B. What comes next of these is on its way while the products of what
// is there are formed.
template <typename T, int C, int R, int ACROSS>
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_product(
    device const T* a [[buffer(0)]], device const float* b [[buffer(1)]],
    device float* c [[buffer(2)]], device const int* exponent [[buffer(3)]],
    device const int* status [[buffer(4)]], device const int* state [[buffer(5)]],
    device const float* coefficient [[buffer(6)]], constant RsvdParams& p [[buffer(7)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int tile_at = p.first + int(group % uint(p.tiles));
  const int part = int(group / uint(p.tiles) % uint(p.parts));
  const long matrix = long(group / uint(p.tiles) / uint(p.parts));
  if (to_skip(state[matrix], p)) return;
  const int down = 256 / ACROSS;
  const int tx = int(simdgroup) % (ACROSS / 8) * 8 + int(lane) % 8;
  const int ty = int(simdgroup) / (ACROSS / 8) * 4 + int(lane) / 8;
  const int kWide = C * ACROSS;
  const int kRows = R * down;
  const int of_a = kRows * kDepth / 256;  // numbers of a tile that a thread fetches
  const int of_b = kWide * kDepth / 256;
  const int kPitch = kRows + 4;
  const int first_row = tile_at * kRows;
  const int begin = part * p.part;
  const int end = min(begin + p.part, p.depth);
  device const T* from_a = a + matrix * p.a_batch;
  device const float* from_b = b + matrix * p.b_batch;
  const bool scaled = (p.flags & RSVD_SCALED) != 0;
  const bool good = status[matrix] == 0;
  const int k_in = exponent[matrix];
  const bool along_depth = p.a_col == 1;
  threadgroup float* tile_b = tile + kDepth * kPitch;

  float acc[R][C];
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int j = 0; j < C; ++j) acc[r][j] = 0.0f;
  }
  // The first number of A and of B that a thread fetches, and from one to the next.
  const int a_row = along_depth ? int(thread_index) / kDepth : int(thread_index) % kRows;
  const int a_k = along_depth ? int(thread_index) % kDepth : int(thread_index) / kRows;
  const int a_down = along_depth ? 256 / kDepth : 0;
  const int a_on = along_depth ? 0 : 256 / kRows;
  const int b_k = int(thread_index) / kWide;
  const int b_j = int(thread_index) % kWide;
  const long a_step = long(a_down) * long(p.a_row) + long(a_on) * long(p.a_col);
  const long b_step = long(256 / kWide) * long(p.b_row);
  from_a += long(first_row + a_row) * long(p.a_row) + long(begin + a_k) * long(p.a_col);
  from_b += long(begin + b_k) * long(p.b_row) + long(b_j) * long(p.b_col);
  T x[of_a];
  float y[of_b];
  for (int k0 = begin - kDepth; k0 < end; k0 += kDepth) {
    if (k0 >= begin) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the last ones have been read
#pragma unroll
      for (int i = 0; i < of_a; ++i) {
        float z = float(x[i]);
        if (scaled) z = good ? scale_in(z, k_in) : 0.0f;
        tile[(a_k + a_on * i) * kPitch + a_row + a_down * i] = z;
      }
#pragma unroll
      for (int i = 0; i < of_b; ++i) tile_b[int(thread_index) + 256 * i] = y[i];
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int next = k0 + kDepth;
    if (next < end) {
#pragma unroll
      for (int i = 0; i < of_a; ++i) {
        x[i] = T(0.0f);
        if (first_row + a_row + a_down * i < p.rows && next + a_k + a_on * i < end)
          x[i] = from_a[long(i) * a_step];
      }
#pragma unroll
      for (int i = 0; i < of_b; ++i) {
        y[i] = 0.0f;
        if (next + b_k + 256 / kWide * i < end && b_j < p.columns) y[i] = from_b[long(i) * b_step];
      }
      from_a += long(kDepth) * long(p.a_col);
      from_b += long(kDepth) * long(p.b_row);
    }
    if (k0 >= begin) {  // numbers past the end are zeros
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        float u[R];
        float v[C];
        read_lines<R, 256 / ACROSS>(tile + k * kPitch, ty, u);
        read_lines<C, ACROSS>(tile_b + k * kWide, tx, v);
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int j = 0; j < C; ++j) acc[r][j] = fma(u[r], v[j], acc[r][j]);
        }
      }
    }
  }

  // A may be C, of the same rows.
  threadgroup_barrier(mem_flags::mem_device);
  const long size = long(p.rows) * long(p.columns);
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int j = 0; j < C; ++j) {
      int row = first_row + line_of(r, ty, R, down);
      int column = line_of(j, tx, C, ACROSS);
      long place = long(row) * long(p.columns) + long(column);
      if (row < p.rows && column < p.columns) {
        if (p.parts > 1) {
          c[(matrix * long(p.parts) + long(part)) * size + place] = acc[r][j];
        } else {
          put(c, place, acc[r][j], matrix, status, state, coefficient, p);
        }
      }
    }
  }
}

// C from its parts.
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_sum(
    device const float* partial [[buffer(0)]], device float* c [[buffer(1)]],
    device const int* status [[buffer(2)]], device const int* state [[buffer(3)]],
    device const float* coefficient [[buffer(4)]], constant RsvdParams& p [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  const long size = long(p.rows) * long(p.columns);
  const uint groups = uint((size + long(threads) - 1l) / long(threads));
  const long matrix = long(group / groups);
  if (to_skip(state[matrix], p)) return;
  const long place = long(group % groups) * long(threads) + long(thread_index);
  if (place < size) {
    float x = 0.0f;
    for (int i = 0; i < p.parts; ++i)
      x += partial[(matrix * long(p.parts) + long(i)) * size + place];
    put(c, place, x, matrix, status, state, coefficient, p);
  }
}

// --- products by a library -----------------------------------------------------------------------

inline uint2 four_halves(thread const half (&x)[4]) {
  half2 one;
  half2 two;
  one.x = x[0];
  one.y = x[1];
  two.x = x[2];
  two.y = x[3];
  uint2 both;
  both.x = as_type<uint>(one);
  both.y = as_type<uint>(two);
  return both;
}

// A, scaled, in two halves: four numbers of a row a thread. Rows are b_row long there, zeros behind
// the end.
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_split(
    device const float* a [[buffer(0)]], device half* high [[buffer(1)]],
    device half* low [[buffer(2)]], device const int* exponent [[buffer(3)]],
    device const int* status [[buffer(4)]], constant RsvdParams& p [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int chunks = (p.b_row + 1023) / 1024;
  const int j = int(group % uint(chunks)) * 1024 + 4 * int(thread_index);
  const long row = long(group / uint(chunks));
  const long matrix = row / long(p.rows);
  const bool own = j < p.b_row;
  const bool good = status[matrix] == 0;
  const int k = exponent[matrix];
  device const float* from = a + (row * long(p.depth) + long(j));
  float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (good && own && p.depth % 4 == 0 && j < p.depth) {
    const float4 four = ((device const float4*)from)[0];
    x[0] = four.x;
    x[1] = four.y;
    x[2] = four.z;
    x[3] = four.w;
  } else if (good) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (j + i < p.depth) x[i] = from[i];
    }
  }
  half top[4];
  half rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = scale_in(x[i], k);
    top[i] = half(x[i]);
    rest[i] = half((x[i] - float(top[i])) * 2048.0f);
  }
  const long to = (row * long(p.b_row) + long(j)) / 4l;
  if (own) {
    ((device uint2*)high)[to] = four_halves(top);
    ((device uint2*)low)[to] = four_halves(rest);
  }
}

// How an exponent of A that is not in its own numbers is shared: halves bring all of it in at the
// end, where bfloat would overflow before.
inline int exponent_of_panel(int exponent, int pieces) { return pieces == 3 ? exponent / 2 : 0; }

// A panel, side by side with what of it does not fit into one piece. Pieces of a row are b_row / P
// long, zeros behind the end.
template <typename T, int P>
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_pieces(
    device const float* x [[buffer(0)]], device T* to [[buffer(1)]],
    device const int* exponent [[buffer(2)]], constant RsvdParams& p [[buffer(3)]],
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int wide = p.b_row / P;
  const uint size = uint(p.depth) * uint(wide);
  const uint groups = (size + 255u) / 256u;
  const long matrix = long(group / groups);
  const uint place = group % groups * 256u + thread_index;
  const bool own = place < size;
  const int i = int(place / uint(wide));
  const int j = int(place % uint(wide));
  float left = 0.0f;
  if (own && j < p.columns) left = x[matrix * p.b_batch + long(i * p.columns + j)];
  if ((p.flags & RSVD_SCALED) != 0) left *= power_of_two(exponent_of_panel(exponent[matrix], P));
  device T* row = to + (matrix * long(p.depth) + long(i)) * long(p.b_row) + long(j);
#pragma unroll
  for (int piece = 0; piece < P; ++piece) {
    T part = T(left);
    if (own) row[piece * wide] = part;
    left -= float(part);
    if (P == 2) left *= 2048.0f;
  }
}

// C from what came of a panel's pieces, in `parts` parts: four columns a thread.
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_gather(
    device const float* partial [[buffer(0)]], device float* c [[buffer(1)]],
    device const int* exponent [[buffer(2)]], device const int* status [[buffer(3)]],
    constant RsvdParams& p [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int pieces = p.part;
  const uint wide = uint(p.b_row / pieces / 4);
  const uint size = uint(p.rows) * wide;
  const uint groups = (size + 255u) / 256u;
  const long matrix = long(group / groups);
  const uint place = group % groups * 256u + thread_index;
  const int row = int(place / wide);
  const int j = int(place % wide) * 4;
  const int parts = place < size ? p.parts : 0;
  // In fours.
  const long stride = long(p.rows) * long(p.b_row / 4);
  device const float4* from = (device const float4*)partial +
                              (matrix * long(p.parts) * stride + long(row) * long(p.b_row / 4));
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int piece = pieces - 1; piece >= 0; --piece) {
    device const float4* of = from + (piece * int(wide) + j / 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] *= p.alpha;
    for (int first = 0; first < parts; first += 4) {
      // Four loads are under way at a time.
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = four_of(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + i < parts) x[i] = of[long(first + i) * stride];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[0] += x[i].x;
        sum[1] += x[i].y;
        sum[2] += x[i].z;
        sum[3] += x[i].w;
      }
    }
  }
  const bool good = status[matrix] == 0;
  float scale = 1.0f;
  if ((p.flags & RSVD_SCALED) != 0) {
    const int k = exponent[matrix];
    scale = power_of_two(min(k - exponent_of_panel(k, pieces), 127));
  }
  device float* to = c + (matrix * long(p.rows) + long(row)) * long(p.columns);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (place < size && j + e < p.columns) to[j + e] = good ? sum[e] * scale : 0.0f;
  }
}

// --- bases ---------------------------------------------------------------------------------------

// R^-1 of the Cholesky factorisation R^T R of a Gram matrix, its columns' lengths included; and
// `scale`, which makes its largest entry 1, squared.
//
// A thread has 8 x 4 entries. Gauss-Jordan elimination below the diagonal, in place: after step j
// columns up to j hold the inverse of the unit triangle, those behind what is left of the matrix,
// whose row j, being symmetric, has the factors of all rows too. Eight rows are done at a time: one
// simdgroup eliminates within them and puts them where all threads below find them. The block on
// the diagonal is kept apart by then, and its place holds the inverse from the identity on.
template <int N>
[[kernel, max_total_threads_per_threadgroup(N* N / 32)]] void rsvd_factor(
    device const float* gram [[buffer(0)]], device float* inverse [[buffer(1)]],
    device float* length [[buffer(2)]], device int* state [[buffer(3)]],
    device int* status [[buffer(4)]], device float* scale [[buffer(5)]],
    constant RsvdParams& p [[buffer(6)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  threadgroup float* over_norm = tile + 32 * N;
  threadgroup float* pivot = over_norm + N;
  threadgroup float* shared = pivot + N;
  const long matrix = long(group);
  const bool basis = (p.flags & RSVD_BASIS) != 0;
  const int before = basis && (p.flags & RSVD_FIRST) == 0 ? state[matrix] : kFar;
  threadgroup_barrier(mem_flags::mem_device);  // all have read the state
  if (before != kFar) {
    if (thread_index == 0u) state[matrix] = kDone;
    return;
  }
  const int l = p.columns;
  const long start = matrix * long(l) * long(l);
  const int ty = int(thread_index) / (N / 4);
  const int tx = int(thread_index) % (N / 4);
  float x[8][4];
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = 8 * ty + r;
      const int j = 4 * tx + c;
      x[r][c] = i < l && j < l ? gram[start + long(i * l + j)] : 0.0f;
      if (i == j) over_norm[i] = x[r][c];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float squares = 0.0f;
  for (int i = int(thread_index); i < N; i += int(threads)) {
    float square = over_norm[i];
    square = square > kTiny ? square : 1.0f;
    over_norm[i] = 1.0f / sqrt(square);
    if (i < l) squares += square;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float off = 0.0f;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = 8 * ty + r;
      const int j = 4 * tx + c;
      const float one = i == j ? 1.0f : 0.0f;
      x[r][c] = max(i, j) < l ? x[r][c] * over_norm[i] * over_norm[j] : one;
      off = fma(x[r][c] - one, x[r][c] - one, off);
    }
  }
  squares = simd_sum(squares);
  off = simd_sum(off);
  if (lane == 0u) {
    shared[simdgroup] = squares;
    shared[simdgroups + simdgroup] = off;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  squares = 0.0f;
  off = 0.0f;
  for (uint i = 0u; i < simdgroups; ++i) {
    squares += shared[i];
    off += shared[simdgroups + i];
  }
  const bool near = basis && off < kNearEnough;
  const float shift = near ? 0.0f : p.alpha;
  if (thread_index == 0u) {
    if (basis) state[matrix] = near ? kNear : kFar;
    if (!near && (p.flags & RSVD_LAST) != 0) status[matrix] = 2;
    length[matrix] = sqrt(squares * (1.0f + shift));
  }

  // A column with little more left than the shift depends on those before it, as far as can be
  // told. It keeps what is left: pivots of rounding errors would grow without bounds.
  const float least = near ? 0.0f : 4.0f * shift;
  for (int block = 0; 8 * block < l; ++block) {
    // Two buffers: the next rows are put while these are still read.
    threadgroup float* rows = tile + (block & 1) * 16 * N;
    threadgroup float* factors = rows + 8 * N;
    const bool diagonal = tx / 2 == block;
    if (int(simdgroup) == block * (N / 4) / 32) {
      // The block on the diagonal, for every lane: nobody waits for another's division.
      const bool here = ty == block;
      const int from = int(lane) / (N / 4) * (N / 4) + 2 * block;
      float d[8][8];
#pragma unroll
      for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int c = r; c < 8; ++c) {
          d[r][c] = simd_shuffle(x[r][c % 4], ushort(from + c / 4));
          if (r == c) d[r][c] += shift;
        }
      }
      if (here && diagonal) {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) x[r][c] = r == 4 * (tx % 2) + c ? 1.0f : 0.0f;
        }
      }
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        const bool left = d[s][s] > least;
        float over = rsqrt(left ? d[s][s] : 1.0f);
        over = over * over;
        over = left ? over * fma(-d[s][s], over, 2.0f) : 0.0f;
        if (here) {
          put_four(x[s], 1.0f, rows + s * N + 4 * tx);
          put_four(x[s], over, factors + s * N + 4 * tx);
          if (tx == 2 * block) pivot[8 * block + s] = left ? d[s][s] : -1.0f;
        }
#pragma unroll
        for (int r = s + 1; r < 8; ++r) {
          float by = here ? d[s][r] * over : 0.0f;
#pragma unroll
          for (int c = r; c < 8; ++c) d[r][c] = fma(-by, d[s][c], d[r][c]);
#pragma unroll
          for (int c = 0; c < 4; ++c) x[r][c] = fma(-by, x[s][c], x[r][c]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (ty > block) {
      if (diagonal) {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) x[r][c] = 0.0f;
        }
      }
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        float low[4];
        float high[4];
        float row[4];
        read_four(factors + s * N + 8 * ty, low);
        read_four(factors + s * N + 8 * ty + 4, high);
        read_four(rows + s * N + 4 * tx, row);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            x[i][c] = fma(-low[i], row[c], x[i][c]);
            x[4 + i][c] = fma(-high[i], row[c], x[4 + i][c]);
          }
        }
      }
    }
  }
  float missing = 0.0f;
  for (int i = int(thread_index); i < l; i += int(threads)) {
    if (pivot[i] < 0.0f) missing = 1.0f;
    pivot[i] = pivot[i] < 0.0f ? 1.0f : 1.0f / sqrt(pivot[i]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float top = 0.0f;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = 8 * ty + r;
      const int j = 4 * tx + c;
      x[r][c] = j <= i && i < l ? x[r][c] * pivot[i] * over_norm[j] : 0.0f;
      top = max(top, fabs(x[r][c]));
    }
  }
  top = simd_max(top);
  missing = simd_max(missing);
  if (lane == 0u) {
    shared[simdgroup] = top;
    shared[simdgroups + simdgroup] = missing;
  }
  // Turned, 32 columns of the result at a time, so that threads side by side write side by side.
  // Fours of a row stand where those of rows nearby do not: threads then hit different banks.
  for (int first = 0; first < l; first += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (8 * ty >= first && 8 * ty < first + 32) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = (2 * ty + h - first / 4) ^ (tx % 8);
          ((threadgroup float4*)tile)[(4 * tx + c) * 8 + at] =
              four_of(x[4 * h][c], x[4 * h + 1][c], x[4 * h + 2][c], x[4 * h + 3][c]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int column = first + int(lane);
    for (int j = int(simdgroup); j < l; j += int(simdgroups)) {
      const int at = int(lane / 4u) ^ (j / 4 % 8);
      if (column < l)
        inverse[start + long(j * l + column)] = tile[(j * 8 + at) * 4 + int(lane % 4u)];
    }
  }
  if (thread_index == 0u) {
    for (uint i = 0u; i < simdgroups; ++i) {
      top = max(top, shared[i]);
      missing = max(missing, shared[simdgroups + i]);
    }
    scale[matrix] = 1.0f / top / top;
    // Without all columns there is no bound of the singular values.
    if (missing > 0.0f) length[matrix] = kHuge;
  }
}

// A lower bound of the smallest singular value of R, and the coefficient of a step's shift. With
// G = R^-1 R^-T, sigma^-2 = |G|_2 <= tr(G^16)^(1/16), and G^8 comes from four products. The first
// is by `scale`, so that the largest eigenvalue is between 1 and l^2; the third by 2^-27, so that
// nothing overflows.
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_bound(
    device const float* eighth [[buffer(0)]], device const float* scale [[buffer(1)]],
    device const float* length [[buffer(2)]], device float* bound [[buffer(3)]],
    device float* coefficient [[buffer(4)]], constant RsvdParams& p [[buffer(5)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  const long matrix = long(group);
  const int size = p.columns * p.columns;
  device const float* from = eighth + matrix * long(size);
  float root = 0.0f;
  for (int i = int(thread_index); i < size; i += int(threads)) root = fma(from[i], from[i], root);
  root = sum_over(root, tile, simdgroup, simdgroups, lane);
  for (int i = 0; i < 5; ++i) root = sqrt(root);
  root *= 10.374716f;  // 2^(2 * 54 / 32)
  if (thread_index == 0u) {
    // Less what rounding may have added, to R and to its inverse. Without an inverse that can be
    // squared there is no bound.
    float least = root > 0.0f ? sqrt(scale[matrix]) / root : 0.0f;
    least = max(least - p.noise * length[matrix], 0.0f);
    float best = (p.flags & RSVD_FIRST) != 0 ? least : max(bound[matrix], least);
    bound[matrix] = best;
    coefficient[matrix] = -p.alpha * best * best;
  }
}

// --- what is left --------------------------------------------------------------------------------

// The l x l matrix that is left is a lower triangle but for rounding. So are columns no longer than
// some ulp of the longest row: a matrix of lower rank has them, and an SVD by Jacobi's rotations
// would turn their rounding errors without end. A simdgroup has every 16th row.
[[kernel, max_total_threads_per_threadgroup(512)]] void rsvd_triangle(
    device float* core [[buffer(0)]], constant RsvdParams& p [[buffer(1)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup float* longest_of = tile + 16 * 128;
  threadgroup float* none = longest_of + 128;
  const int l = p.columns;
  device float* from = core + long(group) * long(l) * long(l);
  float column[4];
#pragma unroll
  for (int h = 0; h < 4; ++h) column[h] = 0.0f;
  float longest = 0.0f;
  for (int i = int(simdgroup); i < l; i += 16) {
    float squares = 0.0f;
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int j = int(lane) + 32 * h;
      float x = j <= i ? from[i * l + j] : 0.0f;
      column[h] = fma(x, x, column[h]);
      squares = fma(x, x, squares);
    }
    longest = max(longest, simd_sum(squares));
  }
#pragma unroll
  for (int h = 0; h < 4; ++h) tile[int(simdgroup) * 128 + int(lane) + 32 * h] = column[h];
  if (lane == 0u) longest_of[simdgroup] = longest;
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  if (thread_index < 128u) {
    float squares = 0.0f;
    for (int i = 0; i < 16; ++i) {
      squares += tile[i * 128 + int(thread_index)];
      longest = max(longest, longest_of[i]);
    }
    none[thread_index] = sqrt(squares) <= p.noise * sqrt(longest) ? 1.0f : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(simdgroup); i < l; i += 16) {
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int j = int(lane) + 32 * h;
      if (j < l && (j > i || none[j] > 0.0f)) from[i * l + j] = 0.0f;
    }
  }
}

// --- results -------------------------------------------------------------------------------------

[[kernel, max_total_threads_per_threadgroup(128)]] void rsvd_values(
    device const float* sigma [[buffer(0)]], device const int* exponent [[buffer(1)]],
    device const int* status [[buffer(2)]], device float* s [[buffer(3)]],
    constant RsvdParams& p [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const long at = long(group) * long(p.columns) + long(thread_index);
  if (int(thread_index) < p.columns)
    s[at] = or_nan(scale_out(sigma[at], exponent[group]), status[group] == 0);
}

#define RSVD_INSTANTIATE_PRODUCT(name, function, T, C, R, ACROSS) \
  template [[host_name(                                           \
      #name)]] [[kernel]] decltype(function<T, C, R, ACROSS>) function<T, C, R, ACROSS>;
RSVD_PRODUCT_VARIANTS(RSVD_INSTANTIATE_PRODUCT)
#define RSVD_INSTANTIATE_WITH(name, function, T, X) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T, X>) function<T, X>;
RSVD_PIECES_VARIANTS(RSVD_INSTANTIATE_WITH)
#define RSVD_INSTANTIATE(name, function, T) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T>) function<T>;
RSVD_SCAN_VARIANTS(RSVD_INSTANTIATE_WITH)
RSVD_SQUARE_VARIANTS(RSVD_INSTANTIATE)

#endif  // JM_HOST
