// What the two Jacobi layouts share: arithmetic on columns, and the order in which pairs are
// visited. A column is an array of vectors; a complex one alternates real and imaginary vectors.
#pragma once

#include "csrc/host/rotation.h"

namespace jml::host::JML_ISA {

template <class T, bool Complex>
struct ColumnOps {
  using V = Vec<T>;
  using Rot = Rotation<T, Complex>;
  static constexpr int P = Complex ? 2 : 1;

  // x^H y, lane by lane.
  struct Dot {
    V re{}, re2{}, im{};

    JML_INLINE void add(V xr, V xi, V yr, V yi) {
      re += xr * yr;
      if constexpr (Complex) {
        re2 += xi * yi;
        im += xr * yi;
        im -= xi * yr;
      }
    }
    JML_INLINE V real() const { return Complex ? re + re2 : re; }
  };

  static JML_INLINE Dot dot(const V* x, const V* y, int64_t len) {
    Dot even, odd;
    int64_t i = 0;
#pragma GCC unroll 2
    for (; i + 2 <= len; i += 2) {
      even.add(x[P * i], x[P * i + P - 1], y[P * i], y[P * i + P - 1]);
      odd.add(x[P * i + P], x[P * i + 2 * P - 1], y[P * i + P], y[P * i + 2 * P - 1]);
    }
    if (i < len) even.add(x[P * i], x[P * i + P - 1], y[P * i], y[P * i + P - 1]);
    even.re += odd.re;
    if constexpr (Complex) {
      even.re2 += odd.re2;
      even.im += odd.im;
    }
    return even;
  }

  static JML_INLINE V norm2(const V* x, int64_t len) {
    V a{}, b{};
    int64_t i = 0;
    for (; i + 2 <= len * P; i += 2) {
      a += x[i] * x[i];
      b += x[i + 1] * x[i + 1];
    }
    if (i < len * P) a += x[i] * x[i];
    return a + b;
  }

  static JML_INLINE void scale(V* x, V factor, int64_t len) {
    for (int64_t i = 0; i < len * P; ++i) x[i] *= factor;
  }

  // One element of two columns, in registers. Products are rounded on their own: a fused
  // multiply-add holds up the store port of Zen 5 (measured: 0.5 cycles each, on top of the
  // stores), while multiplications and additions run beside the stores.
  static JML_INLINE void rotate(const Rot& r, V& xr, V& xi, V& yr, V& yi) {
    if constexpr (Complex) {
      const V zr = xr, zi = xi;
      xr -= rounded<T>(r.a * yr) + r.ai * yi;  // conj(a) y
      xi -= rounded<T>(r.a * yi) - r.ai * yr;
      yr += rounded<T>(r.b * zr) - r.bi * zi;  // b x
      yi += rounded<T>(r.b * zi) + r.bi * zr;
    } else {
      const V ay = rounded<T>(r.a * yr), bx = rounded<T>(r.b * xr);
      xr -= ay;
      yr += bx;
    }
  }

  struct Element {
    V re, im;
  };
  static JML_INLINE Element get(const V* x, int64_t i) { return {x[P * i], x[P * i + P - 1]}; }
  static JML_INLINE void put(V* x, int64_t i, const Element& e) {
    x[P * i] = e.re;
    if constexpr (Complex) x[P * i + 1] = e.im;
  }

  // The rotations are taken by value: the compiler must know that stores do not change them.
  static JML_INLINE void turn(Rot r, V* x, V* y, int64_t len) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < len; ++i) {
      Element a = get(x, i), b = get(y, i);
      rotate(r, a.re, a.im, b.re, b.im);
      put(x, i, a);
      put(y, i, b);
    }
  }

  // Rotates (x1, y1) and (x2, y2) and finds x1^H y2 and x2^H y1 of the result on the way.
  static JML_INLINE void turn_and_dot(Rot r1, Rot r2, V* x1, V* x2, V* y1, V* y2, int64_t len,
                                      Dot& d12, Dot& d21) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < len; ++i) {
      Element a = get(x1, i), b = get(x2, i), c = get(y1, i), d = get(y2, i);
      rotate(r1, a.re, a.im, c.re, c.im);
      rotate(r2, b.re, b.im, d.re, d.im);
      put(x1, i, a);
      put(x2, i, b);
      put(y1, i, c);
      put(y2, i, d);
      d12.add(a.re, a.im, d.re, d.im);
      d21.add(b.re, b.im, c.re, c.im);
    }
  }

  // The four rotations of a 2x2 tile in one pass: (x1, y1), (x2, y2), then (x1, y2), (x2, y1).
  static JML_INLINE void turn_tile(Rot r11, Rot r22, Rot r12, Rot r21, V* x1, V* x2, V* y1, V* y2,
                                   int64_t len) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < len; ++i) {
      Element a = get(x1, i), b = get(x2, i), c = get(y1, i), d = get(y2, i);
      rotate(r11, a.re, a.im, c.re, c.im);
      rotate(r22, b.re, b.im, d.re, d.im);
      rotate(r12, a.re, a.im, d.re, d.im);
      rotate(r21, b.re, b.im, c.re, c.im);
      put(x1, i, a);
      put(x2, i, b);
      put(y1, i, c);
      put(y2, i, d);
    }
  }
};

// Pair k of a round of the circle method over `even` items: p < q. False for the bye of an odd n.
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

// Columns are visited two at a time: a group is columns 2g and 2g + 1, a tile the four pairs
// between two groups. Groups are gathered into an even number of blocks, so that two blocks fit a
// cache, and every pair of blocks meets once a sweep.
struct Ordering {
  int64_t groups, blocks;

  // `fit`: groups that a cache holds.
  Ordering(int64_t columns, int64_t fit) {
    groups = divide_up(columns, 2);
    const int64_t width = fit / 2 > 1 ? fit / 2 : 1;
    blocks = 2 * divide_up(groups, 2 * width);
  }
  int64_t start(int64_t block) const { return block * groups / blocks; }
  int64_t rounds() const { return blocks - 1; }

  // Visitor: single(g) the two columns of a group, tile(g, h) two groups; end() after a set of
  // calls that share no column.
  //
  // All pairs of blocks, each next to one that shares a block with it: half the columns of a pair
  // are in the cache already.
  template <class Visitor>
  void visit_all(Visitor& v) const {
    for (int64_t round = 0; round < rounds(); ++round) {
      for (int64_t k = 0; k < blocks / 2; ++k) visit_round(round, k, v);
    }
  }
  // Pair k of a round of disjoint pairs, for threads that share a matrix.
  template <class Visitor>
  void visit_round(int64_t round, int64_t k, Visitor& v) const {
    int64_t i, j;
    round_robin_pair(blocks, round, k, blocks, i, j);
    visit_pair(i, j, round == 0, round == 0, v);
  }

 private:
  // Every tile between two blocks, and before, if asked for, the pairs inside of each.
  template <class Visitor>
  void visit_pair(int64_t i, int64_t j, bool inside_i, bool inside_j, Visitor& v) const {
    const int64_t i0 = start(i), in = start(i + 1) - i0, j0 = start(j), jn = start(j + 1) - j0;
    const int64_t longest = in > jn ? in : jn;
    if (inside_i || inside_j) {
      const int64_t own_i = inside_i ? in : 0, own_j = inside_j ? jn : 0;
      for (int64_t g = 0; g < own_i; ++g) v.single(i0 + g);
      for (int64_t g = 0; g < own_j; ++g) v.single(j0 + g);
      v.end();
      const int64_t even = longest + (longest & 1);
      for (int64_t r = 0; r + 1 < even; ++r) {
        for (int64_t l = 0; l < even / 2; ++l) {
          int64_t a, b;
          if (round_robin_pair(even, r, l, own_i, a, b)) v.tile(i0 + a, i0 + b);
          if (round_robin_pair(even, r, l, own_j, a, b)) v.tile(j0 + a, j0 + b);
        }
        v.end();
      }
      v.leave();
    }
    for (int64_t shift = 0; shift < longest; ++shift) {
      for (int64_t l = 0; l < in; ++l) {
        const int64_t other = l + shift < longest ? l + shift : l + shift - longest;
        if (other < jn) v.tile(i0 + l, j0 + other);
      }
      v.end();
    }
    v.leave();
  }
};

}  // namespace jml::host::JML_ISA
