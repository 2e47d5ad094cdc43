// One-sided Jacobi within one matrix: rows across the lanes, one rotation angle a lane.
//   X P = Q R (Householder QR with column pivoting), then Jacobi on the columns of L = R^H:
//   L J = W S with J and W orthonormal, so X = (Q J) S (P W)^H.
// Pivoting bounds the sweeps whatever the scaling of the columns (Drmac & Veselic, SIMAX 29, 2008).
// A column of L and the same column of J lie together: the panel.
#pragma once

#include <type_traits>

#include "csrc/host/complete.h"
#include "csrc/host/jacobi_ops.h"
#include "csrc/host/matrix_io.h"
#include "csrc/host/svd_serial.h"

namespace jml::host::JML_ISA {

template <class F>
struct Column {
  using T = typename F::Real;
  using V = Vec<T>;
  using M = Mask<T>;
  using Ops = ColumnOps<T, F::kComplex>;
  using Rot = Rotation<T, F::kComplex>;
  static constexpr bool kComplex = F::kComplex;
  static constexpr int P = F::kPlanes;
  static constexpr int W = kLanes<T>;
  // A pair of column blocks should stay in the first-level cache.
  static constexpr int64_t kBlockBytes = 40 * 1024;

  static int64_t padded(int64_t rows) { return divide_up(rows, W) * W; }

  // Largest cosine and tangent met, lane by lane.
  struct Extremes {
    V cos_max{}, tan_max{};
  };

  // The rotations of W pairs, to be taken one at a time.
  struct Turns {
    alignas(64) T a[W], b[W], ai[W], bi[W];

    JML_INLINE void store_from(const Rot& r) {
      store<T>(a, r.a);
      store<T>(b, r.b);
      if constexpr (kComplex) {
        store<T>(ai, r.ai);
        store<T>(bi, r.bi);
      }
    }
    JML_INLINE Rot get(int k) const {
      Rot r;
      r.a = splat<T>(a[k]);
      r.b = splat<T>(b[k]);
      if constexpr (kComplex) {
        r.ai = splat<T>(ai[k]);
        r.bi = splat<T>(bi[k]);
      }
      return r;
    }
    JML_INLINE void copy(int to, const Turns& from, int k) {
      a[to] = from.a[k];
      b[to] = from.b[k];
      if constexpr (kComplex) {
        ai[to] = from.ai[k];
        bi[to] = from.bi[k];
      }
    }
  };

  // Where things lie in scratch, all padded to whole vectors.
  struct Layout {
    int64_t m, n, np;      // np: n rounded up to whole groups of columns
    int64_t ld;            // reals between planes of X, which is planar
    int64_t vectors;       // of one plane of a column of L or J
    int64_t parts, panel;  // 2 with J, 1 without; vectors between panel columns
    int64_t left_cols;
    T *x, *reflector, *block, *norm2, *sigma2, *weight, *lost, *tau;
    V* g;  // the panel: column j is L's vectors, then J's
    int64_t *pivot, *order;
    uint8_t* null;
    Extremes* extremes;  // one a block pair of a round
    T* completion;       // a planar copy of the right factor, used if columns are null
    int64_t bytes;

    Layout(const Oriented<F>& o, void* base) {
      m = o.rows;
      n = o.cols;
      np = n + (n & 1);
      ld = padded(m);
      vectors = padded(n) / W;
      parts = o.t.compute_uv ? 2 : 1;
      // An odd number of vectors apart, or columns would crowd a few cache sets.
      panel = vectors * P * parts | 1;
      left_cols = o.t.full_matrices ? m : n;
      bytes = 0;
      auto take = [this, base](int64_t count, auto* sample) {
        using E = std::remove_pointer_t<decltype(sample)>;
        const uintptr_t at = reinterpret_cast<uintptr_t>(base) + uintptr_t(bytes);
        bytes += (count * int64_t(sizeof(E)) + 63) / 64 * 64;
        return reinterpret_cast<E*>(at);
      };
      T* real = nullptr;
      int64_t* index = nullptr;
      x = take(ld * n * P, real);
      g = take(panel * np, static_cast<V*>(nullptr));
      reflector = take(ld * P, real);
      block = take(m * kRowBlock * W * P > ld * P * kColumnGroup ? m * kRowBlock * W * P
                                                                 : ld * P * kColumnGroup,
                   real);
      norm2 = take(n + W, real);
      sigma2 = take(np + W, real);
      weight = take(np + W, real);
      lost = take(np + W, real);
      tau = take(n, real);
      pivot = take(n, index);
      order = take(n, index);
      null = take(n, static_cast<uint8_t*>(nullptr));
      extremes = take(np / 4 + 2, static_cast<Extremes*>(nullptr));
      completion = take(o.t.compute_uv ? (n * P + 1) * n : 0, real);
    }
    T* col(int64_t j) const { return x + j * ld * P; }
    V* panel_col(int64_t j) const { return g + j * panel; }
    // Row i of a panel column, plane p: L if part = 0, J if part = 1.
    T& entry(int64_t i, int64_t j, int part, int p) const {
      return reinterpret_cast<T*>(panel_col(j) + (part * vectors + i / W) * P + p)[i % W];
    }
  };
  // Vectors of columns of the left factor that are formed together.
  static constexpr int kRowBlock = 2;
  static constexpr int kColumnGroup = 8;
  static constexpr int64_t kGroup = 1;  // matrices that are worked on together

  static int64_t scratch_bytes(const SvdTask& t) {
    Oriented<F> o(t);
    const int64_t bytes = Layout(o, nullptr).bytes;
    const int64_t serial = serial_scratch_bytes<F>(t);
    return bytes > serial ? bytes : serial;
  }

  static void run(const SvdTask& t, int64_t first, int64_t count, void* scratch) {
    Oriented<F> o(t);
    Layout w(o, scratch);
    for (int64_t b = first; b < first + count; ++b) one(o, w, b, scratch);
  }

  static void one(const Oriented<F>& o, int64_t b, void* scratch) {
    one(o, Layout(o, scratch), b, scratch);
  }

 private:
  static void one(const Oriented<F>& o, const Layout& w, int64_t b, void* scratch) {
    o.t.sweeps[b] = 0;
    T down = 0;
    if (!read(o, w, b, down)) {
      o.t.status[b] = kNonFinite;
      o.t.off_norm[b] = __builtin_nanf("");
      o.write_nan(b);
      return;
    }
    const int64_t rank = pivoted_qr(w);
    lower_factor(o, w, rank);
    if (!jacobi(o, w, b)) {
      o.t.status[b] = serial_svd<F>(o, b, scratch);
      if (o.t.status[b] == kNotConverged) o.write_nan(b);
      return;
    }
    o.t.status[b] = kConverged;
    sort_values(w);
    for (int64_t r = 0; r < w.n; ++r) {
      o.values(b)[r] = T(__builtin_sqrt(w.sigma2[w.order[r]])) * down;
    }
    if (!o.t.compute_uv) return;
    write_right(o, w, b);
    write_left(o, w, b, rank);
  }

  // X into columns, scaled to max |x| in [1, 2). False if an element is not finite.
  static bool read(const Oriented<F>& o, const Layout& w, int64_t b, T& down) {
    const T* a = o.input(b);
    if (o.wide) {
      for (int64_t j = 0; j < w.n; ++j) {
        T* c = w.col(j);
        const T* row = a + j * w.m * P;
        for (int64_t i = 0; i < w.m; ++i) {
          c[i] = row[i * P];
          if constexpr (kComplex) c[w.ld + i] = -row[i * P + 1];
        }
      }
    } else {
      constexpr int64_t kTile = 16;
      for (int64_t i0 = 0; i0 < w.m; i0 += kTile) {
        const int64_t i1 = i0 + kTile < w.m ? i0 + kTile : w.m;
        for (int64_t j = 0; j < w.n; ++j) {
          T* c = w.col(j);
          for (int64_t i = i0; i < i1; ++i) {
            c[i] = a[(i * w.n + j) * P];
            if constexpr (kComplex) c[w.ld + i] = a[(i * w.n + j) * P + 1];
          }
        }
      }
    }
    V big{}, bad{};
    for (int64_t j = 0; j < w.n; ++j) {
      for (int p = 0; p < P; ++p) {
        T* c = w.col(j) + p * w.ld;
        for (int64_t i = w.m; i < w.ld; ++i) c[i] = 0;
        for (int64_t i = 0; i < w.ld; i += W) {
          const V e = load<T>(c + i);
          big = max(big, abs_<T>(e));
          bad += e * T(0);
        }
      }
    }
    if (any(bad != bad)) return false;
    T top = 0;
    for (int l = 0; l < W; ++l) top = big[l] > top ? big[l] : top;
    const M exponent = biased_exponent<T>(splat<T>(top));
    const V up = power_of_two<T>(kMaxBiased<T> - exponent);
    down = power_of_two<T>(exponent)[0];
    for (int64_t i = 0; i < w.ld * w.n * P; i += W) store<T>(w.x + i, load<T>(w.x + i) * up);
    return true;
  }

  // Elements that one vector of sums takes. Without an end to it the norm of 400,000 elements was
  // 26 ulp off with four lanes.
  static constexpr int64_t kSummed = 512 * W;

  static T norm2_of(const T* c, int64_t len) {
    double total = 0;
    for (int64_t first = 0; first < len; first += kSummed) {
      const int64_t last = first + kSummed < len ? first + kSummed : len;
      V a{}, b{};
      int64_t i = first;
      for (; i + 2 * W <= last; i += 2 * W) {
        const V e = load<T>(c + i), f = load<T>(c + i + W);
        a += e * e;
        b += f * f;
      }
      if (i < last) {
        const V e = load<T>(c + i);
        a += e * e;
      }
      total += double(sum<T>(a + b));
    }
    return T(total);
  }

  // x -= tau v (v^H x) for K columns at once, rows [from, ld) in whole vectors; v is zero above its
  // first row.
  template <int K>
  static JML_INLINE void reflect(const T* v, T tau, T* const* x, int64_t from, int64_t ld) {
    double total_re[K] = {}, total_im[K] = {};
    for (int64_t first = from; first < ld; first += kSummed) {
      const int64_t last = first + kSummed < ld ? first + kSummed : ld;
      V re[K] = {}, im[K] = {};
      for (int64_t i = first; i < last; i += W) {
        const V vr = load<T>(v + i);
        V vi{};
        if constexpr (kComplex) vi = load<T>(v + ld + i);
        for (int k = 0; k < K; ++k) {
          const V xr = load<T>(x[k] + i);
          re[k] += vr * xr;
          if constexpr (kComplex) {
            const V xi = load<T>(x[k] + ld + i);
            re[k] += vi * xi;
            im[k] += vr * xi;
            im[k] -= vi * xr;
          }
        }
      }
      for (int k = 0; k < K; ++k) {
        total_re[k] += double(sum<T>(re[k]));
        if constexpr (kComplex) total_im[k] += double(sum<T>(im[k]));
      }
    }
    V fr[K], fi[K];
    for (int k = 0; k < K; ++k) {
      fr[k] = splat<T>(tau * T(total_re[k]));
      if constexpr (kComplex) fi[k] = splat<T>(tau * T(total_im[k]));
    }
    for (int64_t i = from; i < ld; i += W) {
      const V vr = load<T>(v + i);
      V vi{};
      if constexpr (kComplex) vi = load<T>(v + ld + i);
      for (int k = 0; k < K; ++k) {
        V xr = load<T>(x[k] + i);
        if constexpr (kComplex) {
          V xi = load<T>(x[k] + ld + i);
          xr -= fr[k] * vr - fi[k] * vi;
          xi -= fr[k] * vi + fi[k] * vr;
          store<T>(x[k] + ld + i, xi);
        } else {
          xr -= fr[k] * vr;
        }
        store<T>(x[k] + i, xr);
      }
    }
  }
  static void reflect_columns(const T* v, T tau, T* const* x, int64_t count, int64_t from,
                              int64_t ld) {
    from = from / W * W;
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) reflect<4>(v, tau, x + k, from, ld);
    for (; k < count; ++k) reflect<1>(v, tau, x + k, from, ld);
  }

  // Householder QR with column pivoting. On return column j of X holds R down to row j and, below,
  // reflector j whose element j is 1. Returns the number of reflectors; rows of R from there on are
  // zero to working precision.
  static int64_t pivoted_qr(const Layout& w) {
    for (int64_t j = 0; j < w.n; ++j) {
      w.pivot[j] = j;
      w.norm2[j] = norm2_of(w.col(j), w.ld * P);
    }
    constexpr int64_t kReflected = 32;
    T* others[kReflected];
    for (int64_t k = 0; k < w.n; ++k) {
      int64_t top = k;
      for (int64_t j = k + 1; j < w.n; ++j) top = w.norm2[j] > w.norm2[top] ? j : top;
      if (!(w.norm2[top] > kNullNorm2<T>)) return k;
      if (top != k) {
        T *a = w.col(k), *b = w.col(top);
        for (int64_t i = 0; i < w.ld * P; i += W) {
          const V h = load<T>(a + i);
          store<T>(a + i, load<T>(b + i));
          store<T>(b + i, h);
        }
        const int64_t h = w.pivot[k];
        w.pivot[k] = w.pivot[top];
        w.pivot[top] = h;
        w.norm2[top] = w.norm2[k];
      }
      // v = x - beta e_k scaled to v_k = 1, beta = -phase(x_k) |x|, H = I - tau v v^H.
      T* c = w.col(k);
      T* v = w.reflector;
      for (int64_t i = 0; i < w.ld * P; ++i) v[i] = c[i];
      for (int p = 0; p < P; ++p) {
        for (int64_t i = 0; i < k; ++i) v[p * w.ld + i] = 0;
      }
      const T norm = T(__builtin_sqrt(norm2_of(v, w.ld * P)));
      const T ar = v[k], ai = kComplex ? v[w.ld * (P - 1) + k] : T(0);
      const T mag = T(kComplex ? __builtin_hypot(double(ar), double(ai)) : __builtin_fabs(ar));
      const T phr = mag > 0 ? ar / mag : T(1), phi = mag > 0 ? ai / mag : T(0);
      // x_k - beta = phase (mag + norm)
      const T scale = T(1) / (mag + norm);
      const T sr = phr * scale, si = -phi * scale;
      for (int64_t i = k + 1; i < w.m; ++i) {
        if constexpr (kComplex) {
          const T xr = v[i], xi = v[w.ld + i];
          v[i] = xr * sr - xi * si;
          v[w.ld + i] = xr * si + xi * sr;
        } else {
          v[i] *= sr;
        }
      }
      v[k] = 1;
      if constexpr (kComplex) v[w.ld + k] = 0;
      const T tau = (mag + norm) / norm;
      w.tau[k] = tau;
      for (int64_t j = k + 1; j < w.n; j += kReflected) {
        int64_t count = 0;
        for (; count < kReflected && j + count < w.n; ++count) others[count] = w.col(j + count);
        reflect_columns(v, tau, others, count, k, w.ld);
      }
      for (int64_t j = k + 1; j < w.n; ++j) update_norm(w, j, k);
      for (int p = 0; p < P; ++p) {
        for (int64_t i = k + 1; i < w.m; ++i) c[p * w.ld + i] = v[p * w.ld + i];
      }
      c[k] = -phr * norm;
      if constexpr (kComplex) c[w.ld + k] = -phi * norm;
    }
    return w.n;
  }

  // Squared norm of column j below row k, recomputed: downdating loses digits, and this costs a
  // quarter of the reflection just done.
  static JML_INLINE void update_norm(const Layout& w, int64_t j, int64_t k) {
    const T* c = w.col(j);
    T total = 0;
    for (int p = 0; p < P; ++p) {
      const T* plane = c + p * w.ld;
      const int64_t whole = divide_up(k + 1, W) * W;
      const int64_t stop = whole < w.ld ? whole : w.ld;
      for (int64_t i = k + 1; i < stop; ++i) total += plane[i] * plane[i];
      total += norm2_of(plane + whole, w.ld - whole);
    }
    w.norm2[j] = total;
  }

  // L = R^H into the panel, J = I.
  static void lower_factor(const Oriented<F>& o, const Layout& w, int64_t rank) {
    for (int64_t i = 0; i < w.panel * w.np; ++i) w.g[i] = V{};
    for (int64_t j = 0; j < w.n; ++j) {
      const T* c = w.col(j);
      const int64_t stop = j < rank ? j + 1 : rank;
      for (int64_t i = 0; i < stop; ++i) {
        w.entry(j, i, 0, 0) = c[i];
        if constexpr (kComplex) w.entry(j, i, 0, 1) = -c[w.ld + i];
      }
      if (o.t.compute_uv) w.entry(j, j, 1, 0) = 1;
    }
  }

  // One block pair of a sweep: pairs are gathered until a vector of angles is full or the next pair
  // would share a column.
  template <int kVectors>
  struct Pass {
    // Tiles whose angles make one vector; at least one, for lanes that hold fewer than two.
    static constexpr int kTiles = W / 2 > 1 ? W / 2 : 1;
    const Layout& w;
    V tol;
    Extremes& ext;
    int64_t g[W], h[W];
    int tiles = 0, singles = 0;
    // The rotations of the tiles gathered before, still to be applied to J.
    struct Lag {
      int count = 0;
      int64_t g[kTiles], h[kTiles];
      Turns first, second;
    } lag{};

    int64_t len() const { return kVectors > 0 ? kVectors : w.vectors; }
    V* lcol(int64_t j) const { return w.panel_col(j); }
    V* jcol(int64_t j) const { return w.panel_col(j) + len() * P; }

    // Angles of up to W pairs (p[k], q[k]) with their lane sums in re, im. Bit k is set if pair k
    // turns.
    JML_INLINE unsigned find(const int64_t* p, const int64_t* q, int count, V* re, V* im,
                             Turns& t) {
      alignas(64) T xx[W], yy[W], change[W];
      alignas(64) T wx[W], wy[W], lx[W], ly[W];
      for (int k = 0; k < count; ++k) {
        xx[k] = w.sigma2[p[k]];
        yy[k] = w.sigma2[q[k]];
        wx[k] = w.weight[p[k]];
        wy[k] = w.weight[q[k]];
        lx[k] = w.lost[p[k]];
        ly[k] = w.lost[q[k]];
      }
      for (int k = count; k < W; ++k) {
        re[k] = im[k] = V{};
        xx[k] = yy[k] = 0;  // a null pair: never rotated
        wx[k] = wy[k] = 1;
        lx[k] = ly[k] = 0;
      }
      Inner<T, kComplex> in;
      in.re = sum_each<T>(re);
      if constexpr (kComplex) in.im = sum_each<T>(im);
      in.xx = load<T>(xx);
      in.yy = load<T>(yy);
      Weight<T> weight_x{load<T>(wx), load<T>(lx)}, weight_y{load<T>(wy), load<T>(ly)};
      in.wx = weight_x.w;
      in.wy = weight_y.w;
      const Angle<T, kComplex> a = angle<T, kComplex>(in, tol, ~M{});
      ext.cos_max = max(ext.cos_max, a.cosine);
      ext.tan_max = max(ext.tan_max, a.tangent);
      t.store_from(a.r);
      store<T>(change, a.change);
      weight_x.grow(a.growth);
      weight_y.grow(a.growth);
      store<T>(wx, weight_x.w);
      store<T>(wy, weight_y.w);
      store<T>(lx, weight_x.lost);
      store<T>(ly, weight_y.lost);
      for (int k = 0; k < count; ++k) {
        w.sigma2[p[k]] -= change[k];
        w.sigma2[q[k]] += change[k];
        w.weight[p[k]] = wx[k];
        w.weight[q[k]] = wy[k];
        w.lost[p[k]] = lx[k];
        w.lost[q[k]] = ly[k];
      }
      return bits(a.active);
    }

    void single(int64_t group) {
      g[singles++] = 2 * group;
      if (singles == W) end();
    }
    void tile(int64_t a, int64_t b) {
      g[tiles] = 2 * a;
      h[tiles++] = 2 * b;
      if (tiles == kTiles) end();
    }
    void leave() {}
    void end() {
      if (singles > 0) end_singles();
      if (tiles > 0 || lag.count > 0) end_tiles();
    }
    void end_singles() {
      V re[W], im[W];
      for (int k = 0; k < singles; ++k) {
        h[k] = g[k] + 1;
        const auto d = Ops::dot(lcol(g[k]), lcol(h[k]), len());
        re[k] = d.real();
        im[k] = d.im;
      }
      Turns t;
      for (unsigned active = find(g, h, singles, re, im, t); active != 0; active &= active - 1) {
        const int k = __builtin_ctz(active);
        Ops::turn(t.get(k), lcol(g[k]), lcol(h[k]), len());
        if (w.parts == 2) Ops::turn(t.get(k), jcol(g[k]), jcol(h[k]), len());
      }
      singles = 0;
    }
    // Lane 2k is the first pair of tile k, lane 2k + 1 the second.
    void end_tiles() {
      V re[W], im[W];
      int64_t p[W], q[W];
      Lag next;
      next.count = tiles;
      for (int k = 0; k < tiles; ++k) {
        next.g[k] = g[k];
        next.h[k] = h[k];
        for (int e = 0; e < 2; ++e) {
          p[2 * k + e] = g[k] + e;
          q[2 * k + e] = h[k] + e;
          const auto d = Ops::dot(lcol(g[k] + e), lcol(h[k] + e), len());
          re[2 * k + e] = d.real();
          im[2 * k + e] = d.im;
        }
      }
      const unsigned first = tiles > 0 ? find(p, q, 2 * tiles, re, im, next.first) : 0;
      turn_j(0, lag.count / 2);
      for (int k = 0; k < tiles; ++k) {
        typename Ops::Dot d12, d21;
        if ((first >> 2 * k & 3) != 0) {
          Ops::turn_and_dot(next.first.get(2 * k), next.first.get(2 * k + 1), lcol(g[k]),
                            lcol(g[k] + 1), lcol(h[k]), lcol(h[k] + 1), len(), d12, d21);
        } else {
          d12 = Ops::dot(lcol(g[k]), lcol(h[k] + 1), len());
          d21 = Ops::dot(lcol(g[k] + 1), lcol(h[k]), len());
        }
        q[2 * k] = h[k] + 1;
        q[2 * k + 1] = h[k];
        re[2 * k] = d12.real();
        re[2 * k + 1] = d21.real();
        im[2 * k] = d12.im;
        im[2 * k + 1] = d21.im;
      }
      const unsigned second = tiles > 0 ? find(p, q, 2 * tiles, re, im, next.second) : 0;
      turn_j(lag.count / 2, lag.count);
      for (unsigned active = second; active != 0; active &= active - 1) {
        const int k = __builtin_ctz(active);
        Ops::turn(next.second.get(k), lcol(p[k]), lcol(q[k]), len());
      }
      // Tiles that did not turn leave the queue.
      lag.count = 0;
      for (int k = 0; k < tiles; ++k) {
        if (((first | second) >> 2 * k & 3) == 0) continue;
        const int to = lag.count++;
        lag.g[to] = next.g[k];
        lag.h[to] = next.h[k];
        for (int e = 0; e < 2; ++e) {
          lag.first.copy(2 * to + e, next.first, 2 * k + e);
          lag.second.copy(2 * to + e, next.second, 2 * k + e);
        }
      }
      if (w.parts == 1) lag.count = 0;
      tiles = 0;
    }
    void turn_j(int from, int to) {
      for (int k = from; k < to; ++k) {
        Ops::turn_tile(lag.first.get(2 * k), lag.first.get(2 * k + 1), lag.second.get(2 * k),
                       lag.second.get(2 * k + 1), jcol(lag.g[k]), jcol(lag.g[k] + 1),
                       jcol(lag.h[k]), jcol(lag.h[k] + 1), len());
      }
    }
  };

  // Columns of L to orthogonality. True if converged.
  static bool jacobi(const Oriented<F>& o, const Layout& w, int64_t b) {
    switch (w.vectors) {
      case 1:
        return jacobi<1>(o, w, b);
      case 2:
        return jacobi<2>(o, w, b);
      case 4:
        return jacobi<4>(o, w, b);
      case 8:
        return jacobi<8>(o, w, b);
      default:
        return jacobi<0>(o, w, b);
    }
  }
  template <int kVectors>
  static bool jacobi(const Oriented<F>& o, const Layout& w, int64_t b) {
    const int64_t n = w.n;
    const V tol = splat<T>(cosine_tolerance<T>(n));
    const T root_n = T(__builtin_sqrt(double(n)));
    const Ordering order(n, kBlockBytes / (2 * w.panel * kVectorBytes));
    for (int64_t j = 0; j < w.np; ++j) {
      w.sigma2[j] = w.lost[j] = 0;
      w.weight[j] = 1;
    }
    bool done = n == 1;
    int sweep = 0;
    T off = 0;
    while (!done && sweep < o.t.max_sweeps) {
      Extremes ext;
      for (int64_t j = 0; j < n; ++j) {
        unit_weight(w, j, kHeavy<T>);
        w.sigma2[j] = sum<T>(Ops::norm2(w.panel_col(j), w.vectors)) / w.weight[j];
      }
      if (o.t.parallel == nullptr) {
        Pass<kVectors> pass{w, tol, ext};
        order.visit_all(pass);
        pass.end();
      }
      for (int64_t round = 0; o.t.parallel != nullptr && round < order.rounds(); ++round) {
        // The block pairs of a round share no column.
        auto body = [&](int64_t k) {
          w.extremes[k] = Extremes{};
          Pass<kVectors> pass{w, tol, w.extremes[k]};
          order.visit_round(round, k, pass);
          pass.end();
        };
        using Body = decltype(body);
        o.t.parallel->run(
            o.t.parallel->self, order.blocks / 2,
            [](void* arg, int64_t k) { (*static_cast<Body*>(arg))(k); }, &body);
        for (int64_t k = 0; k < order.blocks / 2; ++k) {
          ext.cos_max = max(ext.cos_max, w.extremes[k].cos_max);
          ext.tan_max = max(ext.tan_max, w.extremes[k].tan_max);
        }
      }
      T cos_max = 0, tan_max = 0;
      for (int l = 0; l < W; ++l) {
        cos_max = ext.cos_max[l] > cos_max ? ext.cos_max[l] : cos_max;
        tan_max = ext.tan_max[l] > tan_max ? ext.tan_max[l] : tan_max;
      }
      off = cos_max;
      ++sweep;
      done = cos_max <= tol[0] || next_cosine(cos_max, tan_max, root_n) <= tol[0];
    }
    for (int64_t j = 0; j < n; ++j) unit_weight(w, j, 0);
    o.t.sweeps[b] = sweep;
    o.t.off_norm[b] = float(off);
    return done;
  }

  // A column heavier than `heavy` becomes the true one.
  static void unit_weight(const Layout& w, int64_t j, T heavy) {
    if (!(w.weight[j] > heavy)) return;
    const V down = splat<T>(T(1) / T(__builtin_sqrt(w.weight[j])));
    Ops::scale(w.panel_col(j), down, w.vectors * w.parts);
    w.weight[j] = 1;
    w.lost[j] = 0;
  }

  static void sort_values(const Layout& w) {
    for (int64_t j = 0; j < w.n; ++j) {
      w.sigma2[j] = sum<T>(Ops::norm2(w.panel_col(j), w.vectors));
      // Insertion: the pivoted factor leaves the values nearly sorted.
      int64_t at = j;
      for (; at > 0 && w.sigma2[w.order[at - 1]] < w.sigma2[j]; --at) w.order[at] = w.order[at - 1];
      w.order[at] = j;
    }
  }

  // Right factor: the normalised columns of L J, back through the pivoting.
  static void write_right(const Oriented<F>& o, const Layout& w, int64_t b) {
    bool any_null = false;
    for (int64_t j = 0; j < w.n; ++j) {
      w.null[j] = !(w.sigma2[j] > kNullNorm2<T>);
      any_null |= w.null[j] != 0;
      const T inv = w.null[j] ? T(0) : T(1) / T(__builtin_sqrt(w.sigma2[j]));
      V* c = w.panel_col(j);
      for (int64_t i = 0; i < w.vectors * P; ++i) c[i] = c[i] * inv;
    }
    if (any_null) complete_right(w);
    const FactorOut<F> out = o.right(b);
    for (int64_t r = 0; r < w.n; ++r) {
      const int64_t j = w.order[r];
      for (int64_t i = 0; i < w.n; ++i) {
        out.put(w.pivot[i], r, w.entry(i, j, 0, 0), kComplex ? w.entry(i, j, 0, P - 1) : T(0));
      }
    }
  }

  static __attribute__((noinline)) void complete_right(const Layout& w) {
    T* work = w.completion;
    T* q = work + w.n;
    for (int64_t j = 0; j < w.n; ++j) {
      for (int p = 0; p < P; ++p) {
        for (int64_t i = 0; i < w.n; ++i) q[(j * P + p) * w.n + i] = w.entry(i, j, 0, p);
      }
    }
    complete_columns<T, kComplex>(q, w.n, w.n, w.n * P, w.n, w.null, work);
    for (int64_t j = 0; j < w.n; ++j) {
      for (int p = 0; w.null[j] && p < P; ++p) {
        for (int64_t i = 0; i < w.n; ++i) w.entry(i, j, 0, p) = q[(j * P + p) * w.n + i];
      }
    }
  }

  // Left factor: Q times J, then Q times the rest of the identity if full matrices are asked for.
  static void write_left(const Oriented<F>& o, const Layout& w, int64_t b, int64_t rank) {
    // R is used up: turn every stored column into the whole reflector.
    for (int64_t j = 0; j < rank; ++j) {
      for (int p = 0; p < P; ++p) {
        T* c = w.col(j) + p * w.ld;
        for (int64_t i = 0; i < j; ++i) c[i] = 0;
        c[j] = p == 0;
      }
    }
    const FactorOut<F> out = o.left(b);
    // Many columns: a row of several columns is a vector, and the reflectors need no lane sums.
    // Few: one column at a time, rows across the lanes.
    int64_t r = 0;
    for (; w.left_cols - r >= W / 2 + 1; r += kRowBlock * W) left_rows(w, out, r, rank);
    for (; r < w.left_cols; r += kColumnGroup) left_columns(w, out, r, rank);
  }

  // Column r of [J, 0; 0, I], sorted: the entry in row i < n of plane p.
  static JML_INLINE T left_start(const Layout& w, int64_t i, int64_t r, int p) {
    return r < w.n ? w.entry(i, w.order[r], 1, p) : T(0);
  }

  static void left_rows(const Layout& w, const FactorOut<F>& out, int64_t r0, int64_t rank) {
    constexpr int B = kRowBlock;
    const int64_t count = w.left_cols - r0 < B * W ? w.left_cols - r0 : B * W;
    V* z = reinterpret_cast<V*>(w.block);  // row i: B vectors of each plane
    for (int64_t i = 0; i < w.m * B * P; ++i) z[i] = V{};
    for (int64_t k = 0; k < count; ++k) {
      T* lane = reinterpret_cast<T*>(z + k / W) + k % W;
      for (int p = 0; p < P; ++p) {
        for (int64_t i = 0; i < w.n; ++i) {
          lane[(i * P + p) * B * W] = left_start(w, i, r0 + k, p);
        }
      }
      if (r0 + k >= w.n) lane[(r0 + k) * P * B * W] = 1;
    }
    for (int64_t k = rank; k-- > 0;) {
      const T* v = w.col(k);
      V re[B] = {}, im[B] = {};
      for (int64_t i = k; i < w.m; ++i) {
        const V* row = z + i * B * P;
        const V vr = splat<T>(v[i]);
        for (int e = 0; e < B; ++e) {
          re[e] += vr * row[e];
          if constexpr (kComplex) {
            const V vi = splat<T>(v[w.ld + i]);
            re[e] += vi * row[B + e];
            im[e] += vr * row[B + e];
            im[e] -= vi * row[e];
          }
        }
      }
      for (int e = 0; e < B; ++e) {
        re[e] = re[e] * w.tau[k];
        if constexpr (kComplex) im[e] = im[e] * w.tau[k];
      }
      for (int64_t i = k; i < w.m; ++i) {
        V* row = z + i * B * P;
        const V vr = splat<T>(v[i]);
        for (int e = 0; e < B; ++e) {
          row[e] -= vr * re[e];
          if constexpr (kComplex) {
            const V vi = splat<T>(v[w.ld + i]);
            row[e] += vi * im[e];
            row[B + e] -= vr * im[e];
            row[B + e] -= vi * re[e];
          }
        }
      }
    }
    for (int64_t i = 0; i < w.m; ++i) {
      const T* row = reinterpret_cast<const T*>(z + i * B * P);
      for (int64_t k = 0; k < count; ++k) {
        out.put(i, r0 + k, row[k], kComplex ? row[B * W * (P - 1) + k] : T(0));
      }
    }
  }

  static void left_columns(const Layout& w, const FactorOut<F>& out, int64_t r0, int64_t rank) {
    const int64_t count = w.left_cols - r0 < kColumnGroup ? w.left_cols - r0 : kColumnGroup;
    T* cols[kColumnGroup];
    for (int64_t k = 0; k < count; ++k) {
      T* c = cols[k] = w.block + k * w.ld * P;
      for (int64_t i = 0; i < w.ld * P; i += W) store<T>(c + i, V{});
      for (int p = 0; p < P; ++p) {
        for (int64_t i = 0; i < w.n; ++i) c[p * w.ld + i] = left_start(w, i, r0 + k, p);
      }
      if (r0 + k >= w.n) c[r0 + k] = 1;
    }
    for (int64_t k = rank; k-- > 0;) reflect_columns(w.col(k), w.tau[k], cols, count, k, w.ld);
    for (int64_t i = 0; i < w.m; ++i) {
      for (int64_t k = 0; k < count; ++k) {
        out.put(i, r0 + k, cols[k][i], kComplex ? cols[k][w.ld * (P - 1) + i] : T(0));
      }
    }
  }
};

}  // namespace jml::host::JML_ISA
