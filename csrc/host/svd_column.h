// One-sided Jacobi within one matrix: rows across the lanes, one rotation angle a lane.
//   X P = Q R (Householder QR with column pivoting), then Jacobi on the columns of L = R^H:
//   L J = W S with J and W orthonormal, so X = (Q J) S (P W)^H.
// Pivoting bounds the sweeps whatever the scaling of the columns (Drmac & Veselic, SIMAX 29, 2008).
// Columns are stored as [L part | J part] so that a rotation is one pass over one array.
#pragma once

#include <type_traits>

#include "csrc/host/complete.h"
#include "csrc/host/matrix_io.h"
#include "csrc/host/rotation.h"
#include "csrc/host/svd_serial.h"

namespace jml::host::JML_ISA {

template <class F>
struct Column {
  using T = typename F::Real;
  using Stored = typename F::Stored;
  using V = Vec<T>;
  using M = Mask<T>;
  static constexpr bool kComplex = F::kComplex;
  static constexpr int P = F::kPlanes;
  static constexpr int W = kLanes<T>;
  // Pairs that one round rotates together, and so the widest column block.
  static constexpr int kMaxPairs = 32;
  // A pair of column blocks should stay in the first-level cache.
  static constexpr int64_t kBlockBytes = 32 * 1024;

  static int64_t padded(int64_t rows) { return (rows + W - 1) / W * W; }

  // Largest cosine and tangent met, lane by lane.
  struct Extremes {
    V cos_max{}, tan_max{};
  };

  // Where things lie in scratch, all padded to whole vectors.
  struct Layout {
    int64_t m, n, ld, lg, part, panel;  // ld: X's column; lg: one plane of L; part: reals of L or J
    int64_t left_cols;
    T *x, *g, *reflector, *block, *norm2, *sigma2, *tau, *work;
    int64_t *pivot, *order;
    uint8_t* null;
    Extremes* extremes;  // one a block pair of a round
    int64_t bytes;

    Layout(const Oriented<F>& o, void* base) {
      m = o.rows;
      n = o.cols;
      ld = padded(m);
      lg = padded(n);
      part = lg * P;
      panel = part * (o.t.compute_uv ? 2 : 1);
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
      g = take(panel * n, real);
      reflector = take(ld * P, real);
      block = take(ld * P * kColumnGroup, real);
      norm2 = take(n + W, real);
      sigma2 = take(n + W, real);
      tau = take(n, real);
      work = take(lg, real);
      pivot = take(n, index);
      order = take(n, index);
      null = take(n, static_cast<uint8_t*>(nullptr));
      extremes = take(n / 4 + 2, static_cast<Extremes*>(nullptr));
    }
    T* col(int64_t j) const { return x + j * ld * P; }
    T* panel_col(int64_t j) const { return g + j * panel; }
  };
  static constexpr int kColumnGroup = 8;

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
      o.values(b)[r] = narrow<F>(T(__builtin_sqrt(w.sigma2[w.order[r]])) * down);
    }
    if (!o.t.compute_uv) return;
    write_right(o, w, b);
    write_left(o, w, b, rank);
  }

  // X into columns, scaled to max |x| in [1, 2). False if an element is not finite.
  static bool read(const Oriented<F>& o, const Layout& w, int64_t b, T& down) {
    const Stored* a = o.input(b);
    if (o.wide) {
      for (int64_t j = 0; j < w.n; ++j) {
        T* c = w.col(j);
        const Stored* row = a + j * w.m * P;
        for (int64_t i = 0; i < w.m; ++i) {
          c[i] = widen(row[i * P]);
          if constexpr (kComplex) c[w.ld + i] = -widen(row[i * P + 1]);
        }
      }
    } else {
      constexpr int64_t kTile = 16;
      for (int64_t i0 = 0; i0 < w.m; i0 += kTile) {
        const int64_t i1 = i0 + kTile < w.m ? i0 + kTile : w.m;
        for (int64_t j = 0; j < w.n; ++j) {
          T* c = w.col(j);
          for (int64_t i = i0; i < i1; ++i) {
            c[i] = widen(a[(i * w.n + j) * P]);
            if constexpr (kComplex) c[w.ld + i] = widen(a[(i * w.n + j) * P + 1]);
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

  static T norm2_of(const T* c, int64_t len) {
    V a{}, b{};
    int64_t i = 0;
    for (; i + 2 * W <= len; i += 2 * W) {
      const V e = load<T>(c + i), f = load<T>(c + i + W);
      a += e * e;
      b += f * f;
    }
    if (i < len) {
      const V e = load<T>(c + i);
      a += e * e;
    }
    return sum<T>(a + b);
  }

  // x -= tau v (v^H x) for K columns at once, rows [from, ld) in whole vectors; v is zero above its
  // first row.
  template <int K>
  static JML_INLINE void reflect(const T* v, T tau, T* const* x, int64_t from, int64_t ld) {
    V re[K] = {}, im[K] = {};
    for (int64_t i = from; i < ld; i += W) {
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
    V fr[K], fi[K];
    for (int k = 0; k < K; ++k) {
      fr[k] = splat<T>(tau * sum<T>(re[k]));
      if constexpr (kComplex) fi[k] = splat<T>(tau * sum<T>(im[k]));
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
    T* others[kMaxPairs];
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
      const T mag = kComplex ? T(__builtin_sqrt(ar * ar + ai * ai)) : T(__builtin_fabs(ar));
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
      for (int64_t j = k + 1; j < w.n; j += kMaxPairs) {
        int64_t count = 0;
        for (; count < kMaxPairs && j + count < w.n; ++count) others[count] = w.col(j + count);
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
      const int64_t whole = (k + 1 + W - 1) / W * W;
      const int64_t stop = whole < w.ld ? whole : w.ld;
      for (int64_t i = k + 1; i < stop; ++i) total += plane[i] * plane[i];
      total += norm2_of(plane + whole, w.ld - whole);
    }
    w.norm2[j] = total;
  }

  // L = R^H into the panel, J = I.
  static void lower_factor(const Oriented<F>& o, const Layout& w, int64_t rank) {
    for (int64_t i = 0; i < w.panel * w.n; i += W) store<T>(w.g + i, V{});
    for (int64_t j = 0; j < w.n; ++j) {
      const T* c = w.col(j);
      const int64_t stop = j < rank ? j + 1 : rank;
      for (int64_t i = 0; i < stop; ++i) {
        w.panel_col(i)[j] = c[i];
        if constexpr (kComplex) w.panel_col(i)[w.lg + j] = -c[w.ld + i];
      }
      if (o.t.compute_uv) w.panel_col(j)[w.part + j] = 1;
    }
  }

  // One round: `count` disjoint pairs (p[k], q[k]).
  static void rotate_round(const Layout& w, const int* p, const int* q, int count, V tol,
                           Extremes& ext) {
    for (int base = 0; base < count; base += W) {
      const int pairs = count - base < W ? count - base : W;
      Inner<T, kComplex> g;
      V re[W], im[W];
      T xx[W] __attribute__((aligned(64))), yy[W] __attribute__((aligned(64)));
      for (int k = 0; k < pairs; ++k) {
        const T* x = w.panel_col(p[base + k]);
        const T* y = w.panel_col(q[base + k]);
        xx[k] = w.sigma2[p[base + k]];
        yy[k] = w.sigma2[q[base + k]];
        V r0{}, r1{}, i0{}, i1{};
        if constexpr (kComplex) {
          for (int64_t i = 0; i < w.lg; i += W) {
            const V xr = load<T>(x + i), xi = load<T>(x + w.lg + i);
            const V yr = load<T>(y + i), yi = load<T>(y + w.lg + i);
            r0 += xr * yr;
            r1 += xi * yi;
            i0 += xr * yi;
            i1 -= xi * yr;
          }
        } else {
          int64_t i = 0;
          for (; i + 2 * W <= w.lg; i += 2 * W) {
            r0 += load<T>(x + i) * load<T>(y + i);
            r1 += load<T>(x + i + W) * load<T>(y + i + W);
          }
          if (i < w.lg) r0 += load<T>(x + i) * load<T>(y + i);
        }
        re[k] = r0 + r1;
        if constexpr (kComplex) im[k] = i0 + i1;
      }
      for (int k = pairs; k < W; ++k) {
        re[k] = V{};
        if constexpr (kComplex) im[k] = V{};
        xx[k] = yy[k] = 0;  // a null pair: never rotated
      }
      g.re = sum_each<T>(re);
      if constexpr (kComplex) g.im = sum_each<T>(im);
      g.xx = load<T>(xx);
      g.yy = load<T>(yy);
      const Rotation<T, kComplex> r = rotation<T, kComplex>(g, tol, ~M{});
      ext.cos_max = max(ext.cos_max, r.cosine);
      if (!any(r.active)) continue;
      ext.tan_max = max(ext.tan_max, r.tangent);
      for (int k = 0; k < pairs; ++k) {
        if (!r.active[k]) continue;
        Rotation<T, kComplex> one;
        one.s = splat<T>(r.s[k]);
        one.tau = splat<T>(r.tau[k]);
        if constexpr (kComplex) {
          one.pr = splat<T>(r.pr[k]);
          one.pi = splat<T>(r.pi[k]);
        }
        const T change = r.change[k];
        w.sigma2[p[base + k]] -= change;
        w.sigma2[q[base + k]] += change;
        T* x = w.panel_col(p[base + k]);
        T* y = w.panel_col(q[base + k]);
        for (int64_t i = 0; i < w.panel; i += W * P) apply(one, x, y, i, w.lg);
      }
    }
  }

  // Vector number i of a panel column. Complex columns hold [re | im] for L, then the same for J.
  static JML_INLINE void apply(const Rotation<T, kComplex>& r, T* x, T* y, int64_t i, int64_t lg) {
    V none{};
    if constexpr (kComplex) {
      const int64_t half = i / (2 * lg) * 2 * lg;
      const int64_t e = half + (i - half) / 2;
      V xr = load<T>(x + e), xi = load<T>(x + e + lg);
      V yr = load<T>(y + e), yi = load<T>(y + e + lg);
      rotate<T, true>(r, xr, xi, yr, yi);
      store<T>(x + e, xr);
      store<T>(x + e + lg, xi);
      store<T>(y + e, yr);
      store<T>(y + e + lg, yi);
    } else {
      V xr = load<T>(x + i), yr = load<T>(y + i);
      rotate<T, false>(r, xr, none, yr, none);
      store<T>(x + i, xr);
      store<T>(y + i, yr);
    }
  }

  // Every pair inside two column blocks (on the first visit) and every pair across them.
  static void block_pair(const Layout& w, int i0, int in, int j0, int jn, bool inside, V tol,
                         Extremes& ext) {
    int p[kMaxPairs + 2], q[kMaxPairs + 2];
    if (inside) {
      const int longest = in > jn ? in : jn;
      const int even = longest + (longest & 1);
      for (int round = 0; round + 1 < even; ++round) {
        int count = 0;
        for (int half = 0; half < 2; ++half) {
          const int start = half ? j0 : i0, size = half ? jn : in;
          for (int k = 0; k < even / 2; ++k) {
            int64_t a, b;
            if (!round_robin_pair(even, round, k, size, a, b)) continue;
            p[count] = start + int(a);
            q[count++] = start + int(b);
          }
        }
        rotate_round(w, p, q, count, tol, ext);
      }
    }
    const int longest = in > jn ? in : jn;
    for (int round = 0; jn > 0 && round < longest; ++round) {
      int count = 0;
      for (int k = 0; k < in; ++k) {
        const int other = k + round < longest ? k + round : k + round - longest;
        if (other >= jn) continue;
        p[count] = i0 + k;
        q[count++] = j0 + other;
      }
      rotate_round(w, p, q, count, tol, ext);
    }
  }

  // Columns of L to orthogonality. True if converged.
  static bool jacobi(const Oriented<F>& o, const Layout& w, int64_t b) {
    const int64_t n = w.n;
    const T root = T(__builtin_sqrt(double(n > 4 ? n : 4)));
    const V tol = splat<T>(root * kUlp<T> * T(0.5));
    const T quadratic = T(__builtin_sqrt(double(n)));
    const int64_t column_bytes = w.panel * int64_t(sizeof(T));
    int64_t width = kBlockBytes / column_bytes / 2;
    width = width < 4 ? 4 : width > kMaxPairs ? kMaxPairs : width;
    int64_t blocks = (n + width - 1) / width;
    blocks += blocks & 1;
    bool done = n == 1;
    int sweep = 0;
    T off = 0;
    auto start = [&](int64_t block) { return int(block * n / blocks); };
    while (!done && sweep < o.t.max_sweeps) {
      Extremes ext;
      for (int64_t j = 0; j < n; ++j) w.sigma2[j] = norm2_of(w.panel_col(j), w.part);
      for (int64_t round = 0; round + 1 < blocks; ++round) {
        // The block pairs of a round share no column.
        auto visit = [&](int64_t k, Extremes& e) {
          int64_t i, j;
          round_robin_pair(blocks, round, k, blocks, i, j);
          block_pair(w, start(i), start(i + 1) - start(i), start(j), start(j + 1) - start(j),
                     round == 0, tol, e);
        };
        if (o.t.parallel == nullptr) {
          for (int64_t k = 0; k < blocks / 2; ++k) visit(k, ext);
          continue;
        }
        auto body = [&](int64_t k) {
          w.extremes[k] = Extremes{};
          visit(k, w.extremes[k]);
        };
        using Body = decltype(body);
        o.t.parallel->run(
            o.t.parallel->self, blocks / 2,
            [](void* arg, int64_t k) { (*static_cast<Body*>(arg))(k); }, &body);
        for (int64_t k = 0; k < blocks / 2; ++k) {
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
      done = cos_max <= tol[0] || cos_max * tan_max * quadratic <= tol[0];
    }
    o.t.sweeps[b] = sweep;
    o.t.off_norm[b] = float(off);
    return done;
  }

  static void sort_values(const Layout& w) {
    for (int64_t j = 0; j < w.n; ++j) {
      w.sigma2[j] = norm2_of(w.panel_col(j), w.part);
      // Insertion: the pivoted factor leaves the values nearly sorted.
      int64_t at = j;
      for (; at > 0 && w.sigma2[w.order[at - 1]] < w.sigma2[j]; --at) w.order[at] = w.order[at - 1];
      w.order[at] = j;
    }
  }

  // Right factor: rows of the normalised L J, back through the pivoting.
  static void write_right(const Oriented<F>& o, const Layout& w, int64_t b) {
    bool any_null = false;
    for (int64_t j = 0; j < w.n; ++j) {
      w.null[j] = !(w.sigma2[j] > kNullNorm2<T>);
      any_null |= w.null[j];
      const V inv = splat<T>(w.null[j] ? T(0) : T(1) / T(__builtin_sqrt(w.sigma2[j])));
      T* c = w.panel_col(j);
      for (int64_t i = 0; i < w.part; i += W) store<T>(c + i, load<T>(c + i) * inv);
    }
    if (any_null) {
      complete_columns<T, kComplex>(w.g, w.n, w.n, w.panel, w.lg, w.null, w.work);
    }
    const FactorOut<F> out = o.right(b);
    for (int64_t r = 0; r < w.n; ++r) {
      const T* c = w.panel_col(w.order[r]);
      for (int64_t i = 0; i < w.n; ++i) {
        out.put(w.pivot[i], r, c[i], kComplex ? c[w.lg + i] : T(0));
      }
    }
  }

  // Left factor: Q times J (or, past column n, times the identity), a few columns at a time.
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
    for (int64_t r0 = 0; r0 < w.left_cols; r0 += kColumnGroup) {
      const int64_t count = w.left_cols - r0 < kColumnGroup ? w.left_cols - r0 : kColumnGroup;
      T* cols[kColumnGroup];
      for (int64_t k = 0; k < count; ++k) {
        T* c = cols[k] = w.block + k * w.ld * P;
        for (int64_t i = 0; i < w.ld * P; i += W) store<T>(c + i, V{});
        if (r0 + k >= w.n) {
          c[r0 + k] = 1;
          continue;
        }
        const T* j = w.panel_col(w.order[r0 + k]) + w.part;
        for (int p = 0; p < P; ++p) {
          for (int64_t i = 0; i < w.n; ++i) c[p * w.ld + i] = j[p * w.lg + i];
        }
      }
      for (int64_t k = rank; k-- > 0;) reflect_columns(w.col(k), w.tau[k], cols, count, k, w.ld);
      for (int64_t i = 0; i < w.m; ++i) {
        for (int64_t k = 0; k < count; ++k) {
          out.put(i, r0 + k, cols[k][i], kComplex ? cols[k][w.ld * (P - 1) + i] : T(0));
        }
      }
    }
  }
};

}  // namespace jml::host::JML_ISA
