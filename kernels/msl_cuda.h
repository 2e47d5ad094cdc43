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
//   barriers      threadgroup_barrier(f)       __syncthreads()
//                 simdgroup_barrier(f)         __syncwarp()
//   simd          simd_shuffle*, simd_any ...  __shfl_*_sync, __any_sync over all 32 lanes
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

}  // namespace metal

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
