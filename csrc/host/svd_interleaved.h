// One-sided Jacobi across matrices: lane l of every vector belongs to matrix l of a group, so no
// lane ever talks to another and small n runs at the width of the machine.
// Layout: element (i, j) of all matrices is one vector (two when complex); columns are contiguous
// and an odd number of vectors apart, or a power-of-two size would crowd a few cache sets.
#pragma once

#include "csrc/host/complete.h"
#include "csrc/host/jacobi_ops.h"
#include "csrc/host/matrix_io.h"
#include "csrc/host/svd_column.h"

namespace jml::host::JML_ISA {

template <class F>
struct Interleaved {
  using T = typename F::Real;
  using V = Vec<T>;
  using M = Mask<T>;
  using Ops = ColumnOps<T, F::kComplex>;
  using Rot = Rotation<T, F::kComplex>;
  static constexpr bool kComplex = F::kComplex;
  static constexpr int P = F::kPlanes;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kGroup = W;  // matrices that are worked on together
  // A pair of column blocks of every lane should stay in the first-level cache.
  static constexpr int64_t kBlockBytes = 40 * 1024;

  static int64_t scratch_bytes(const SvdTask& t) {
    Oriented<F> o(t);
    const int64_t vectors = (stride(o.rows) + stride(o.cols) + 4) * (o.cols + 1);
    const int64_t stage = (stride(o.rows) + stride(o.cols)) * (o.cols + 1);  // per lane
    const int64_t completion = o.rows * o.cols * P + o.rows + o.cols;
    const int64_t bytes = (vectors + stage) * kVectorBytes + completion * int64_t(sizeof(T)) + 64;
    const int64_t column = Column<F>::scratch_bytes(t);
    return bytes > column ? bytes : column;
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
  // Vectors between columns of `rows` elements.
  static int64_t stride(int64_t rows) { return rows * P | 1; }

  // Reads W row-major matrices into vectors of element e; absent lanes are zero matrices.
  static void gather(const Oriented<F>& o, int64_t b, int count, V* x, T* stage) {
    const int64_t elements = o.rows * o.cols * P;
    const T* src = stage;
    if (count == W) {
      src = o.input(b);
    } else {
      for (int64_t i = 0; i < W * elements; ++i)
        stage[i] = i < count * elements ? o.input(b)[i] : 0;
    }
    // Element e of the input is plane p of entry (i, j) of X.
    const int64_t inner_len = o.wide ? o.rows : o.cols, step = stride(o.rows);
    int64_t outer = 0, along = 0;
    auto place = [&](V r) {
      const int64_t entry = along / P, plane = along % P;
      const int64_t i = o.wide ? entry : outer, j = o.wide ? outer : entry;
      x[j * step + i * P + plane] = plane == 1 && o.wide ? -r : r;
      if (++along == inner_len * P) {
        along = 0;
        ++outer;
      }
    };
    int64_t e = 0;
    for (; e + W <= elements; e += W) {
      V r[W];
      for (int l = 0; l < W; ++l) r[l] = load<T>(src + l * elements + e);
      transpose<T>(r);
      for (int l = 0; l < W; ++l) place(r[l]);
    }
    for (; e < elements; ++e) {
      V r;
      for (int l = 0; l < W; ++l) r[l] = src[l * elements + e];
      place(r);
    }
    // The gap between columns is never data, but max and scale run over it.
    for (int64_t j = 0; j < o.cols; ++j) {
      for (int64_t i = o.rows * P; i < step; ++i) x[j * step + i] = V{};
    }
  }

  // The reverse: vectors to W consecutive arrays.
  static void scatter(const V* x, int64_t elements, T* out) {
    int64_t e = 0;
    for (; e + W <= elements; e += W) {
      V r[W];
      for (int l = 0; l < W; ++l) r[l] = x[e + l];
      transpose<T>(r);
      for (int l = 0; l < W; ++l) store<T>(out + l * elements + e, r[l]);
    }
    for (; e < elements; ++e) {
      for (int l = 0; l < W; ++l) out[l * elements + e] = x[e][l];
    }
  }

  // A sweep over the pairs of W matrices. Tiles that share no column are taken a few at a time, so
  // that their angles overlap. V lags behind: by one step where X and V fit the cache together
  // (work for the processor while it waits for the next angles), else by a pair of blocks, so that
  // the cache holds twice as many columns of either.
  template <bool kVectors>
  struct Sweep {
    static constexpr int kTiles = 4, kQueue = 32;
    struct Tile {
      int64_t g, h;
      Rot r11, r22, r12, r21;
      bool turned;
    };
    V *x, *v, *norms;
    Weight<T>* weights;
    int64_t m, n, xs, vs;
    V tol;
    M working;
    bool together;  // X and V fit the cache
    V cos_max{}, tan_max{};
    // Tiles [behind, ahead) have turned X but not V; [ahead, filled) are new.
    Tile tiles[kQueue];
    int behind = 0, ahead = 0, filled = 0;

    // Not an aggregate: braces would write zeros to all tiles, at n = 4 a quarter of the time.
    Sweep(V* x, V* v, V* norms, Weight<T>* weights, int64_t m, int64_t n, int64_t xs, int64_t vs,
          V tol, M working, bool together)
        : x(x),
          v(v),
          norms(norms),
          weights(weights),
          m(m),
          n(n),
          xs(xs),
          vs(vs),
          tol(tol),
          working(working),
          together(together) {}

    V* xcol(int64_t j) { return x + j * xs; }
    V* vcol(int64_t j) { return v + j * vs; }

    JML_INLINE bool find(int64_t p, int64_t q, const typename Ops::Dot& d, Rot& r) {
      const Inner<T, kComplex> g{norms[p], norms[q], weights[p].w, weights[q].w, d.real(), d.im};
      const Angle<T, kComplex> a = angle<T, kComplex>(g, tol, working);
      cos_max = max(cos_max, a.cosine);
      tan_max = max(tan_max, a.tangent);
      norms[p] -= a.change;
      norms[q] += a.change;
      weights[p].grow(a.growth);
      weights[q].grow(a.growth);
      r = a.r;
      return any(a.active);
    }

    void single(int64_t g) {
      const int64_t p = 2 * g, q = 2 * g + 1;
      Rot r;
      if (!find(p, q, Ops::dot(xcol(p), xcol(q), m), r)) return;
      Ops::turn(r, xcol(p), xcol(q), m);
      if constexpr (kVectors) Ops::turn(r, vcol(p), vcol(q), n);
    }
    void tile(int64_t g, int64_t h) {
      Tile& t = tiles[filled++];
      t.g = 2 * g;
      t.h = 2 * h;
      if (filled - ahead == kTiles) end();
    }
    void end() {
      Tile* t = tiles + ahead;
      const int count = filled - ahead, lag = together ? ahead - behind : 0;
      bool first[kTiles], second[kTiles];
      for (int k = 0; k < count; ++k) {
        const int64_t g = t[k].g, h = t[k].h;
        const auto d11 = Ops::dot(xcol(g), xcol(h), m);
        const auto d22 = Ops::dot(xcol(g + 1), xcol(h + 1), m);
        first[k] = find(g, h, d11, t[k].r11);
        first[k] |= find(g + 1, h + 1, d22, t[k].r22);
      }
      turn_v(lag / 2);
      for (int k = 0; k < count; ++k) {
        const int64_t g = t[k].g, h = t[k].h;
        typename Ops::Dot d12, d21;
        if (first[k]) {
          Ops::turn_and_dot(t[k].r11, t[k].r22, xcol(g), xcol(g + 1), xcol(h), xcol(h + 1), m, d12,
                            d21);
        } else {
          d12 = Ops::dot(xcol(g), xcol(h + 1), m);
          d21 = Ops::dot(xcol(g + 1), xcol(h), m);
        }
        second[k] = find(g, h + 1, d12, t[k].r12);
        second[k] |= find(g + 1, h, d21, t[k].r21);
        t[k].turned = first[k] || second[k];
      }
      turn_v(lag - lag / 2);
      for (int k = 0; k < count; ++k) {
        if (!second[k]) continue;
        const int64_t g = t[k].g, h = t[k].h;
        Ops::turn(t[k].r12, xcol(g), xcol(h + 1), m);
        Ops::turn(t[k].r21, xcol(g + 1), xcol(h), m);
      }
      ahead = filled;
      if (filled + kTiles > kQueue) finish();
    }
    // The next `count` tiles on V.
    void turn_v(int count) {
      for (const int stop = behind + count; behind < stop; ++behind) {
        const Tile& t = tiles[behind];
        if (!kVectors || !t.turned) continue;
        Ops::turn_tile(t.r11, t.r22, t.r12, t.r21, vcol(t.g), vcol(t.g + 1), vcol(t.h),
                       vcol(t.h + 1), n);
      }
    }
    // A pair of blocks is done.
    void leave() {
      if (!together) finish();
    }
    // V catches up.
    void finish() {
      turn_v(ahead - behind);
      behind = ahead = filled = 0;
    }
  };

  template <bool kVectors>
  static void group(const Oriented<F>& o, int64_t b, int count, void* scratch) {
    const int64_t m = o.rows, n = o.cols;
    const int64_t xs = stride(m), vs = stride(n);
    V* x = static_cast<V*>(scratch);  // column j at x + j * xs
    const int64_t np = n + (n & 1);   // a zero column makes the last group whole
    V* v = x + np * xs;               // column j at v + j * vs
    V* norms = v + np * vs;           // squared column norms
    V* order = norms + np;            // column index, carried by the sort
    auto* weights = reinterpret_cast<Weight<T>*>(order + np);  // squared lengths of columns of V
    T* stage = reinterpret_cast<T*>(weights + np);
    gather(o, b, count, x, stage);

    V big{}, bad{};
    for (int64_t i = 0; i < n * xs; ++i) {
      big = max(big, abs_<T>(x[i]));
      bad += x[i] * T(0);  // NaN from any NaN or infinity
    }
    for (int64_t i = n * xs; i < np * xs; ++i) x[i] = V{};
    const M finite = bad == bad;
    big = finite ? big : V{};
    const M exponent = biased_exponent<T>(big);
    const V up = power_of_two<T>(kMaxBiased<T> - exponent);
    const V down = power_of_two<T>(exponent);
    for (int64_t i = 0; i < n * xs; ++i) x[i] = finite ? x[i] * up : V{};
    if constexpr (kVectors) {
      for (int64_t i = 0; i < np * vs; ++i) v[i] = V{};
      for (int64_t j = 0; j < n; ++j) v[j * vs + j * P] = splat<T>(1);
    }

    const V tol = splat<T>(cosine_tolerance<T>(m));
    const T root_n = T(__builtin_sqrt(double(n)));
    for (int64_t j = 0; j < np; ++j) {
      norms[j] = V{};
      weights[j] = {splat<T>(1), V{}};
    }
    auto unit_weight = [&](int64_t j) {
      const V down = splat<T>(1) / sqrt(weights[j].w);
      Ops::scale(x + j * xs, down, m);
      if constexpr (kVectors) Ops::scale(v + j * vs, down, n);
      weights[j] = {splat<T>(1), V{}};
    };
    M working = n > 1 ? finite : M{};
    V off{}, sweeps{};
    const int64_t x_bytes = xs * kVectorBytes, v_bytes = kVectors ? vs * kVectorBytes : 0;
    const bool together = np * (x_bytes + v_bytes) <= kBlockBytes;
    const Ordering order_of(n, together ? np : kBlockBytes / (2 * max(x_bytes, v_bytes)));
    for (int sweep = 0; sweep < o.t.interleaved_max_sweeps && any(working); ++sweep) {
      for (int64_t j = 0; j < n; ++j) {
        if (any(weights[j].w > kHeavy<T>)) unit_weight(j);
        norms[j] = Ops::norm2(x + j * xs, m) / weights[j].w;
      }
      Sweep<kVectors> pass(x, v, norms, weights, m, n, xs, vs, tol, working, together);
      order_of.visit_all(pass);
      pass.finish();
      const V cos_max = pass.cos_max, tan_max = pass.tan_max;
      off = working ? cos_max : off;
      sweeps += working ? splat<T>(1) : V{};
      working = working & (cos_max > tol) & (next_cosine(cos_max, tan_max, root_n) > tol);
    }

    // Singular values and their order: odd-even transposition sort, all matrices at once.
    for (int64_t j = 0; j < n; ++j) {
      unit_weight(j);
      norms[j] = Ops::norm2(x + j * xs, m);
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
    write<kVectors>(o, b, count, {x, norms, order, down, off, sweeps, finite, working, stage});
    for (int l = 0; l < count; ++l) {
      if (o.t.status[b + l] != kNotConverged) continue;
      // Hard for a method without pivoting: the pivoted one needs few sweeps and errs less.
      const int32_t spent = o.t.sweeps[b + l];
      Column<F>::one(o, b + l, scratch);
      o.t.sweeps[b + l] += spent;
    }
  }

  // What a group of matrices came to.
  struct Outcome {
    const V *x, *norms, *order;
    V down, off, sweeps;
    M finite, working;
    T* stage;
  };

  template <bool kVectors>
  static void write(const Oriented<F>& o, int64_t b, int count, const Outcome& r) {
    const int64_t m = o.rows, n = o.cols;
    const int64_t xs = stride(m), vs = stride(n), np = n + (n & 1), lane_reals = (xs + vs) * np;
    if constexpr (kVectors) scatter(r.x, lane_reals, r.stage);  // v follows x
    T* work = r.stage + W * lane_reals;
    uint8_t* null = reinterpret_cast<uint8_t*>(work + m);
    for (int l = 0; l < count; ++l) {
      const int64_t matrix = b + l;
      o.t.sweeps[matrix] = int32_t(r.sweeps[l]);
      o.t.off_norm[matrix] = r.finite[l] ? float(r.off[l]) : __builtin_nanf("");
      o.t.status[matrix] = !r.finite[l] ? kNonFinite : r.working[l] ? kNotConverged : kConverged;
      if (!r.finite[l]) o.write_nan(matrix);
      if (o.t.status[matrix] != kConverged) continue;
      T* values = o.values(matrix);
      bool any_null = false;
      for (int64_t c = 0; c < n; ++c) {
        values[c] = T(__builtin_sqrt(r.norms[c][l])) * r.down[l];
        any_null |= !(r.norms[c][l] > kNullNorm2<T>);
      }
      if constexpr (!kVectors) continue;
      const T* xl = r.stage + l * lane_reals;
      const T* vl = xl + np * xs;
      const FactorOut<F> left = o.left(matrix), right = o.right(matrix);
      for (int64_t c = 0; c < n; ++c) {
        const int64_t j = int64_t(r.order[c][l]);
        const bool is_null = !(r.norms[c][l] > kNullNorm2<T>);
        const T inv = is_null ? T(0) : T(1) / T(__builtin_sqrt(r.norms[c][l]));
        const T* from = xl + j * xs;
        for (int64_t i = 0; i < m; ++i) {
          left.put(i, c, from[i * P] * inv, kComplex ? from[i * P + P - 1] * inv : T(0));
        }
        from = vl + j * vs;
        for (int64_t i = 0; i < n; ++i)
          right.put(i, c, from[i * P], kComplex ? from[i * P + P - 1] : T(0));
      }
      if (any_null) complete_left(o, matrix, l, xl, r, work, null);
    }
  }

  // Rare: some columns carry no direction. Rebuild the left factor column-major and complete it.
  static __attribute__((noinline)) void complete_left(const Oriented<F>& o, int64_t matrix, int l,
                                                      const T* xl, const Outcome& r, T* work,
                                                      uint8_t* null) {
    const int64_t m = o.rows, n = o.cols;
    T* copy = work + m + n;  // after the null flags; scratch_bytes counts it
    for (int64_t c = 0; c < n; ++c) {
      const int64_t j = int64_t(r.order[c][l]);
      null[c] = !(r.norms[c][l] > kNullNorm2<T>);
      const T inv = null[c] ? T(0) : T(1) / T(__builtin_sqrt(r.norms[c][l]));
      for (int64_t i = 0; i < m; ++i) {
        for (int p = 0; p < P; ++p) copy[(c * P + p) * m + i] = xl[j * stride(m) + i * P + p] * inv;
      }
    }
    complete_columns<T, kComplex>(copy, m, n, m * P, m, null, work);
    for (int64_t c = 0; c < n; ++c) {
      if (!null[c]) continue;
      for (int64_t i = 0; i < m; ++i) {
        o.left(matrix).put(i, c, copy[c * P * m + i], kComplex ? copy[(c * P + 1) * m + i] : T(0));
      }
    }
  }
};

}  // namespace jml::host::JML_ISA
