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

// Columns are rescaled between sweeps above this weight. Rotating one column with n - 1 others
// multiplies its weight by 2^(n - 1) at most, far less in practice.
template <class T>
inline constexpr T kHeavy = sizeof(T) == 4 ? T(0x1p40) : T(0x1p400);

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

// One pair of columns a lane. Columns are kept scaled: the true column is the stored one divided by
// the square root of its weight, and the weight is the squared length of its column of V. It is
// tracked, never measured: rounding in V would get into the singular values (2 ulp at n = 64).
template <class T, bool Complex>
struct Inner {
  Vec<T> xx, yy;  // squared norms of the true columns
  Vec<T> wx, wy;  // weights
  Vec<T> re, im;  // x^H y of the stored columns
};

// The unitary rotation that makes a pair orthogonal, as a fast scaled rotation (Gentleman 1973,
// Hammarling 1974; xGESVJ rotates with xROTM for the same reason): half the products of a plain
// one.
//   x <- x - conj(a) y,   y <- y + b x,   then both weights grow by 1 + conj(a) b.
// With unit columns a = b = p tan(theta), p the phase of x^H y. Stored columns of V stay orthogonal
// if b wx = a wy to working precision, whatever the angle is: so the angle itself may be rough and
// approximate reciprocals are enough for it.
template <class T, bool Complex>
struct Rotation {
  Vec<T> a, b;
};
template <class T>
struct Rotation<T, true> {
  Vec<T> a, ai, b, bi;
};

// A weight and what rounding took from it. A weight that drifts by d makes columns of V that turn
// by an angle theta d sin(2 theta) / 2 short of orthogonal: at n = 128 that cost 7 ulp of the
// singular values.
template <class T>
struct Weight {
  Vec<T> w, lost;

  JML_INLINE void grow(Vec<T> growth) {
    const Vec<T> sum = w + w * growth;
    lost += lost * growth + (w * growth + (w - sum));
    w = sum + lost;
    lost += sum - w;
  }
};

template <class T, bool Complex>
struct Angle {
  Rotation<T, Complex> r;  // the identity in lanes that are not active
  Vec<T> change;           // what yy gains and xx loses: tan(theta) |x^H y|
  Vec<T> growth;           // conj(a) b = tan(theta)^2
  Vec<T> cosine;           // |x^H y| / (|x| |y|); 0 for a pair with a null column
  Vec<T> tangent;
  Mask<T> active;
};

template <class T, bool Complex>
JML_INLINE Angle<T, Complex> angle(const Inner<T, Complex>& g, Vec<T> tol, Mask<T> enabled) {
  Angle<T, Complex> r;
  const Vec<T> one = splat<T>(1), zero = splat<T>(0);
  const Vec<T> unscale = approx_rsqrt(g.wx) * approx_rsqrt(g.wy);
  const Vec<T> re = g.re * unscale;
  Vec<T> mag, pr, pi;
  if constexpr (Complex) {
    // Scaled by the larger part: squares of a tiny product would underflow, and raised first, or
    // its reciprocal would overflow.
    const Vec<T> im = g.im * unscale;
    Vec<T> ar = abs_<T>(re), ai = abs_<T>(im);
    Vec<T> big = max(ar, ai);
    constexpr T kRaise = sizeof(T) == 4 ? T(0x1p64) : T(1);
    Mask<T> some = big > kNullNorm2<T> * kUlp<T>;
    Vec<T> inv = one / (some ? big * kRaise : one);
    Vec<T> nr = some ? re * kRaise * inv : one, ni = some ? im * kRaise * inv : zero;
    Vec<T> h = sqrt(nr * nr + ni * ni);
    mag = some ? big * h : zero;
    pr = nr / h;
    pi = ni / h;
  } else {
    mag = abs_<T>(re);
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
  r.tangent = abs_<T>(t);
  r.change = t * mag;
  if constexpr (!Complex) t = re < zero ? -t : t;
  const Vec<T> a = t * (g.wx * unscale), ratio = g.wy / g.wx;
  if constexpr (Complex) {
    r.r.a = a * pr;
    r.r.ai = a * pi;
    r.r.b = r.r.a * ratio;
    r.r.bi = r.r.ai * ratio;
    r.growth = r.r.a * r.r.b + r.r.ai * r.r.bi;
  } else {
    r.r.a = a;
    r.r.b = a * ratio;
    r.growth = a * r.r.b;
  }
  return r;
}

}  // namespace jml::host::JML_ISA
