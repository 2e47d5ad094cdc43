// Householder QR across the lanes: lane l of every vector belongs to matrix (or block of rows) l of
// a group. Element (i, j) of all of them is one vector, two when complex; a column is contiguous,
// and columns are an odd number of vectors apart, or they would crowd a few cache sets.
//   H_j = I - tau_j v_j v_j^H with v_j zero above row j, tau_j real; H_{k-1} .. H_0 A = R.
// Columns are scaled by powers of two before, so that no square overflows or vanishes; Q does not
// see that, R is scaled back. R's diagonal is made real and >= 0 by a phase for each column of Q.
#pragma once

#include "csrc/host/matrix_io.h"

namespace jml::host::JML_ISA {

template <class T, bool kComplex>
struct Householder {
  using V = Vec<T>;
  using M = Mask<T>;
  static constexpr int P = kComplex ? 2 : 1;
  static constexpr int W = kLanes<T>;
  // Columns that are reflected together: the reflector is loaded once for all.
  static constexpr int kTogether = 4;
  // Squares below have lost digits to underflow.
  static constexpr T kTiny = sizeof(T) == 4 ? T(1.1754944e-38 / 1.1920929e-7)
                                            : T(2.2250738585072014e-308 / 2.220446049250313e-16);

  static int64_t stride(int64_t rows) { return rows * P | 1; }

  struct Panel {
    V* x;
    int64_t rows, cols, step;  // vectors from column to column

    JML_INLINE V* col(int64_t j) const { return x + j * step; }
  };

  // What reflectors consist of beside their vectors, which replace the columns from the diagonal
  // down.
  struct Factors {
    V* tau;    // [k]
    V* sign;   // [k * P], the phase of column j of Q
    V* cross;  // [k * P], v_j^H v_{j+1} for even j
    V* diag;   // [k], R's diagonal, >= 0
    V* down;   // [cols], what undoes the scaling of a column
  };
  // Vectors of tau, sign and cross: what it takes to apply Q.
  static int64_t kept_vectors(int64_t k) { return k * (1 + 2 * P); }
  static int64_t factor_vectors(int64_t cols, int64_t k) { return kept_vectors(k) + k + cols; }
  static Factors factors(V* at, int64_t k) {
    return {at, at + k, at + k * (1 + P), at + kept_vectors(k), at + kept_vectors(k) + k};
  }

  // Reads W row-major matrices that lie one behind the other; only `valid` elements (planes counted
  // apart) exist, what is behind them counts as zero.
  template <class S>
  static void gather(const S* a, int64_t valid, const Panel& p, int64_t rows, T* stage) {
    const int64_t elements = rows * p.cols * P;
    const T* src = stage;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (valid == W * elements) src = a;
    }
    if (src == stage) {
      for (int64_t i = 0; i < valid; ++i) stage[i] = widen(a[i]);
      for (int64_t i = valid; i < W * elements; ++i) stage[i] = 0;
    }
    const int64_t width = p.cols * P;
    int64_t row = 0, along = 0;
    auto place = [&](V v) {
      p.x[along / P * p.step + row * P + along % P] = v;
      if (++along == width) {
        along = 0;
        ++row;
      }
    };
    int64_t e = 0;
    for (; e + W <= elements; e += W) {
      V r[W];
      for (int l = 0; l < W; ++l) r[l] = load<T>(src + l * elements + e);
      transpose<T>(r);
      for (int l = 0; l < W; ++l) place(r[l]);
    }
    if (e < elements && elements >= W) {
      // The last elements with some before them, which are placed again.
      V r[W];
      const int64_t start = elements - W;
      row = start / width;
      along = start % width;
      for (int l = 0; l < W; ++l) r[l] = load<T>(src + l * elements + start);
      transpose<T>(r);
      for (int l = 0; l < W; ++l) place(r[l]);
      e = elements;
    }
    for (; e < elements; ++e) {
      V r;
      for (int l = 0; l < W; ++l) r[l] = src[l * elements + e];
      place(r);
    }
  }

  // The reverse: W row-major matrices of `rows` x `cols` elements, get(row, column, plane) each.
  template <class S, class Get>
  static void scatter(int64_t rows, int64_t cols, S* out, int64_t valid, T* stage, Get get) {
    const int64_t elements = rows * cols * P, width = cols * P;
    T* to = stage;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (valid == W * elements) to = out;
    }
    int64_t row = 0, along = 0;
    auto next = [&] {
      const V v = get(row, along / P, int(along % P));
      if (++along == width) {
        along = 0;
        ++row;
      }
      return v;
    };
    int64_t e = 0;
    for (; e + W <= elements; e += W) {
      V r[W];
      for (int l = 0; l < W; ++l) r[l] = next();
      transpose<T>(r);
      for (int l = 0; l < W; ++l) store<T>(to + l * elements + e, r[l]);
    }
    for (; e < elements; ++e) {
      const V v = next();
      for (int l = 0; l < W; ++l) to[l * elements + e] = v[l];
    }
    if (to != stage) return;
    for (int64_t i = 0; i < valid; ++i) out[i] = Narrow<S>::from(stage[i]);
  }

  // Brings the largest entry of every column to [1, 2). Lanes that are not finite become zero; the
  // result is the mask of the finite ones.
  static M scale(const Panel& p, V* down) {
    V bad{};
    for (int64_t j = 0; j < p.cols; ++j) {
      const V* c = p.col(j);
      V big{};
      for (int64_t i = 0; i < p.rows * P; ++i) {
        big = max(big, abs_<T>(c[i]));
        bad += c[i] * T(0);  // NaN from any NaN or infinity
      }
      down[j] = big;
    }
    const M finite = bad == bad;
    for (int64_t j = 0; j < p.cols; ++j) {
      const M exponent = biased_exponent<T>(finite ? down[j] : V{});
      const V up = power_of_two<T>(kMaxBiased<T> - exponent);
      down[j] = power_of_two<T>(exponent);
      V* c = p.col(j);
      for (int64_t i = 0; i < p.rows * P; ++i) c[i] = finite ? c[i] * up : V{};
    }
    return finite;
  }

  // Columns y, y + step, .. (K of them) become H y; v is the reflector from its first row on.
  template <int K>
  static JML_INLINE void reflect(const V* v, V tau, V* y, int64_t step, int64_t rows) {
    V re[K] = {}, im[K] = {}, re2[K] = {};
    int64_t i = 0;
    if constexpr (!kComplex) {
      for (; i + 2 <= rows; i += 2) {
        const V a = v[i], b = v[i + 1];
#pragma GCC unroll 8
        for (int c = 0; c < K; ++c) {
          re[c] += a * y[c * step + i];
          re2[c] += b * y[c * step + i + 1];
        }
      }
    }
    for (; i < rows; ++i) {
      const V vr = v[i * P];
#pragma GCC unroll 8
      for (int c = 0; c < K; ++c) {
        const V yr = y[c * step + i * P];
        re[c] += vr * yr;
        if constexpr (kComplex) {
          const V vi = v[i * P + 1], yi = y[c * step + i * P + 1];
          re[c] += vi * yi;
          im[c] += vr * yi;
          im[c] -= vi * yr;
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < K; ++c) {
      re[c] = (re[c] + re2[c]) * tau;
      im[c] *= tau;
    }
    for (i = 0; i < rows; ++i) {
      const V vr = v[i * P];
#pragma GCC unroll 8
      for (int c = 0; c < K; ++c) {
        V* at = y + c * step + i * P;
        at[0] -= re[c] * vr;
        if constexpr (kComplex) {
          const V vi = v[i * P + 1];
          at[0] += im[c] * vi;
          at[1] -= re[c] * vi;
          at[1] -= im[c] * vr;
        }
      }
    }
  }
  static JML_INLINE void reflect(int64_t count, const V* v, V tau, V* y, int64_t step,
                                 int64_t rows) {
    switch (count) {
      case 4:
        return reflect<4>(v, tau, y, step, rows);
      case 3:
        return reflect<3>(v, tau, y, step, rows);
      case 2:
        return reflect<2>(v, tau, y, step, rows);
      case 1:
        return reflect<1>(v, tau, y, step, rows);
      default:
        return;
    }
  }

  // Two reflectors at once, of columns j and j + 1, from row j on: half the traffic of one after
  // the other. H_{j+1} H_j y if `forward`, else H_j H_{j+1} y.
  template <int K>
  static JML_INLINE void reflect_pair(const Panel& p, const Factors& f, int64_t j, bool forward,
                                      V* y, int64_t step) {
    const int64_t rows = p.rows - j;
    const V *low = p.col(j) + j * P, *high = p.col(j + 1) + j * P;  // high has no first row
    V lr[K], li[K] = {}, hr[K] = {}, hi[K] = {};
#pragma GCC unroll 8
    for (int c = 0; c < K; ++c) {
      lr[c] = low[0] * y[c * step];
      if constexpr (kComplex) {
        lr[c] += low[1] * y[c * step + 1];
        li[c] = low[0] * y[c * step + 1] - low[1] * y[c * step];
      }
    }
    for (int64_t i = 1; i < rows; ++i) {
      const V ar = low[i * P], br = high[i * P];
#pragma GCC unroll 8
      for (int c = 0; c < K; ++c) {
        const V yr = y[c * step + i * P];
        lr[c] += ar * yr;
        hr[c] += br * yr;
        if constexpr (kComplex) {
          const V ai = low[i * P + 1], bi = high[i * P + 1], yi = y[c * step + i * P + 1];
          lr[c] += ai * yi;
          li[c] += ar * yi;
          li[c] -= ai * yr;
          hr[c] += bi * yi;
          hi[c] += br * yi;
          hi[c] -= bi * yr;
        }
      }
    }
    const V tl = f.tau[j], th = f.tau[j + 1], cr = f.cross[j * P];
#pragma GCC unroll 8
    for (int c = 0; c < K; ++c) {
      if constexpr (kComplex) {
        const V ci = f.cross[j * P + 1];
        if (forward) {
          lr[c] *= tl;
          li[c] *= tl;
          hr[c] = th * (hr[c] - (cr * lr[c] + ci * li[c]));
          hi[c] = th * (hi[c] - (cr * li[c] - ci * lr[c]));
        } else {
          hr[c] *= th;
          hi[c] *= th;
          lr[c] = tl * (lr[c] - (cr * hr[c] - ci * hi[c]));
          li[c] = tl * (li[c] - (cr * hi[c] + ci * hr[c]));
        }
        y[c * step] -= low[0] * lr[c] - low[1] * li[c];
        y[c * step + 1] -= low[0] * li[c] + low[1] * lr[c];
      } else {
        if (forward) {
          lr[c] *= tl;
          hr[c] = th * (hr[c] - cr * lr[c]);
        } else {
          hr[c] *= th;
          lr[c] = tl * (lr[c] - cr * hr[c]);
        }
        y[c * step] -= low[0] * lr[c];
      }
    }
    for (int64_t i = 1; i < rows; ++i) {
      const V ar = low[i * P], br = high[i * P];
#pragma GCC unroll 8
      for (int c = 0; c < K; ++c) {
        V* at = y + c * step + i * P;
        V yr = at[0];
        yr -= ar * lr[c];
        yr -= br * hr[c];
        if constexpr (kComplex) {
          const V ai = low[i * P + 1], bi = high[i * P + 1];
          V yi = at[1];
          yr += ai * li[c];
          yr += bi * hi[c];
          yi -= ar * li[c];
          yi -= ai * lr[c];
          yi -= br * hi[c];
          yi -= bi * hr[c];
          at[1] = yi;
        }
        at[0] = yr;
      }
    }
  }
  static JML_INLINE void reflect_pair(int64_t count, const Panel& p, const Factors& f, int64_t j,
                                      bool forward, V* y, int64_t step) {
    switch (count) {
      case 4:
        return reflect_pair<4>(p, f, j, forward, y, step);
      case 3:
        return reflect_pair<3>(p, f, j, forward, y, step);
      case 2:
        return reflect_pair<2>(p, f, j, forward, y, step);
      default:
        return reflect_pair<1>(p, f, j, forward, y, step);
    }
  }

  // v_j^H v_{j+1}.
  static void make_cross(const Panel& p, const Factors& f, int64_t j) {
    const V *low = p.col(j) + (j + 1) * P, *high = p.col(j + 1) + (j + 1) * P;
    V re{}, im{};
    for (int64_t i = 0; i < p.rows - j - 1; ++i) {
      re += low[i * P] * high[i * P];
      if constexpr (kComplex) {
        re += low[i * P + 1] * high[i * P + 1];
        im += low[i * P] * high[i * P + 1];
        im -= low[i * P + 1] * high[i * P];
      }
    }
    f.cross[j * P] = re;
    if constexpr (kComplex) f.cross[j * P + 1] = im;
  }

  // The reflector of column j, from its diagonal down.
  static void make(const Panel& p, const Factors& f, int64_t j) {
    V* x = p.col(j) + j * P;
    const int64_t len = (p.rows - j) * P;
    V a{}, b{};
    int64_t i = 0;
    for (; i + 2 <= len; i += 2) {
      a += x[i] * x[i];
      b += x[i + 1] * x[i + 1];
    }
    if (i < len) a += x[i] * x[i];
    const V norm2 = a + b, norm = sqrt(norm2);
    // The tail that is then left out is less than an ulp of the column.
    M live = norm2 > T(p.rows * P) * kTiny;
    if (j + 1 == p.rows) live = M{};  // nothing below
    V mag = abs_<T>(x[0]), phr, phi{};
    if constexpr (kComplex) {
      const V ar = mag, ai = abs_<T>(x[1]);
      const V hi = max(ar, ai), lo = min(ar, ai);
      const M some = hi > kTiny;
      const V ratio = some ? lo / (some ? hi : splat<T>(1)) : V{};
      mag = hi * sqrt(1 + ratio * ratio);
      const V safe = some ? mag : splat<T>(1);
      phr = some ? x[0] / safe : splat<T>(1);
      phi = some ? x[1] / safe : V{};
      // One Newton step: a phase off the unit circle would leave Q off orthogonal.
      const V grow = T(1.5) - T(0.5) * (phr * phr + phi * phi);
      phr *= grow;
      phi *= grow;
    } else {
      phr = x[0] < 0 ? splat<T>(-1) : splat<T>(1);
    }
    const V safe = live ? norm : splat<T>(1);
    f.tau[j] = live ? 1 / (safe * (safe + mag)) : V{};
    f.diag[j] = live ? norm : mag;
    f.sign[j * P] = live ? -phr : phr;
    x[0] += live ? phr * norm : V{};
    if constexpr (kComplex) {
      f.sign[j * P + 1] = live ? -phi : phi;
      x[1] += live ? phi * norm : V{};
    }
  }

  // k reflectors, and R above the diagonal. Column by column, so that a few stay in the cache.
  static void factor(const Panel& p, const Factors& f, int64_t k) {
    for (int64_t first = 0; first < p.cols; first += kTogether) {
      const int64_t end = first + kTogether < p.cols ? first + kTogether : p.cols;
      int64_t j = 0;
      for (; j + 1 < first && j + 1 < k; j += 2) {
        reflect_pair(end - first, p, f, j, true, p.col(first) + j * P, p.step);
      }
      for (; j < first && j < k; ++j) {
        reflect(end - first, p.col(j) + j * P, f.tau[j], p.col(first) + j * P, p.step, p.rows - j);
      }
      for (j = first; j < end && j < k; ++j) {
        make(p, f, j);
        if (j & 1) make_cross(p, f, j - 1);
        reflect(end - j - 1, p.col(j) + j * P, f.tau[j], p.col(j + 1) + j * P, p.step, p.rows - j);
      }
    }
  }

  // y = H_0 .. H_{k-1} y. With `identity`, y is the identity (its columns times anything) and the
  // reflectors that do not touch a column are left out.
  static void apply_q(const Panel& p, const Factors& f, int64_t k, const Panel& y, bool identity) {
    for (int64_t first = 0; first < y.cols; first += kTogether) {
      const int64_t end = first + kTogether < y.cols ? first + kTogether : y.cols;
      int64_t left = identity && end < k ? end : k;
      if (left & 1) {
        const int64_t j = --left;
        reflect(end - first, p.col(j) + j * P, f.tau[j], y.col(first) + j * P, y.step, p.rows - j);
      }
      for (int64_t j = left - 2; j >= 0; j -= 2) {
        reflect_pair(end - first, p, f, j, false, y.col(first) + j * P, y.step);
      }
    }
  }

  // The columns of the identity times the phases of Q.
  static void signed_identity(const Panel& y, const Factors& f, int64_t k) {
    for (int64_t j = 0; j < y.cols; ++j) {
      V* c = y.col(j);
      for (int64_t i = 0; i < y.rows * P; ++i) c[i] = V{};
      c[j * P] = j < k ? f.sign[j * P] : splat<T>(1);
      if constexpr (kComplex) {
        if (j < k) c[j * P + 1] = f.sign[j * P + 1];
      }
    }
  }

  // Entry (i, j) of R, i < k rows.
  static JML_INLINE V r_entry(const Panel& p, const Factors& f, int64_t k, int64_t i, int64_t j,
                              int plane) {
    if (i > j || i >= k) return V{};
    if (i == j) return plane == 0 ? f.diag[i] * f.down[j] : V{};
    const V* x = p.col(j) + i * P;
    if constexpr (kComplex) {
      const V sr = f.sign[i * P], si = f.sign[i * P + 1];
      return (plane == 0 ? sr * x[0] + si * x[1] : sr * x[1] - si * x[0]) * f.down[j];
    } else {
      return f.sign[i] * x[0] * f.down[j];
    }
  }
};

// W matrices at a time.
template <class F>
struct QrInterleaved {
  using T = typename F::Real;
  using Stored = typename F::Stored;
  using V = Vec<T>;
  using H = Householder<T, F::kComplex>;
  static constexpr int P = F::kPlanes;
  static constexpr int W = H::W;

  static int64_t columns_of_q(const QrTask& t) { return t.want_q ? t.kq() : 0; }
  static int64_t scratch_bytes(const QrTask& t) {
    const int64_t longest = t.n > t.kq() ? t.n : t.kq();
    const int64_t vectors = H::stride(t.m) * (t.n + columns_of_q(t)) +
                            H::factor_vectors(t.n, t.k()) +
                            (t.m > t.kq() ? t.m : t.kq()) * longest * P;
    return vectors * kVectorBytes;
  }

  static void run(const QrTask& t, int64_t first, int64_t count, void* scratch) {
    for (int64_t b = first; b < first + count; b += W) {
      const int64_t left = first + count - b;
      group(t, b, left < W ? left : W, static_cast<V*>(scratch));
    }
  }

 private:
  static void group(const QrTask& t, int64_t b, int64_t count, V* scratch) {
    const int64_t m = t.m, n = t.n, k = t.k(), kq = t.kq(), step = H::stride(m);
    const typename H::Panel p{scratch, m, n, step};
    const typename H::Panel y{p.x + n * step, m, columns_of_q(t), step};
    V* rest = y.x + y.cols * step;
    const typename H::Factors f = H::factors(rest, k);
    T* stage = reinterpret_cast<T*>(rest + H::factor_vectors(n, k));
    H::gather(static_cast<const Stored*>(t.a) + b * m * n * P, count * m * n * P, p, m, stage);
    const auto finite = H::scale(p, f.down);
    H::factor(p, f, k);
    Stored* r = static_cast<Stored*>(t.r) + b * kq * n * P;
    H::scatter(kq, n, r, count * kq * n * P, stage,
               [&](int64_t i, int64_t j, int plane) { return H::r_entry(p, f, k, i, j, plane); });
    Stored* q = static_cast<Stored*>(t.q) + b * m * kq * P;
    if (t.want_q) {
      H::signed_identity(y, f, k);
      H::apply_q(p, f, k, y, true);
      H::scatter(m, kq, q, count * m * kq * P, stage,
                 [&](int64_t i, int64_t j, int plane) { return y.x[j * step + i * P + plane]; });
    }
    const unsigned good = bits(finite);
    for (int64_t l = 0; l < count; ++l) {
      if (good >> l & 1) continue;
      fill_nan<F>(r + l * kq * n * P, kq * n);
      if (t.want_q) fill_nan<F>(q + l * m * kq * P, m * kq);
    }
  }
};

// body(begin, end, slot) for all of `groups`, in as many pieces as there are slots; by the threads
// of a task that shares them, if `share`.
template <class Body>
inline void in_pieces(const QrTask& t, int64_t groups, bool share, const Body& body) {
  const int64_t slots = t.slots > 0 ? t.slots : 1;
  struct Arg {
    const Body& body;
    int64_t groups, pieces;
  } arg{body, groups, slots < groups ? slots : groups};
  if (t.parallel == nullptr || !share || arg.pieces <= 1) return body(0, groups, 0);
  auto piece = [](void* self, int64_t c) {
    const Arg& a = *static_cast<Arg*>(self);
    a.body(c * a.groups / a.pieces, (c + 1) * a.groups / a.pieces, c);
  };
  t.parallel->run(t.parallel->self, arg.pieces, piece, &arg);
}

// One tall matrix: every block of `block` rows is factored, a block a lane, then the R of all
// blocks one below the other, and so on until one block is left; back through the levels, the
// reflectors of each turn the Q of the next into its own. The blocks depend on the shape and the
// vector length only, so results do not depend on the number of threads.
template <class F>
struct QrTsqr {
  using T = typename F::Real;
  using Stored = typename F::Stored;
  using V = Vec<T>;
  using H = Householder<T, F::kComplex>;
  static constexpr int P = F::kPlanes;
  static constexpr int W = H::W;
  static constexpr int kMaxLevels = 40;
  // A group of blocks, its reflectors or its part of Q, should stay in the second-level cache.
  static constexpr int64_t kGroupBytes = 192 * 1024;

  static int64_t block_rows(const QrTask& t) {
    const int64_t fit = kGroupBytes / (t.n * P * kVectorBytes);
    int64_t rows = fit < 512 ? fit : 512;
    rows = rows > 2 * t.n ? rows : 2 * t.n;
    return (rows + 15) / 16 * 16;
  }

  struct Level {
    int64_t rows, blocks, groups;
    T* data;   // of the levels behind the first: R of the blocks before, then V, then Q
    V* extra;  // tau, sign and cross of each group
  };
  // Where things lie in scratch.
  struct Layout {
    int64_t m, n, block, step, group_reals;
    int levels;
    Level level[kMaxLevels];
    T* spill;  // reflectors that do not fit where Q will be
    bool in_q;
    uint8_t* bad;  // one a group of the first level, one for all others
    char* slots;
    int64_t slot_bytes, bytes;

    Layout(const QrTask& t, void* base) {
      m = t.m;
      n = t.n;
      block = block_rows(t);
      step = H::stride(block);
      group_reals = W * block * n * P;
      bytes = 0;
      auto take = [this, base](int64_t size) {
        char* at = static_cast<char*>(base) + bytes;
        bytes += (size + 63) / 64 * 64;
        return at;
      };
      in_q = sizeof(Stored) == sizeof(T);
      levels = 0;
      for (int64_t rows = m;;) {
        Level& l = level[levels];
        l.rows = rows;
        l.blocks = divide_up(rows, block);
        l.groups = divide_up(l.blocks, W);
        l.data = levels == 0
                     ? nullptr
                     : reinterpret_cast<T*>(take(l.groups * group_reals * int64_t(sizeof(T))));
        l.extra = reinterpret_cast<V*>(take(l.groups * H::kept_vectors(n) * kVectorBytes));
        ++levels;
        if (l.blocks == 1) break;
        rows = l.blocks * n;
      }
      const int64_t spilled = !t.want_q ? 0 : in_q ? 1 : level[0].groups;
      spill = reinterpret_cast<T*>(take(spilled * group_reals * int64_t(sizeof(T))));
      bad = reinterpret_cast<uint8_t*>(take(level[0].groups));
      slot_bytes = (2 * step * n + H::factor_vectors(n, n)) * kVectorBytes +
                   group_reals * int64_t(sizeof(T));
      slot_bytes = (slot_bytes + 63) / 64 * 64;
      slots = take(slot_bytes * (t.slots > 0 ? t.slots : 1));
    }
    // Valid elements of group g of level i.
    int64_t valid(int i, int64_t g) const {
      const int64_t left = level[i].rows * n * P - g * group_reals;
      return left < group_reals ? left : group_reals;
    }
    T* reflectors(const QrTask& t, int64_t b, int i, int64_t g) const {
      if (i > 0) return level[i].data + g * group_reals;
      if constexpr (sizeof(Stored) == sizeof(T)) {
        if (valid(0, g) == group_reals) {
          return static_cast<T*>(t.q) + b * m * n * P + g * group_reals;
        }
        return spill;
      }
      return spill + g * group_reals;
    }
  };

  static int64_t scratch_bytes(const QrTask& t) { return Layout(t, nullptr).bytes; }

  static void run(const QrTask& t, int64_t first, int64_t count, void* scratch) {
    const Layout w(t, scratch);
    for (int64_t b = first; b < first + count; ++b) one(t, w, b);
  }

 private:
  // What a piece of work needs.
  struct Slot {
    typename H::Panel p, y;
    typename H::Factors f;
    T* stage;

    Slot(const Layout& w, int64_t slot) {
      V* at = reinterpret_cast<V*>(w.slots + slot * w.slot_bytes);
      p = {at, w.block, w.n, w.step};
      y = {at + w.n * w.step, w.block, w.n, w.step};
      V* rest = at + 2 * w.n * w.step;
      f = H::factors(rest, w.n);
      stage = reinterpret_cast<T*>(rest + H::factor_vectors(w.n, w.n));
    }
  };

  // body(group, slot) for every group of a level.
  template <class Body>
  static void for_groups(const QrTask& t, const Layout& w, int64_t groups, const Body& body) {
    in_pieces(t, groups, true, [&](int64_t begin, int64_t end, int64_t piece) {
      const Slot slot(w, piece);
      for (int64_t g = begin; g < end; ++g) body(g, slot);
    });
  }

  static void one(const QrTask& t, const Layout& w, int64_t b) {
    const int64_t n = w.n;
    const Stored* a = static_cast<const Stored*>(t.a) + b * w.m * n * P;
    Stored* q = static_cast<Stored*>(t.q) + b * w.m * n * P;
    Stored* r = static_cast<Stored*>(t.r) + b * n * n * P;
    bool good = true;
    for (int i = 0; i < w.levels && good; ++i) {
      const Level& level = w.level[i];
      for_groups(t, w, level.groups,
                 [&](int64_t g, const Slot& s) { down(t, w, b, i, g, a, r, s); });
      for (int64_t g = 0; g < level.groups; ++g) good = good && w.bad[g] == 0;
    }
    if (!good) {
      fill_nan<F>(r, n * n);
      if (t.want_q) fill_nan<F>(q, w.m * n);
      return;
    }
    if (!t.want_q) return;
    for (int i = w.levels - 1; i >= 0; --i) {
      for_groups(t, w, w.level[i].groups,
                 [&](int64_t g, const Slot& s) { up(t, w, b, i, g, q, s); });
    }
  }

  // Factors a group of blocks: R goes to the next level, or is the result.
  static void down(const QrTask& t, const Layout& w, int64_t b, int i, int64_t g, const Stored* a,
                   Stored* r, const Slot& s) {
    const Level& level = w.level[i];
    const int64_t n = w.n, valid = w.valid(i, g);
    if (i == 0) {
      H::gather(a + g * w.group_reals, valid, s.p, w.block, s.stage);
    } else {
      H::gather(level.data + g * w.group_reals, valid, s.p, w.block, s.stage);
    }
    const auto finite = H::scale(s.p, s.f.down);
    w.bad[g] = any(~finite);
    H::factor(s.p, s.f, n);
    if (t.want_q) {
      V* extra = level.extra + g * H::kept_vectors(n);
      for (int64_t j = 0; j < H::kept_vectors(n); ++j) extra[j] = s.f.tau[j];
      T* keep = w.reflectors(t, b, i, g);
      for (int64_t j = 0; j < n; ++j) {
        __builtin_memcpy(keep + j * w.block * P * W, s.p.col(j),
                         size_t(w.block * P * kVectorBytes));
      }
    }
    auto entry = [&](int64_t row, int64_t col, int plane) {
      return H::r_entry(s.p, s.f, n, row, col, plane);
    };
    if (i + 1 < w.levels) {
      T* next = w.level[i + 1].data + g * W * n * n * P;
      H::scatter(n, n, next, blocks_of(level, g) * n * n * P, s.stage, entry);
    } else {
      H::scatter(n, n, r, n * n * P, s.stage, entry);
    }
  }

  static int64_t blocks_of(const Level& level, int64_t g) {
    const int64_t left = level.blocks - g * W;
    return left < W ? left : W;
  }

  // Q of a group of blocks from the Q of the level behind.
  static void up(const QrTask& t, const Layout& w, int64_t b, int i, int64_t g, Stored* q,
                 const Slot& s) {
    const Level& level = w.level[i];
    const int64_t n = w.n;
    const T* keep = w.reflectors(t, b, i, g);
    for (int64_t j = 0; j < n; ++j) {
      __builtin_memcpy(s.p.col(j), keep + j * w.block * P * W, size_t(w.block * P * kVectorBytes));
    }
    const V* extra = level.extra + g * H::kept_vectors(n);
    for (int64_t j = 0; j < H::kept_vectors(n); ++j) s.f.tau[j] = extra[j];
    const bool last = i + 1 == w.levels;
    if (last) {
      H::signed_identity(s.y, s.f, n);
    } else {
      const T* next = w.level[i + 1].data + g * W * n * n * P;
      H::gather(next, blocks_of(level, g) * n * n * P, s.y, n, s.stage);
      for (int64_t j = 0; j < n; ++j) {
        V* c = s.y.col(j);
        for (int64_t e = n * P; e < w.block * P; ++e) c[e] = V{};
      }
      sign_rows(s, n);
    }
    H::apply_q(s.p, s.f, n, s.y, last);
    auto entry = [&](int64_t row, int64_t col, int plane) {
      return s.y.x[col * w.step + row * P + plane];
    };
    if (i == 0) {
      H::scatter(w.block, n, q + g * w.group_reals, w.valid(i, g), s.stage, entry);
    } else {
      H::scatter(w.block, n, level.data + g * w.group_reals, w.group_reals, s.stage, entry);
    }
  }

  // The block's Q is H_0 .. H_{n-1} D with the phases D; what it multiplies has D's rows.
  static void sign_rows(const Slot& s, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      V* c = s.y.col(j);
      for (int64_t i = 0; i < n; ++i) {
        const V sr = s.f.sign[i * P];
        if constexpr (F::kComplex) {
          const V si = s.f.sign[i * P + 1], yr = c[i * P], yi = c[i * P + 1];
          c[i * P] = sr * yr - si * yi;
          c[i * P + 1] = sr * yi + si * yr;
        } else {
          c[i] *= sr;
        }
      }
    }
  }
};

}  // namespace jml::host::JML_ISA
