// Householder QR of one matrix, its columns across the lanes: panels of B columns, each a block
// reflector I - V T V^H that is applied by products (Schreiber, Van Loan, SISSC 10, 1989).
//
// A strip is S columns: row i of it is two vectors, of 2 W / P columns (complex numbers: the real
// parts, then the imaginary ones), and its rows are contiguous. The matrix is strips one behind the
// other, a panel is G of them, and so are V, which replaces the panel, T and what is between. A
// strip of columns is reflected by itself, so results do not depend on the number of threads.
//
// Within a panel columns lie along the lanes instead. Columns are scaled by powers of two before,
// and R scaled back; the phases that make R's diagonal real and >= 0 are those of the identity that
// the reflectors turn into Q: neither costs a pass.
#pragma once

#include "csrc/host/householder.h"

namespace jml::host::JML_ISA {

template <class F>
struct QrBlocked {
  using T = typename F::Real;
  using Stored = typename F::Stored;
  using V = Vec<T>;
  using H = Householder<T, F::kComplex>;
  static constexpr bool kComplex = F::kComplex;
  static constexpr int P = F::kPlanes;
  static constexpr int W = kLanes<T>;
  static constexpr int S = 2 * W / P;
  static constexpr int kRow = 2 * W;  // numbers of a row of a strip
  // Columns of a panel: enough that a strip is worth loading, few enough that panels cost little.
  static constexpr int G = 32 / P > S ? 32 / P / S : 1;
  static constexpr int B = G * S;
  static constexpr int kTri = B * G * kRow;  // numbers of a B x B matrix in strips
  // Rows of a product at a time: two vectors each must leave registers for what is multiplied.
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kRows = 8;
#else
  static constexpr int kRows = 4;
#endif
  static_assert(B % kRows == 0 && B % W == 0);
  // Products below are not worth waking threads for.
  static constexpr int64_t kSharedWork = 1 << 20;

  // ---- strips ----

  static int64_t columns(int64_t n, int64_t s) { return n - s * S < S ? n - s * S : S; }

  // Where number l of a row of a strip is: plane and column of it.
  static JML_INLINE int64_t in_strip(int64_t l, int plane) { return l + plane * W; }

  static JML_INLINE void get(const Stored* from, T* to, int64_t count) {
    if (count == S) {
      for (int l = 0; l < S; ++l) {
        for (int e = 0; e < P; ++e) to[in_strip(l, e)] = widen(from[l * P + e]);
      }
      return;
    }
    for (int l = 0; l < S; ++l) {
      for (int e = 0; e < P; ++e) to[in_strip(l, e)] = l < count ? T(widen(from[l * P + e])) : T(0);
    }
  }
  static JML_INLINE void put(const T* from, Stored* to, int64_t count) {
    if (count == S) {
      for (int l = 0; l < S; ++l) {
        for (int e = 0; e < P; ++e) to[l * P + e] = narrow<F>(from[in_strip(l, e)]);
      }
      return;
    }
    for (int l = 0; l < count; ++l) {
      for (int e = 0; e < P; ++e) to[l * P + e] = narrow<F>(from[in_strip(l, e)]);
    }
  }

  static JML_INLINE V load_at(const T* row, int h) { return load<T>(row + h * W); }
  static JML_INLINE void store_at(T* row, int h, V v) { store<T>(row + h * W, v); }

  // Entry (i, j) of a B x B matrix in strips.
  static JML_INLINE T& entry(T* tri, int64_t i, int64_t j, int plane) {
    return tri[j / S * (B * kRow) + i * kRow + in_strip(j % S, plane)];
  }

  // Rows first .. first + K of out = V^H C, of one strip of V.
  template <int K>
  static JML_INLINE void inner(const T* v, const T* c, int64_t rows, int first, T* out) {
    V sum[K][2] = {};
    v += first;
    for (int64_t i = 0; i < rows; ++i, v += kRow, c += kRow) {
      const V c0 = load_at(c, 0), c1 = load_at(c, 1);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        sum[k][0] += v[k] * c0;
        sum[k][1] += v[k] * c1;
        if constexpr (kComplex) {
          sum[k][0] += v[k + W] * c1;
          sum[k][1] -= v[k + W] * c0;
        }
      }
    }
    for (int k = 0; k < K; ++k) {
      store_at(out + (first + k) * kRow, 0, sum[k][0]);
      store_at(out + (first + k) * kRow, 1, sum[k][1]);
    }
  }
  static void inner(const T* v, int64_t apart, const T* c, int64_t rows, T* out) {
    constexpr int K = kRows < S ? kRows : S;
    for (int g = 0; g < G; ++g) {
      for (int first = 0; first < S; first += K) {
        inner<K>(v + g * apart, c, rows, first, out + g * S * kRow);
      }
    }
  }

  // K rows of C += V X, or C = V X.
  template <int K, bool kAdd>
  static JML_INLINE void outer(const T* v, int64_t apart, const T* x, T* c) {
    V sum[K][2] = {};
    if constexpr (kAdd) {
      for (int k = 0; k < K; ++k) {
        sum[k][0] = load_at(c + k * kRow, 0);
        sum[k][1] = load_at(c + k * kRow, 1);
      }
    }
    for (int g = 0; g < G; ++g, v += apart) {
      for (int l = 0; l < S; ++l, x += kRow) {
        const V x0 = load_at(x, 0), x1 = load_at(x, 1);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
          const T re = v[k * kRow + l];
          sum[k][0] += re * x0;
          sum[k][1] += re * x1;
          if constexpr (kComplex) {
            const T im = v[k * kRow + l + W];
            sum[k][0] -= im * x1;
            sum[k][1] += im * x0;
          }
        }
      }
    }
    for (int k = 0; k < K; ++k) {
      store_at(c + k * kRow, 0, sum[k][0]);
      store_at(c + k * kRow, 1, sum[k][1]);
    }
  }
  template <bool kAdd>
  static void outer(const T* v, int64_t apart, const T* x, T* c, int64_t rows) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      outer<kRows, kAdd>(v + i * kRow, apart, x, c + i * kRow);
    }
    if constexpr (kAdd) {  // else of B rows, a multiple
      for (; i < rows; ++i) outer<1, kAdd>(v + i * kRow, apart, x, c + i * kRow);
    }
  }

  // ---- the decomposition ----

  // Where things lie in scratch.
  struct Layout {
    int64_t m, n, k, kq, strips, panels, strip;  // numbers of a strip
    int64_t ld;                                  // of a column of the panel
    T *f, *x, *corner, *forth, *back, *phase, *down, *gram;
    uint8_t* bad;  // one a strip
    char* slots;
    int64_t slot_bytes, bytes;

    Layout(const QrTask& t, void* base) : m(t.m), n(t.n), k(t.k()), kq(t.kq()) {
      strips = divide_up(n, S);
      panels = divide_up(k, B);
      strip = m * kRow;
      ld = (divide_up(m, W) | 1) * W;
      bytes = 0;
      auto take = [this, base](int64_t size) {
        char* at = static_cast<char*>(base) + bytes;
        bytes += (size + 63) / 64 * 64;
        return at;
      };
      auto reals = [&](int64_t count) {
        return reinterpret_cast<T*>(take(count * int64_t(sizeof(T))));
      };
      // Behind the last panel there may be less than G strips, but they are read.
      f = reals((panels * G > strips ? panels * G : strips) * strip);
      x = reals(B * P * ld);
      corner = reals(panels * kTri);
      forth = reals(panels * kTri);
      back = reals(panels * kTri);
      phase = reals(panels * B * P);
      down = reals(strips * kRow);
      gram = reals(kTri);
      bad = reinterpret_cast<uint8_t*>(take(strips));
      slot_bytes = (2 * B * kRow + (t.want_q ? strip : 0)) * int64_t(sizeof(T));
      slots = take(slot_bytes * (t.slots > 0 ? t.slots : 1));
    }
    T* of_slot(int64_t slot) const { return reinterpret_cast<T*>(slots + slot * slot_bytes); }
  };

  static int64_t scratch_bytes(const QrTask& t) { return Layout(t, nullptr).bytes; }

  static void run(const QrTask& t, int64_t first, int64_t count, void* scratch) {
    const Layout w(t, scratch);
    for (int64_t b = first; b < first + count; ++b) one(t, w, b);
  }

 private:
  // body(group, slot) for every group.
  template <class Body>
  static void for_groups(const QrTask& t, int64_t groups, bool share, const Body& body) {
    in_pieces(t, groups, share, [&](int64_t begin, int64_t end, int64_t slot) {
      for (int64_t g = begin; g < end; ++g) body(g, slot);
    });
  }

  static void one(const QrTask& t, const Layout& w, int64_t b) {
    const Stored* a = static_cast<const Stored*>(t.a) + b * w.m * w.n * P;
    Stored* q = static_cast<Stored*>(t.q) + b * w.m * w.kq * P;
    Stored* r = static_cast<Stored*>(t.r) + b * w.kq * w.n * P;
    for_groups(t, w.strips, w.m * w.n > kSharedWork / 4,
               [&](int64_t s, int64_t) { load_strip(w, a, s); });
    for (int64_t s = 0; s < w.strips; ++s) {
      if (w.bad[s] == 0) continue;
      fill_nan<F>(r, w.kq * w.n);
      if (t.want_q) fill_nan<F>(q, w.m * w.kq);
      return;
    }
    for (int64_t p = 0; p < w.panels; ++p) {
      factor(w, p);
      const int64_t first = (p + 1) * G, behind = w.strips - first;
      if (behind <= 0) continue;
      const bool share = behind * (w.m - p * B) * kRow * B > kSharedWork;
      for_groups(t, behind, share, [&](int64_t s, int64_t slot) {
        apply(w, p, w.forth, w.f + (first + s) * w.strip, w.of_slot(slot));
      });
    }
    for_groups(t, w.strips, w.kq * w.n > kSharedWork / 4,
               [&](int64_t s, int64_t) { store_r(w, r, s); });
    if (!t.want_q) return;
    for_groups(t, divide_up(w.kq, S), w.m * w.kq * w.k > kSharedWork, [&](int64_t s, int64_t slot) {
      T* work = w.of_slot(slot);
      T* y = work + 2 * B * kRow;
      start_q(w, y, s);
      // Columns of the identity that a panel's rows do not reach stay as they are.
      const int64_t own = s / G < w.panels - 1 ? s / G : w.panels - 1;
      for (int64_t p = own; p >= 0; --p) apply(w, p, w.back, y, work);
      for (int64_t i = 0; i < w.m; ++i) {
        put(y + i * kRow, q + (i * w.kq + s * S) * P, columns(w.kq, s));
      }
    });
  }

  // A strip of the matrix, the largest entry of each column brought to [1, 2).
  static void load_strip(const Layout& w, const Stored* a, int64_t s) {
    T* f = w.f + s * w.strip;
    const int64_t count = columns(w.n, s);
    V big[2] = {}, nan{};
    for (int64_t i = 0; i < w.m; ++i) {
      get(a + (i * w.n + s * S) * P, f + i * kRow, count);
      for (int h = 0; h < 2; ++h) {
        const V x = load_at(f + i * kRow, h);
        big[h] = max(big[h], abs_<T>(x));
        nan += x * T(0);  // NaN from any NaN or infinity
      }
    }
    w.bad[s] = any(~(nan == nan));
    if (w.bad[s] != 0) return;
    if constexpr (kComplex) big[0] = big[1] = max(big[0], big[1]);
    V up[2];
    for (int h = 0; h < 2; ++h) {
      const Mask<T> exponent = biased_exponent<T>(big[h]);
      up[h] = power_of_two<T>(kMaxBiased<T> - exponent);
      store<T>(w.down + s * kRow + h * W, power_of_two<T>(exponent));
    }
    for (int64_t i = 0; i < w.m; ++i) {
      for (int h = 0; h < 2; ++h) store_at(f + i * kRow, h, load_at(f + i * kRow, h) * up[h]);
    }
  }

  // A strip of columns c becomes (I - V T V^H) c; `minus` is -T, or -T^H, of all panels.
  static void apply(const Layout& w, int64_t p, const T* minus, T* c, T* work) {
    const int64_t rows = w.m - p * B;
    const T* v = w.f + p * G * w.strip + p * B * kRow;
    c += p * B * kRow;
    inner(v, w.strip, c, rows, work);
    outer<false>(minus + p * kTri, B * kRow, work, work + B * kRow, B);
    outer<true>(v, w.strip, work + B * kRow, c, rows);
  }

  // ---- a panel ----

  // Between strips and columns: number (i, l) of half h of strip g is in column column_of(g, h, l).
  static JML_INLINE int64_t column_of(int g, int h, int l) {
    return kComplex ? (g * S + l) * 2 + h : g * S + h * W + l;
  }
  static void turn(const Layout& w, T* f, int64_t rows, bool to_columns) {
    for (int g = 0; g < G; ++g, f += w.strip) {
      for (int h = 0; h < 2; ++h) {
        for (int64_t i = 0; i < rows; i += W) {
          const int here = int(rows - i < W ? rows - i : W);
          V v[W];
          if (to_columns) {
            for (int l = 0; l < W; ++l) v[l] = l < here ? load_at(f + (i + l) * kRow, h) : V{};
          } else {
            for (int l = 0; l < W; ++l) v[l] = load_at(w.x + column_of(g, h, l) * w.ld + i, 0);
          }
          transpose<T>(v);
          if (to_columns) {
            for (int l = 0; l < W; ++l) store_at(w.x + column_of(g, h, l) * w.ld + i, 0, v[l]);
          } else {
            for (int l = 0; l < here; ++l) store_at(f + (i + l) * kRow, h, v[l]);
          }
        }
      }
    }
  }

  // Columns y, y + step, .. (K of them) become (I - tau v v^H) y, of `vectors` vectors.
  template <int K>
  static JML_INLINE void reflect(const Layout& w, const T* v, T tau, T* y, int64_t begin,
                                 int64_t end) {
    V re[K] = {}, im[K] = {};
    const int64_t step = w.ld * P;
    for (int64_t i = begin; i < end; i += W) {
      const V a = load_at(v + i, 0);
#pragma GCC unroll 4
      for (int c = 0; c < K; ++c) {
        const V yr = load_at(y + c * step + i, 0);
        re[c] += a * yr;
        if constexpr (kComplex) {
          const V b = load_at(v + w.ld + i, 0), yi = load_at(y + c * step + w.ld + i, 0);
          re[c] += b * yi;
          im[c] += a * yi;
          im[c] -= b * yr;
        }
      }
    }
    T sr[K], si[K];
    for (int c = 0; c < K; ++c) {
      sr[c] = tau * sum<T>(re[c]);
      if constexpr (kComplex) si[c] = tau * sum<T>(im[c]);
    }
    for (int64_t i = begin; i < end; i += W) {
      const V a = load_at(v + i, 0);
#pragma GCC unroll 4
      for (int c = 0; c < K; ++c) {
        T* at = y + c * step + i;
        V yr = load_at(at, 0) - sr[c] * a;
        if constexpr (kComplex) {
          const V b = load_at(v + w.ld + i, 0);
          yr += si[c] * b;
          store_at(at + w.ld, 0, load_at(at + w.ld, 0) - sr[c] * b - si[c] * a);
        }
        store_at(at, 0, yr);
      }
    }
  }

  // The panel becomes V; R of its rows goes to `corner`, T to `forth` and `back`.
  static void factor(const Layout& w, int64_t p) {
    const int64_t base = p * B, rows = w.m - base;
    const int64_t count = w.n - base < B ? w.n - base : B;
    const int64_t steps = w.k - base < B ? w.k - base : B;
    T* strips = w.f + p * G * w.strip + base * kRow;
    T* corner = w.corner + p * kTri;
    for (int64_t i = 0; i < kTri; ++i) corner[i] = 0;
    for (int64_t s = w.strips; s < (p + 1) * G; ++s) {
      for (int64_t i = 0; i < w.strip; ++i) w.f[s * w.strip + i] = 0;
    }
    turn(w, strips, rows, true);
    const int64_t end = divide_up(rows, W) * W;
    T tau[B] = {};
    for (int64_t j = 0; j < B; ++j) {
      T* x = w.x + j * P * w.ld;
      take_r(w, p, x, j, j < steps ? j : (rows < B ? rows : B));
      if (j >= steps) {
        for (int64_t i = 0; i < end; ++i) {
          for (int e = 0; e < P; ++e) x[e * w.ld + i] = 0;
        }
        continue;
      }
      const int64_t begin = j / W * W;
      tau[j] = make(w, p, x, j, rows, begin, end);
      int64_t c = j + 1;
      for (; c + 4 <= count; c += 4) reflect<4>(w, x, tau[j], w.x + c * P * w.ld, begin, end);
      for (; c < count; ++c) reflect<1>(w, x, tau[j], w.x + c * P * w.ld, begin, end);
    }
    turn(w, strips, rows, false);
    make_t(w, p, strips, rows, tau);
  }

  // The first `count` entries of column j leave it for R, with the phases of their rows.
  static void take_r(const Layout& w, int64_t p, T* x, int64_t j, int64_t count) {
    const T* phase = w.phase + p * B * P;
    T* corner = w.corner + p * kTri;
    for (int64_t i = 0; i < count; ++i) {
      const T re = x[i], sr = phase[i * P];
      if constexpr (kComplex) {
        const T im = x[w.ld + i], si = phase[i * P + 1];
        entry(corner, i, j, 0) = sr * re + si * im;
        entry(corner, i, j, 1) = sr * im - si * re;
        x[w.ld + i] = 0;
      } else {
        entry(corner, i, j, 0) = sr * re;
      }
      x[i] = 0;
    }
  }

  // The reflector of column j, from its diagonal down; returns tau. Householder::make for one.
  static T make(const Layout& w, int64_t p, T* x, int64_t j, int64_t rows, int64_t begin,
                int64_t end) {
    V squares[2] = {};
    for (int64_t i = begin; i < end; i += W) {
      for (int e = 0; e < P; ++e) {
        const V v = load_at(x + e * w.ld + i, 0);
        squares[e] += v * v;
      }
    }
    const T norm2 = sum<T>(squares[0] + squares[1]), norm = root(norm2);
    const bool live = norm2 > T(rows * P) * H::kTiny && j + 1 < rows;
    T mag = absolute(x[j]), phr = x[j] < 0 ? T(-1) : T(1), phi = 0;
    if constexpr (kComplex) {
      const T ar = mag, ai = absolute(x[w.ld + j]);
      const T high = ar > ai ? ar : ai, low = ar > ai ? ai : ar;
      const bool some = high > H::kTiny;
      const T ratio = some ? low / high : T(0);
      mag = high * root(1 + ratio * ratio);
      phr = some ? x[j] / mag : T(1);
      phi = some ? x[w.ld + j] / mag : T(0);
      // One Newton step: a phase off the unit circle would leave Q off orthogonal.
      const T grow = T(1.5) - T(0.5) * (phr * phr + phi * phi);
      phr *= grow;
      phi *= grow;
    }
    T* phase = w.phase + (p * B + j) * P;
    phase[0] = live ? -phr : phr;
    if (live) x[j] += phr * norm;
    if constexpr (kComplex) {
      phase[1] = live ? -phi : phi;
      if (live) x[w.ld + j] += phi * norm;
    }
    entry(w.corner + p * kTri, j, j, 0) = live ? norm : mag;
    return live ? 1 / (norm * (norm + mag)) : T(0);
  }
  static JML_INLINE T root(T x) { return sqrt(splat<T>(x))[0]; }
  static JML_INLINE T absolute(T x) { return x < 0 ? -x : x; }

  // Column j of T is -tau_j T (V^H v_j), with tau_j on the diagonal.
  static void make_t(const Layout& w, int64_t p, const T* v, int64_t rows, const T* tau) {
    alignas(64) T t[B * P * B];  // column by column, planes apart
    for (int g = 0; g < G; ++g) {
      inner(v, w.strip, v + g * w.strip, rows, w.gram + g * B * kRow);
    }
    for (int64_t j = 0; j < B; ++j) {
      T* own = t + j * P * B;
      constexpr int kVectors = B / W;
      V re[kVectors] = {}, im[kVectors] = {};
      for (int64_t l = 0; l < j; ++l) {
        const T gr = -tau[j] * entry(w.gram, l, j, 0);
        for (int h = 0; h < kVectors; ++h) {
          const V tr = load_at(t + l * P * B, h);
          re[h] += gr * tr;
          if constexpr (kComplex) {
            const T gi = -tau[j] * entry(w.gram, l, j, 1);
            const V ti = load_at(t + l * P * B + B, h);
            re[h] -= gi * ti;
            im[h] += gr * ti;
            im[h] += gi * tr;
          }
        }
      }
      for (int h = 0; h < kVectors; ++h) {
        store_at(own, h, re[h]);
        if constexpr (kComplex) store_at(own + B, h, im[h]);
      }
      own[j] = tau[j];
    }
    T *forth = w.forth + p * kTri, *back = w.back + p * kTri;
    for (int64_t j = 0; j < B; ++j) {
      for (int64_t i = 0; i < B; ++i) {
        const T re = t[j * P * B + i];
        entry(back, i, j, 0) = entry(forth, j, i, 0) = -re;
        if constexpr (kComplex) {
          const T im = t[j * P * B + B + i];
          entry(back, i, j, 1) = -im;
          entry(forth, j, i, 1) = im;
        }
      }
    }
  }

  // ---- results ----

  // Columns of the identity, with Q's phases.
  static void start_q(const Layout& w, T* y, int64_t s) {
    for (int64_t i = 0; i < w.strip; ++i) y[i] = 0;
    for (int64_t l = 0; l < columns(w.kq, s); ++l) {
      const int64_t j = s * S + l;
      T* at = y + j * kRow + l;
      at[0] = j < w.k ? w.phase[j * P] : T(1);
      if constexpr (kComplex) at[W] = j < w.k ? w.phase[j * P + 1] : T(0);
    }
  }

  // A strip of R, its columns scaled back.
  static void store_r(const Layout& w, Stored* r, int64_t s) {
    const int64_t count = columns(w.n, s), p = s / G;
    const T* f = w.f + s * w.strip;
    const V down[2] = {load_at(w.down + s * kRow, 0), load_at(w.down + s * kRow, 1)};
    alignas(64) T row[kRow];
    for (int64_t i = 0; i < w.kq; ++i) {
      V re{}, im{};
      if (i < p * B && i < w.k) {
        const V x = load_at(f + i * kRow, 0), y = load_at(f + i * kRow, 1);
        const T sr = w.phase[i * P];
        re = sr * x;
        im = sr * y;
        if constexpr (kComplex) {
          const T si = w.phase[i * P + 1];
          re += si * y;
          im -= si * x;
        }
      } else if (i < w.k && i < (p + 1) * B) {
        const T* corner = w.corner + p * kTri + s % G * (B * kRow) + (i - p * B) * kRow;
        re = load_at(corner, 0);
        im = load_at(corner, 1);
      }
      store_at(row, 0, re * down[0]);
      store_at(row, 1, im * down[1]);
      put(row, r + (i * w.n + s * S) * P, count);
    }
  }
};

}  // namespace jml::host::JML_ISA
