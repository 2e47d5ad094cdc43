// Jacobi rotations, many pairs of columns at a time: lane l holds one pair (x, y).
#pragma once

#include "csrc/host/simd.h"

namespace jml::host::JML_ISA {

// Columns whose squared norm is below this (the matrix is scaled to max |a| in [1, 2)) are rounding
// noise of a rank-deficient matrix: they are left alone and completed at the end. Products of two
// live norms stay above the smallest subnormal by ulp and more.
template <class T>
inline constexpr T kNullNorm2 = sizeof(T) == 4 ? T(0x1p-112) : T(0x1p-400);
template <class T>
inline constexpr T kUlp = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);

// Columns count as orthogonal below this cosine. Inside a cluster a cosine is an error of the
// singular value, so the sqrt(m) ulp / 2 of xGESVJ (Gaussian: no difference) would cost 6 ulp at m
// = 128.
template <class T>
JML_INLINE T cosine_tolerance(int64_t m) {
  const T root = T(__builtin_sqrt(double(m)) / 4);
  return kUlp<T> * (root > 1 ? root : T(1));
}

// A bound on the cosines after a sweep that met and removed these. Not cosine * tangent: a tiny
// column has a tiny tangent while its cosine is near 1, and removing what two such columns share
// with a large one leaves cosine^2 between them.
template <class X, class T>
JML_INLINE X next_cosine(X cosine, X tangent, T root_n) {
  return cosine * max(cosine, tangent) * root_n;
}

// x^H y and the squared norms of one pair a lane.
template <class T, bool Complex>
struct Inner {
  Vec<T> xx, yy, re, im;
};

// The unitary rotation that makes a pair orthogonal, in Rutishauser's form:
//   x <- x - s (conj(p) y + tau x),   y <- y + s (p x - tau y),
// p the phase of x^H y (1 when real), tau = tan(theta / 2), s = sin(theta). Only s must agree with
// tau to working precision for the update to be unitary; the angle itself may be rough, which is
// why approximate reciprocals are enough for it.
template <class T, bool Complex>
struct Rotation {
  Vec<T> s, tau;
};
template <class T>
struct Rotation<T, true> {
  Vec<T> s, tau, pr, pi;
};

template <class T, bool Complex>
struct Angle {
  Rotation<T, Complex> r;  // the identity in lanes that are not active
  Vec<T> change;           // what yy gains and xx loses: tan(theta) |x^H y|
  Vec<T> cosine;           // |x^H y| / (|x| |y|); 0 for a pair with a null column
  Vec<T> tangent;
  Mask<T> active;
};

template <class T, bool Complex>
JML_INLINE Angle<T, Complex> angle(const Inner<T, Complex>& g, Vec<T> tol, Mask<T> enabled) {
  Angle<T, Complex> r;
  const Vec<T> one = splat<T>(1), zero = splat<T>(0);
  Vec<T> mag;
  if constexpr (Complex) {
    // Scaled by the larger part: squares of a tiny product would underflow, and raised first, or
    // its reciprocal would overflow.
    Vec<T> ar = abs_<T>(g.re), ai = abs_<T>(g.im);
    Vec<T> big = max(ar, ai);
    constexpr T kRaise = sizeof(T) == 4 ? T(0x1p64) : T(1);
    Mask<T> some = big > kNullNorm2<T> * kUlp<T>;
    Vec<T> inv = one / (some ? big * kRaise : one);
    Vec<T> nr = some ? g.re * kRaise * inv : one, ni = some ? g.im * kRaise * inv : zero;
    Vec<T> h = sqrt(nr * nr + ni * ni);
    mag = some ? big * h : zero;
    r.r.pr = nr / h;
    r.r.pi = ni / h;
  } else {
    mag = abs_<T>(g.re);
  }
  Mask<T> live = (g.xx > kNullNorm2<T>)&(g.yy > kNullNorm2<T>)&enabled;
  Vec<T> cosine = mag * approx_rsqrt(g.xx) * approx_rsqrt(g.yy);
  r.cosine = live ? cosine : zero;
  r.active = live & (cosine > tol);
  // tan(theta) = 1 / (z + sqrt(1 + z^2)) with the sign of z: the smaller root.
  // Scaled so that the reciprocal of a tiny product stays finite.
  constexpr T kUp = sizeof(T) == 4 ? T(0x1p80) : T(1);
  Vec<T> z = (g.yy - g.xx) * kUp * approx_rcp((mag + mag) * kUp);
  Vec<T> az = abs_<T>(z);
  Vec<T> capped = min(az, splat<T>(sizeof(T) == 4 ? T(1e9) : T(1e100)));
  Vec<T> h = one + capped * capped;
  Vec<T> t = approx_rcp(az + max(h * approx_rsqrt(h), az));
  t = z < zero ? -t : t;
  t = r.active ? t : zero;
  Vec<T> h2 = one + t * t;
  Vec<T> tau = t * approx_rcp(one + h2 * approx_rsqrt(h2));
  r.r.tau = tau;
  r.r.s = (tau + tau) / (one + tau * tau);
  r.tangent = abs_<T>(t);
  r.change = t * mag;
  if constexpr (!Complex) {
    // p = -1 folds into s and tau: negating both keeps s * tau and turns p y into y.
    const Vec<T> sign = g.re < zero ? -one : one;
    r.r.s = r.r.s * sign;
    r.r.tau = tau * sign;
  }
  return r;
}

}  // namespace jml::host::JML_ISA
