// The second algorithm: serial cyclic one-sided Jacobi with de Rijk's column pivoting, in double.
// Source: P. P. M. de Rijk, SIAM J. Sci. Stat. Comput. 10 (1989); convergence as LAPACK xGESVJ.
// Slow and simple on purpose: it runs only for a matrix on which a parallel ordering gave up.
#pragma once

#include "csrc/host/complete.h"
#include "csrc/host/matrix_io.h"

namespace jml::host::JML_ISA {

template <class F>
int64_t serial_scratch_bytes(const SvdTask& t) {
  Oriented<F> o(t);
  const int64_t left_cols = t.full_matrices && t.compute_uv ? o.rows : o.cols;
  const int64_t reals = (o.rows * left_cols + o.cols * o.cols) * F::kPlanes + o.rows + 2 * o.cols;
  return reals * int64_t(sizeof(double)) + left_cols + 64;
}

// Returns the status and writes every output of matrix b.
template <class F>
int32_t serial_svd(const Oriented<F>& o, int64_t b, void* scratch) {
  constexpr bool kComplex = F::kComplex;
  constexpr int P = F::kPlanes;
  const int64_t m = o.rows, n = o.cols;
  const int64_t left_cols = o.t.full_matrices && o.t.compute_uv ? m : n;
  double* x = static_cast<double*>(scratch);  // column c at x + c * m * P, planes m apart
  double* v = x + m * left_cols * P;
  double* work = v + n * n * P;
  double* norm2 = work + m;
  double* key = norm2 + n;
  uint8_t* null = reinterpret_cast<uint8_t*>(key + n);

  using Real = typename F::Real;
  const Real* a = o.input(b);
  double big = 0;
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      const Real* e = a + (o.wide ? j * o.t.n + i : i * o.t.n + j) * P;
      for (int p = 0; p < P; ++p) {
        double value = double(e[p]);
        x[(j * P + p) * m + i] = p == 1 && o.wide ? -value : value;
        const double mag = __builtin_fabs(value);
        if (mag > big) big = mag;
      }
    }
  }
  int exponent = 0;
  if (big > 0) __builtin_frexp(big, &exponent);
  // Two factors, because one power of two can leave the range of double at its ends.
  const double up = __builtin_ldexp(1.0, -exponent / 2);
  const double up2 = __builtin_ldexp(1.0, -exponent - (-exponent / 2));
  for (int64_t i = 0; i < m * n * P; ++i) x[i] = x[i] * up * up2;
  for (int64_t i = 0; i < n * n * P; ++i) v[i] = 0;
  for (int64_t j = 0; j < n; ++j) v[j * P * n + j] = 1;

  auto norm_of = [&](int64_t j) {
    double s = 0;
    for (int64_t i = 0; i < m * P; ++i) s += x[j * P * m + i] * x[j * P * m + i];
    return s;
  };
  auto rotate_columns = [&](double* base, int64_t len, int64_t p, int64_t q, double s, double tau,
                            double pr, double pi) {
    double* xp = base + p * P * len;
    double* xq = base + q * P * len;
    for (int64_t i = 0; i < len; ++i) {
      if constexpr (kComplex) {
        const double ar = xp[i], ai = xp[len + i], br = xq[i], bi = xq[len + i];
        xp[i] = ar - s * (pr * br + pi * bi + tau * ar);
        xp[len + i] = ai - s * (pr * bi - pi * br + tau * ai);
        xq[i] = br + s * (pr * ar - pi * ai - tau * br);
        xq[len + i] = bi + s * (pr * ai + pi * ar - tau * bi);
      } else {
        const double a0 = xp[i], b0 = xq[i];
        xp[i] = a0 - s * (pr * b0 + tau * a0);
        xq[i] = b0 + s * (pr * a0 - tau * b0);
      }
    }
  };
  auto swap_columns = [&](double* base, int64_t len, int64_t p, int64_t q) {
    for (int64_t i = 0; i < len * P; ++i) {
      const double h = base[p * P * len + i];
      base[p * P * len + i] = base[q * P * len + i];
      base[q * P * len + i] = h;
    }
  };

  const double tol = __builtin_sqrt(double(m)) * double(kUlp<typename F::Real>) * 0.5;
  bool converged = n == 1;
  int sweep = 0;
  double off = 0;
  while (!converged && sweep < o.t.fallback_max_sweeps) {
    off = 0;
    ++sweep;
    for (int64_t j = 0; j < n; ++j) norm2[j] = norm_of(j);
    for (int64_t p = 0; p + 1 < n; ++p) {
      int64_t top = p;
      for (int64_t j = p + 1; j < n; ++j) {
        if (norm2[j] > norm2[top]) top = j;
      }
      if (top != p) {
        swap_columns(x, m, p, top);
        swap_columns(v, n, p, top);
        const double h = norm2[p];
        norm2[p] = norm2[top];
        norm2[top] = h;
      }
      for (int64_t q = p + 1; q < n; ++q) {
        if (norm2[q] <= kNullNorm2<double> || norm2[p] <= kNullNorm2<double>) continue;
        const double* xp = x + p * P * m;
        const double* xq = x + q * P * m;
        double re = 0, im = 0;
        for (int64_t i = 0; i < m; ++i) {
          re += xp[i] * xq[i];
          if constexpr (kComplex) {
            re += xp[m + i] * xq[m + i];
            im += xp[i] * xq[m + i] - xp[m + i] * xq[i];
          }
        }
        const double mag = kComplex ? __builtin_hypot(re, im) : __builtin_fabs(re);
        const double cosine = mag / (__builtin_sqrt(norm2[p]) * __builtin_sqrt(norm2[q]));
        if (cosine > off) off = cosine;
        if (!(cosine > tol)) continue;
        const double z = (norm2[q] - norm2[p]) / (2 * mag);
        const double az = __builtin_fabs(z);
        double t = 1 / (az + (az > 1e100 ? az : __builtin_sqrt(1 + az * az)));
        if (z < 0) t = -t;
        const double tau = t / (1 + __builtin_sqrt(1 + t * t));
        const double s = 2 * tau / (1 + tau * tau);
        rotate_columns(x, m, p, q, s, tau, re / mag, im / mag);
        if (o.t.compute_uv) rotate_columns(v, n, p, q, s, tau, re / mag, im / mag);
        norm2[p] -= t * mag;
        norm2[q] += t * mag;
      }
    }
    converged = off <= tol;
  }
  o.t.sweeps[b] += sweep;
  o.t.off_norm[b] = float(off);
  if (!converged) return kNotConverged;

  for (int64_t j = 0; j < n; ++j) key[j] = norm2[j] = norm_of(j);
  const double down = __builtin_ldexp(1.0, exponent / 2);
  const double down2 = __builtin_ldexp(1.0, exponent - exponent / 2);
  for (int64_t j = 0; j < left_cols; ++j) {
    null[j] = j >= n || norm2[j] <= kNullNorm2<double>;
    if (null[j]) continue;
    const double inv = 1 / __builtin_sqrt(norm2[j]);
    for (int64_t i = 0; i < m * P; ++i) x[j * P * m + i] *= inv;
  }
  if (o.t.compute_uv) {
    complete_columns<double, kComplex>(x, m, left_cols, m * P, m, null, work);
  }
  auto write = [&](const FactorOut<F>& out, const double* q, int64_t len, int64_t col, int64_t to) {
    const double* c = q + col * P * len;
    for (int64_t i = 0; i < len; ++i) out.put(i, to, Real(c[i]), Real(kComplex ? c[len + i] : 0));
  };
  for (int64_t r = 0; r < n; ++r) {
    int64_t top = 0;
    for (int64_t j = 1; j < n; ++j) {
      if (key[j] > key[top]) top = j;
    }
    key[top] = -1;
    o.values(b)[r] = Real(__builtin_sqrt(norm2[top]) * down * down2);
    if (!o.t.compute_uv) continue;
    write(o.left(b), x, m, top, r);
    write(o.right(b), v, n, top, r);
  }
  for (int64_t r = n; o.t.compute_uv && r < left_cols; ++r) write(o.left(b), x, m, r, r);
  return kConvergedSecond;
}

}  // namespace jml::host::JML_ISA
