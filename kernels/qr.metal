// QR decomposition by Householder reflections: small matrices in registers, others as a tree.
//
// Up to 32 x 32 ("small"): a matrix belongs to N lanes of a simdgroup, a lane to a column of A and
// to a column of Q^H, both in registers. At step j lane j's column is the reflector: all lanes of
// the matrix read it by shuffle, take their dot products with it and reflect.
//   Grid: ceil(batch / (SIMDGROUPS * 32 / N)) threadgroups of 32 * SIMDGROUPS threads.
//   Threadgroup bytes: SIMDGROUPS * 32 / N * W * N * (N + 1) * 4 with Q (the tile that turns Q so
//   that its rows are written in order), 0 without. W = 2 floats where numbers are complex.
//
// Any size ("tsqr"): F is a copy of A with scaled columns. A panel of up to L columns is taken at a
// time, its rows in pieces. L lanes have a piece: its first L rows ("top") are made a triangle, and
// then every B rows that follow are reflected into it, so that the triangle stays where it is and
// the reflectors replace the rows. The tops of K pieces are a piece of the next level, until one is
// left. At these levels all blocks are triangles, and so are their reflectors: everything lies in
// the panel itself. Reflections are applied, to columns behind the panel or to Q, in the same
// pieces, L columns at a time.
//   dispatch             threadgroups                                        threads
//   qr_tsqr_scan_*       batch * parts * ceil(n / L)                         256  largest entries
//   qr_tsqr_scale        batch                                               256  exponents; status
//   qr_tsqr_load_*       batch * ceil(m n / 1024)                            256  F
//   qr_tsqr_factor_*     ceil(batch * pieces / (S * 32 / L))                 32 S  a panel's level
//   qr_tsqr_apply_*      ceil(batch * pieces * chunks / (S * 32 / L))        32 S  what is behind
//   qr_tsqr_triangle_*   batch * ceil(r_rows n / 1024)                       256  R
//   qr_tsqr_start_*      batch * ceil(m q_cols / 1024)                       256  I, R's phases
//   qr_tsqr_apply_*      as above, panels and levels in reverse              32 S  Q
//   qr_tsqr_store_*      batch * ceil(m q_cols / 1024)                       256  16 bits: Q
//   Threadgroup bytes: scan and scale 1024; factor S * 32 / L * 4 W * (L * L + 2 * (B + 4)), apply
//   S * 32 / L * 4 W * (L * L + L * (B + 4)).
//
// Edges. Every column of A is scaled by a power of two of its own, read by its bits so that
// denormals survive a device that flushes them: Q does not change, and a column of R is scaled
// back. A matrix with a NaN or Inf is computed as zeros and gets NaN in its outputs. Lanes past the
// end of the batch, of the columns or of the rows compute on zeros and store nothing: no lane
// returns early, because simd functions need all 32. Results of a matrix do not depend on its
// neighbours. R's diagonal is real and >= 0. Q is a product of reflections, so it is orthonormal
// whatever the rank.

#ifndef JM_HOST
#include <metal_stdlib>
using namespace metal;
#endif

// Of "small". All matrices are dense and row-major.
struct QrParams {
  int batch;
  int m;
  int n;
  int q_cols;  // min(m, n), or m; R has as many rows
};

// Of the dispatches of "tsqr". Row v of a level is row base + v / L * spacing + v % L of F.
struct QrTsqrParams {
  int batch;
  int m;
  int n;
  int q_cols;
  int parts;       // threadgroups that scan a column
  int base;        // first row and column of the panel
  int width;       // its columns
  int reflectors;  // of each piece: min(width, m - base)
  int level;
  int spacing;
  int rows;     // of all pieces of the level
  int piece;    // of one; the last has the rest
  int pieces;   // a matrix
  int blocks;   // of B rows, behind the first L of the longest piece
  int columns;  // of what reflections are applied to
  int first;    // column that they are applied to, and all behind it
  int chunks;   // of L columns
  int reverse;  // 1: the last reflection first
};

// X(name, function, storage type, W, N, SIMDGROUPS)
#define QR_SMALL_SIZES(X, kind, function, tag, T, W) \
  X(qr_##kind##_##tag##_n8, function, T, W, 8, 2)    \
  X(qr_##kind##_##tag##_n16, function, T, W, 16, 2)  \
  X(qr_##kind##_##tag##_n32, function, T, W, 32, 2)
#define QR_SMALL_KINDS(X, tag, T, W)                \
  QR_SMALL_SIZES(X, small_q, qr_small_q, tag, T, W) \
  QR_SMALL_SIZES(X, small_r, qr_small_r, tag, T, W)
#define QR_SMALL_VARIANTS(X)         \
  QR_SMALL_KINDS(X, f32, float, 1)   \
  QR_SMALL_KINDS(X, f16, half, 1)    \
  QR_SMALL_KINDS(X, bf16, bfloat, 1) \
  QR_SMALL_KINDS(X, c64, float, 2)

// X(name, function, storage type, W): what of "tsqr" depends on the storage type.
#define QR_TSQR_STORED(X, tag, T, W)        \
  X(qr_tsqr_scan_##tag, qr_tsqr_scan, T, W) \
  X(qr_tsqr_load_##tag, qr_tsqr_load, T, W) \
  X(qr_tsqr_triangle_##tag, qr_tsqr_triangle, T, W)
#define QR_TSQR_STORAGE(X)                      \
  QR_TSQR_STORED(X, f32, float, 1)              \
  QR_TSQR_STORED(X, f16, half, 1)               \
  QR_TSQR_STORED(X, bf16, bfloat, 1)            \
  QR_TSQR_STORED(X, c64, float, 2)              \
  X(qr_tsqr_start_f32, qr_tsqr_start, float, 1) \
  X(qr_tsqr_start_c64, qr_tsqr_start, float, 2) \
  X(qr_tsqr_store_f16, qr_tsqr_store, half, 1)  \
  X(qr_tsqr_store_bf16, qr_tsqr_store, bfloat, 1)

// X(name, function, W, L, B, S); B >= L, as a buffer for a block takes the first L rows too.
#define QR_TSQR_VARIANTS(X)                               \
  X(qr_tsqr_factor_l4, qr_tsqr_factor, 1, 4, 64, 2)       \
  X(qr_tsqr_factor_l8, qr_tsqr_factor, 1, 8, 64, 2)       \
  X(qr_tsqr_factor_l16, qr_tsqr_factor, 1, 16, 32, 2)     \
  X(qr_tsqr_factor_l32, qr_tsqr_factor, 1, 32, 32, 2)     \
  X(qr_tsqr_apply_l4, qr_tsqr_apply, 1, 4, 64, 2)         \
  X(qr_tsqr_apply_l8, qr_tsqr_apply, 1, 8, 64, 2)         \
  X(qr_tsqr_apply_l16, qr_tsqr_apply, 1, 16, 32, 2)       \
  X(qr_tsqr_apply_l32, qr_tsqr_apply, 1, 32, 32, 2)       \
  X(qr_tsqr_factor_c64_l4, qr_tsqr_factor, 2, 4, 32, 2)   \
  X(qr_tsqr_factor_c64_l8, qr_tsqr_factor, 2, 8, 32, 2)   \
  X(qr_tsqr_factor_c64_l16, qr_tsqr_factor, 2, 16, 16, 2) \
  X(qr_tsqr_factor_c64_l32, qr_tsqr_factor, 2, 32, 32, 1) \
  X(qr_tsqr_apply_c64_l4, qr_tsqr_apply, 2, 4, 32, 2)     \
  X(qr_tsqr_apply_c64_l8, qr_tsqr_apply, 2, 8, 32, 2)     \
  X(qr_tsqr_apply_c64_l16, qr_tsqr_apply, 2, 16, 16, 2)   \
  X(qr_tsqr_apply_c64_l32, qr_tsqr_apply, 2, 32, 32, 1)

#ifndef JM_HOST

constant float kTiny = 1e-37f;    // below it a sum of squares is rounding
constant float kLittle = 1e-18f;  // a squared length that another one does not notice
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

// x * 2^-k, building a denormal result from its bits: for |x| up to 2^38, and what is below 2^-66,
// nothing beside the largest entry of its column, may be flushed.
inline float scale_out(float x, int k) {
  if (k > 60) {
    float units = fabs(x) * power_of_two(149 - k);  // in units of 2^-149
    uint sign = as_type<uint>(x) & 0x80000000u;
    if (units < 8388608.0f) return as_type<float>(sign | uint(units + 0.5f));
    return as_type<float>(sign | (as_type<uint>(units) - (149u << 23)));
  }
  return x * power_of_two(-k);
}

// x, or NaN. Chosen by bits, so that a compiler told to expect no NaN still stores one.
inline float or_nan(float x, bool good) {
  return as_type<float>(good ? as_type<uint>(x) : 0x7fc00000u);
}

// --- small: one matrix in N lanes ---------------------------------------------------------------

// What reflecting row and column j does: a column x gets (conj(alpha) x_j + s) / norm in row j and
// loses w (conj(u) x_j + s / d) / norm below it, where w is the reflector, s = w^H x below row j
// and u the phase of alpha = w_j. Row j is turned by -conj(u), so that the diagonal is norm.
struct Reflection {
  float phase_re;  // conj(u)
  float phase_im;
  float size;  // |alpha|
  float norm;
  float over;   // 1 / norm, or 0 where there is nothing to reflect
  float share;  // 1 / d, d = |alpha| + norm
};

template <int W>
inline Reflection reflection(float re, float im, float below) {
  Reflection h;
  float big = W == 1 ? fabs(re) : max(fabs(re), fabs(im));
  bool none = !(big > kTiny);
  float over = none ? 0.0f : 1.0f / big;
  float a = re * over;
  float b = W == 1 ? 0.0f : im * over;
  float length = W == 1 ? 1.0f : sqrt(max(fma(a, a, b * b), 0.5f));
  h.size = none ? 0.0f : big * length;
  h.phase_re = none ? 1.0f : (W == 1 ? (re < 0.0f ? -1.0f : 1.0f) : a / length);
  h.phase_im = none || W == 1 ? 0.0f : -b / length;
  float square = h.size * h.size;
  bool flat = !(below > kTiny) || !(below > kLittle * square);
  h.norm = flat ? h.size : sqrt(square + below);
  h.over = flat ? 0.0f : 1.0f / h.norm;
  h.share = flat ? 0.0f : 1.0f / (h.size + h.norm);
  return h;
}

// Sum of conj(w_i) x_i below row j.
template <int N, int W>
inline void dot_below(thread const float (&w)[W][N], thread const float (&x)[W][N], int j,
                      thread float (&s)[2]) {
  float re[2] = {0.0f, 0.0f};
  float im[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i > j) {
      re[i % 2] = fma(w[0][i], x[0][i], re[i % 2]);
      if (W == 2) {
        re[i % 2] = fma(w[W - 1][i], x[W - 1][i], re[i % 2]);
        im[i % 2] = fma(w[0][i], x[W - 1][i], im[i % 2]);
        im[i % 2] = fma(-w[W - 1][i], x[0][i], im[i % 2]);
      }
    }
  }
  s[0] = re[0] + re[1];
  s[1] = im[0] + im[1];
}

template <int N, int W>
inline void reflect_below(thread const float (&w)[W][N], thread float (&x)[W][N], int j,
                          Reflection h, thread const float (&s)[2]) {
  float head_re = 0.0f;
  float head_im = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    head_re = i == j ? x[0][i] : head_re;
    if (W == 2) head_im = i == j ? x[W - 1][i] : head_im;
  }
  // conj(u) x_j
  float turned_re = h.phase_re * head_re;
  float turned_im = 0.0f;
  if (W == 2) {
    turned_re = fma(-h.phase_im, head_im, turned_re);
    turned_im = fma(h.phase_re, head_im, h.phase_im * head_re);
  }
  bool flat = h.over == 0.0f;
  float by_re = fma(h.share, s[0], turned_re) * h.over;
  float by_im = fma(h.share, s[1], turned_im) * h.over;
  float along_re = flat ? turned_re : fma(h.size, turned_re, s[0]) * h.over;
  float along_im = flat ? turned_im : fma(h.size, turned_im, s[1]) * h.over;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i > j) {
      x[0][i] = fma(-by_re, w[0][i], x[0][i]);
      if (W == 2) {
        x[0][i] = fma(by_im, w[W - 1][i], x[0][i]);
        x[W - 1][i] = fma(-by_re, w[W - 1][i], x[W - 1][i]);
        x[W - 1][i] = fma(-by_im, w[0][i], x[W - 1][i]);
      }
    }
    if (i == j) {
      x[0][i] = along_re;
      if (W == 2) x[W - 1][i] = along_im;
    }
  }
}

template <typename T, int W, int N, bool WITH_Q>
inline void qr_lanes(device const T* a, device T* q, device T* r, constant QrParams& p,
                     threadgroup float* tile, uint group, uint simdgroup, uint simdgroups,
                     uint lane) {
  const int own = int(lane) % N;
  const uint first = lane - uint(own);
  const long matrix = long((group * simdgroups + simdgroup) * uint(32 / N) + lane / uint(N));
  const bool active = matrix < long(p.batch);
  const int steps = min(p.m, p.n);
  device const T* from = a + matrix * long(p.m) * long(p.n) * W;
  float x[W][N];
  float y[W][N];
  uint bits = 0u;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      x[w][i] = 0.0f;
      y[w][i] = w == 0 && i == own ? 1.0f : 0.0f;
      if (active && i < p.m && own < p.n) x[w][i] = float(from[(i * p.n + own) * W + w]);
      bits = max(bits, as_type<uint>(x[w][i]) & 0x7fffffffu);
    }
  }
  const int k = exponent_for(bits);
#pragma unroll
  for (int o = N / 2; o > 0; o /= 2) bits = max(bits, simd_shuffle_xor(bits, ushort(o)));
  const bool finite = bits < kExponent;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int w = 0; w < W; ++w) x[w][i] = finite ? scale_in(x[w][i], k) : 0.0f;
  }

#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < steps) {
      float w[W][N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int e = 0; e < W; ++e) {
          w[e][i] = 0.0f;
          if (i >= j) w[e][i] = simd_shuffle(x[e][i], ushort(first + uint(j)));
        }
      }
      float s[2];
      dot_below<N, W>(w, x, j, s);
      float below = simd_shuffle(s[0], ushort(first + uint(j)));
      Reflection h = reflection<W>(w[0][j], w[W - 1][j], below);
      reflect_below<N, W>(w, x, j, h, s);
      // Lane j knows the diagonal better than by reflecting.
      x[0][j] = own == j ? h.norm : x[0][j];
      if (W == 2) x[W - 1][j] = own == j ? 0.0f : x[W - 1][j];
      if (WITH_Q) {
        dot_below<N, W>(w, y, j, s);
        reflect_below<N, W>(w, y, j, h, s);
      }
    }
  }

  device T* triangle = r + matrix * long(p.q_cols) * long(p.n) * W;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (active && i < p.q_cols && own < p.n) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        float z = i <= own ? scale_out(x[w][i], k) : 0.0f;
        triangle[(i * p.n + own) * W + w] = T(or_nan(z, finite));
      }
    }
  }
  if (WITH_Q) {
    // A lane has a column of Q^H; lanes of a row of Q are to write together.
    threadgroup float* turned = tile + (simdgroup * 32u + first) * uint(W * (N + 1));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      turned[own * (N + 1) + i] = y[0][i];
      if (W == 2) turned[(N + own) * (N + 1) + i] = -y[W - 1][i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    device T* to = q + matrix * long(p.m) * long(p.q_cols) * W;
    for (int i = 0; i < p.m; ++i) {
      if (active && own < p.q_cols) {
#pragma unroll
        for (int w = 0; w < W; ++w) {
          float z = turned[(w * N + i) * (N + 1) + own];
          to[(i * p.q_cols + own) * W + w] = T(or_nan(z, finite));
        }
      }
    }
  }
}

template <typename T, int W, int N, int S>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void qr_small_q(
    device const T* a [[buffer(0)]], device T* q [[buffer(1)]], device T* r [[buffer(2)]],
    constant QrParams& p [[buffer(3)]], threadgroup float* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  qr_lanes<T, W, N, true>(a, q, r, p, tile, group, simdgroup, uint(S), lane);
}

template <typename T, int W, int N, int S>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void qr_small_r(
    device const T* a [[buffer(0)]], device T* r [[buffer(1)]], constant QrParams& p [[buffer(2)]],
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  qr_lanes<T, W, N, false>(a, nullptr, r, p, nullptr, group, simdgroup, uint(S), lane);
}

// --- tsqr: a tree of pieces of rows --------------------------------------------------------------

// Largest entry, as bits, of L columns in a part of the rows. p.width is L.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]] void qr_tsqr_scan(
    device const T* a [[buffer(0)]], device uint* largest [[buffer(1)]],
    constant QrTsqrParams& p [[buffer(2)]], threadgroup uint* tile [[threadgroup(0)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  const int part = int(group % uint(p.parts));
  const uint rest = group / uint(p.parts);
  const uint across = uint((p.n + p.width - 1) / p.width);
  const int column = int(rest % across) * p.width + int(thread_index) % p.width;
  const long matrix = long(rest / across);
  const int each = (p.m + p.parts - 1) / p.parts;
  const int end = min(part * each + each, p.m);
  device const T* from = a + matrix * long(p.m) * long(p.n) * W;
  uint bits = 0u;
  for (int i = part * each + int(thread_index) / p.width; i < end; i += int(threads) / p.width) {
    if (column < p.n) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        float x = float(from[long(i * p.n + column) * W + e]);
        bits = max(bits, as_type<uint>(x) & 0x7fffffffu);
      }
    }
  }
  tile[thread_index] = bits;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (int(thread_index) < p.width && column < p.n) {
    for (uint t = thread_index + uint(p.width); t < threads; t += uint(p.width))
      bits = max(bits, tile[t]);
    largest[(matrix * long(p.parts) + long(part)) * long(p.n) + long(column)] = bits;
  }
}

// The exponent of each column, and status: 0 where all entries are finite.
[[kernel, max_total_threads_per_threadgroup(256)]] void qr_tsqr_scale(
    device const uint* largest [[buffer(0)]], device int* exponent [[buffer(1)]],
    device int* status [[buffer(2)]], constant QrTsqrParams& p [[buffer(3)]],
    threadgroup uint* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  device const uint* from = largest + long(group) * long(p.parts) * long(p.n);
  uint top = 0u;
  for (int first = 0; first < p.n; first += 32) {
    int column = first + int(lane);
    uint bits = 0u;
    if (column < p.n) {
      for (int part = int(simdgroup); part < p.parts; part += int(simdgroups))
        bits = max(bits, from[long(part) * long(p.n) + long(column)]);
    }
    tile[simdgroup * 32u + lane] = bits;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0u; i < simdgroups; ++i) bits = max(bits, tile[i * 32u + lane]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0u && column < p.n)
      exponent[long(group) * long(p.n) + long(column)] = exponent_for(bits);
    top = max(top, bits);
  }
  top = simd_max(top);
  if (simdgroup == 0u && lane == 0u) status[group] = top < kExponent ? 0 : 1;
}

// Four entries a thread.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]] void qr_tsqr_load(
    device const T* a [[buffer(0)]], device const int* exponent [[buffer(1)]],
    device const int* status [[buffer(2)]], device float* f [[buffer(3)]],
    constant QrTsqrParams& p [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  const uint size = uint(p.m) * uint(p.n);
  const uint parts = (size + 4u * threads - 1u) / (4u * threads);
  const long matrix = long(group / parts);
  const long start = matrix * long(size);
  const bool good = status[matrix] == 0;
  uint at = group % parts * 4u * threads + thread_index;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at < size) {
      int k = exponent[matrix * long(p.n) + long(at % uint(p.n))];
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const long number = (start + long(at)) * W + e;
        float x = scale_in(float(a[number]), k);
        f[number] = good ? x : 0.0f;
      }
    }
    at += threads;
  }
}

// Where a group of L lanes works.
struct QrPlace {
  long matrix;
  bool active;
  int piece;
  int chunk;
  int begin;  // rows of the level
  int end;
};

inline QrPlace place_of(uint item, constant QrTsqrParams& p) {
  QrPlace at;
  at.chunk = int(item % uint(p.chunks));
  item /= uint(p.chunks);
  at.piece = int(item % uint(p.pieces));
  at.matrix = long(item / uint(p.pieces));
  at.active = at.matrix < long(p.batch);
  at.begin = at.piece * p.piece;
  at.end = at.piece + 1 == p.pieces ? p.rows : at.begin + p.piece;
  return at;
}

// Row v of the level, counted from the panel's first.
template <int L>
inline long row_of(int v, constant QrTsqrParams& p) {
  return long(v / L) * long(p.spacing) + long(v % L);
}

// Whether entry (v, c) of the panel belongs to the level: the tops of lower levels are triangles,
// with those levels' reflectors below the diagonal.
template <int L>
inline bool in_level(QrPlace at, int v, int c, constant QrTsqrParams& p) {
  return at.active && v < at.end && c < p.width && (p.level == 0 || v % L <= c);
}

// H = I - tau y y^H with y = (1, down w) takes (alpha, w) to (beta, 0). tau is real.
struct PanelReflection {
  float beta;
  float beta_im;
  float tau;
  float down;
  float down_im;
};

template <int W>
inline PanelReflection panel_reflection(float re, float im, float below) {
  PanelReflection h;
  h.beta_im = 0.0f;
  h.down_im = 0.0f;
  if (W == 1) {
    float square = re * re;
    bool flat = !(below > kTiny) || !(below > kLittle * square);
    float norm = sqrt(square + below);
    h.beta = flat ? re : (re > 0.0f ? -norm : norm);
    h.tau = flat ? 0.0f : (h.beta - re) / h.beta;
    h.down = flat ? 0.0f : 1.0f / (re - h.beta);
  } else {
    Reflection r = reflection<W>(re, im, below);
    bool flat = r.over == 0.0f;
    h.beta = flat ? re : -r.phase_re * r.norm;
    h.beta_im = flat ? im : r.phase_im * r.norm;
    h.tau = (r.size + r.norm) * r.over;
    h.down = r.phase_re * r.share;
    h.down_im = r.phase_im * r.share;
  }
  return h;
}

// What column x loses, times y: tau y^H x, where s = w^H x.
template <int W>
inline void panel_share(PanelReflection h, float head_re, float head_im, thread const float (&s)[2],
                        thread float (&by)[2]) {
  if (W == 1) {
    by[0] = h.tau * fma(h.down, s[0], head_re);
    by[1] = 0.0f;
  } else {
    by[0] = h.tau * fma(h.down, s[0], fma(h.down_im, s[1], head_re));
    by[1] = h.tau * fma(h.down, s[1], fma(-h.down_im, s[0], head_im));
  }
}

// And times w; column j itself becomes y, which is down w.
template <int W>
inline void panel_turn(PanelReflection h, bool own, thread float (&by)[2]) {
  float re = by[0] * h.down;
  float im = 0.0f;
  if (W == 2) {
    re = fma(-by[1], h.down_im, re);
    im = fma(by[1], h.down, by[0] * h.down_im);
  }
  by[0] = own ? -h.down : re;
  by[1] = own ? -h.down_im : im;
}

// x - by w.
template <int W>
inline void lose(thread float& re, thread float& im, thread const float (&by)[2], float w_re,
                 float w_im) {
  re = fma(-by[0], w_re, re);
  if (W == 2) {
    re = fma(by[1], w_im, re);
    im = fma(-by[0], w_im, im);
    im = fma(-by[1], w_re, im);
  }
}

template <int W, int N>
inline void lose_all(thread float (&x)[W][N], thread const float (&by)[2],
                     thread const float (&w)[W][N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float re = x[0][i];
    float im = x[W - 1][i];
    lose<W>(re, im, by, w[0][i], w[W - 1][i]);
    x[0][i] = re;
    if (W == 2) x[W - 1][i] = im;
  }
}

// N numbers of threadgroup memory that begin at a multiple of four.
template <int N>
inline void read_column(threadgroup const float* from, thread float (&to)[N]) {
  threadgroup const float4* vectors = (threadgroup const float4*)from;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    float4 v = vectors[i];
    to[4 * i] = v.x;
    to[4 * i + 1] = v.y;
    to[4 * i + 2] = v.z;
    to[4 * i + 3] = v.w;
  }
}

template <int N>
inline float dot_product(thread const float (&x)[N], thread const float (&y)[N]) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < N; ++i) part[i % 4] = fma(x[i], y[i], part[i % 4]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// x^H y.
template <int W, int N>
inline void inner_product(thread const float (&x)[W][N], thread const float (&y)[W][N],
                          thread float (&s)[2]) {
  s[0] = dot_product<N>(x[0], y[0]);
  s[1] = 0.0f;
  if (W == 2) {
    s[0] += dot_product<N>(x[W - 1], y[W - 1]);
    s[1] = dot_product<N>(x[0], y[W - 1]) - dot_product<N>(x[W - 1], y[0]);
  }
}

// One level of a panel: reflectors of every piece, and its triangle in its first rows.
template <int W, int L, int B, int S>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void qr_tsqr_factor(
    device float* f [[buffer(0)]], constant QrTsqrParams& p [[buffer(1)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int own = int(lane) % L;
  const uint first = lane - uint(own);
  const uint worker = (group * uint(S) + simdgroup) * uint(32 / L) + lane / uint(L);
  const QrPlace at = place_of(worker, p);
  device float* panel = f + (at.matrix * long(p.m) * long(p.n) + long(p.base) * long(p.n + 1)) * W;
  threadgroup float* top =
      tile + (simdgroup * uint(32 / L) + lane / uint(L)) * uint(W * (L * L + 2 * (B + 4)));
  threadgroup float* shared = top + W * L * L;
  // top[(e * L + i) * L + c] and w[e * (B + 4) + i]: part e of entry (i, c), and of entry i.
  constexpr int kTop = (W - 1) * L * L;
  constexpr int kNext = (W - 1) * (B + 4);
  for (int i = 0; i < L; ++i) {
#pragma unroll
    for (int e = 0; e < W; ++e) {
      float x = 0.0f;
      if (in_level<L>(at, at.begin + i, own, p))
        x = panel[(row_of<L>(at.begin + i, p) * long(p.n) + long(own)) * W + e];
      top[(e * L + i) * L + own] = x;
    }
  }
  if (p.level == 0) {
    for (int j = 0; j < p.reflectors; ++j) {
      // Two buffers: the next column is put while this one is still read.
      threadgroup float* w = shared + (j & 1) * W * (B + 4);
      if (own == j) {
        for (int i = j; i < L; ++i) {
          w[i] = top[i * L + own];
          if (W == 2) w[kNext + i] = top[kTop + i * L + own];
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      float s[2] = {0.0f, 0.0f};
      for (int i = j + 1; i < L; ++i) {
        s[0] = fma(w[i], top[i * L + own], s[0]);
        if (W == 2) {
          s[0] = fma(w[kNext + i], top[kTop + i * L + own], s[0]);
          s[1] = fma(w[i], top[kTop + i * L + own], s[1]);
          s[1] = fma(-w[kNext + i], top[i * L + own], s[1]);
        }
      }
      PanelReflection h = panel_reflection<W>(w[j], W == 2 ? w[kNext + j] : 0.0f,
                                              simd_shuffle(s[0], ushort(first + uint(j))));
      float by[2] = {0.0f, 0.0f};
      const float head = top[j * L + own];
      const float head_im = W == 2 ? top[kTop + j * L + own] : 0.0f;
      if (own > j) panel_share<W>(h, head, head_im, s, by);
      top[j * L + own] = own == j ? h.beta : head - by[0];
      if (W == 2) top[kTop + j * L + own] = own == j ? h.beta_im : head_im - by[1];
      panel_turn<W>(h, own == j, by);
      for (int i = j + 1; i < L; ++i) {
        float re = own == j ? 0.0f : top[i * L + own];
        float im = W == 1 || own == j ? 0.0f : top[kTop + i * L + own];
        lose<W>(re, im, by, w[i], W == 2 ? w[kNext + i] : 0.0f);
        top[i * L + own] = re;
        if (W == 2) top[kTop + i * L + own] = im;
      }
    }
  }
  for (int b = 0; b < p.blocks; ++b) {
    const int v = at.begin + L + b * B;
    float x[W][B];
#pragma unroll
    for (int i = 0; i < B; ++i) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        x[e][i] = 0.0f;
        if (in_level<L>(at, v + i, own, p))
          x[e][i] = panel[(row_of<L>(v + i, p) * long(p.n) + long(own)) * W + e];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = 0; j < p.reflectors; ++j) {
      threadgroup float* w = shared + (j & 1) * W * (B + 4);
      const float head = top[j * L + own];
      const float head_im = W == 2 ? top[kTop + j * L + own] : 0.0f;
      if (own == j) {
#pragma unroll
        for (int e = 0; e < W; ++e) {
#pragma unroll
          for (int i = 0; i < B; ++i) w[e * (B + 4) + i] = x[e][i];
        }
        w[B] = head;
        if (W == 2) w[kNext + B] = head_im;
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      float y[W][B];
      read_column<B>(w, y[0]);
      if (W == 2) read_column<B>(w + kNext, y[W - 1]);
      float s[2];
      inner_product<W, B>(y, x, s);
      PanelReflection h = panel_reflection<W>(w[B], W == 2 ? w[kNext + B] : 0.0f,
                                              simd_shuffle(s[0], ushort(first + uint(j))));
      float by[2] = {0.0f, 0.0f};
      if (own > j) panel_share<W>(h, head, head_im, s, by);
      top[j * L + own] = own == j ? h.beta : head - by[0];
      if (W == 2) top[kTop + j * L + own] = own == j ? h.beta_im : head_im - by[1];
      panel_turn<W>(h, own == j, by);
#pragma unroll
      for (int i = 0; i < B; ++i) {
        x[0][i] = own == j ? 0.0f : x[0][i];
        if (W == 2) x[W - 1][i] = own == j ? 0.0f : x[W - 1][i];
      }
      lose_all<W, B>(x, by, y);
    }
#pragma unroll
    for (int i = 0; i < B; ++i) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        if (in_level<L>(at, v + i, own, p))
          panel[(row_of<L>(v + i, p) * long(p.n) + long(own)) * W + e] = x[e][i];
      }
    }
  }
  for (int i = 0; i < L; ++i) {
#pragma unroll
    for (int e = 0; e < W; ++e) {
      if (in_level<L>(at, at.begin + i, own, p))
        panel[(row_of<L>(at.begin + i, p) * long(p.n) + long(own)) * W + e] =
            top[(e * L + i) * L + own];
    }
  }
}

// The reflections of one level of a panel, applied to columns of y from p.first on.
template <int W, int L, int B, int S>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void qr_tsqr_apply(
    device const float* f [[buffer(0)]], device float* y [[buffer(1)]],
    device const int* status [[buffer(2)]], constant QrTsqrParams& p [[buffer(3)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int own = int(lane) % L;
  const uint first = lane - uint(own);
  const uint worker = (group * uint(S) + simdgroup) * uint(32 / L) + lane / uint(L);
  QrPlace at = place_of(worker, p);
  if (at.active) at.active = status[at.matrix] == 0;
  device const float* panel =
      f + (at.matrix * long(p.m) * long(p.n) + long(p.base) * long(p.n + 1)) * W;
  const int column = p.first + at.chunk * L + own;
  const bool inside = at.active && column < p.columns;
  device float* target =
      y + ((at.matrix * long(p.m) + long(p.base)) * long(p.columns) + long(column)) * W;
  threadgroup float* top =
      tile + (simdgroup * uint(32 / L) + lane / uint(L)) * uint(W * (L * L + L * (B + 4)));
  // vectors[(e * L + j) * (B + 4) + i]: part e of row i of reflector j; top as in qr_tsqr_factor.
  threadgroup float* vectors = top + W * L * L;
  constexpr int kTop = (W - 1) * L * L;
  constexpr int kNext = (W - 1) * L * (B + 4);
  for (int i = 0; i < L; ++i) {
#pragma unroll
    for (int e = 0; e < W; ++e) {
      float x = 0.0f;
      if (inside && at.begin + i < at.end)
        x = target[row_of<L>(at.begin + i, p) * long(p.columns) * W + e];
      top[(e * L + i) * L + own] = x;
    }
  }
  // Of level 0 the first rows have reflectors of their own, before those of the blocks.
  const int heads = p.level == 0 ? 1 : 0;
  const int phases = p.blocks + heads;
  for (int phase = 0; phase < phases; ++phase) {
    const int b = (p.reverse != 0 ? phases - 1 - phase : phase) - heads;
    const int v = b < 0 ? at.begin : at.begin + L + b * B;
    float squares = 0.0f;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < B; ++i) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        float x = 0.0f;
        if (in_level<L>(at, v + i, own, p) && (b >= 0 || (i > own && i < L)))
          x = panel[(row_of<L>(v + i, p) * long(p.n) + long(own)) * W + e];
        vectors[(e * L + own) * (B + 4) + i] = x;
        squares = fma(x, x, squares);
      }
    }
    // Of the vector as it is stored, so that rounding does not take from the reflection.
    const float tau = squares > 0.0f ? 2.0f / (1.0f + squares) : 0.0f;
    float x[W][B];
#pragma unroll
    for (int i = 0; i < B; ++i) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        x[e][i] = 0.0f;
        if (b >= 0 && inside && v + i < at.end)
          x[e][i] = target[row_of<L>(v + i, p) * long(p.columns) * W + e];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int step = 0; step < p.reflectors; ++step) {
      const int j = p.reverse != 0 ? p.reflectors - 1 - step : step;
      threadgroup const float* w = vectors + j * (B + 4);
      const float by = simd_shuffle(tau, ushort(first + uint(j)));
      float s[2];
      if (b < 0) {
        s[0] = top[j * L + own];
        s[1] = W == 2 ? top[kTop + j * L + own] : 0.0f;
        for (int i = j + 1; i < L; ++i) {
          s[0] = fma(w[i], top[i * L + own], s[0]);
          if (W == 2) {
            s[0] = fma(w[kNext + i], top[kTop + i * L + own], s[0]);
            s[1] = fma(w[i], top[kTop + i * L + own], s[1]);
            s[1] = fma(-w[kNext + i], top[i * L + own], s[1]);
          }
        }
        s[0] *= by;
        s[1] *= by;
        top[j * L + own] -= s[0];
        if (W == 2) top[kTop + j * L + own] -= s[1];
        for (int i = j + 1; i < L; ++i) {
          float re = top[i * L + own];
          float im = W == 2 ? top[kTop + i * L + own] : 0.0f;
          lose<W>(re, im, s, w[i], W == 2 ? w[kNext + i] : 0.0f);
          top[i * L + own] = re;
          if (W == 2) top[kTop + i * L + own] = im;
        }
      } else {
        float z[W][B];
        read_column<B>(w, z[0]);
        if (W == 2) read_column<B>(w + kNext, z[W - 1]);
        inner_product<W, B>(z, x, s);
        s[0] = by * (top[j * L + own] + s[0]);
        top[j * L + own] -= s[0];
        if (W == 2) {
          s[1] = by * (top[kTop + j * L + own] + s[1]);
          top[kTop + j * L + own] -= s[1];
        }
        lose_all<W, B>(x, s, z);
      }
    }
#pragma unroll
    for (int i = 0; i < B; ++i) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        if (b >= 0 && inside && v + i < at.end)
          target[row_of<L>(v + i, p) * long(p.columns) * W + e] = x[e][i];
      }
    }
  }
  for (int i = 0; i < L; ++i) {
#pragma unroll
    for (int e = 0; e < W; ++e) {
      if (inside && at.begin + i < at.end)
        target[row_of<L>(at.begin + i, p) * long(p.columns) * W + e] = top[(e * L + i) * L + own];
    }
  }
}

// The phase of an entry of the diagonal; 1 of zero.
template <int W>
inline void phase_of(device const float* x, thread float (&phase)[2]) {
  phase[0] = x[0] < 0.0f ? -1.0f : 1.0f;
  phase[1] = 0.0f;
  if (W == 2) {
    Reflection r = reflection<W>(x[0], x[W - 1], 0.0f);
    phase[0] = r.phase_re;
    phase[1] = -r.phase_im;
  }
}

// R, with its rows turned so that the diagonal is real and >= 0. Four entries a thread.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]] void qr_tsqr_triangle(
    device const float* f [[buffer(0)]], device const int* exponent [[buffer(1)]],
    device const int* status [[buffer(2)]], device T* r [[buffer(3)]],
    constant QrTsqrParams& p [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  const uint size = uint(p.q_cols) * uint(p.n);
  const uint parts = (size + 4u * threads - 1u) / (4u * threads);
  const long matrix = long(group / parts);
  device const float* from = f + matrix * long(p.m) * long(p.n) * W;
  const bool good = status[matrix] == 0;
  uint at = group % parts * 4u * threads + thread_index;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if (at < size) {
      long i = long(at / uint(p.n));
      long c = long(at % uint(p.n));
      float re = 0.0f;
      float im = 0.0f;
      if (i <= c) {
        const int k = exponent[matrix * long(p.n) + c];
        float phase[2];
        phase_of<W>(from + (i * long(p.n) + i) * W, phase);
        device const float* x = from + (i * long(p.n) + c) * W;
        if (W == 1) {
          re = scale_out(x[0], k);
          re = phase[0] < 0.0f ? -re : re;
        } else {
          re = fma(phase[0], x[0], phase[1] * x[W - 1]);
          im = i == c ? 0.0f : scale_out(fma(phase[0], x[W - 1], -phase[1] * x[0]), k);
          re = scale_out(re, k);
        }
      }
      device T* to = r + (matrix * long(size) + long(at)) * W;
      to[0] = T(or_nan(re, good));
      if (W == 2) to[W - 1] = T(or_nan(im, good));
    }
    at += threads;
  }
}

// What the reflections turn into Q: the identity with the phases of R's diagonal.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]] void qr_tsqr_start(
    device const float* f [[buffer(0)]], device const int* status [[buffer(1)]],
    device T* y [[buffer(2)]], constant QrTsqrParams& p [[buffer(3)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  const uint size = uint(p.m) * uint(p.q_cols);
  const uint parts = (size + 4u * threads - 1u) / (4u * threads);
  const long matrix = long(group / parts);
  const bool good = status[matrix] == 0;
  uint at = group % parts * 4u * threads + thread_index;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if (at < size) {
      long i = long(at / uint(p.q_cols));
      float x[2] = {0.0f, 0.0f};
      if (i == long(at % uint(p.q_cols))) {
        x[0] = 1.0f;
        if (i < long(p.n)) phase_of<W>(f + ((matrix * long(p.m) + i) * long(p.n) + i) * W, x);
      }
#pragma unroll
      for (int e = 0; e < W; ++e) y[(matrix * long(size) + long(at)) * W + e] = or_nan(x[e], good);
    }
    at += threads;
  }
}

// Q in the storage type, where that is not float.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]] void qr_tsqr_store(
    device const float* y [[buffer(0)]], device T* q [[buffer(1)]],
    constant QrTsqrParams& p [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  const uint size = uint(p.m) * uint(p.q_cols);
  const uint parts = (size + 4u * threads - 1u) / (4u * threads);
  const long start = long(group / parts) * long(size);
  uint at = group % parts * 4u * threads + thread_index;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if (at < size) q[start + long(at)] = T(y[start + long(at)]);
    at += threads;
  }
}

#define QR_INSTANTIATE_SMALL(name, function, T, W, N, S) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T, W, N, S>) function<T, W, N, S>;
QR_SMALL_VARIANTS(QR_INSTANTIATE_SMALL)
#define QR_INSTANTIATE_STORED(name, function, T, W) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T, W>) function<T, W>;
QR_TSQR_STORAGE(QR_INSTANTIATE_STORED)
#define QR_INSTANTIATE_TSQR(name, function, W, L, B, S) \
  template [[host_name(#name)]] [[kernel]] decltype(function<W, L, B, S>) function<W, L, B, S>;
QR_TSQR_VARIANTS(QR_INSTANTIATE_TSQR)

#endif  // JM_HOST
