// activation(alpha op(A) x + beta y + bias) + residual: dense matrix by a few vectors.
//
// A is [batch, m, n] row-major, x [batch, nrhs, depth]; y, bias, residual and the result are
// [batch, nrhs, outputs]. Sums are float32 whatever the storage. Time is that of reading A, so a
// kernel reads it once for up to M vectors, 16 bytes a lane and load where rows allow it.
//
// op = N ("rows"): L lanes of a simdgroup share R rows of A; lane l takes the chunks l, l + L, ...
// of a row, U of them in flight. Neighbouring lanes read neighbouring chunks of 16 bytes (WORDS 4),
// 4 bytes (1) or one element (0). 16 bytes need rows that are multiples of 16 bytes long. Others
// are read by element: every row has an alignment of its own then, and vectors with a head and a
// tail would need x at eight alignments, that is eight strided loads of x for one of A.
//   Grid: ceil(m / (32 / L * R * G)) * ceil(nrhs / M) * batch threadgroups of G simdgroups.
// op = N, few rows ("split"): the S simdgroups of a threadgroup share R rows, chunk by chunk;
//   sums meet in threadgroup memory, 4 * S * R * M * W bytes. Threadgroups may share rows too
//   (parts > 1): sums then go to device memory, and gemv_finish adds them in order.
//   Grid: ceil(m / R) * parts * ceil(nrhs / M) * batch threadgroups of S simdgroups.
// op = T or C ("columns"): no transposed copy; lane l owns the chunk of columns l of 32 and walks
//   down the rows, 32 rows a simdgroup in turn. x comes by simdgroup broadcast, or is read from
//   threadgroup memory. Sums of simdgroups, and of parts, as above.
//   Threadgroup bytes: 4 * S * 32 * V * M, V = floats a chunk, and before them 4 * S * 32 *
//   M * W for x where it is read from there.
//
// Order of additions: fixed by L, V and S of the row and by the sizes of one matrix, not by the
// batch, nor by R, U and M. Rows and vectors past the end are computed as copies of the last one
// and not stored. beta = 0 does not read y. Buffers must start at multiples of 16 bytes. Subnormal
// float32 and bfloat16 numbers may count as zero, as the device has it; those of half do not.
// Complex numbers (W = 2) are pairs of floats; conjugate = -1 turns the sign of A's second ones.

#ifndef JM_HOST
#include <metal_stdlib>
using namespace metal;
#endif

// One pipeline serves every epilogue: flags are looked at once an output, not once a term.
struct GemvParams {
  long a_batch;  // floats or halves from one matrix to the next
  int batch;
  int outputs;  // numbers, complex or not
  int depth;    // terms of each sum
  int stride;   // floats or halves from one row of A to the next
  int nrhs;
  int rhs_groups;  // ceil(nrhs / M)
  int blocks;      // threadgroups along the outputs
  int parts;       // threadgroups along the depth
  int part;        // chunks of a part of the depth; rows of A where columns are summed
  int flags;       // GemvFlags: what to add
  int activation;  // GemvActivation
  float alpha_re;
  float alpha_im;
  float beta_re;
  float beta_im;
  float conjugate;
};

// What a row of the table can do, and what a call asks for. kGemvSmallK: lanes do not idle where
// a row of A has fewer than 32 chunks. kGemvOff: measured slower, taken only by name.
enum GemvFlags {
  kGemvBias = 1,
  kGemvAccumulate = 2,
  kGemvResidual = 4,
  kGemvActivation = 8,
  kGemvSmallK = 16,
  kGemvOff = 32,
  kGemvReal = 15,
  kGemvComplex = 7
};

// How much of A a device may fetch before the call's turn has come (csrc/device.h), in bytes. On an
// H200 9728x896 in 16 bits takes 5.4 us instead of 5.9; with twice as much 896x4864 in 32 bits
// takes 7.4 instead of 6.5.
enum GemvBytes { kGemvAhead = 4000000 };

// The order of kActivations in csrc/gemv.h.
enum GemvActivation {
  kGemvNone,
  kGemvRelu,
  kGemvGelu,
  kGemvGeluTanh,
  kGemvSilu,
  kGemvTanh,
  kGemvSigmoid
};

// X(name, function, A, x and result, kind of A, of x, W, WORDS, L, R, U, S or G, M, flags)
#define GEMV_ROWS(X, tag, A, B, K, KB, W, F)                                              \
  X(gemv_rows_##tag##_m1, gemv_rows, A, B, K, KB, W, 4, 32, 2, 4, 4, 1, F)                \
  X(gemv_any_##tag##_m1, gemv_rows, A, B, K, KB, W, 0, 32, 4, 4, 4, 1, F | kGemvSmallK)   \
  X(gemv_any_##tag##_m4, gemv_rows, A, B, K, KB, W, 0, 32, 4, 2, 4, 4, F | kGemvSmallK)   \
  X(gemv_any_##tag##_m16, gemv_rows, A, B, K, KB, W, 0, 32, 2, 2, 4, 16, F | kGemvSmallK) \
  X(gemv_split_##tag##_m1, gemv_split, A, B, K, KB, W, 4, 32, 2, 4, 4, 1, F)              \
  X(gemv_anysplit_##tag##_m1, gemv_split, A, B, K, KB, W, 0, 32, 4, 8, 4, 1, F)           \
  X(gemv_anysplit_##tag##_m4, gemv_split, A, B, K, KB, W, 0, 32, 2, 2, 4, 4, F)
#define GEMV_COLUMNS(X, name, tag, A, B, K, KB, W, WORDS, F)                          \
  X(gemv_##name##_##tag##_m1, gemv_columns, A, B, K, KB, W, WORDS, 32, 1, 8, 8, 1, F) \
  X(gemv_##name##_##tag##_m4, gemv_columns, A, B, K, KB, W, WORDS, 32, 1, 4, 8, 4, F) \
  X(gemv_##name##_##tag##_m16, gemv_columns, A, B, K, KB, W, WORDS, 32, 1, 4, 4, 16, F)
// What the three plain dtypes have besides. Off, with times on an H200 (bfloat16): r1 took 1.12 of
// rows' time at 9728x896 and 1.13 at 896x896, r4 1.13 and 1.14, 1.02 and 1.24 with bias, silu and
// residual (1.17 in float32); wideread took 0.99 to 1.02 of wide's, for twice the
// threadgroup memory.
#define GEMV_MORE(X, tag, A, K)                                                                \
  X(gemv_r1_##tag##_m1, gemv_rows, A, A, K, K, 1, 4, 32, 1, 4, 4, 1, kGemvReal | kGemvOff)     \
  X(gemv_r4_##tag##_m1, gemv_rows, A, A, K, K, 1, 4, 32, 4, 2, 4, 1, kGemvReal | kGemvOff)     \
  X(gemv_tiny_##tag##_m1, gemv_rows, A, A, K, K, 1, 4, 8, 4, 1, 4, 1, kGemvReal | kGemvSmallK) \
  X(gemv_rows_##tag##_m2, gemv_rows, A, A, K, K, 1, 4, 32, 4, 2, 4, 2, kGemvReal)              \
  X(gemv_rows_##tag##_m4, gemv_rows, A, A, K, K, 1, 4, 32, 4, 1, 4, 4, kGemvReal)              \
  X(gemv_rows_##tag##_m8, gemv_rows, A, A, K, K, 1, 4, 32, 4, 1, 4, 8, kGemvReal)              \
  X(gemv_rows_##tag##_m16, gemv_rows, A, A, K, K, 1, 4, 32, 2, 1, 4, 16, kGemvReal)            \
  X(gemv_split_##tag##_m4, gemv_split, A, A, K, K, 1, 4, 32, 2, 2, 4, 4, kGemvReal)            \
  X(gemv_wide_##tag##_m1, gemv_columns, A, A, K, K, 1, 4, 32, 1, 8, 8, 1, kGemvReal)           \
  X(gemv_wideread_##tag##_m1, gemv_columns_shared, A, A, K, K, 1, 4, 32, 1, 8, 8, 1,           \
    kGemvReal | kGemvOff)
#define GEMV_FINISH(X, tag, B, KB, W, F) \
  X(gemv_finish_##tag, gemv_finish, B, B, KB, KB, W, 0, 32, 1, 1, 8, 1, F)
#define GEMV_CONVERT(X, tag, A, W) \
  X(gemv_convert_##tag, gemv_convert, A, float, 0, 0, W, 0, 32, 1, 1, 8, 1, 0)
#define GEMV_VARIANTS(X)                                                 \
  GEMV_ROWS(X, f32, float, float, 0, 0, 1, kGemvReal)                    \
  GEMV_ROWS(X, f16, half, half, 1, 1, 1, kGemvReal)                      \
  GEMV_ROWS(X, bf16, bfloat, bfloat, 2, 2, 1, kGemvReal)                 \
  GEMV_ROWS(X, f16f32, half, float, 1, 0, 1, kGemvReal)                  \
  GEMV_ROWS(X, bf16f32, bfloat, float, 2, 0, 1, kGemvReal)               \
  GEMV_ROWS(X, c64, float, float, 0, 0, 2, kGemvComplex)                 \
  GEMV_MORE(X, f32, float, 0)                                            \
  GEMV_MORE(X, f16, half, 1)                                             \
  GEMV_MORE(X, bf16, bfloat, 2)                                          \
  GEMV_COLUMNS(X, column, f32, float, float, 0, 0, 1, 0, kGemvReal)      \
  GEMV_COLUMNS(X, column, f16, half, half, 1, 1, 1, 0, kGemvReal)        \
  GEMV_COLUMNS(X, column, bf16, bfloat, bfloat, 2, 2, 1, 0, kGemvReal)   \
  GEMV_COLUMNS(X, column, f16f32, half, float, 1, 0, 1, 0, kGemvReal)    \
  GEMV_COLUMNS(X, column, bf16f32, bfloat, float, 2, 0, 1, 0, kGemvReal) \
  GEMV_COLUMNS(X, column, c64, float, float, 0, 0, 2, 0, kGemvComplex)   \
  GEMV_COLUMNS(X, pair, f16, half, half, 1, 1, 1, 1, kGemvReal)          \
  GEMV_COLUMNS(X, pair, bf16, bfloat, bfloat, 2, 2, 1, 1, kGemvReal)     \
  GEMV_FINISH(X, f32, float, 0, 1, kGemvReal)                            \
  GEMV_FINISH(X, f16, half, 1, 1, kGemvReal)                             \
  GEMV_FINISH(X, bf16, bfloat, 2, 1, kGemvReal)                          \
  GEMV_FINISH(X, c64, float, 0, 2, kGemvComplex)                         \
  GEMV_CONVERT(X, f16f32, half, 1)                                       \
  GEMV_CONVERT(X, bf16f32, bfloat, 1)                                    \
  GEMV_CONVERT(X, f32c64, float, 2)                                      \
  GEMV_CONVERT(X, f16c64, half, 2)                                       \
  GEMV_CONVERT(X, bf16c64, bfloat, 2)

// Floats in a chunk.
#define GEMV_V(KIND, W, WORDS) ((WORDS) == 0 ? (W) : (WORDS) * ((KIND) == 0 ? 1 : 2))

#ifndef JM_HOST

// N words of A or x. Behind the end: zeros, and no load.
template <typename T, int WORDS, int N>
inline void load_words(device const T* from, bool valid, thread uint (&w)[N]) {
  if (WORDS == 4) {
    device const uint4* vectors = (device const uint4*)from;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      uint4 v;
      v.x = 0u;
      v.y = 0u;
      v.z = 0u;
      v.w = 0u;
      if (valid) v = vectors[i];
      w[4 * i] = v.x;
      w[4 * i + 1] = v.y;
      w[4 * i + 2] = v.z;
      w[4 * i + 3] = v.w;
    }
  } else if (WORDS == 1) {
    device const uint* words = (device const uint*)from;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      w[i] = 0u;
      if (valid) w[i] = words[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      w[i] = 0u;
      if (valid) w[i] = as_type<uint>(float(from[i]));
    }
  }
}

// Words as floats. KIND: 0 float, 1 half, 2 bfloat.
template <int KIND, int N, int V>
inline void expand(thread const uint (&w)[N], thread float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (KIND == 0) {
      to[i] = as_type<float>(w[i]);
    } else if (KIND == 1) {
      half2 h = as_type<half2>(w[i]);
      to[2 * i] = float(h.x);
      to[2 * i + 1] = float(h.y);
    } else {
      to[2 * i] = as_type<float>(w[i] << 16);
      to[2 * i + 1] = as_type<float>(w[i] & 0xffff0000u);
    }
  }
}

template <int L>
inline float lanes_sum(float x) {
#pragma unroll
  for (int o = L / 2; o > 0; o /= 2) x += simd_shuffle_xor(x, ushort(o));
  return x;
}

// erfc by a Chebyshev fit in 1 / (1 + |x| / 2) (Numerical Recipes' erfcc): 1.2e-7 of its value.
inline float erfc_of(float x) {
  float z = fabs(x);
  float t = 1.0f / fma(0.5f, z, 1.0f);
  float s = fma(t, 0.17087277f, -0.82215223f);
  s = fma(t, s, 1.48851587f);
  s = fma(t, s, -1.13520398f);
  s = fma(t, s, 0.27886807f);
  s = fma(t, s, -0.18628806f);
  s = fma(t, s, 0.09678418f);
  s = fma(t, s, 0.37409196f);
  s = fma(t, s, 1.00002368f);
  s = fma(t, s, -1.26551223f);
  float y = t * exp(fma(-z, z, s));
  return x < 0.0f ? 2.0f - y : y;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

inline float activate(float x, int which) {
  if (which == kGemvRelu) return x < 0.0f ? 0.0f : x;
  if (which == kGemvGelu) return 0.5f * x * erfc_of(-0.70710678f * x);
  if (which == kGemvGeluTanh) {
    float u = 0.79788456f * fma(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanh(u));
  }
  if (which == kGemvSilu) return x * sigmoid(x);
  if (which == kGemvTanh) return tanh(x);
  if (which == kGemvSigmoid) return sigmoid(x);
  return x;
}

// Stores output `at` of the sum re (+ i im).
template <typename X, int W>
inline void finish_output(float re, float im, long at, device const X* y, device const X* bias,
                          device const X* residual, device X* out, constant GemvParams& p) {
  device const X* from = y + at * W;
  float zr = p.alpha_re * re;
  float zi = 0.0f;
  if (W == 2) {
    zr = fma(-p.alpha_im, im, zr);
    zi = fma(p.alpha_re, im, p.alpha_im * re);
  }
  if ((p.flags & kGemvAccumulate) != 0) {
    float yr = float(from[0]);
    zr = fma(p.beta_re, yr, zr);
    if (W == 2) {
      float yi = float(from[1]);
      zr = fma(-p.beta_im, yi, zr);
      zi = fma(p.beta_re, yi, fma(p.beta_im, yr, zi));
    }
  }
  if ((p.flags & kGemvBias) != 0) {
    from = bias + at * W;
    zr += float(from[0]);
    if (W == 2) zi += float(from[1]);
  }
  if (W == 1) zr = activate(zr, p.activation);
  if ((p.flags & kGemvResidual) != 0) {
    from = residual + at * W;
    zr += float(from[0]);
    if (W == 2) zi += float(from[1]);
  }
  device X* to = out + at * W;
  to[0] = X(zr);
  if (W == 2) to[1] = X(zi);
}

// Adds the products of one chunk of A with one of x.
template <int W, int V>
inline void multiply_add(thread const float (&a)[V], thread const float (&x)[V], float conjugate,
                         thread float& re, thread float& im) {
  if (W == 1) {
#pragma unroll
    for (int e = 0; e < V; ++e) re = fma(a[e], x[e], re);
  } else {
#pragma unroll
    for (int e = 0; e + 1 < V; e += 2) {
      float ai = conjugate * a[e + 1];
      re = fma(-ai, x[e + 1], fma(a[e], x[e], re));
      im = fma(ai, x[e], fma(a[e], x[e + 1], im));
    }
  }
}

// U chunks of R rows, `step` apart, from chunk c on; GUARD where some may lie behind the end.
// All loads of A are written before any use of one, so that they are in flight together.
template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int R, int U, int M,
          bool GUARD>
inline void add_chunks(device const T* a, device const X* x, thread const int (&row)[R],
                       thread const int (&vector)[M], int c, int step, int end, float conjugate,
                       thread float (&re)[M][R], thread float (&im)[M][R]) {
  const int V = GEMV_V(KIND, W, WORDS);
  const int E = WORDS == 0 || KIND == 0 ? 1 : 2;    // floats in a word of A
  const int XE = WORDS == 0 || XKIND == 0 ? 1 : 2;  // and of x
  uint aw[U][R][V / E];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    int at = c + u * step;
#pragma unroll
    for (int r = 0; r < R; ++r)
      load_words<T, WORDS, V / E>(a + (row[r] + at * V), !GUARD || at < end, aw[u][r]);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    int at = c + u * step;
    float av[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) expand<WORDS == 0 ? 0 : KIND, V / E, V>(aw[u][r], av[r]);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      uint xw[V / XE];
      float xv[V];
      load_words<X, WORDS, V / XE>(x + (vector[j] + at * V), !GUARD || at < end, xw);
      expand<WORDS == 0 ? 0 : XKIND, V / XE, V>(xw, xv);
#pragma unroll
      for (int r = 0; r < R; ++r) multiply_add<W, V>(av[r], xv, conjugate, re[j][r], im[j][r]);
    }
  }
}

// Sums of the chunks begin to end of R rows; this lane takes begin + lane, then every lanes-th.
template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int R, int U, int M>
inline void dot_rows(device const T* a, device const X* x, constant GemvParams& p, int first_row,
                     int first_vector, int begin, int end, int lane, int lanes,
                     thread float (&re)[M][R], thread float (&im)[M][R]) {
  int row[R];
  int vector[M];
#pragma unroll
  for (int r = 0; r < R; ++r) row[r] = (min(first_row + r, p.outputs - 1) - first_row) * p.stride;
#pragma unroll
  for (int j = 0; j < M; ++j) {
    vector[j] = (min(first_vector + j, p.nrhs - 1) - first_vector) * p.depth * W;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      re[j][r] = 0.0f;
      im[j][r] = 0.0f;
    }
  }
  device const T* from = a + long(first_row) * p.stride;
  int c = begin;
  for (; c + U * lanes <= end; c += U * lanes)
    add_chunks<T, X, KIND, XKIND, W, WORDS, R, U, M, false>(from, x, row, vector, c + lane, lanes,
                                                            end, p.conjugate, re, im);
  if (c < end)
    add_chunks<T, X, KIND, XKIND, W, WORDS, R, U, M, true>(from, x, row, vector, c + lane, lanes,
                                                           end, p.conjugate, re, im);
}

// Which matrix, vectors, part of the depth and block of outputs a threadgroup has.
struct GemvPlace {
  int matrix;
  int vector;
  int part;
  int block;
};

inline GemvPlace place_of(uint group, int vectors, constant GemvParams& p) {
  GemvPlace place;
  uint rest = group / uint(p.blocks);
  place.block = int(group % uint(p.blocks));
  place.part = int(rest % uint(p.parts));
  rest /= uint(p.parts);
  place.vector = int(rest % uint(p.rhs_groups)) * vectors;
  place.matrix = int(rest / uint(p.rhs_groups));
  return place;
}

// Sums of one output of the threadgroup: to the result, or to device memory where parts follow.
template <typename X, int W>
inline void put_output(float re, float im, long vector, int output, int part, device const X* y,
                       device const X* bias, device const X* residual, device X* out,
                       device float* partial, constant GemvParams& p) {
  if (p.parts == 1) {
    finish_output<X, W>(re, im, vector * p.outputs + output, y, bias, residual, out, p);
  } else {
    device float* to = partial + ((vector * p.parts + part) * p.outputs + output) * W;
    to[0] = re;
    if (W == 2) to[1] = im;
  }
}

template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int L, int R, int U, int S,
          int M>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void gemv_rows(
    device const T* a [[buffer(0)]], device const X* x [[buffer(1)]],
    device const X* y [[buffer(2)]], device const X* bias [[buffer(3)]],
    device const X* residual [[buffer(4)]], device X* out [[buffer(5)]],
    constant GemvParams& p [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  GemvPlace place = place_of(group, M, p);
  int own = int(lane) % L;
  // Rows past the end are the last one again, so that all lanes sum.
  int row = ((place.block * S + int(simdgroup)) * (32 / L) + int(lane) / L) * R;
  long vector = long(place.matrix) * p.nrhs + place.vector;
  float re[M][R];
  float im[M][R];
  dot_rows<T, X, KIND, XKIND, W, WORDS, R, U, M>(
      a + long(place.matrix) * p.a_batch, x + vector * p.depth * W, p, min(row, p.outputs - 1),
      place.vector, 0, p.depth * W / GEMV_V(KIND, W, WORDS), own, L, re, im);
  // Each lane finishes outputs of its own.
#pragma unroll
  for (int first = 0; first < R * M; first += L) {
    float own_re = 0.0f;
    float own_im = 0.0f;
#pragma unroll
    for (int i = 0; i < L; ++i) {
      if (first + i < R * M) {
        float sum = lanes_sum<L>(re[(first + i) / R % M][(first + i) % R]);
        own_re = i == own ? sum : own_re;
        if (W == 2) {
          sum = lanes_sum<L>(im[(first + i) / R % M][(first + i) % R]);
          own_im = i == own ? sum : own_im;
        }
      }
    }
    int output = row + (first + own) % R;
    int j = (first + own) / R;
    if (j < M && output < p.outputs && place.vector + j < p.nrhs)
      finish_output<X, W>(own_re, own_im, (vector + j) * p.outputs + output, y, bias, residual, out,
                          p);
  }
}

template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int L, int R, int U, int S,
          int M>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void gemv_split(
    device const T* a [[buffer(0)]], device const X* x [[buffer(1)]],
    device const X* y [[buffer(2)]], device const X* bias [[buffer(3)]],
    device const X* residual [[buffer(4)]], device X* out [[buffer(5)]],
    device float* partial [[buffer(6)]], constant GemvParams& p [[buffer(7)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  GemvPlace place = place_of(group, M, p);
  int row = place.block * R;
  long vector = long(place.matrix) * p.nrhs + place.vector;
  int begin = place.part * p.part;
  int end = min(begin + p.part, p.depth * W / GEMV_V(KIND, W, WORDS));
  float re[M][R];
  float im[M][R];
  dot_rows<T, X, KIND, XKIND, W, WORDS, R, U, M>(
      a + long(place.matrix) * p.a_batch, x + vector * p.depth * W, p, row, place.vector, begin,
      end, int(simdgroup * 32u + lane), 32 * S, re, im);
#pragma unroll
  for (int i = 0; i < R * M; ++i) {
    float sum = simd_sum(re[i / R][i % R]);
    if (lane == 0u) tile[(int(simdgroup) * R * M + i) * W] = sum;
    if (W == 2) {
      sum = simd_sum(im[i / R][i % R]);
      if (lane == 0u) tile[(int(simdgroup) * R * M + i) * W + 1] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int i = int(simdgroup * 32u + lane);
  int output = row + i % R;
  int j = i / R;
  if (j < M && output < p.outputs && place.vector + j < p.nrhs) {
    float own_re = 0.0f;
    float own_im = 0.0f;
    for (int s = 0; s < S; ++s) {
      own_re += tile[(s * R * M + i) * W];
      if (W == 2) own_im += tile[(s * R * M + i) * W + 1];
    }
    put_output<X, W>(own_re, own_im, vector + j, output, place.part, y, bias, residual, out,
                     partial, p);
  }
}

// Adds the products of U rows of A, from row k on, with x: value u of each vector is in xs[j][u].
template <typename T, int KIND, int W, int WORDS, int U, int M, int V>
inline void add_rows(device const T* a, constant GemvParams& p, int k, int end, bool inside,
                     thread const float (&xs)[M][U * W], thread float (&sum)[M][V]) {
  const int E = WORDS == 0 || KIND == 0 ? 1 : 2;
  uint aw[U][V / E];
#pragma unroll
  for (int u = 0; u < U; ++u)
    load_words<T, WORDS, V / E>(a + long(k + u) * p.stride, inside && k + u < end, aw[u]);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float av[V];
    expand<WORDS == 0 ? 0 : KIND, V / E, V>(aw[u], av);
#pragma unroll
    for (int j = 0; j < M; ++j) {
#pragma unroll
      for (int e = 0; e < V; e += W) {
        if (W == 1) {
          sum[j][e] = fma(av[e], xs[j][u], sum[j][e]);
        } else {
          float ai = p.conjugate * av[(e + 1) % V];
          float xr = xs[j][u * W];
          float xi = xs[j][u * W + W - 1];
          sum[j][e] = fma(-ai, xi, fma(av[e], xr, sum[j][e]));
          sum[j][(e + 1) % V] = fma(ai, xr, fma(av[e], xi, sum[j][(e + 1) % V]));
        }
      }
    }
  }
}

template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int U, int S, int M,
          bool SHARED>
inline void sum_columns(device const T* a, device const X* x, device const X* y,
                        device const X* bias, device const X* residual, device X* out,
                        device float* partial, constant GemvParams& p, threadgroup float* tile,
                        uint group, uint simdgroup, uint lane) {
  const int V = GEMV_V(KIND, W, WORDS);
  GemvPlace place = place_of(group, M, p);
  long vector = long(place.matrix) * p.nrhs + place.vector;
  int column = (place.block * 32 + int(lane)) * V;  // in floats
  bool inside = column < p.outputs * W;
  int begin = place.part * p.part;
  int end = min(begin + p.part, p.depth);
  device const T* from = a + long(place.matrix) * p.a_batch + (inside ? column : 0);
  device const X* xs = x + vector * p.depth * W;
  threadgroup float* staged = tile + int(simdgroup) * 32 * M * W;
  threadgroup float* sums = SHARED ? tile + S * 32 * M * W : tile;

  float sum[M][V];
#pragma unroll
  for (int j = 0; j < M; ++j) {
#pragma unroll
    for (int e = 0; e < V; ++e) sum[j][e] = 0.0f;
  }
  for (int top = begin; top < end; top += 32 * S) {
    int k = top + int(simdgroup) * 32;
    float own[M][W];  // x of row k + lane
#pragma unroll
    for (int j = 0; j < M; ++j) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        int at = (min(place.vector + j, p.nrhs - 1) - place.vector) * p.depth + k + int(lane);
        own[j][w] = 0.0f;
        if (k + int(lane) < end) own[j][w] = float(xs[long(at) * W + w]);
        if (SHARED) staged[(j * 32 + int(lane)) * W + w] = own[j][w];
      }
    }
    if (SHARED) simdgroup_barrier(mem_flags::mem_threadgroup);
    int rows = min(end - k, 32);
    for (int i = 0; i < rows; i += U) {
      float part[M][U * W];
#pragma unroll
      for (int j = 0; j < M; ++j) {
#pragma unroll
        for (int u = 0; u < U * W; ++u) {
          if (SHARED) {
            part[j][u] = staged[(j * 32 + i) * W + u];
          } else {
            part[j][u] = simd_shuffle(own[j][u % W], ushort(i + u / W));
          }
        }
      }
      add_rows<T, KIND, W, WORDS, U, M, V>(from, p, k + i, end, inside, part, sum);
    }
    if (SHARED) simdgroup_barrier(mem_flags::mem_threadgroup);
  }

#pragma unroll
  for (int j = 0; j < M; ++j) {
#pragma unroll
    for (int e = 0; e < V; ++e)
      sums[((int(simdgroup) * M + j) * V + e) * 32 + int(lane)] = sum[j][e];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(simdgroup * 32u + lane); i < M * 32 * V / W; i += 32 * S) {
    int j = i / (32 * V / W);
    int e = i % (V / W) * W;
    int owner = i / (V / W) % 32;
    int output = place.block * 32 * V / W + i % (32 * V / W);
    if (output < p.outputs && place.vector + j < p.nrhs) {
      float own_re = 0.0f;
      float own_im = 0.0f;
      for (int s = 0; s < S; ++s) {
        own_re += sums[((s * M + j) * V + e) * 32 + owner];
        if (W == 2) own_im += sums[((s * M + j) * V + e + 1) * 32 + owner];
      }
      put_output<X, W>(own_re, own_im, vector + j, output, place.part, y, bias, residual, out,
                       partial, p);
    }
  }
}

template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int L, int R, int U, int S,
          int M>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void gemv_columns(
    device const T* a [[buffer(0)]], device const X* x [[buffer(1)]],
    device const X* y [[buffer(2)]], device const X* bias [[buffer(3)]],
    device const X* residual [[buffer(4)]], device X* out [[buffer(5)]],
    device float* partial [[buffer(6)]], constant GemvParams& p [[buffer(7)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  sum_columns<T, X, KIND, XKIND, W, WORDS, U, S, M, false>(a, x, y, bias, residual, out, partial, p,
                                                           tile, group, simdgroup, lane);
}

template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int L, int R, int U, int S,
          int M>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void gemv_columns_shared(
    device const T* a [[buffer(0)]], device const X* x [[buffer(1)]],
    device const X* y [[buffer(2)]], device const X* bias [[buffer(3)]],
    device const X* residual [[buffer(4)]], device X* out [[buffer(5)]],
    device float* partial [[buffer(6)]], constant GemvParams& p [[buffer(7)]],
    threadgroup float* tile [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  sum_columns<T, X, KIND, XKIND, W, WORDS, U, S, M, true>(a, x, y, bias, residual, out, partial, p,
                                                          tile, group, simdgroup, lane);
}

// Adds the sums of the parts in order, one output a thread.
//   Grid: ceil(batch * nrhs * outputs / (32 * S)) threadgroups.
template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int L, int R, int U, int S,
          int M>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void gemv_finish(
    device const X* y [[buffer(0)]], device const X* bias [[buffer(1)]],
    device const X* residual [[buffer(2)]], device X* out [[buffer(3)]],
    device const float* partial [[buffer(4)]], constant GemvParams& p [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  long at = long(group) * (32 * S) + long(thread_index);
  if (at < long(p.batch) * p.nrhs * p.outputs) {
    long vector = at / p.outputs;
    int output = int(at % p.outputs);
    float re = 0.0f;
    float im = 0.0f;
    for (int part = 0; part < p.parts; ++part) {
      long from = ((vector * p.parts + part) * p.outputs + output) * W;
      re += partial[from];
      if (W == 2) im += partial[from + 1];
    }
    finish_output<X, W>(re, im, at, y, bias, residual, out, p);
  }
}

// x in the type of the result, where a call has it in another. `outputs` counts numbers.
//   Grid: ceil(outputs / (32 * S)) threadgroups.
template <typename T, typename X, int KIND, int XKIND, int W, int WORDS, int L, int R, int U, int S,
          int M>
[[kernel, max_total_threads_per_threadgroup(32 * S)]] void gemv_convert(
    device const T* from [[buffer(0)]], device X* to [[buffer(1)]],
    constant GemvParams& p [[buffer(2)]], uint at [[thread_position_in_grid]]) {
  if (int(at) < p.outputs) {
    to[long(at) * W] = X(float(from[at]));
    if (W == 2) to[long(at) * W + 1] = X(0.0f);
  }
}

#define GEMV_INSTANTIATE(name, function, T, X, KIND, XKIND, W, WORDS, L, R, U, S, M, FLAGS) \
  template [[host_name(#name)]] [[kernel]]                                                  \
  decltype(function<T, X, KIND, XKIND, W, WORDS, L, R, U, S, M>)                            \
      function<T, X, KIND, XKIND, W, WORDS, L, R, U, S, M>;
GEMV_VARIANTS(GEMV_INSTANTIATE)

#endif  // JM_HOST
