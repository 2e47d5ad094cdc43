// Jacobi rotations, many pairs of columns at a time: lane l holds one pair (x, y).
#pragma once

#include "csrc/host/simd.h"

namespace jml::host::JML_ISA {

// Columns whose squared norm is below this (the matrix is scaled to max |a| in [1, 2)) are rounding
// noise of a rank-deficient matrix: they are left alone and completed at the end. It also keeps every
// product of two live norms, and its reciprocal, a normal number.
template <class T>
inline constexpr T kNullNorm2 = sizeof(T) == 4 ? T(0x1p-100) : T(0x1p-800);
template <class T>
inline constexpr T kUlp = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);

// x^H y and the squared norms of one pair a lane.
template <class T, bool Complex>
struct Inner {
  Vec<T> xx, yy, re, im;
};

// The unitary rotation that makes a pair orthogonal, in Rutishauser's form:
//   x <- x - s (conj(p) y + tau x),   y <- y + s (p x - tau y),
// p the phase of x^H y (1 when real), tau = tan(theta / 2), s = sin(theta). Only s must agree with
// tau to working precision for the update to be unitary; the angle itself may be rough, which is why
// approximate reciprocals are enough for it.
template <class T, bool Complex>
struct Rotation {
  Vec<T> s, tau, pr, pi;
  Vec<T> change;  // what yy gains and xx loses: tan(theta) |x^H y|
  Vec<T> cosine;  // |x^H y| / (|x| |y|); 0 for a pair with a null column
  Vec<T> tangent;
  Mask<T> active;
};

template <class T, bool Complex>
JML_INLINE Rotation<T, Complex> rotation(const Inner<T, Complex>& g, Vec<T> tol, Mask<T> enabled) {
  Rotation<T, Complex> r;
  const Vec<T> one = splat<T>(1), zero = splat<T>(0);
  Vec<T> mag;
  if constexpr (Complex) {
    // Scaled by the larger part: squares of a tiny product would underflow.
    Vec<T> ar = abs_<T>(g.re), ai = abs_<T>(g.im);
    Vec<T> big = max(ar, ai);
    Vec<T> inv = big > zero ? one / big : zero;
    Vec<T> nr = g.re * inv, ni = g.im * inv;
    Vec<T> h = sqrt(nr * nr + ni * ni);
    Vec<T> ih = h > zero ? one / h : zero;
    mag = big * h;
    r.pr = nr * ih;
    r.pi = ni * ih;
  } else {
    mag = abs_<T>(g.re);
    r.pr = g.re < zero ? -one : one;
    r.pi = zero;
  }
  Mask<T> live = (g.xx > kNullNorm2<T>)&(g.yy > kNullNorm2<T>)&enabled;
  Vec<T> cosine = mag * approx_rsqrt(g.xx) * approx_rsqrt(g.yy);
  r.cosine = live ? cosine : zero;
  r.active = live & (cosine > tol);
  // tan(theta) = 1 / (z + sqrt(1 + z^2)) with the sign of z: the smaller root.
  Vec<T> z = (g.yy - g.xx) * approx_rcp(mag + mag);
  Vec<T> az = abs_<T>(z);
  Vec<T> capped = min(az, splat<T>(sizeof(T) == 4 ? T(1e9) : T(1e100)));
  Vec<T> h = one + capped * capped;
  Vec<T> t = approx_rcp(az + max(h * approx_rsqrt(h), az));
  t = z < zero ? -t : t;
  t = r.active ? t : zero;
  Vec<T> h2 = one + t * t;
  Vec<T> tau = t * approx_rcp(one + h2 * approx_rsqrt(h2));
  r.tau = tau;
  r.s = (tau + tau) / (one + tau * tau);
  r.tangent = abs_<T>(t);
  r.change = t * mag;
  if constexpr (!Complex) {
    // Fold the sign into s so that real updates need no phase: x -= s(y + tau x) with both negated
    // keeps s * tau, and turns conj(p) y into y.
    r.s = r.s * r.pr;
    r.tau = r.tau * r.pr;
  }
  return r;
}

// One rotation of one pair, one vector of rows; for real data xi and yi are not used.
template <class T, bool Complex>
JML_INLINE void rotate(const Rotation<T, Complex>& r, Vec<T>& xr, Vec<T>& xi, Vec<T>& yr,
                       Vec<T>& yi) {
  if constexpr (Complex) {
    Vec<T> qr = r.pr * yr + r.pi * yi, qi = r.pr * yi - r.pi * yr;  // conj(p) y
    Vec<T> wr = r.pr * xr - r.pi * xi, wi = r.pr * xi + r.pi * xr;  // p x
    xr -= r.s * (qr + r.tau * xr);
    xi -= r.s * (qi + r.tau * xi);
    yr += r.s * (wr - r.tau * yr);
    yi += r.s * (wi - r.tau * yi);
  } else {
    Vec<T> tx = yr + r.tau * xr, ty = xr - r.tau * yr;
    xr -= r.s * tx;
    yr += r.s * ty;
  }
}

// Pair k of a round of the circle method over `even` columns: p < q. False for the bye of an odd n.
JML_INLINE bool round_robin_pair(int64_t even, int64_t round, int64_t k, int64_t n, int64_t& p,
                                 int64_t& q) {
  const int64_t ring = even - 1;
  int64_t a = k == 0 ? ring : round + k;
  int64_t b = round - k;
  if (k != 0 && a >= ring) a -= ring;
  if (b < 0) b += ring;
  p = a < b ? a : b;
  q = a < b ? b : a;
  return q < n;
}

}  // namespace jml::host::JML_ISA
