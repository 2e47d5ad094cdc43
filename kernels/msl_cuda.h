// Metal Shading Language on NVIDIA GPUs. Includes nothing, so that NVRTC needs no CUDA headers.
//
//   MSL                                        here
//   entry point   [[kernel]] void f(...)       extern "C" __global__, written by tools/msl
//   pointers      device T*, threadgroup T*    T*
//   scalars       constant P& [[buffer(i)]]    const P, by value
//   constants     constant float x = 1;        constexpr
//   specialised   [[function_constant(i)]]     constexpr, from -DJM_CONSTANT_i=value
//   scratch       [[threadgroup(0)]]           dynamic shared memory; later ones at jm_offset_i
//   ids           [[thread_index_in_...]]      jm_<name>(), read from threadIdx and blockIdx;
//                                              groups and grids are one-dimensional in threads
//   dispatches    each after the one before    jm_begin(), written by tools/msl: waits for it
//   barriers      threadgroup_barrier(f)       __syncthreads()
//                 simdgroup_barrier(f)         __syncwarp()
//   simd          simd_shuffle*, simd_any ...  __shfl_*_sync, __any_sync over all 32 lanes
//   matrices      simdgroup_float8x8           tensor cores; factors in two parts of TF32, so that
//                                              products are those of float to an ulp or so
//   vectors       uint2..4, float2..4, half2   structs with .x .y .z .w; uint4 aligned as in MSL
//   storage       half, bfloat                 16-bit structs, convert to and from float only
//   not in MSL    double, double2              of kernels in a table SVD_DOUBLE_VARIANTS alone
//   arithmetic    fma, sqrt, x / y             correctly rounded
//                 exp, tanh                    two ulps or so
//                 rsqrt, fast::divide          two ulps or so
//   unrolling     #pragma unroll               the same
// Not in the dialect: see FORBIDDEN in tools/msl/parse.py.
#pragma once

typedef unsigned char jm_byte;
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;

namespace jm_kernels {
namespace metal {

// NVRTC's own uint3 and float4 stay outside of this namespace.
struct alignas(8) uint2 {
  uint x, y;
};
struct uint3 {
  uint x, y, z;
};
struct alignas(16) uint4 {
  uint x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct float3 {
  float x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// GPUs with 64-bit floating point; kernels see it as a type that they are instantiated with.
struct alignas(16) double2 {
  double x, y;
};

struct half {
  ushort bits;
  half() = default;
  __device__ explicit half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ explicit operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};

struct half2 {
  half x, y;
};

struct bfloat {
  ushort bits;
  bfloat() = default;
  __device__ explicit bfloat(float x) {
    uint b = __float_as_uint(x);
    bool nan = (b & 0x7fffffffu) > 0x7f800000u;
    bits = ushort((nan ? b | 0x400000u : b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
  __device__ explicit operator float() const { return __uint_as_float(uint(bits) << 16); }
};

template <typename To, typename From>
struct jm_cast;
template <>
struct jm_cast<uint, float> {
  static __device__ uint of(float x) { return __float_as_uint(x); }
};
template <>
struct jm_cast<float, uint> {
  static __device__ float of(uint x) { return __uint_as_float(x); }
};
template <>
struct jm_cast<half2, uint> {
  static __device__ half2 of(uint x) {
    half2 y;
    asm("mov.b32 {%0, %1}, %2;" : "=h"(y.x.bits), "=h"(y.y.bits) : "r"(x));
    return y;
  }
};
template <>
struct jm_cast<uint, half2> {
  static __device__ uint of(half2 x) {
    uint y;
    asm("mov.b32 %0, {%1, %2};" : "=r"(y) : "h"(x.x.bits), "h"(x.y.bits));
    return y;
  }
};
template <>
struct jm_cast<ulong, double> {
  static __device__ ulong of(double x) { return ulong(__double_as_longlong(x)); }
};
template <>
struct jm_cast<double, ulong> {
  static __device__ double of(ulong x) { return __longlong_as_double((long long)x); }
};
template <typename To, typename From>
__device__ inline To as_type(From x) {
  return jm_cast<To, From>::of(x);
}

__device__ inline float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline float fabs(float x) { return ::fabsf(x); }
__device__ inline float sqrt(float x) { return __fsqrt_rn(x); }
__device__ inline float exp(float x) { return ::expf(x); }
__device__ inline float tanh(float x) { return ::tanhf(x); }
// Flushing denormals saves the rescaling around each: kernels give them normal numbers.
__device__ inline float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline double fabs(double x) { return ::fabs(x); }
__device__ inline double sqrt(double x) { return __dsqrt_rn(x); }
// An ulp or two off: two Newton steps from the GPU's own 20 bits or so.
__device__ inline double rsqrt(double x) {
  double y;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y = __fma_rn(0.5 * y, __fma_rn(-x * y, y, 1.0), y);
  return __fma_rn(0.5 * y, __fma_rn(-x * y, y, 1.0), y);
}
__device__ inline float max(float a, float b) { return ::fmaxf(a, b); }
__device__ inline float min(float a, float b) { return ::fminf(a, b); }
__device__ inline double max(double a, double b) { return ::fmax(a, b); }
__device__ inline double min(double a, double b) { return ::fmin(a, b); }
__device__ inline ulong max(ulong a, ulong b) { return a > b ? a : b; }
__device__ inline int max(int a, int b) { return a > b ? a : b; }
__device__ inline int min(int a, int b) { return a < b ? a : b; }
__device__ inline uint max(uint a, uint b) { return a > b ? a : b; }
__device__ inline uint min(uint a, uint b) { return a < b ? a : b; }
__device__ inline int clamp(int x, int low, int high) { return min(max(x, low), high); }
__device__ inline float clamp(float x, float low, float high) { return min(max(x, low), high); }
namespace fast {
__device__ inline float divide(float a, float b) {
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ inline double divide(double a, double b) {
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(b));
  y = __fma_rn(y, __fma_rn(-b, y, 1.0), y);
  y = __fma_rn(y, __fma_rn(-b, y, 1.0), y);
  return a * y;
}
}  // namespace fast

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
__device__ inline mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
__device__ inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
__device__ inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

constexpr uint jm_all = 0xffffffffu;
template <typename T>
__device__ inline T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(jm_all, x, lane);
}
template <typename T>
__device__ inline T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(jm_all, x, mask);
}
template <typename T>
__device__ inline T simd_shuffle_up(T x, ushort delta) {
  return __shfl_up_sync(jm_all, x, delta);
}
template <typename T>
__device__ inline T simd_shuffle_down(T x, ushort delta) {
  return __shfl_down_sync(jm_all, x, delta);
}
template <typename T>
__device__ inline T simd_broadcast(T x, ushort lane) {
  return __shfl_sync(jm_all, x, lane);
}
__device__ inline bool simd_any(bool x) { return __any_sync(jm_all, x); }
__device__ inline bool simd_all(bool x) { return __all_sync(jm_all, x); }
template <typename T>
__device__ inline T simd_sum(T x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(jm_all, x, o);
  return x;
}
template <typename T>
__device__ inline T simd_max(T x) {
  for (int o = 16; o > 0; o /= 2) x = max(x, __shfl_xor_sync(jm_all, x, o));
  return x;
}
#if __CUDA_ARCH__ >= 800
__device__ inline uint simd_max(uint x) { return __reduce_max_sync(jm_all, x); }
#endif
template <typename T>
__device__ inline T simd_min(T x) {
  for (int o = 16; o > 0; o /= 2) x = min(x, __shfl_xor_sync(jm_all, x, o));
  return x;
}

struct alignas(16) ulong2 {
  ulong x, y;
  __device__ explicit ulong2(ulong both) : x(both), y(both) {}
};

// Eight rows and columns, two numbers a lane, in each of the three layouts that a tensor core asks
// for. What a kernel does not use of them, a compiler drops, the loads too.
struct simdgroup_float8x8 {
  float2 sum;  // row lane / 4, columns 2 (lane % 4) and the next; and what is to be added
  float2 more;
  float left[2];   // of a left factor: row lane / 4, columns lane % 4 and 4 + lane % 4
  float right[2];  // of a right factor: rows lane % 4 and 4 + lane % 4, column lane / 4
  bool product;    // only sum and more are there
  __device__ float2& thread_elements() {
    sum = float2{sum.x + more.x, sum.y + more.y};
    more = float2{0.0f, 0.0f};
    product = true;
    return sum;
  }
};

template <typename T, int COLUMNS, int ROWS>
__device__ inline simdgroup_float8x8 make_filled_simdgroup_matrix(float x) {
  return simdgroup_float8x8{{x, x}, {0.0f, 0.0f}, {x, x}, {x, x}, false};
}

__device__ inline void simdgroup_load(simdgroup_float8x8& m, const float* from, ulong pitch,
                                      ulong2 origin = ulong2(0), bool transpose = false) {
  const uint g = threadIdx.x / 4u % 8u, t = threadIdx.x % 4u;
  const ulong down = transpose ? 1ul : pitch, along = transpose ? pitch : 1ul;
  from += origin.y * pitch + origin.x;
  m.sum = float2{from[g * down + 2u * t * along], from[g * down + (2u * t + 1u) * along]};
  m.more = float2{0.0f, 0.0f};
  for (uint i = 0; i < 2u; ++i) {
    m.left[i] = from[g * down + (t + 4u * i) * along];
    m.right[i] = from[(t + 4u * i) * down + g * along];
  }
  m.product = false;
}

__device__ inline void simdgroup_store(simdgroup_float8x8 m, float* to, ulong pitch) {
  const uint g = threadIdx.x / 4u % 8u, t = threadIdx.x % 4u;
  const float2 x = m.thread_elements();
  to[g * pitch + 2u * t] = x.x;
  to[g * pitch + 2u * t + 1u] = x.y;
}

// A product as a factor: its numbers are with other lanes.
__device__ inline void jm_as_factor(simdgroup_float8x8& m) {
  const uint g = threadIdx.x / 4u % 8u, t = threadIdx.x % 4u;
  const float2 x = m.thread_elements();
  for (uint i = 0; i < 2u; ++i) {
    const uint beside = 4u * g + (t + 4u * i) / 2u, below = 4u * (t + 4u * i) + g / 2u;
    const float a = __shfl_sync(jm_all, x.x, beside), b = __shfl_sync(jm_all, x.y, beside);
    const float c = __shfl_sync(jm_all, x.x, below), d = __shfl_sync(jm_all, x.y, below);
    m.left[i] = t % 2u == 0u ? a : b;
    m.right[i] = g % 2u == 0u ? c : d;
  }
  m.product = false;
}

#if __CUDA_ARCH__ >= 800
// x to the nearest number of TF32, whose lowest 13 bits are zeros.
__device__ inline float jm_tf32(float x) {
  return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
}
// d += a b with the 16 x 8 numbers of a, 8 x 8 of b.
__device__ inline void jm_mma(float (&d)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
#endif

// The upper eight rows of a tensor core take the left factor to TF32, its lower eight what that
// leaves, both with the two parts of the right factor. Its sums are cut off, not rounded: kernels
// with long ones add them up in pieces.
__device__ inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, simdgroup_float8x8 a,
                                                     simdgroup_float8x8 b, simdgroup_float8x8 c) {
  if (a.product) jm_as_factor(a);
  if (b.product) jm_as_factor(b);
#if __CUDA_ARCH__ >= 800
  const float a0 = jm_tf32(a.left[0]), a1 = jm_tf32(a.left[1]);
  const float b0 = jm_tf32(b.right[0]), b1 = jm_tf32(b.right[1]);
  const float rows[4] = {a0, a.left[0] - a0, a1, a.left[1] - a1};
  float sums[4] = {c.sum.x, c.sum.y, c.more.x, c.more.y};
  jm_mma(sums, rows, b.right[0] - b0, b.right[1] - b1);
  jm_mma(sums, rows, b0, b1);
  d.sum = float2{sums[0], sums[1]};
  d.more = float2{sums[2], sums[3]};
#else
  const uint lane = threadIdx.x % 32u, row = lane / 4u * 4u, column = lane % 4u * 8u;
  float x = c.sum.x, y = c.sum.y;
  for (uint k = 0; k < 8u; ++k) {
    const float l = __shfl_sync(jm_all, a.left[k / 4u], row + k % 4u);
    x = __fmaf_rn(l, __shfl_sync(jm_all, b.right[k / 4u], column + k % 4u), x);
    y = __fmaf_rn(l, __shfl_sync(jm_all, b.right[k / 4u], column + 4u + k % 4u), y);
  }
  d.sum = float2{x, y};
  d.more = c.more;
#endif
  d.product = true;
}

}  // namespace metal

// How kernels begin. The host has them placed on the GPU before the one ahead has quite ended
// (csrc/device_cuda.cc); nothing is read or written before it has, and is seen.
__device__ inline void jm_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Those that stream a matrix: the next one may come as soon as all threadgroups of this one run,
// and the first `bytes` of the matrix are on their way to the L2 cache meanwhile, where they stay
// right if they are still being written.
__device__ inline void jm_begin(const void* matrix, ulong bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  const ulong line = 128, own = (bytes / gridDim.x + line - 1) / line * line;
  const ulong first = own * blockIdx.x, end = first + own < bytes ? first + own : bytes;
  for (ulong i = first + line * threadIdx.x; i < end; i += line * blockDim.x) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)matrix + i));
  }
#endif
  jm_begin();
}

__device__ inline uint jm_threadgroup_position_in_grid() { return blockIdx.x; }
__device__ inline uint jm_threadgroups_per_grid() { return gridDim.x; }
__device__ inline uint jm_threads_per_threadgroup() { return blockDim.x; }
__device__ inline uint jm_simdgroups_per_threadgroup() { return blockDim.x / 32u; }
__device__ inline uint jm_threads_per_simdgroup() { return 32u; }
__device__ inline uint jm_simdgroup_index_in_threadgroup() { return threadIdx.x / 32u; }
__device__ inline uint jm_thread_index_in_simdgroup() { return threadIdx.x % 32u; }
__device__ inline uint jm_thread_index_in_threadgroup() { return threadIdx.x; }
__device__ inline uint jm_thread_position_in_threadgroup() { return threadIdx.x; }
__device__ inline uint jm_thread_position_in_grid() {
  return blockIdx.x * blockDim.x + threadIdx.x;
}
// Grids may have three dimensions of groups; the threads of a group are one row.
__device__ inline metal::uint3 jm_threadgroup_position_in_grid3() {
  return metal::uint3{blockIdx.x, blockIdx.y, blockIdx.z};
}
__device__ inline metal::uint3 jm_threadgroups_per_grid3() {
  return metal::uint3{gridDim.x, gridDim.y, gridDim.z};
}
__device__ inline metal::uint3 jm_threads_per_threadgroup3() {
  return metal::uint3{blockDim.x, 1u, 1u};
}
__device__ inline metal::uint3 jm_thread_position_in_threadgroup3() {
  return metal::uint3{threadIdx.x, 0u, 0u};
}
__device__ inline metal::uint3 jm_thread_position_in_grid3() {
  return metal::uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y, blockIdx.z};
}

}  // namespace jm_kernels
