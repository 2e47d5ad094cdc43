// Singular value decomposition of many small matrices by one-sided Jacobi, columns in registers.
//
// Work split. A matrix belongs to N / C lanes of one simdgroup, each holding C columns of A and of
// V:
//   C = 1 ("xor")   lane owns one column; step k pairs lane with lane ^ k, nothing moves; N - 1
//   steps
//                   a sweep. Suits a device whose shuffles are as fast as its arithmetic (Apple).
//   C = 2 ("ring")  lane owns two columns and rotates them; then one column moves to a neighbour
//                   (odd-even order with every pair swapped); N steps a sweep, half the shuffles.
// A simdgroup holds 32 C / N matrices, a threadgroup SIMDGROUPS of them.
//
// Grid: ceil(batch / matrices_per_threadgroup) threadgroups of 32 * SIMDGROUPS threads, one
// dimension. Threadgroup bytes: SIMDGROUPS * (32 C / N) * N * (N + 1) * 4 with vectors (the tile
// that turns V so that its rows are written in order), 0 for values only.
//
// Sizes: 1 <= n <= m <= N; m < n is the same problem with the strides of A swapped, and U and Vt
// exchanged. Rows and columns beyond m and n are zeros in registers, which rotations leave alone.
//
// Edges. Lanes of matrices past the end of the batch compute on zeros and store nothing: no lane
// returns early, because simd functions need all 32. Results of a matrix do not depend on its
// neighbours. A is scaled by a power of two first, read by its bits so that denormals survive a
// device that flushes them. A matrix with a NaN or Inf, or not converged, gets NaN in its outputs.
// Columns that vanish are replaced by vectors orthonormal to the rest, so U is orthonormal always;
// u_cols > n completes U to more columns (u_cols <= m).

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
  float tol;  // columns with |cosine| <= tol count as orthogonal; sqrt(m) * 2^-24
};

// status: one value a matrix.
enum SvdStatus { kSvdConverged = 0, kSvdNotConverged = 2, kSvdNonFinite = 3 };

// X(name, function, storage type, N, C, SIMDGROUPS)
#define SVD_SIZES(X, kind, function, tag, T, C)      \
  X(svd_##kind##_##tag##_n8, function, T, 8, C, 4)   \
  X(svd_##kind##_##tag##_n16, function, T, 16, C, 2) \
  X(svd_##kind##_##tag##_n32, function, T, 32, C, 2)
#define SVD_KINDS(X, tag, T)                         \
  SVD_SIZES(X, xor_vectors, svd_vectors, tag, T, 1)  \
  SVD_SIZES(X, ring_vectors, svd_vectors, tag, T, 2) \
  SVD_SIZES(X, xor_values, svd_values, tag, T, 1)    \
  SVD_SIZES(X, ring_values, svd_values, tag, T, 2)
#define SVD_VARIANTS(X)    \
  SVD_KINDS(X, f32, float) \
  SVD_KINDS(X, f16, half)  \
  SVD_KINDS(X, bf16, bfloat)

#ifndef JM_HOST

constant float kTiny = 1e-37f;              // below it a squared norm or a dot product is rounding
constant float kVanished = 8.8817842e-16f;  // 2^-50: dot products of such columns underflow
constant uint kExponent = 0x7f800000u;

struct Rotation {
  float s;       // sine
  float tau;     // tangent of half the angle
  float t;       // tangent
  float cosine;  // |cosine| of the angle between the two columns, before rotating
};

// 2^k for -126 <= k <= 127.
inline float power_of_two(int k) { return as_type<float>(uint(k + 127) << 23); }

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

// x * 2^-k for x >= 0, building a denormal result from its bits.
inline float scale_out(float x, int k) {
  if (k > 22) {
    float units = x * power_of_two(149 - k);  // in units of 2^-149
    if (units < 8388608.0f) return as_type<float>(uint(units + 0.5f));
    return as_type<float>(as_type<uint>(units) - (149u << 23));
  }
  return x * power_of_two(-k);
}

template <int L>
inline float group_sum(float x) {
#pragma unroll
  for (int o = L / 2; o > 0; o /= 2) x += simd_shuffle_xor(x, ushort(o));
  return x;
}

template <int L>
inline float group_max(float x) {
#pragma unroll
  for (int o = L / 2; o > 0; o /= 2) x = max(x, simd_shuffle_xor(x, ushort(o)));
  return x;
}

template <int L>
inline uint group_max_bits(uint x) {
#pragma unroll
  for (int o = L / 2; o > 0; o /= 2) x = max(x, simd_shuffle_xor(x, ushort(o)));
  return x;
}

// The rotation x' = c x - s y, y' = s x + c y that makes columns with squared norms a, b and dot
// product g orthogonal. Angles may be rough, but s must match tau to the last bit or norms drift:
// hence one exact division and approximate ones elsewhere.
inline Rotation rotation(float a, float b, float g, float tol) {
  float size = fabs(g);
  Rotation r;
  r.cosine = min(min(size * rsqrt(max(a, kTiny)), 1e18f) * rsqrt(max(b, kTiny)), 1.0f);
  bool rotate = r.cosine > tol && size > kTiny;
  float h = b - a;
  float w = 2.0f * size;
  float inverse = fast::divide(1.0f, max(max(fabs(h), w), kTiny));  // h and w may be tiny squares
  float hs = fabs(h) * inverse;
  float ws = w * inverse;
  float hypot_inverse = rsqrt(max(fma(hs, hs, ws * ws), 0.5f));
  float c2 = fma(0.5f * hs, hypot_inverse, 0.5f);  // cosine squared, in [1/2, 1]
  float c_inverse = rsqrt(c2);
  float sine = 0.5f * ws * hypot_inverse * c_inverse;
  float sign = (h < 0.0f) != (g < 0.0f) ? -1.0f : 1.0f;
  float tau = sign * fast::divide(sine, fma(c2, c_inverse, 1.0f));
  r.tau = rotate ? tau : 0.0f;
  r.s = rotate ? 2.0f * tau / fma(tau, tau, 1.0f) : 0.0f;
  r.t = rotate ? sign * sine * c_inverse : 0.0f;
  return r;
}

// One sweep, lane ^ k order. Rutishauser's form of the update keeps V orthonormal to rounding.
template <int N, int C, bool VECTORS>
inline void sweep_xor(thread float (&x)[C][N], thread float (&v)[C][N], thread float (&norm)[C],
                      bool live, float tol, uint lane, thread float& max_cos,
                      thread float& max_tan) {
  for (uint k = 1; k < uint(N); ++k) {
    float y[N];
    float g = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      y[i] = simd_shuffle_xor(x[0][i], ushort(k));
      g = fma(x[0][i], y[i], g);
    }
    float other = simd_shuffle_xor(norm[0], ushort(k));
    bool first = (lane ^ k) > lane;
    Rotation r = rotation(first ? norm[0] : other, first ? other : norm[0], g, tol);
    bool rotate = live && r.s != 0.0f;
    max_cos = max(max_cos, r.cosine);
    if (simd_any(rotate)) {
      // The second column of a pair sees the opposite angle.
      float s = rotate ? (first ? r.s : -r.s) : 0.0f;
      float tau = first ? r.tau : -r.tau;
      max_tan = max(max_tan, fabs(r.t));
      norm[0] = rotate ? fma(first ? -r.t : r.t, g, norm[0]) : norm[0];
#pragma unroll
      for (int i = 0; i < N; ++i) x[0][i] = fma(-s, fma(tau, x[0][i], y[i]), x[0][i]);
      if (VECTORS) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float w = simd_shuffle_xor(v[0][i], ushort(k));
          v[0][i] = fma(-s, fma(tau, v[0][i], w), v[0][i]);
        }
      }
    }
  }
}

// Rotates the two columns of this lane.
template <int N, int C, bool VECTORS>
inline void rotate_pair(thread float (&x)[C][N], thread float (&v)[C][N], thread float (&norm)[C],
                        bool live, float tol, thread float& max_cos, thread float& max_tan) {
  float g = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) g = fma(x[0][i], x[C - 1][i], g);
  Rotation r = rotation(norm[0], norm[C - 1], g, tol);
  bool rotate = live && r.s != 0.0f;
  max_cos = live ? max(max_cos, r.cosine) : max_cos;
  if (simd_any(rotate)) {
    float s = rotate ? r.s : 0.0f;
    max_tan = max(max_tan, rotate ? fabs(r.t) : 0.0f);
    norm[0] = rotate ? fma(-r.t, g, norm[0]) : norm[0];
    norm[C - 1] = rotate ? fma(r.t, g, norm[C - 1]) : norm[C - 1];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float p = x[0][i];
      float q = x[C - 1][i];
      x[0][i] = fma(-s, fma(r.tau, p, q), p);
      x[C - 1][i] = fma(s, fma(-r.tau, q, p), q);
    }
    if (VECTORS) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float p = v[0][i];
        float q = v[C - 1][i];
        v[0][i] = fma(-s, fma(r.tau, p, q), p);
        v[C - 1][i] = fma(s, fma(-r.tau, q, p), q);
      }
    }
  }
}

// One sweep, odd-even order. Columns stand at positions 0..N-1, lane l at 2l and 2l+1. Each step
// swaps the pairs it rotates, so that after N steps every two columns have met once. In an odd step
// the pairs are (2l+1, 2l+2); the last lane then holds positions N-1 and 0, which do not meet.
template <int N, int C, bool VECTORS>
inline void sweep_ring(thread float (&x)[C][N], thread float (&v)[C][N], thread float (&norm)[C],
                       bool live, float tol, uint lane, thread float& max_cos,
                       thread float& max_tan) {
  const uint lanes = uint(N / C);
  // The columns of a finished matrix stay where they are, however long its neighbours go on.
  uint base = lane & ~(lanes - 1u);
  ushort right = ushort(live ? base | ((lane + 1u) & (lanes - 1u)) : lane);
  ushort left = ushort(live ? base | ((lane + lanes - 1u) & (lanes - 1u)) : lane);
  bool last = live && (lane & (lanes - 1u)) == lanes - 1u;
  for (int step = 0; step < N; step += 2) {
    rotate_pair<N, C, VECTORS>(x, v, norm, live, tol, max_cos, max_tan);
    norm[C - 1] = simd_shuffle(norm[C - 1], right);
#pragma unroll
    for (int i = 0; i < N; ++i) x[C - 1][i] = simd_shuffle(x[C - 1][i], right);
    if (VECTORS) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[C - 1][i] = simd_shuffle(v[C - 1][i], right);
    }
    rotate_pair<N, C, VECTORS>(x, v, norm, live && !last, tol, max_cos, max_tan);
    float move = last ? norm[C - 1] : norm[0];
    norm[C - 1] = last ? norm[0] : norm[C - 1];
    norm[0] = simd_shuffle(move, left);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float m = last ? x[C - 1][i] : x[0][i];
      x[C - 1][i] = last ? x[0][i] : x[C - 1][i];
      x[0][i] = simd_shuffle(m, left);
    }
    if (VECTORS) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float m = last ? v[C - 1][i] : v[0][i];
        v[C - 1][i] = last ? v[0][i] : v[C - 1][i];
        v[0][i] = simd_shuffle(m, left);
      }
    }
  }
}

// rank[c] = place of this lane's column c when all N are sorted by key, largest first.
template <int N, int C>
inline void rank_columns(thread const float (&key)[C], thread int (&rank)[C], uint lane) {
  const int lanes = N / C;
  int own = int(lane) & (lanes - 1);
  int base = int(lane) - own;
  for (int c = 0; c < C; ++c) rank[c] = 0;
  for (int j = 0; j < lanes; ++j) {
    for (int d = 0; d < C; ++d) {
      float other = simd_shuffle(key[d], ushort(base + j));
      for (int c = 0; c < C; ++c) {
        bool before = other > key[c] || (other == key[c] && j * C + d < own * C + c);
        rank[c] += before ? 1 : 0;
      }
    }
  }
}

// Replaces the missing columns by vectors orthonormal to all others: the unit vector that lies
// furthest from their span, orthogonalised twice.
template <int N, int C>
inline void complete_columns(thread float (&x)[C][N], thread const int (&rank)[C],
                             thread const bool (&missing)[C], int m, int u_cols) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[c][i] = missing[c] ? 0.0f : x[c][i];
  }
  for (int r = 0; r < u_cols; ++r) {
    bool here = false;
    for (int c = 0; c < C; ++c) here = here || (missing[c] && rank[c] == r);
    if (!simd_any(here)) continue;
    int row = 0;
    float least = 4.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float part = 0.0f;
      for (int c = 0; c < C; ++c) part = fma(x[c][i], x[c][i], part);
      part = group_sum<N / C>(part);
      bool better = i < m && part < least;
      row = better ? i : row;
      least = better ? part : least;
    }
    float w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = i == row ? 1.0f : 0.0f;
    for (int pass = 0; pass < 2; ++pass) {
      float along[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        along[c] = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) along[c] = fma(x[c][i], w[i], along[c]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float part = 0.0f;
        for (int c = 0; c < C; ++c) part = fma(along[c], x[c][i], part);
        w[i] -= group_sum<N / C>(part);
      }
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) squares = fma(w[i], w[i], squares);
    float inverse = 1.0f / sqrt(max(squares, kTiny));
#pragma unroll
    for (int c = 0; c < C; ++c) {
      bool take = missing[c] && rank[c] == r;
#pragma unroll
      for (int i = 0; i < N; ++i) x[c][i] = take ? w[i] * inverse : x[c][i];
    }
  }
}

template <typename T, int N, int C, bool VECTORS>
inline void svd_simdgroup(device const T* a, device T* u, device T* s, device T* vt,
                          device int* status, device int* sweeps, device float* off_norm,
                          constant SvdParams& p, threadgroup float* tile, uint simdgroup,
                          uint lane) {
  const uint lanes = uint(N / C);
  uint within = lane / lanes;  // which of the simdgroup's matrices
  uint own = lane % lanes;     // which of the matrix's lanes
  long matrix = long(simdgroup) * long(32 / int(lanes)) + long(within);
  bool active = matrix < long(p.batch);
  device const T* am = a + (active ? matrix * p.a_batch : long(0));

  float x[C][N];
  float v[C][N];
  uint bits = 0u;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = int(own) * C + c;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[c][i] = 0.0f;
      if (active && i < p.m && column < p.n) x[c][i] = float(am[i * p.a_row + column * p.a_col]);
      bits = max(bits, as_type<uint>(x[c][i]) & 0x7fffffffu);
    }
  }
  bits = group_max_bits<N / C>(bits);
  bool finite = bits < kExponent;
  // The largest entry comes to lie in [1, 4); denormal matrices become whole numbers.
  int k = bits >= 0x00800000u ? max(127 - int(bits >> 23), -126) : 149;

  // Start from columns in descending order of norm: fewer sweeps on graded matrices.
  float key[C];
  int rank[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    key[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float y = finite ? scale_in(x[c][i], k) : 0.0f;
      key[c] = fma(y, y, key[c]);
    }
  }
  rank_columns<N, C>(key, rank, lane);
  int source[C];
  for (int c = 0; c < C; ++c) source[c] = 0;
  for (int j = 0; j < int(lanes); ++j) {
    for (int d = 0; d < C; ++d) {
      int place = simd_shuffle(rank[d], ushort(lane - own + uint(j)));
      for (int c = 0; c < C; ++c) source[c] = place == int(own) * C + c ? j * C + d : source[c];
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float y = 0.0f;
      if (active && finite && i < p.m && source[c] < p.n)
        y = scale_in(float(am[i * p.a_row + source[c] * p.a_col]), k);
      x[c][i] = y;
      // Columns of the padding get a zero column of V, by which they are known at the end.
      v[c][i] = i == source[c] && source[c] < p.n ? 1.0f : 0.0f;
    }
  }

  bool done = !(active && finite);
  bool converged = false;
  int count = 0;
  float off = 0.0f;
  float root_n = sqrt(float(p.n));
  for (int sweep = 0; sweep < p.max_sweeps; ++sweep) {
    if (!simd_any(!done)) break;
    float norm[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      norm[c] = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) norm[c] = fma(x[c][i], x[c][i], norm[c]);
    }
    float max_cos = 0.0f;
    float max_tan = 0.0f;
    if (C == 1)
      sweep_xor<N, C, VECTORS>(x, v, norm, !done, p.tol, lane, max_cos, max_tan);
    else
      sweep_ring<N, C, VECTORS>(x, v, norm, !done, p.tol, lane, max_cos, max_tan);
    max_cos = group_max<N / C>(max_cos);
    max_tan = group_max<N / C>(max_tan);
    if (!done) {
      count = sweep + 1;
      off = max_cos;
      // What a sweep leaves behind is a product of two angles. Cosines alone cannot tell: inside a
      // cluster small cosines need large rotations. Nor can tangents: a tiny column has a tiny one.
      converged = max_cos <= p.tol || max_cos * max(max_cos, max_tan) * root_n < p.tol;
      done = converged;
    }
  }
  bool good = active && finite && converged;

  float sigma[C];
  bool missing[C];
  bool any_missing = false;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    // Squares of a small column would underflow.
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) largest = max(largest, fabs(x[c][i]));
    float up = largest < 5.4210109e-20f ? 1.8446744e19f : 1.0f;  // 2^-64, 2^64
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float y = x[c][i] * up;
      squares = fma(y, y, squares);
    }
    float length = sqrt(squares);
    missing[c] = !(length > kVanished * up);
    float inverse = missing[c] ? 0.0f : up / length;
#pragma unroll
    for (int i = 0; i < N; ++i) x[c][i] *= inverse;
    sigma[c] = good ? length / up : 0.0f;
    key[c] = sigma[c];
    if (VECTORS) {
      float weight = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) weight = fma(v[c][i], v[c][i], weight);
      key[c] = good && weight < 0.5f ? -1.0f : key[c];  // padding comes last
    }
  }
  rank_columns<N, C>(key, rank, lane);

  const float nan = as_type<float>(0x7fc00000u);
  if (active) {
    for (int c = 0; c < C; ++c) {
      if (rank[c] < p.n) s[matrix * p.n + rank[c]] = T(good ? scale_out(sigma[c], k) : nan);
    }
    if (own == 0u) {
      status[matrix] = good ? kSvdConverged : (finite ? kSvdNotConverged : kSvdNonFinite);
      sweeps[matrix] = count;
      off_norm[matrix] = off;
    }
  }

  if (VECTORS) {
    // V goes through threadgroup memory so that lanes write neighbouring elements of Vt.
    const int pitch = N + 1;
    uint corner = within * uint(N * pitch);
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (rank[c] < p.n && i < p.n) tile[corner + uint(rank[c] * pitch + i)] = v[c][i];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (active) {
      device T* vm = vt + matrix * p.vt_batch;
      for (int i = 0; i < p.n; ++i) {
        for (int c = 0; c < C; ++c) {
          int column = int(own) * C + c;
          if (column < p.n) {
            float y = tile[corner + uint(i * pitch + column)];
            vm[i * p.vt_row + column * p.vt_col] = T(good ? y : nan);
          }
        }
      }
    }

    for (int c = 0; c < C; ++c) {
      missing[c] = missing[c] && good && rank[c] < p.u_cols;
      any_missing = any_missing || missing[c];
    }
    if (simd_any(any_missing)) complete_columns<N, C>(x, rank, missing, p.m, p.u_cols);
    if (active) {
      device T* um = u + matrix * p.u_batch;
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i < p.m && rank[c] < p.u_cols)
            um[i * p.u_row + rank[c] * p.u_col] = T(good ? x[c][i] : nan);
        }
      }
    }
  }
}

template <typename T, int N, int C>
[[kernel]] void svd_vectors(
    device const T* a [[buffer(0)]], device T* u [[buffer(1)]], device T* s [[buffer(2)]],
    device T* vt [[buffer(3)]], device int* status [[buffer(4)]], device int* sweeps [[buffer(5)]],
    device float* off_norm [[buffer(6)]], constant SvdParams& p [[buffer(7)]],
    threadgroup float* tiles [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint tile_floats = uint(32 * C / N * N * (N + 1));
  svd_simdgroup<T, N, C, true>(a, u, s, vt, status, sweeps, off_norm, p,
                               tiles + simdgroup * tile_floats, group * simdgroups + simdgroup,
                               lane);
}

template <typename T, int N, int C>
[[kernel]] void svd_values(device const T* a [[buffer(0)]], device T* s [[buffer(1)]],
                           device int* status [[buffer(2)]], device int* sweeps [[buffer(3)]],
                           device float* off_norm [[buffer(4)]],
                           constant SvdParams& p [[buffer(5)]],
                           uint group [[threadgroup_position_in_grid]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint simdgroups [[simdgroups_per_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]]) {
  svd_simdgroup<T, N, C, false>(a, nullptr, s, nullptr, status, sweeps, off_norm, p, nullptr,
                                group * simdgroups + simdgroup, lane);
}

#define SVD_INSTANTIATE(name, function, T, N, C, SIMDGROUPS) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T, N, C>) function<T, N, C>;
SVD_VARIANTS(SVD_INSTANTIATE)

#endif  // JM_HOST
