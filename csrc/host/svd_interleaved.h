// One-sided Jacobi across matrices: lane l of every vector belongs to matrix l of a group, so no
// lane ever talks to another and small n runs at the width of the machine.
// Layout: element e of the row-major input of all matrices is one vector (two when complex).
#pragma once

#include "csrc/host/complete.h"
#include "csrc/host/matrix_io.h"
#include "csrc/host/rotation.h"
#include "csrc/host/svd_serial.h"

namespace jml::host::JML_ISA {

template <class F>
struct Interleaved {
  using T = typename F::Real;
  using Stored = typename F::Stored;
  using V = Vec<T>;
  using M = Mask<T>;
  static constexpr bool kComplex = F::kComplex;
  static constexpr int P = F::kPlanes;
  static constexpr int W = kLanes<T>;

  static int64_t scratch_bytes(const SvdTask& t) {
    Oriented<F> o(t);
    const int64_t vectors = (o.rows * o.cols + o.cols * o.cols) * P + 4 * o.cols;
    const int64_t stage = (o.rows + o.cols) * o.cols * P;  // per lane
    const int64_t completion = o.rows * o.cols * P + o.rows + o.cols;
    const int64_t bytes =
        (vectors + stage) * kVectorBytes + completion * int64_t(sizeof(T)) + 64;
    const int64_t serial = serial_scratch_bytes<F>(t);
    return bytes > serial ? bytes : serial;
  }

  static void run(const SvdTask& t, int64_t first, int64_t count, void* scratch) {
    Oriented<F> o(t);
    for (int64_t b = first; b < first + count; b += W) {
      const int64_t left = first + count - b;
      if (t.compute_uv) {
        group<true>(o, b, int(left < W ? left : W), scratch);
      } else {
        group<false>(o, b, int(left < W ? left : W), scratch);
      }
    }
  }

 private:
  // Reads W row-major matrices into vectors of element e; absent lanes are zero matrices.
  static void gather(const Oriented<F>& o, int64_t b, int count, V* x, T* stage) {
    const int64_t elements = o.rows * o.cols * P;
    const T* src = stage;
    if constexpr (sizeof(Stored) == sizeof(T)) {
      if (count == W) src = o.input(b);
    }
    if (src == stage) {
      const Stored* a = o.input(b);
      for (int64_t i = 0; i < count * elements; ++i) stage[i] = widen(a[i]);
      for (int64_t i = count * elements; i < W * elements; ++i) stage[i] = 0;
    }
    int64_t e = 0;
    for (; e + W <= elements; e += W) {
      V r[W];
      for (int l = 0; l < W; ++l) r[l] = load<T>(src + l * elements + e);
      transpose<T>(r);
      for (int l = 0; l < W; ++l) x[e + l] = r[l];
    }
    for (; e < elements; ++e) {
      V r;
      for (int l = 0; l < W; ++l) r[l] = src[l * elements + e];
      x[e] = r;
    }
    if (kComplex && o.wide) {
      for (int64_t i = 1; i < elements; i += P) x[i] = -x[i];
    }
  }

  // The reverse: vectors to W consecutive arrays.
  static void scatter(const V* x, int64_t elements, T* out, int64_t stride) {
    int64_t e = 0;
    for (; e + W <= elements; e += W) {
      V r[W];
      for (int l = 0; l < W; ++l) r[l] = x[e + l];
      transpose<T>(r);
      for (int l = 0; l < W; ++l) store<T>(out + l * stride + e, r[l]);
    }
    for (; e < elements; ++e) {
      for (int l = 0; l < W; ++l) out[l * stride + e] = x[e][l];
    }
  }

  static JML_INLINE Inner<T, kComplex> inner(const V* x, const V* y, int64_t step, int64_t len) {
    Inner<T, kComplex> g;
    V re0{}, re1{}, im0{}, im1{};
    int64_t i = 0;
    if constexpr (kComplex) {
      for (; i < len; ++i) {
        const V xr = x[i * step], xi = x[i * step + 1], yr = y[i * step], yi = y[i * step + 1];
        re0 += xr * yr;
        re1 += xi * yi;
        im0 += xr * yi;
        im1 -= xi * yr;
      }
    } else {
      for (; i + 2 <= len; i += 2) {
        re0 += x[i * step] * y[i * step];
        re1 += x[(i + 1) * step] * y[(i + 1) * step];
      }
      if (i < len) re0 += x[i * step] * y[i * step];
    }
    g.re = re0 + re1;
    g.im = im0 + im1;
    return g;
  }

  static JML_INLINE V norm2(const V* x, int64_t step, int64_t len) {
    V a{}, b{};
    for (int64_t i = 0; i < len; ++i) {
      a += x[i * step] * x[i * step];
      if constexpr (kComplex) b += x[i * step + 1] * x[i * step + 1];
    }
    return a + b;
  }

  static JML_INLINE void apply(const Rotation<T, kComplex>& r, V* x, V* y, int64_t step,
                               int64_t len) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < len; ++i) {
      V none{};
      if constexpr (kComplex) {
        rotate<T, true>(r, x[i * step], x[i * step + 1], y[i * step], y[i * step + 1]);
      } else {
        V xr = x[i * step], yr = y[i * step];
        rotate<T, false>(r, xr, none, yr, none);
        x[i * step] = xr;
        y[i * step] = yr;
      }
    }
  }

  template <bool kVectors>
  static void group(const Oriented<F>& o, int64_t b, int count, void* scratch) {
    const int64_t m = o.rows, n = o.cols;
    const int64_t elements = m * n * P;
    V* x = static_cast<V*>(scratch);
    V* v = x + elements;          // column j at v + j * n * P
    V* norms = v + n * n * P;     // squared column norms
    V* order = norms + n;         // column index, carried by the sort
    T* stage = reinterpret_cast<T*>(order + 3 * n);
    gather(o, b, count, x, stage);
    // Column j of X starts at x + j * cs and steps by rs, in vectors.
    const int64_t rs = (o.wide ? 1 : n) * P, cs = (o.wide ? m : 1) * P;

    V big{}, bad{};
    for (int64_t i = 0; i < elements; ++i) {
      big = max(big, abs_<T>(x[i]));
      bad += x[i] * T(0);  // NaN from any NaN or infinity
    }
    const M finite = bad == bad;
    big = finite ? big : V{};
    const M exponent = biased_exponent<T>(big);
    const V up = power_of_two<T>(kMaxBiased<T> - exponent);
    const V down = power_of_two<T>(exponent);
    for (int64_t i = 0; i < elements; ++i) x[i] = finite ? x[i] * up : V{};
    if constexpr (kVectors) {
      for (int64_t i = 0; i < n * n * P; ++i) v[i] = V{};
      for (int64_t j = 0; j < n; ++j) v[(j * n + j) * P] = splat<T>(1);
    }

    const T root = T(__builtin_sqrt(double(m > 4 ? m : 4)));
    const V tol = splat<T>(root * kUlp<T> * T(0.5));
    const T quadratic = T(__builtin_sqrt(double(n)));
    M working = n > 1 ? finite : M{};
    V off{}, sweeps{};
    const int64_t even = n + (n & 1);
    for (int sweep = 0; sweep < o.t.max_sweeps && any(working); ++sweep) {
      V cos_max{}, tan_max{};
      for (int64_t j = 0; j < n; ++j) norms[j] = norm2(x + j * cs, rs, m);
      // Round robin: the pairs of a round are disjoint, so the processor overlaps them.
      for (int64_t round = 0; round + 1 < even; ++round) {
        for (int64_t k = 0; k < even / 2; ++k) {
          int64_t p, q;
          if (!round_robin_pair(even, round, k, n, p, q)) continue;
          V* xp = x + p * cs;
          V* xq = x + q * cs;
          Inner<T, kComplex> g = inner(xp, xq, rs, m);
          g.xx = norms[p];
          g.yy = norms[q];
          const Rotation<T, kComplex> r = rotation<T, kComplex>(g, tol, working);
          cos_max = max(cos_max, r.cosine);
          if (!any(r.active)) continue;
          tan_max = max(tan_max, r.tangent);
          const V s = r.active ? r.s : V{}, tau = r.active ? r.tau : V{};
          Rotation<T, kComplex> masked = r;
          masked.s = s;
          masked.tau = tau;
          apply(masked, xp, xq, rs, m);
          if constexpr (kVectors) apply(masked, v + p * n * P, v + q * n * P, P, n);
          const V change = r.active ? r.change : V{};
          norms[p] -= change;
          norms[q] += change;
        }
      }
      off = working ? cos_max : off;
      sweeps += working ? splat<T>(1) : V{};
      working = working & (cos_max > tol) & (cos_max * tan_max * quadratic > tol);
    }

    // Singular values and their order: odd-even transposition sort, all matrices at once.
    for (int64_t j = 0; j < n; ++j) {
      norms[j] = norm2(x + j * cs, rs, m);
      order[j] = splat<T>(T(j));
    }
    for (int64_t pass = 0; pass < n; ++pass) {
      for (int64_t j = pass & 1; j + 1 < n; j += 2) {
        const V a = norms[j], c = norms[j + 1], oa = order[j], oc = order[j + 1];
        const M swap = a < c;
        norms[j] = swap ? c : a;
        norms[j + 1] = swap ? a : c;
        order[j] = swap ? oc : oa;
        order[j + 1] = swap ? oa : oc;
      }
    }
    write<kVectors>(o, b, count, x, v, norms, order, down, finite, working, off, sweeps, stage);
    for (int l = 0; l < count; ++l) {
      if (o.t.status[b + l] != kNotConverged) continue;
      const int32_t status = serial_svd<F>(o, b + l, scratch);
      o.t.status[b + l] = status;
      if (status == kNotConverged) o.write_nan(b + l);
    }
  }

  template <bool kVectors>
  static void write(const Oriented<F>& o, int64_t b, int count, const V* x, const V* v,
                    const V* norms, const V* order, V down, M finite, M working, V off, V sweeps,
                    T* stage) {
    const int64_t m = o.rows, n = o.cols;
    const int64_t lane_reals = (m + n) * n * P;
    if constexpr (kVectors) {
      scatter(x, m * n * P, stage, lane_reals);
      scatter(v, n * n * P, stage + m * n * P, lane_reals);
    }
    T* work = stage + W * lane_reals;
    uint8_t* null = reinterpret_cast<uint8_t*>(work + m);
    for (int l = 0; l < count; ++l) {
      const int64_t matrix = b + l;
      o.t.sweeps[matrix] = int32_t(sweeps[l]);
      o.t.off_norm[matrix] = finite[l] ? float(off[l]) : __builtin_nanf("");
      o.t.status[matrix] = !finite[l] ? kNonFinite : working[l] ? kNotConverged : kConverged;
      if (!finite[l]) o.write_nan(matrix);
      if (o.t.status[matrix] != kConverged) continue;
      Stored* values = o.values(matrix);
      bool any_null = false;
      for (int64_t r = 0; r < n; ++r) {
        values[r] = narrow<F>(T(__builtin_sqrt(norms[r][l])) * down[l]);
        any_null |= !(norms[r][l] > kNullNorm2<T>);
      }
      if constexpr (!kVectors) continue;
      const T* xl = stage + l * lane_reals;
      const T* vl = xl + m * n * P;
      const FactorOut<F> left = o.left(matrix), right = o.right(matrix);
      const int64_t rs = (o.wide ? 1 : n) * P, cs = (o.wide ? m : 1) * P;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t j = int64_t(order[r][l]);
        const bool is_null = !(norms[r][l] > kNullNorm2<T>);
        const T inv = is_null ? T(0) : T(1) / T(__builtin_sqrt(norms[r][l]));
        const T* c = xl + j * cs;
        for (int64_t i = 0; i < m; ++i) {
          left.put(i, r, c[i * rs] * inv, kComplex ? c[i * rs + P - 1] * inv : T(0));
        }
        const T* d = vl + j * n * P;
        for (int64_t i = 0; i < n; ++i) right.put(i, r, d[i * P], kComplex ? d[i * P + P - 1] : T(0));
      }
      if (any_null) complete_left(o, matrix, l, xl, norms, order, work, null);
    }
  }

  // Rare: some columns carry no direction. Rebuild the left factor column-major and complete it.
  static __attribute__((noinline)) void complete_left(const Oriented<F>& o, int64_t matrix, int l,
                                                      const T* xl, const V* norms, const V* order,
                                                      T* work, uint8_t* null) {
    const int64_t m = o.rows, n = o.cols;
    const int64_t rs = (o.wide ? 1 : n) * P, cs = (o.wide ? m : 1) * P;
    T* copy = work + m + n;  // after the null flags; scratch_bytes counts it
    for (int64_t r = 0; r < n; ++r) {
      const int64_t j = int64_t(order[r][l]);
      null[r] = !(norms[r][l] > kNullNorm2<T>);
      const T inv = null[r] ? T(0) : T(1) / T(__builtin_sqrt(norms[r][l]));
      for (int64_t i = 0; i < m; ++i) {
        for (int p = 0; p < P; ++p) copy[(r * P + p) * m + i] = xl[j * cs + i * rs + p] * inv;
      }
    }
    complete_columns<T, kComplex>(copy, m, n, m * P, m, null, work);
    for (int64_t r = 0; r < n; ++r) {
      if (!null[r]) continue;
      for (int64_t i = 0; i < m; ++i) {
        o.left(matrix).put(i, r, copy[r * P * m + i], kComplex ? copy[(r * P + 1) * m + i] : T(0));
      }
    }
  }
};

}  // namespace jml::host::JML_ISA
