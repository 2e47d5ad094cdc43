// Elements as they lie in XLA's buffers: one planar view of the six dtypes.
#pragma once

#include <cstdint>

#include "csrc/host/simd.h"
#include "csrc/host/svd.h"

namespace jml::host::JML_ISA {

// A storage format: Real is what the arithmetic runs in, Stored what one plane of an element is.
template <class StoredT, class RealT, bool IsComplex>
struct Format {
  using Stored = StoredT;
  using Real = RealT;
  static constexpr bool kComplex = IsComplex;
  static constexpr int kPlanes = IsComplex ? 2 : 1;
};
struct BF16 {
  uint16_t bits;
};
using FormatF16 = Format<_Float16, float, false>;
using FormatBF16 = Format<BF16, float, false>;
using FormatF32 = Format<float, float, false>;
using FormatF64 = Format<double, double, false>;
using FormatC64 = Format<float, float, true>;
using FormatC128 = Format<double, double, true>;

// Calls fn with the Format of a dtype.
template <class Fn>
inline auto with_format(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kF16:
      return fn(FormatF16{});
    case DType::kBF16:
      return fn(FormatBF16{});
    case DType::kF32:
      return fn(FormatF32{});
    case DType::kF64:
      return fn(FormatF64{});
    case DType::kC64:
      return fn(FormatC64{});
    case DType::kC128:
      break;
  }
  return fn(FormatC128{});
}

template <class T>
JML_INLINE T widen(T x) {
  return x;
}
JML_INLINE float widen(_Float16 x) { return float(x); }
JML_INLINE float widen(BF16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
template <class S>
struct Narrow {
  static JML_INLINE S from(S x) { return x; }
};
template <>
struct Narrow<_Float16> {
  static JML_INLINE _Float16 from(float x) { return _Float16(x); }
};
template <>
struct Narrow<BF16> {
  static JML_INLINE BF16 from(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};  // stay a NaN
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
  }
};

template <class F>
JML_INLINE typename F::Stored narrow(typename F::Real x) {
  return Narrow<typename F::Stored>::from(x);
}

template <class F>
JML_INLINE void fill_nan(typename F::Stored* p, int64_t elements) {
  const typename F::Stored nan = narrow<F>(__builtin_nanf(""));
  for (int64_t i = 0; i < elements * F::kPlanes; ++i) p[i] = nan;
}

// A factor Q with orthonormal columns as it is written out: either Q itself, row-major with `cols`
// columns, or Q^H. Column r of Q goes to column r of the first and to row r of the second.
template <class F>
struct FactorOut {
  typename F::Stored* p;
  int64_t stride;  // between rows of what is stored
  bool adjoint;

  JML_INLINE void put(int64_t row, int64_t col, typename F::Real re, typename F::Real im) const {
    typename F::Stored* q = p + (adjoint ? col * stride + row : row * stride + col) * F::kPlanes;
    q[0] = re;
    if constexpr (F::kComplex) q[1] = adjoint ? -im : im;
  }
};

// The problem with its long side first: X is a (m >= n), or its adjoint (m < n).
// X = Left S Right^H, so a's U and Vh are Left and Right^H, or Right and Left^H.
template <class F>
struct Oriented {
  using Stored = typename F::Stored;
  using Real = typename F::Real;
  const SvdTask& t;
  bool wide;
  int64_t rows, cols;  // of X: rows >= cols
  int64_t ku, kv;

  explicit Oriented(const SvdTask& task) : t(task) {
    wide = t.m < t.n;
    rows = wide ? t.n : t.m;
    cols = wide ? t.m : t.n;
    ku = t.full_matrices ? t.m : cols;
    kv = t.full_matrices ? t.n : cols;
  }
  const Stored* input(int64_t b) const {
    return static_cast<const Stored*>(t.a) + b * t.m * t.n * F::kPlanes;
  }
  // S is real whatever a is.
  Stored* values(int64_t b) const { return static_cast<Stored*>(t.s) + b * cols; }
  FactorOut<F> u(int64_t b) const {
    return {static_cast<Stored*>(t.u) + b * t.m * ku * F::kPlanes, ku, false};
  }
  FactorOut<F> vh(int64_t b) const {
    return {static_cast<Stored*>(t.vh) + b * kv * t.n * F::kPlanes, t.n, true};
  }
  FactorOut<F> left(int64_t b) const { return wide ? vh(b) : u(b); }
  FactorOut<F> right(int64_t b) const { return wide ? u(b) : vh(b); }

  void write_nan(int64_t b) const {
    for (int64_t i = 0; i < cols; ++i) values(b)[i] = __builtin_nanf("");
    if (!t.compute_uv) return;
    fill_nan<F>(u(b).p, t.m * ku);
    fill_nan<F>(vh(b).p, kv * t.n);
  }
};

}  // namespace jml::host::JML_ISA
