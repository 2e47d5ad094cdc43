// One vocabulary of short vectors for every instruction-set level, on GCC/Clang vector extensions.
// Included only by csrc/host/*.cc, which are compiled once per level inside `jml::host::JML_ISA`:
// nothing here may have linkage outside that namespace, or the linker could pick a copy that holds
// instructions the machine lacks. For the same reason no std:: templates are used in these files.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jml::host::JML_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct SimdOf;
template <>
struct SimdOf<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
  using Bits = int32_t;
  static constexpr int kMantissaBits = 23;
};
template <>
struct SimdOf<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
  using Bits = int64_t;
  static constexpr int kMantissaBits = 52;
};
template <class T>
using Vec = typename SimdOf<T>::Vec;
// All bits set in lanes that hold, zero elsewhere.
template <class T>
using Mask = typename SimdOf<T>::Mask;
template <class T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

#define JML_INLINE inline __attribute__((always_inline))

JML_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
JML_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <class T>
JML_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
JML_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// A store of a large result to an aligned address, which is not read before; store_fence() behind
// them, or other threads may not see it.
template <class T>
JML_INLINE void store_past_caches(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  store<T>(p, v);
#endif
}
JML_INLINE void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Bit l of the result is lane l of the mask.
JML_INLINE unsigned bits(Mask<float> m) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)m);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_ps((__m256)m));
#elif defined(__x86_64__)
  return unsigned(_mm_movemask_ps((__m128)m));
#elif defined(__aarch64__)
  return vaddvq_u32(vandq_u32((uint32x4_t)m, uint32x4_t{1, 2, 4, 8}));
#endif
}
JML_INLINE unsigned bits(Mask<double> m) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)m);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_pd((__m256d)m));
#elif defined(__x86_64__)
  return unsigned(_mm_movemask_pd((__m128d)m));
#elif defined(__aarch64__)
  return unsigned(vaddvq_u64(vandq_u64((uint64x2_t)m, uint64x2_t{1, 2})));
#endif
}
// Compilers differ in which of the 64-bit integers a comparison of doubles gives.
template <class M>
JML_INLINE bool any(M m) {
  if constexpr (sizeof(m[0]) == sizeof(float)) {
    return bits((Mask<float>)m) != 0;
  } else {
    return bits((Mask<double>)m) != 0;
  }
}

JML_INLINE Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Vec<float>)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (Vec<float>)vsqrtq_f32((float32x4_t)x);
#endif
}
JML_INLINE Vec<double> sqrt(Vec<double> x) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  return (Vec<double>)_mm_sqrt_pd((__m128d)x);
#elif defined(__aarch64__)
  return (Vec<double>)vsqrtq_f64((float64x2_t)x);
#endif
}

// 1/x and 1/sqrt(x) for rotation angles, never for data. An angle with relative error e leaves e
// times the cosine it removes, so a last sweep from cosines of sqrt(ulp) asks for e <= sqrt(ulp):
// 2^-11 in float, 2^-26 in double. Results for 0 and infinity are not used.
JML_INLINE Vec<float> approx_rcp(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_rcp14_ps((__m512)x);
#else
  return 1.0f / x;
#endif
}
JML_INLINE Vec<float> approx_rsqrt(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_rsqrt14_ps((__m512)x);
#else
  return 1.0f / sqrt(x);
#endif
}
JML_INLINE Vec<double> approx_rcp(Vec<double> x) {
#if defined(__AVX512F__)
  const Vec<double> y = (Vec<double>)_mm512_rcp14_pd((__m512d)x);
  return y * (2.0 - x * y);
#else
  return 1.0 / x;
#endif
}
JML_INLINE Vec<double> approx_rsqrt(Vec<double> x) {
#if defined(__AVX512F__)
  const Vec<double> y = (Vec<double>)_mm512_rsqrt14_pd((__m512d)x);
  return y * (1.5 - 0.5 * x * y * y);
#else
  return 1.0 / sqrt(x);
#endif
}

// x, in the form in which a compiler cannot merge it into a fused multiply-add.
template <class T>
JML_INLINE Vec<T> rounded(Vec<T> x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <class V>
JML_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
JML_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class T>
JML_INLINE Vec<T> abs_(Vec<T> x) {
  using Bits = typename SimdOf<T>::Bits;
  return (Vec<T>)((Mask<T>)x & ~(Bits(1) << (8 * sizeof(T) - 1)));
}

template <class T, int S, int... L>
JML_INLINE Vec<T> rotate_lanes(Vec<T> v, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(v, v, ((L + S) % kLanes<T>)...);
}
// Sum of the lanes.
template <class T, int S = kLanes<T> / 2>
JML_INLINE T sum(Vec<T> v) {
  if constexpr (S > 0) {
    return sum<T, S / 2>(v + rotate_lanes<T, S>(v, std::make_integer_sequence<int, kLanes<T>>{}));
  }
  return v[0];
}

// Block swap between two vectors at stride S: the 2x2 step that transposes and reductions repeat.
// lo holds a's lanes with (lane & S) == 0 and, in the other lanes, b's lanes S below; hi the rest.
template <class T, int S, int... L>
JML_INLINE void block_swap(Vec<T> a, Vec<T> b, Vec<T>& lo, Vec<T>& hi,
                           std::integer_sequence<int, L...>) {
  constexpr int W = kLanes<T>;
  lo = __builtin_shufflevector(a, b, ((L & S) ? W + L - S : L)...);
  hi = __builtin_shufflevector(a, b, ((L & S) ? W + L : L + S)...);
}
template <class T, int S>
JML_INLINE void block_swap(Vec<T> a, Vec<T> b, Vec<T>& lo, Vec<T>& hi) {
  block_swap<T, S>(a, b, lo, hi, std::make_integer_sequence<int, kLanes<T>>{});
}

// In-register transpose of kLanes x kLanes.
template <class T, int S = 1>
JML_INLINE void transpose(Vec<T>* r) {
  if constexpr (S < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & S) continue;
      Vec<T> lo, hi;
      block_swap<T, S>(r[i], r[i + S], lo, hi);
      r[i] = lo;
      r[i + S] = hi;
    }
    transpose<T, 2 * S>(r);
  }
}

// Lane l of the result is the sum of the lanes of r[l]. Destroys r.
template <class T, int S = 1>
JML_INLINE Vec<T> sum_each(Vec<T>* r) {
  if constexpr (S < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += 2 * S) {
      Vec<T> lo, hi;
      block_swap<T, S>(r[i], r[i + S], lo, hi);
      r[i] = lo + hi;
    }
    return sum_each<T, 2 * S>(r);
  }
  return r[0];
}

// 2^(biased - bias) for a biased exponent in [0, max]; 0 stands for the subnormal power below the
// smallest normal one, so that every finite input has an exact power of two that brings it to [1,
// 2).
template <class T>
JML_INLINE Vec<T> power_of_two(Mask<T> biased) {
  constexpr int kBits = SimdOf<T>::kMantissaBits;
  using Bits = typename SimdOf<T>::Bits;
  Mask<T> bits = biased << kBits;
  Mask<T> subnormal = Mask<T>{} + (Bits(1) << (kBits - 1));
  return (Vec<T>)(biased > 0 ? bits : subnormal);
}
template <class T>
inline constexpr int kMaxBiased = sizeof(T) == 4 ? 254 : 2046;
template <class T>
JML_INLINE Mask<T> biased_exponent(Vec<T> x) {
  constexpr int kBits = SimdOf<T>::kMantissaBits;
  return ((Mask<T>)x >> kBits) & (kMaxBiased<T> + 1);
}

}  // namespace jml::host::JML_ISA
