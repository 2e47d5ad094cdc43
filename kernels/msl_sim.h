// Metal Shading Language as C++ for the simulator, which runs every thread as a fiber and judges
// what it does (JM_SIM_CHECKED 1) or only runs it (0).
//
//   MSL                                        here
//   entry point   [[kernel]] void f(...)       jm_entry_<i>(), written by tools/msl
//   pointers      device T*, threadgroup T*    jm_pointer<space, T>: spaces do not mix
//   scalars       constant P& [[buffer(i)]]    const P&
//   constants     constant float x = 1;        constexpr
//   specialised   [[function_constant(i)]]     static variable, set by compile()
//   scratch       [[threadgroup(0)]]           memory of its own, full of NaN at the start
//   ids           [[thread_index_in_...]]      jm_id(), jm_id3()
//   barriers      threadgroup_barrier(f)       all fibers of the group meet; f orders memory
//                 simdgroup_barrier(f)         all fibers of the simdgroup meet
//   simd          simd_shuffle*, simd_any ...  all 32 fibers meet and exchange
//   matrices      simdgroup_float8x8           two numbers a lane; all 32 fibers meet and exchange
//   arrays        T x[N], thread T (&x)[N]     jm_array<T, N>: every index is judged
//   vectors       uint2..4, float2..4, half2   structs with .x .y .z .w; uint4 aligned as in MSL
//   storage       half, bfloat                 16-bit structs, convert to and from float only
//   not in MSL    double, double2              of kernels in a table SVD_DOUBLE_VARIANTS alone
//   arithmetic    fma, sqrt, x / y             correctly rounded, denormals flushed
//                 rsqrt, fast::divide          correctly rounded here
//                 exp, tanh                    the C library's
//   unrolling     #pragma unroll               dropped
// Not in the dialect: see FORBIDDEN in tools/msl/parse.py.
#pragma once

#include <cstdint>
#include <type_traits>

#include "sim/runtime.h"

namespace {
namespace jm_msl {

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;
using jm_ids = ::jml::sim::Id;

enum class jm_space { device_, constant_, threadgroup_ };

// An index, and the line it was written on.
struct jm_index {
  template <typename I, typename = std::enable_if_t<std::is_integral_v<I> || std::is_enum_v<I>>>
  [[gnu::always_inline]] constexpr jm_index(I i, int at = __builtin_LINE())
      : value(static_cast<int64_t>(i)), line(at) {}
  int64_t value;
  int line;
};

// T x[N]. Always inline, as kernels that are judged once are not optimised.
#if JM_SIM_CHECKED
template <typename T, int N>
struct jm_array {
  [[gnu::always_inline]] constexpr T& operator[](const jm_index& i) {
    if (uint64_t(i.value) >= uint64_t(N)) ::jml::sim::array_out_of_bounds(i.line, i.value);
    return all[i.value];
  }
  [[gnu::always_inline]] constexpr const T& operator[](const jm_index& i) const {
    if (uint64_t(i.value) >= uint64_t(N)) ::jml::sim::array_out_of_bounds(i.line, i.value);
    return all[i.value];
  }
  T all[N];
};
#else
template <typename T, int N>
using jm_array = T[N];
#endif

// What p[i] is when it may be written.
template <typename T>
class jm_element {
 public:
  jm_element(T* p, ::jml::sim::Allocation* a, int line) : p_(p), a_(a), line_(line) {}
  operator T() const { return ::jml::sim::check_read(a_, p_, sizeof(T), line_) ? *p_ : T(); }
  const jm_element& operator=(const T& x) const {
    if (::jml::sim::check_write(a_, p_, sizeof(T), line_)) *p_ = x;
    return *this;
  }
  const jm_element& operator=(const jm_element& x) const { return *this = T(x); }
  jm_element(const jm_element&) = default;
  const jm_element& operator+=(const T& x) const { return *this = T(*this) + x; }
  const jm_element& operator-=(const T& x) const { return *this = T(*this) - x; }
  const jm_element& operator*=(const T& x) const { return *this = T(*this) * x; }

 private:
  T* p_;
  ::jml::sim::Allocation* a_;
  int line_;
};

template <jm_space S, typename T>
struct jm_pointer {
  T* p = nullptr;
  ::jml::sim::Allocation* a = nullptr;

  jm_pointer() = default;
  jm_pointer(decltype(nullptr)) {}
  jm_pointer(T* data, ::jml::sim::Allocation* allocation) : p(data), a(allocation) {}
  // T* to const T*, in the same space.
  template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T>>>
  jm_pointer(const jm_pointer<S, U>& other) : p(other.p), a(other.a) {}
  // (device float*)p: another type in the same space, only when it is asked for.
  template <typename U, typename = std::enable_if_t<!std::is_same_v<const U, T>>, typename = void>
  explicit jm_pointer(const jm_pointer<S, U>& other)
      : p(reinterpret_cast<T*>(other.p)), a(other.a) {}

  T* at(jm_index i) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) +
                                static_cast<uintptr_t>(i.value) * sizeof(T));
  }
#if JM_SIM_CHECKED
  auto operator[](jm_index i) const {
    if constexpr (std::is_const_v<T>) {
      using V = std::remove_const_t<T>;
      return ::jml::sim::check_read(a, at(i), sizeof(T), i.line) ? *at(i) : V();
    } else {
      return jm_element<T>(at(i), a, i.line);
    }
  }
#else
  T& operator[](jm_index i) const { return *at(i); }
#endif
  jm_pointer operator+(jm_index i) const { return jm_pointer(at(i), a); }
  jm_pointer& operator+=(jm_index i) { return *this = *this + i; }
  explicit operator bool() const { return p != nullptr; }
};

template <typename T>
auto jm_buffer(int index) {
  ::jml::sim::Bound b = ::jml::sim::bound_buffer(index);
  return jm_pointer<jm_space::device_, T>(static_cast<T*>(b.data), b.allocation);
}
template <typename T>
auto jm_scratch(int index) {
  ::jml::sim::Bound b = ::jml::sim::bound_threadgroup(index);
  return jm_pointer<jm_space::threadgroup_, T>(static_cast<T*>(b.data), b.allocation);
}
template <typename T>
const T& jm_params(int index) {
  return *static_cast<const T*>(::jml::sim::bound_params(index));
}

namespace metal {

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

template <typename To, typename From>
To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}

struct half {
  ushort bits;
  half() = default;
  explicit half(float x) {
    uint b = as_type<uint>(x), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
    if (a >= 0x47800000u) {  // 65536 and above, Inf, NaN
      bits = ushort(sign | (a > 0x7f800000u ? 0x7e00u : 0x7c00u));
    } else if (a < 0x38800000u) {  // half denormals: multiples of 2^-24
      float units = __builtin_fabsf(x) * 16777216.0f;
      uint whole = uint(units);
      float rest = units - float(whole);
      whole += rest > 0.5f || (rest == 0.5f && (whole & 1u)) ? 1u : 0u;
      bits = ushort(sign | whole);
    } else {
      uint r = a + 0xfffu + ((a >> 13) & 1u);
      bits = ushort(sign | ((r - 0x38000000u) >> 13));
    }
  }
  explicit operator float() const {
    uint sign = uint(bits & 0x8000u) << 16, e = (bits >> 10) & 31u, f = bits & 0x3ffu;
    if (e == 31u) return as_type<float>(sign | 0x7f800000u | (f << 13));
    if (e == 0u) {
      float x = float(f) * 5.9604645e-8f;  // 2^-24
      return sign != 0u ? -x : x;
    }
    return as_type<float>(sign | ((e + 112u) << 23) | (f << 13));
  }
};

struct half2 {
  half x, y;
};

struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit bfloat(float x) {
    uint b = as_type<uint>(x);
    bool nan = (b & 0x7fffffffu) > 0x7f800000u;
    bits = ushort((nan ? b | 0x400000u : b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
  explicit operator float() const { return as_type<float>(uint(bits) << 16); }
};

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float exp(float x) { return __builtin_expf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline double fabs(double x) { return __builtin_fabs(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }
inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
inline double max(double a, double b) { return __builtin_fmax(a, b); }
inline double min(double a, double b) { return __builtin_fmin(a, b); }
inline ulong max(ulong a, ulong b) { return a > b ? a : b; }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }
inline int clamp(int x, int low, int high) { return min(max(x, low), high); }
inline float clamp(float x, float low, float high) { return min(max(x, low), high); }
namespace fast {
inline float divide(float a, float b) { return a / b; }
inline double divide(double a, double b) { return a / b; }
}  // namespace fast

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline void threadgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  ::jml::sim::threadgroup_barrier(static_cast<int>(f), line);
}
inline void simdgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  ::jml::sim::simdgroup_barrier(static_cast<int>(f), line);
}

template <typename T>
uint64_t jm_pack(T x) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <typename T>
T jm_unpack(uint64_t bits) {
  T x;
  __builtin_memcpy(&x, &bits, sizeof(T));
  return x;
}

inline uint jm_lane() { return ::jml::sim::id(jm_ids::thread_index_in_simdgroup_, 0); }

template <typename T>
T jm_shuffle(T x, uint source, int line) {
  const uint64_t* all = ::jml::sim::meet(::jml::sim::Meet::shuffle_, jm_pack(x), line);
  ::jml::sim::note_lane(source, line);
  return jm_unpack<T>(all[source & 31u]);
}
template <typename T>
T simd_shuffle(T x, ushort lane, int line = __builtin_LINE()) {
  return jm_shuffle(x, lane, line);
}
template <typename T>
T simd_broadcast(T x, ushort lane, int line = __builtin_LINE()) {
  return jm_shuffle(x, lane, line);
}
template <typename T>
T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  return jm_shuffle(x, jm_lane() ^ mask, line);
}
// Past the end a lane keeps its own value.
template <typename T>
T simd_shuffle_up(T x, ushort delta, int line = __builtin_LINE()) {
  uint lane = jm_lane();
  return jm_shuffle(x, delta > lane ? lane : lane - delta, line);
}
template <typename T>
T simd_shuffle_down(T x, ushort delta, int line = __builtin_LINE()) {
  uint lane = jm_lane();
  return jm_shuffle(x, lane + delta > 31u ? lane : lane + delta, line);
}
inline bool simd_any(bool x, int line = __builtin_LINE()) {
  const uint64_t* all = ::jml::sim::meet(::jml::sim::Meet::vote_, x ? 1u : 0u, line);
  uint64_t any = 0;
  for (int i = 0; i < 32; ++i) any |= all[i];
  return any != 0;
}
inline bool simd_all(bool x, int line = __builtin_LINE()) {
  const uint64_t* all = ::jml::sim::meet(::jml::sim::Meet::vote_, x ? 1u : 0u, line);
  uint64_t every = 1;
  for (int i = 0; i < 32; ++i) every &= all[i];
  return every != 0;
}
template <typename T, typename F>
T jm_reduce(T x, F f, int line) {
  const uint64_t* all = ::jml::sim::meet(::jml::sim::Meet::reduce_, jm_pack(x), line);
  T part[32];
  for (int i = 0; i < 32; ++i) part[i] = jm_unpack<T>(all[i]);
  for (int o = 16; o > 0; o /= 2) {
    for (int i = 0; i < o; ++i) part[i] = f(part[i], part[i + o]);
  }
  return part[0];
}
template <typename T>
T simd_sum(T x, int line = __builtin_LINE()) {
  return jm_reduce(x, [](T a, T b) { return a + b; }, line);
}
template <typename T>
T simd_max(T x, int line = __builtin_LINE()) {
  return jm_reduce(x, [](T a, T b) { return max(a, b); }, line);
}
template <typename T>
T simd_min(T x, int line = __builtin_LINE()) {
  return jm_reduce(x, [](T a, T b) { return min(a, b); }, line);
}

struct alignas(16) ulong2 {
  ulong x, y;
  explicit ulong2(ulong both) : x(both), y(both) {}
};

// A lane has row lane / 4, columns 2 (lane % 4) and the next. Of what is loaded it knows all: that
// is exchanged once, and not in each product.
struct simdgroup_float8x8 {
  float2 own;
  float all[64];
  bool known = false;
  float2& thread_elements() {
    known = false;
    return own;
  }
};

inline void jm_exchange(simdgroup_float8x8& m, int line) {
  const uint64_t* pairs = ::jml::sim::meet(::jml::sim::Meet::matrix_, jm_pack(m.own), line);
  for (int i = 0; i < 32; ++i) {
    const float2 pair = jm_unpack<float2>(pairs[i]);
    m.all[2 * i] = pair.x;
    m.all[2 * i + 1] = pair.y;
  }
  m.known = true;
}

template <typename T, int COLUMNS, int ROWS>
simdgroup_float8x8 make_filled_simdgroup_matrix(float x, int line = __builtin_LINE()) {
  static_assert(std::is_same_v<T, float> && COLUMNS == 8 && ROWS == 8);
  simdgroup_float8x8 m;
  m.own = float2{x, x};
  jm_exchange(m, line);
  return m;
}

template <jm_space S, typename T>
void simdgroup_load(simdgroup_float8x8& m, jm_pointer<S, T> from, ulong pitch,
                    ulong2 origin = ulong2(0), bool transpose = false,
                    int line = __builtin_LINE()) {
  const ulong row = jm_lane() / 4u, column = jm_lane() % 4u * 2u;
  from = from + jm_index(origin.y * pitch + origin.x);
  const ulong at = transpose ? column * pitch + row : row * pitch + column;
  m.own.x = from[jm_index(at, line)];
  m.own.y = from[jm_index(at + (transpose ? pitch : 1ul), line)];
  jm_exchange(m, line);
}

template <jm_space S>
void simdgroup_store(const simdgroup_float8x8& m, jm_pointer<S, float> to, ulong pitch,
                     int line = __builtin_LINE()) {
  const ulong at = jm_lane() / 4u * pitch + jm_lane() % 4u * 2u;
  ::jml::sim::meet(::jml::sim::Meet::matrix_, 0, line);
  to[jm_index(at, line)] = m.own.x;
  to[jm_index(at + 1, line)] = m.own.y;
}

inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, simdgroup_float8x8& a,
                                          simdgroup_float8x8& b, const simdgroup_float8x8& c,
                                          int line = __builtin_LINE()) {
#if JM_SIM_CHECKED
  ::jml::sim::meet(::jml::sim::Meet::matrix_, 0, line);
#endif
  if (!a.known) jm_exchange(a, line);
  if (!b.known) jm_exchange(b, line);
  const float* row = a.all + jm_lane() / 4u * 8u;
  const float* columns = b.all + jm_lane() % 4u * 2u;
  float2 sum = c.own;
  for (int k = 0; k < 8; ++k) {
    sum.x = fma(row[k], columns[8 * k], sum.x);
    sum.y = fma(row[k], columns[8 * k + 1], sum.y);
  }
  d.own = sum;
  d.known = false;
}

}  // namespace metal

inline uint jm_id(jm_ids which) { return ::jml::sim::id(which, 0); }
inline metal::uint3 jm_id3(jm_ids which) {
  return {::jml::sim::id(which, 0), ::jml::sim::id(which, 1), ::jml::sim::id(which, 2)};
}

}  // namespace jm_msl
}  // namespace
