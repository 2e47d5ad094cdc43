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
//   rsvd_product_*    batch * parts * tiles            256       a tile is 16 R rows of C
//   rsvd_sum          batch * ceil(rows columns / 256) 256       C from its parts, where several
//   rsvd_factor_n*    batch                            (N / 4)^2 inverse of a triangle
//   rsvd_bound        batch                            256       the smallest singular value
//   rsvd_triangle     batch                            128       the l x l matrix that is left
//   rsvd_values       batch                            128       S
//   and between the last two those of kernels/svd.metal for that matrix.
// Where a library's matrix products in 16 bits are asked for ("library"), those with A are
//   rsvd_split         batch * m * ceil(pitch / 1024)   256       A in halves, once
//   rsvd_pieces_*      batch * ceil(depth pitch / 256)  256       a panel in pieces of 16 bits
//   gemm_*             of kernels/gemm.metal
//   rsvd_gather        batch * ceil(rows columns / 256) 256       C
// A = high + 2^-11 low, halves, is exact to 2^-22 of an entry and 2^-36 of the largest; a panel's
// pieces x0 + 2^-11 x1 are as good, and high x0 + 2^-11 (high x1 + low x0) leaves out 2^-22 of the
// product. A of 16 bits is its own high part; for bfloat a panel has three pieces, 24 bits.
//   Threadgroup bytes: scan and scale 1024, product 4 * 16 * (16 R + 4 + 16 C), factor
//   4 * (18 N + 32), bound 128, triangle 16.
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

// X(name, function, storage type, C, R): C columns and R rows of C for a thread, 16 C and 16 R for
// a tile. Low tiles are for products of few rows, which would keep few cores busy.
#define RSVD_PRODUCTS(X, tag, T)                     \
  X(rsvd_product_##tag##_n32, rsvd_product, T, 2, 8) \
  X(rsvd_product_##tag##_n64, rsvd_product, T, 4, 8) \
  X(rsvd_product_##tag##_n128, rsvd_product, T, 8, 8)
#define RSVD_PRODUCT_VARIANTS(X)                         \
  RSVD_PRODUCTS(X, f32, float)                           \
  RSVD_PRODUCTS(X, f16, half)                            \
  RSVD_PRODUCTS(X, bf16, bfloat)                         \
  X(rsvd_product_f32_low_n32, rsvd_product, float, 2, 2) \
  X(rsvd_product_f32_low_n64, rsvd_product, float, 4, 2) \
  X(rsvd_product_f32_low_n128, rsvd_product, float, 8, 2)

// X(name, function, storage type)
#define RSVD_SCAN_VARIANTS(X)        \
  X(rsvd_scan_f32, rsvd_scan, float) \
  X(rsvd_scan_f16, rsvd_scan, half)  \
  X(rsvd_scan_bf16, rsvd_scan, bfloat)

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

// The sum over a threadgroup, for all of its threads.
inline float sum_over(float x, threadgroup float* shared, uint simdgroup, uint simdgroups,
                      uint lane) {
  x = simd_sum(x);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // what was shared before has been read
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

// Largest entry, as bits, of a part of a matrix.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_scan(
    device const T* a [[buffer(0)]], device uint* largest [[buffer(1)]],
    constant RsvdParams& p [[buffer(2)]], threadgroup uint* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  const long size = long(p.rows) * long(p.depth);
  device const T* from = a + long(group / uint(p.parts)) * size;
  const long share = (size + long(p.parts) - 1l) / long(p.parts);
  const long begin = long(group % uint(p.parts)) * share;
  const long end = begin + share < size ? begin + share : size;
  uint top = 0u;
  for (long i = begin + long(thread_index); i < end; i += long(threads))
    top = max(top, as_type<uint>(float(from[i])) & 0x7fffffffu);
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
  float4 v;
  v.x = from[0] * by;
  v.y = from[1] * by;
  v.z = from[2] * by;
  v.w = from[3] * by;
  ((threadgroup float4*)to)[0] = v;
}

// Thread t of 16 has `count` rows or columns of a tile, in fours so that threads side by side read
// threadgroup memory side by side. Number i of them:
inline int line_of(int i, int t, int count) {
  return count >= 4 ? i / 4 * 64 + 4 * t + i % 4 : count * t + i;
}

template <int COUNT>
inline void read_lines(threadgroup const float* from, int t, thread float (&to)[COUNT]) {
  if (COUNT >= 4) {
    float four[4];
#pragma unroll
    for (int h = 0; h < COUNT / 4; ++h) {
      read_four(from + 64 * h + 4 * t, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(4 * h + i) % COUNT] = four[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = from[COUNT * t + i];
  }
}

// 16 R rows of C, or of one of its parts. 16 x 16 threads, each with R rows and C columns. What
// comes next of A and B is on its way while the products of what is there are formed.
template <typename T, int C, int R>
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_product(
    device const T* a [[buffer(0)]], device const float* b [[buffer(1)]],
    device float* c [[buffer(2)]], device const int* exponent [[buffer(3)]],
    device const int* status [[buffer(4)]], device const int* state [[buffer(5)]],
    device const float* coefficient [[buffer(6)]], constant RsvdParams& p [[buffer(7)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int tile_at = p.first + int(group % uint(p.tiles));
  const int part = int(group / uint(p.tiles) % uint(p.parts));
  const long matrix = long(group / uint(p.tiles) / uint(p.parts));
  if (to_skip(state[matrix], p)) return;
  const int ty = int(thread_index) / 16;
  const int tx = int(thread_index) % 16;
  const int kRows = 16 * R;
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
  const int a_down = along_depth ? 16 : 0;
  const int a_on = along_depth ? 0 : 16 / R;
  const int b_k = int(thread_index) / (16 * C);
  const int b_j = int(thread_index) % (16 * C);
  const long a_step = long(a_down) * long(p.a_row) + long(a_on) * long(p.a_col);
  const long b_step = long(16 / C) * long(p.b_row);
  from_a += long(first_row + a_row) * long(p.a_row) + long(begin + a_k) * long(p.a_col);
  from_b += long(begin + b_k) * long(p.b_row) + long(b_j) * long(p.b_col);
  T x[R];
  float y[C];
  for (int k0 = begin - kDepth; k0 < end; k0 += kDepth) {
    if (k0 >= begin) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the last ones have been read
#pragma unroll
      for (int i = 0; i < R; ++i) {
        float z = float(x[i]);
        if (scaled) z = good ? scale_in(z, k_in) : 0.0f;
        tile[(a_k + a_on * i) * kPitch + a_row + a_down * i] = z;
      }
#pragma unroll
      for (int i = 0; i < C; ++i) tile_b[int(thread_index) + 256 * i] = y[i];
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int next = k0 + kDepth;
    if (next < end) {
#pragma unroll
      for (int i = 0; i < R; ++i) {
        x[i] = T(0.0f);
        if (first_row + a_row + a_down * i < p.rows && next + a_k + a_on * i < end)
          x[i] = from_a[long(i) * a_step];
      }
#pragma unroll
      for (int i = 0; i < C; ++i) {
        y[i] = 0.0f;
        if (next + b_k + 16 / C * i < end && b_j < p.columns) y[i] = from_b[long(i) * b_step];
      }
      from_a += long(kDepth) * long(p.a_col);
      from_b += long(kDepth) * long(p.b_row);
    }
    const int depth = k0 >= begin ? min(end - k0, kDepth) : 0;
    for (int k1 = 0; k1 < depth; k1 += 2) {
#pragma unroll
      for (int k = k1; k < k1 + 2; ++k) {
        float u[R];
        float v[C];
        read_lines<R>(tile + k * kPitch, ty, u);
        read_lines<C>(tile_b + k * 16 * C, tx, v);
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
      int row = first_row + line_of(r, ty, R);
      int column = line_of(j, tx, C);
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

// A, scaled, in two halves. Rows are b_row long there, zeros behind the end.
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_split(
    device const float* a [[buffer(0)]], device half* high [[buffer(1)]],
    device half* low [[buffer(2)]], device const int* exponent [[buffer(3)]],
    device const int* status [[buffer(4)]], constant RsvdParams& p [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int chunks = (p.b_row + 1023) / 1024;
  const int first = int(group % uint(chunks)) * 1024 + int(thread_index);
  const long row = long(group / uint(chunks));
  const long matrix = row / long(p.rows);
  const bool good = status[matrix] == 0;
  const int k = exponent[matrix];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int j = first + 256 * i;
    if (j < p.b_row) {
      float x = 0.0f;
      if (good && j < p.depth) x = scale_in(a[row * long(p.depth) + long(j)], k);
      half top = half(x);
      high[row * long(p.b_row) + long(j)] = top;
      low[row * long(p.b_row) + long(j)] = half((x - float(top)) * 2048.0f);
    }
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

// C from what came of a panel's pieces, in `parts` parts.
[[kernel, max_total_threads_per_threadgroup(256)]] void rsvd_gather(
    device const float* partial [[buffer(0)]], device float* c [[buffer(1)]],
    device const int* exponent [[buffer(2)]], device const int* status [[buffer(3)]],
    constant RsvdParams& p [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const uint size = uint(p.rows) * uint(p.columns);
  const uint groups = (size + 255u) / 256u;
  const long matrix = long(group / groups);
  const uint place = group % groups * 256u + thread_index;
  const int parts = place < size ? p.parts : 0;
  const int pieces = p.part;
  const int wide = p.b_row / pieces;
  const long row = matrix * long(p.parts) * long(p.rows) + long(place / uint(p.columns));
  device const float* from = partial + row * long(p.b_row) + long(place % uint(p.columns));
  float sum = 0.0f;
  for (int piece = pieces - 1; piece >= 0; --piece) {
    sum *= p.alpha;
    for (int i = 0; i < parts; ++i)
      sum += from[long(i) * long(p.rows) * long(p.b_row) + long(piece * wide)];
  }
  if ((p.flags & RSVD_SCALED) != 0) {
    const int k = exponent[matrix];
    sum *= power_of_two(min(k - exponent_of_panel(k, pieces), 127));
  }
  if (place < size) c[matrix * long(size) + long(place)] = status[matrix] == 0 ? sum : 0.0f;
}

// --- bases ---------------------------------------------------------------------------------------

// R^-1 of the Cholesky factorisation R^T R of a Gram matrix, its columns' lengths included; and
// `scale`, which makes its largest entry 1, squared.
//
// A thread has 4 x 4 entries. Gauss-Jordan elimination below the diagonal, in place: after step j
// columns up to j hold the inverse of the unit triangle, those behind what is left of the matrix,
// whose row j, being symmetric, has the factors of all rows too. Four rows are done at a time: one
// simdgroup eliminates within them and puts them where all threads below find them.
template <int N>
[[kernel, max_total_threads_per_threadgroup(N* N / 16)]] void rsvd_factor(
    device const float* gram [[buffer(0)]], device float* inverse [[buffer(1)]],
    device float* length [[buffer(2)]], device int* state [[buffer(3)]],
    device int* status [[buffer(4)]], device float* scale [[buffer(5)]],
    constant RsvdParams& p [[buffer(6)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  threadgroup float* over_norm = tile + 16 * N;
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
  float squares = 0.0f;
  for (int i = int(thread_index); i < N; i += int(threads)) {
    float square = i < l ? gram[start + long(i * l + i)] : 1.0f;
    square = square > kTiny ? square : 1.0f;
    over_norm[i] = 1.0f / sqrt(square);
    if (i < l) squares += square;
  }
  squares = sum_over(squares, shared, simdgroup, simdgroups, lane);

  float x[4][4];
  float off = 0.0f;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int i = 4 * ty + r;
      int j = 4 * tx + c;
      float one = i == j ? 1.0f : 0.0f;
      x[r][c] = one;
      if (i < l && j < l) x[r][c] = gram[start + long(i * l + j)] * over_norm[i] * over_norm[j];
      off = fma(x[r][c] - one, x[r][c] - one, off);
    }
  }
  off = sum_over(off, shared, simdgroup, simdgroups, lane);
  const bool near = basis && off < kNearEnough;
  const float shift = near ? 0.0f : p.alpha;
  if (thread_index == 0u) {
    if (basis) state[matrix] = near ? kNear : kFar;
    if (!near && (p.flags & RSVD_LAST) != 0) status[matrix] = 2;
    length[matrix] = sqrt(squares * (1.0f + shift));
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) x[r][r] += ty == tx ? shift : 0.0f;

  // A column with little more left than the shift depends on those before it, as far as can be
  // told. It keeps what is left: pivots of rounding errors would grow without bounds.
  const float least = near ? 0.0f : 4.0f * shift;
  for (int block = 0; 4 * block < l; ++block) {
    // Two buffers: the next rows are put while these are still read.
    threadgroup float* rows = tile + (block & 1) * 8 * N;
    threadgroup float* factors = rows + 4 * N;
    const bool diagonal = tx == block;
    if (int(simdgroup) == block * (N / 4) / 32) {
      // The block on the diagonal, for every lane: nobody waits for another's division.
      const bool here = ty == block;
      const ushort from = ushort(int(lane) / (N / 4) * (N / 4) + block);
      float d[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = r; c < 4; ++c) d[r][c] = simd_shuffle(x[r][c], from);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const bool left = d[s][s] > least;
        float over = rsqrt(left ? d[s][s] : 1.0f);
        over = over * over;
        over = left ? over * fma(-d[s][s], over, 2.0f) : 0.0f;
        if (here) {
          put_four(x[s], 1.0f, rows + s * N + 4 * tx);
          put_four(x[s], over, factors + s * N + 4 * tx);
          if (diagonal) pivot[4 * block + s] = left ? d[s][s] : -1.0f;
        }
#pragma unroll
        for (int r = s + 1; r < 4; ++r) {
          float by = here ? d[s][r] * over : 0.0f;
#pragma unroll
          for (int c = r; c < 4; ++c) d[r][c] = fma(-by, d[s][c], d[r][c]);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            bool own = here && diagonal && c == s;
            x[r][c] = fma(-by, own ? 1.0f : x[s][c], own ? 0.0f : x[r][c]);
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (ty > block) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        float by[4];
        float row[4];
        read_four(factors + s * N + 4 * ty, by);
        read_four(rows + s * N + 4 * tx, row);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          bool own = diagonal && c == s;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            x[i][c] = fma(-by[i], own ? 1.0f : row[c], own ? 0.0f : x[i][c]);
        }
      }
    }
  }
  // Without all columns there is no bound of the singular values.
  float missing = 0.0f;
  for (int i = int(thread_index); i < l; i += int(threads)) {
    if (pivot[i] < 0.0f) missing += 1.0f;
    pivot[i] = pivot[i] < 0.0f ? 1.0f : 1.0f / sqrt(pivot[i]);
  }
  missing = sum_over(missing, shared, simdgroup, simdgroups, lane);
  if (thread_index == 0u && missing > 0.0f) length[matrix] = kHuge;
  float top = 0.0f;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int i = 4 * ty + r;
      int j = 4 * tx + c;
      float y = j < i ? x[r][c] : (j == i ? 1.0f : 0.0f);
      x[r][c] = i < l ? y * pivot[i] * over_norm[j] : 0.0f;
      top = max(top, fabs(x[r][c]));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read what was missing
  top = max_over(top, shared, simdgroup, simdgroups, lane);
  if (thread_index == 0u) scale[matrix] = 1.0f / top / top;
  // Turned, 16 columns of the result at a time, so that threads side by side write side by side.
  for (int first = 0; first < l; first += 16) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (4 * ty >= first && 4 * ty < first + 16) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) tile[(4 * tx + c) * 17 + 4 * ty + r - first] = x[r][c];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = int(thread_index); e < 16 * l; e += int(threads)) {
      if (first + e % 16 < l)
        inverse[start + long(e / 16 * l + first + e % 16)] = tile[e / 16 * 17 + e % 16];
    }
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
// would turn their rounding errors without end. A thread a row, then a column.
[[kernel, max_total_threads_per_threadgroup(128)]] void rsvd_triangle(
    device float* core [[buffer(0)]], constant RsvdParams& p [[buffer(1)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int l = p.columns;
  const int own = int(thread_index);
  device float* from = core + long(group) * long(l) * long(l);
  float squares = 0.0f;
  for (int j = 0; j <= own && own < l; ++j)
    squares = fma(from[own * l + j], from[own * l + j], squares);
  float longest = simd_max(squares);
  if (lane == 0u) tile[simdgroup] = longest;
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  for (int i = 0; i < 4; ++i) longest = max(longest, tile[i]);
  squares = 0.0f;
  for (int i = own; i < l; ++i) squares = fma(from[i * l + own], from[i * l + own], squares);
  const bool none = sqrt(squares) <= p.noise * sqrt(longest);
  for (int i = 0; i < l && own < l; ++i) {
    if (i < own || none) from[i * l + own] = 0.0f;
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

#define RSVD_INSTANTIATE_PRODUCT(name, function, T, C, R) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T, C, R>) function<T, C, R>;
RSVD_PRODUCT_VARIANTS(RSVD_INSTANTIATE_PRODUCT)
#define RSVD_INSTANTIATE_PIECES(name, function, T, P) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T, P>) function<T, P>;
RSVD_PIECES_VARIANTS(RSVD_INSTANTIATE_PIECES)
#define RSVD_INSTANTIATE(name, function, T) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T>) function<T>;
RSVD_SCAN_VARIANTS(RSVD_INSTANTIATE)
RSVD_SQUARE_VARIANTS(RSVD_INSTANTIATE)

#endif  // JM_HOST
