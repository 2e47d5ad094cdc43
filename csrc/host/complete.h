// Orthonormal completion: the last resort of every route, for columns that carry no direction.
#pragma once

#include <cstdint>

#include "csrc/host/simd.h"

namespace jml::host::JML_ISA {

// Columns of q (planes re, im; column c at q + c * col_stride, plane 1 at + plane_stride) that are
// not null are orthonormal; give each null one a unit vector orthogonal to all before it.
// Gram-Schmidt, twice, on the coordinate axis that the present columns span least (its remainder is
// >= 1/rows).
template <class T, bool Complex>
void complete_columns(T* q, int64_t rows, int64_t cols, int64_t col_stride, int64_t plane_stride,
                      const uint8_t* null, T* work) {
  T* leverage = work;  // squared norm of each row over the columns present
  for (int64_t i = 0; i < rows; ++i) leverage[i] = 0;
  auto add_leverage = [&](int64_t c) {
    const T* x = q + c * col_stride;
    for (int64_t i = 0; i < rows; ++i) {
      leverage[i] += x[i] * x[i];
      if constexpr (Complex) leverage[i] += x[plane_stride + i] * x[plane_stride + i];
    }
  };
  for (int64_t c = 0; c < cols; ++c) {
    if (!null[c]) add_leverage(c);
  }
  for (int64_t c = 0; c < cols; ++c) {
    if (!null[c]) continue;
    int64_t axis = 0;
    for (int64_t i = 1; i < rows; ++i) {
      if (leverage[i] < leverage[axis]) axis = i;
    }
    T* x = q + c * col_stride;
    for (int64_t i = 0; i < rows; ++i) {
      x[i] = 0;
      if constexpr (Complex) x[plane_stride + i] = 0;
    }
    x[axis] = 1;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t d = 0; d < cols; ++d) {
        if (null[d] && d >= c) continue;
        const T* y = q + d * col_stride;
        T re = 0, im = 0;  // y^H x
        for (int64_t i = 0; i < rows; ++i) {
          re += y[i] * x[i];
          if constexpr (Complex) {
            re += y[plane_stride + i] * x[plane_stride + i];
            im += y[i] * x[plane_stride + i] - y[plane_stride + i] * x[i];
          }
        }
        for (int64_t i = 0; i < rows; ++i) {
          x[i] -= re * y[i];
          if constexpr (Complex) {
            x[i] += im * y[plane_stride + i];
            x[plane_stride + i] -= re * y[plane_stride + i] + im * y[i];
          }
        }
      }
      T norm2 = 0;
      for (int64_t i = 0; i < rows; ++i) {
        norm2 += x[i] * x[i];
        if constexpr (Complex) norm2 += x[plane_stride + i] * x[plane_stride + i];
      }
      const T inv = T(1) / __builtin_sqrt(norm2);
      for (int64_t i = 0; i < rows; ++i) {
        x[i] *= inv;
        if constexpr (Complex) x[plane_stride + i] *= inv;
      }
    }
    add_leverage(c);
  }
}

}  // namespace jml::host::JML_ISA
