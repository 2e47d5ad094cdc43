// What the static checker (tools/msl/check.py) puts in place of <metal_stdlib>: declarations only,
// with address spaces as Clang's own, so that Clang tells what mixes them. Vectors are Clang's.
#pragma once

#include <stdint.h>

#include <type_traits>

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((__always_inline__))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;
typedef half float16_t;
typedef decltype(sizeof(0)) size_t;

#define JM_VECTORS(T)                                          \
  typedef T T##2 __attribute__((ext_vector_type(2)));          \
  typedef T T##3 __attribute__((ext_vector_type(3)));          \
  typedef T T##4 __attribute__((ext_vector_type(4)));          \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2))); \
  typedef T packed_##T##3 __attribute__((ext_vector_type(3))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4)));
JM_VECTORS(char)
JM_VECTORS(uchar)
JM_VECTORS(short)
JM_VECTORS(ushort)
JM_VECTORS(int)
JM_VECTORS(uint)
JM_VECTORS(long)
JM_VECTORS(ulong)
JM_VECTORS(float)
JM_VECTORS(half)
JM_VECTORS(bfloat)
JM_VECTORS(bool)
#undef JM_VECTORS

namespace metal {

using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::decay_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_arithmetic_v;
using std::is_const_v;
using std::is_convertible_v;
using std::is_floating_point;
using std::is_integral;
using std::is_pointer_v;
using std::is_same;
using std::is_same_v;
using std::is_signed_v;
using std::is_unsigned_v;
using std::remove_const_t;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;
template <typename T>
constexpr bool is_integral_v = std::is_integral_v<T>;
template <typename T>
constexpr bool is_floating_point_v =
    std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;

template <typename... T>
using _disjunction = std::disjunction<T...>;
template <typename T>
using uniform = T;
template <typename T>
T make_uniform(T x);

template <typename T>
struct remove_addrspace {
  typedef T type;
};
template <typename T>
struct remove_addrspace<device T> {
  typedef T type;
};
template <typename T>
struct remove_addrspace<constant T> {
  typedef T type;
};
template <typename T>
struct remove_addrspace<threadgroup T> {
  typedef T type;
};
template <typename T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <typename T>
struct numeric_limits {
  static constexpr T min() { return T(); }
  static constexpr T max() { return T(); }
  static constexpr T lowest() { return T(); }
  static constexpr T infinity() { return T(); }
  static constexpr T epsilon() { return T(); }
  static constexpr T quiet_NaN() { return T(); }
  static constexpr int digits = 24;
};

template <typename T, size_t N>
struct array {
  T items[N];
  T& operator[](size_t i) { return items[i]; }
  const T& operator[](size_t i) const { return items[i]; }
};

template <typename To, typename From>
To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, x);
}
template <typename T>
T select(T a, T b, bool c);
template <typename T, typename U>
T select(T a, T b, U c);

// Elementwise functions take scalars and vectors alike, and any mix of scalars as in MSL.
#define JM_1(name)      \
  template <typename T> \
  T name(T x);
#define JM_2(name)                  \
  template <typename T, typename U> \
  auto name(T x, U y) -> decltype(x + y);
#define JM_3(name)                              \
  template <typename T, typename U, typename V> \
  auto name(T x, U y, V z) -> decltype(x + y + z);
// clang-format off
#define JM_MATH                                                                              \
  JM_1(abs) JM_1(fabs) JM_1(sqrt) JM_1(rsqrt) JM_1(exp) JM_1(exp2) JM_1(exp10) JM_1(log)     \
  JM_1(log2) JM_1(log10) JM_1(sin) JM_1(cos) JM_1(tan) JM_1(asin) JM_1(acos) JM_1(atan)      \
  JM_1(sinh) JM_1(cosh) JM_1(tanh) JM_1(asinh) JM_1(acosh) JM_1(atanh) JM_1(ceil)            \
  JM_1(floor) JM_1(round) JM_1(rint) JM_1(trunc) JM_1(fract) JM_1(sign) JM_2(pow) JM_2(powr) \
  JM_2(fmod) JM_2(atan2) JM_2(copysign) JM_2(divide) JM_2(fmin) JM_2(fmax) JM_2(min)         \
  JM_2(max) JM_3(clamp) JM_3(fma)
// clang-format on
JM_MATH
namespace fast {
JM_MATH
}
namespace precise {
JM_MATH
}
JM_1(normalize)
JM_1(popcount)
JM_1(clz)
JM_1(ctz)
JM_1(reverse_bits)
JM_2(dot)
JM_2(mulhi)
JM_2(ldexp)
JM_3(mix)
JM_3(mad)
template <typename T>
bool isnan(T x);
template <typename T>
bool isinf(T x);
template <typename T>
bool isfinite(T x);
template <typename T>
bool signbit(T x);
template <typename T>
bool any(T x);
template <typename T>
bool all(T x);

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum memory_order { memory_order_relaxed };
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
void atomic_thread_fence(mem_flags, memory_order, thread_scope);

#define JM_SIMD_1(name) \
  template <typename T> \
  T name(T x);
JM_SIMD_1(simd_sum)
JM_SIMD_1(simd_product)
JM_SIMD_1(simd_max)
JM_SIMD_1(simd_min)
JM_SIMD_1(simd_and)
JM_SIMD_1(simd_or)
JM_SIMD_1(simd_xor)
JM_SIMD_1(simd_prefix_inclusive_sum)
JM_SIMD_1(simd_prefix_exclusive_sum)
JM_SIMD_1(simd_prefix_inclusive_product)
JM_SIMD_1(simd_prefix_exclusive_product)
JM_SIMD_1(simd_broadcast_first)
JM_SIMD_1(quad_sum)
#define JM_SIMD_2(name) \
  template <typename T> \
  T name(T x, ushort i);
JM_SIMD_2(simd_shuffle)
JM_SIMD_2(simd_shuffle_xor)
JM_SIMD_2(simd_shuffle_up)
JM_SIMD_2(simd_shuffle_down)
JM_SIMD_2(simd_shuffle_rotate_up)
JM_SIMD_2(simd_shuffle_rotate_down)
JM_SIMD_2(simd_broadcast)
JM_SIMD_2(quad_shuffle)
JM_SIMD_2(quad_shuffle_xor)
template <typename T>
T simd_shuffle_and_fill_up(T x, T fill, ushort i);
template <typename T>
T simd_shuffle_and_fill_down(T x, T fill, ushort i);
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();
struct simd_vote {
  typedef ulong vote_t;
  simd_vote(vote_t = 0);
  explicit operator vote_t() const;
  bool any() const;
  bool all() const;
};
simd_vote simd_ballot(bool);

template <typename T>
struct atomic {
  T value;
};
#define JM_ATOMIC_OP(name, S)       \
  template <typename T, typename U> \
  T name(volatile S atomic<T>* object, U operand, memory_order);
#define JM_ATOMIC_OPS(S)                                                                           \
  JM_ATOMIC_OP(atomic_fetch_add_explicit, S)                                                       \
  JM_ATOMIC_OP(atomic_fetch_sub_explicit, S)                                                       \
  JM_ATOMIC_OP(atomic_fetch_min_explicit, S)                                                       \
  JM_ATOMIC_OP(atomic_fetch_max_explicit, S)                                                       \
  JM_ATOMIC_OP(atomic_fetch_and_explicit, S)                                                       \
  JM_ATOMIC_OP(atomic_fetch_or_explicit, S)                                                        \
  JM_ATOMIC_OP(atomic_exchange_explicit, S)                                                        \
  JM_ATOMIC_OP(atomic_store_explicit, S)                                                           \
  template <typename T>                                                                            \
  T atomic_load_explicit(const volatile S atomic<T>* object, memory_order);                        \
  template <typename T, typename U>                                                                \
  bool atomic_compare_exchange_weak_explicit(volatile S atomic<T>* object, T* expected, U desired, \
                                             memory_order, memory_order);
JM_ATOMIC_OPS(device)
JM_ATOMIC_OPS(threadgroup)
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

template <typename T, int C, int R>
struct simdgroup_matrix {
  simdgroup_matrix();
  explicit simdgroup_matrix(T);
  vec<T, C * R / 32> thread_elements_;
  vec<T, C * R / 32>& thread_elements();
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <typename T, int C, int R = C, typename U>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(U);
template <typename M, typename P, typename... A>
void simdgroup_load(M&, P, A...);
template <typename M, typename P, typename... A>
void simdgroup_store(M, P, A...);
template <typename D, typename A, typename B>
void simdgroup_multiply(D&, A, B);
template <typename D, typename A, typename B, typename C>
void simdgroup_multiply_accumulate(D&, A, B, C);

#undef JM_1
#undef JM_2
#undef JM_3
#undef JM_MATH
#undef JM_SIMD_1
#undef JM_SIMD_2
#undef JM_ATOMIC_OP
#undef JM_ATOMIC_OPS

}  // namespace metal

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define M_PI_F 3.14159265f
#define M_LN2_F 0.693147181f
#define M_LN10_F 2.30258509f
#define M_SQRT2_F 1.41421356f
#define M_E_F 2.71828183f
#define M_LOG2E_F 1.44269504f
