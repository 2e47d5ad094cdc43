// CholeskyQR2 of one tall matrix of at most B columns (Fukaya, Nakatsukasa, Yanagisawa, Yamamoto,
// ScalA 2014): A^H A = R1^H R1, Y = A R1^-1, Y^H Y = R2^H R2, Q = Y R2^-1, R = R2 R1. A block of
// rows goes through all of a pass in the first-level cache, and Y is made twice rather than kept,
// so that A is read three times and Q written once. Where Y is not nearly orthonormal, as for
// dependent columns, numbers whose squares overflow and NaN, QrTsqr does the work.
#pragma once

#include "csrc/host/qr_blocked.h"

namespace jml::host::JML_ISA {

template <class F>
struct QrGram {
  using T = typename F::Real;
  using Stored = typename F::Stored;
  using K = QrBlocked<F>;
  using Otherwise = QrTsqr<F>;
  static constexpr bool kComplex = F::kComplex;
  static constexpr int P = F::kPlanes;
  static constexpr int B = K::B;
  static constexpr int kTri = K::kTri;
  static constexpr int64_t kBlock = 128;       // rows
  static constexpr int64_t kLarge = 16 << 20;  // bytes
  static constexpr bool kStreams = !kComplex && sizeof(Stored) == sizeof(T);
  // Of the rows, each with a sum of its own: as many whatever the threads, so that results do not
  // depend on them.
  static constexpr int64_t kPieces = 64;

  struct Layout {
    T *gram, *inverse, *blocks;  // a piece, the two factors, a slot
    int64_t slots, bytes;

    Layout(const QrTask& t, void* base) : slots(t.slots > 0 ? t.slots : 1), bytes(0) {
      auto take = [this, base](int64_t count) {
        T* at = reinterpret_cast<T*>(static_cast<char*>(base) + bytes);
        bytes += count * int64_t(sizeof(T));
        return at;
      };
      gram = take(kPieces * kTri);
      inverse = take(2 * kTri);
      blocks = take(slots * 2 * kNumbers);
    }
  };
  static constexpr int64_t kNumbers = K::G * kBlock * K::kRow;  // of a block

  static int64_t scratch_bytes(const QrTask& t) {
    const int64_t own = Layout(t, nullptr).bytes, other = Otherwise::scratch_bytes(t);
    return own > other ? own : other;
  }

  static void run(const QrTask& t, int64_t first, int64_t count, void* scratch) {
    for (int64_t b = first; b < first + count; ++b) {
      if (!one(t, Layout(t, scratch), b)) Otherwise::run(t, b, 1, scratch);
    }
  }

 private:
  // A factor, and what is made of it: upper triangles, in double precision.
  struct Triangle {
    double re[B][B], im[B][B];
  };

  static bool one(const QrTask& t, const Layout& w, int64_t b) {
    const Stored* a = static_cast<const Stored*>(t.a) + b * t.m * t.n * P;
    Stored* q = static_cast<Stored*>(t.q) + b * t.m * t.n * P;
    Stored* r = static_cast<Stored*>(t.r) + b * t.n * t.n * P;
    Triangle first, second, all;
    // A shift of a few ulp: without it rounding may leave the Gram matrix indefinite.
    const double ulp = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
    sum_grams(t, w, a, 0);
    if (!factor(t, w, 4 * double(t.n) * ulp, &first, w.inverse)) return false;
    sum_grams(t, w, a, 1);
    if (!nearly_orthonormal(t, w)) return false;
    if (!factor(t, w, 0, &second, w.inverse + kTri)) return false;
    multiply(t.n, second, first, &all);
    for (int64_t i = 0; i < t.n; ++i) {
      for (int64_t j = 0; j < t.n; ++j) {
        Stored* to = r + (i * t.n + j) * P;
        to[0] = narrow<F>(T(i <= j ? all.re[i][j] : 0));
        if constexpr (kComplex) to[1] = T(i < j ? all.im[i][j] : 0);
      }
    }
    if (!t.want_q) return true;
    // What the caches would not keep need not be read into them before it is written.
    const bool stream = kStreams && t.n % K::S == 0 && t.m * t.n * int64_t(sizeof(T)) > kLarge &&
                        reinterpret_cast<uintptr_t>(q) % kVectorBytes == 0;
    for_blocks(t, w, a, 2, [&](const T* rows, int64_t at, int64_t count, int64_t) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t g = 0; g * K::S < t.n; ++g) {
          const T* from = rows + (g * kBlock + i) * K::kRow;
          Stored* to = q + ((at + i) * t.n + g * K::S) * P;
          if constexpr (kStreams) {
            if (stream) {
              for (int h = 0; h < 2; ++h)
                store_past_caches<T>(to + h * K::W, load<T>(from + h * K::W));
              continue;
            }
          }
          K::put(from, to, K::columns(t.n, g));
        }
      }
      if (stream) store_fence();
    });
    return true;
  }

  // body(block, first row, rows, piece) for A times the first `steps` inverses.
  template <class Body>
  static void for_blocks(const QrTask& t, const Layout& w, const Stored* a, int steps,
                         const Body& body) {
    in_pieces(t, kPieces, true, [&](int64_t begin, int64_t end, int64_t slot) {
      T* x = w.blocks + slot * 2 * kNumbers;
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t last = (piece + 1) * t.m / kPieces;
        for (int64_t at = piece * t.m / kPieces; at < last; at += kBlock) {
          const int64_t count = last - at < kBlock ? last - at : kBlock;
          T *from = x, *to = x + kNumbers;
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t g = 0; g < K::G; ++g) {
              const int64_t here = K::columns(t.n, g);
              K::get(a + ((at + i) * t.n + g * K::S) * P, from + (g * kBlock + i) * K::kRow,
                     here > 0 ? here : 0);
            }
          }
          for (int step = 0; step < steps; ++step) {
            const T* inverse = w.inverse + step * kTri;
            for (int64_t g = 0; g < K::G; ++g) {
              // Whole groups of rows: what is behind the last one is not looked at.
              for (int64_t i = 0; i < count; i += K::kRows) {
                times_upper(from + i * K::kRow, inverse + g * B * K::kRow, g,
                            to + (g * kBlock + i) * K::kRow);
              }
            }
            T* swap = from;
            from = to;
            to = swap;
          }
          body(from, at, count, piece);
        }
      }
    });
  }

  // Rows of an upper triangle, of strip g's own, that have anything in the strip's first vector.
  static constexpr int kFirst = kComplex ? K::S : K::W;

  // kRows rows of C = V X, of strip g of the upper triangle X.
  static JML_INLINE void times_upper(const T* v, const T* x, int64_t g, T* c) {
    using V = typename K::V;
    V sum[K::kRows][2] = {};
    auto add = [&](int l, bool both) {
      const V x0 = K::load_at(x, 0), x1 = K::load_at(x, 1);
#pragma GCC unroll 8
      for (int k = 0; k < K::kRows; ++k) {
        const T re = v[k * K::kRow + l];
        if (both) sum[k][0] += re * x0;
        sum[k][1] += re * x1;
        if constexpr (kComplex) {
          const T im = v[k * K::kRow + l + K::W];
          sum[k][0] -= im * x1;
          sum[k][1] += im * x0;
        }
      }
      x += K::kRow;
    };
    for (; g > 0; --g, v += kBlock * K::kRow) {
      for (int l = 0; l < K::S; ++l) add(l, true);
    }
    for (int l = 0; l < kFirst; ++l) add(l, true);
    for (int l = kFirst; l < K::S; ++l) add(l, false);
    for (int k = 0; k < K::kRows; ++k) {
      K::store_at(c + k * K::kRow, 0, sum[k][0]);
      K::store_at(c + k * K::kRow, 1, sum[k][1]);
    }
  }

  // Strip g of the upper triangle of V^H V, and what else comes with it.
  static void upper_gram(const T* v, int64_t g, int64_t rows, T* out) {
    constexpr int kTwo = K::kRows < kFirst ? K::kRows : kFirst;
    constexpr int kOne = 2 * kTwo < kFirst ? 2 * kTwo : kFirst;
    const T* c = v + g * kBlock * K::kRow;
    for (int64_t h = 0; h < g; ++h, v += kBlock * K::kRow, out += K::S * K::kRow) {
      for (int first = 0; first < K::S; first += kTwo) {
        K::template inner<kTwo>(v, c, rows, first, out);
      }
    }
    for (int first = 0; first < kFirst; first += kTwo) {
      K::template inner<kTwo>(v, c, rows, first, out);
    }
    for (int first = kFirst; first < K::S; first += kOne) {
      typename K::V sum[kOne] = {};
      for (int64_t i = 0; i < rows; ++i) {
        const typename K::V x = K::load_at(c + i * K::kRow, 1);
#pragma GCC unroll 16
        for (int k = 0; k < kOne; ++k) sum[k] += v[i * K::kRow + first + k] * x;
      }
      for (int k = 0; k < kOne; ++k) K::store_at(out + (first + k) * K::kRow, 1, sum[k]);
    }
  }

  // The Gram matrix of A times the first `steps` inverses, in w.gram.
  static void sum_grams(const QrTask& t, const Layout& w, const Stored* a, int steps) {
    for (int64_t i = 0; i < kPieces * kTri; ++i) w.gram[i] = 0;
    for_blocks(t, w, a, steps, [&](const T* rows, int64_t, int64_t count, int64_t piece) {
      alignas(64) T part[kTri] = {};
      for (int64_t g = 0; g < K::G; ++g) {
        upper_gram(rows, g, count, part + g * B * K::kRow);
      }
      T* gram = w.gram + piece * kTri;
      for (int64_t i = 0; i < kTri; ++i) gram[i] += part[i];
    });
    for (int64_t piece = 1; piece < kPieces; ++piece) {
      for (int64_t i = 0; i < kTri; ++i) w.gram[i] += w.gram[piece * kTri + i];
    }
  }

  static bool nearly_orthonormal(const QrTask& t, const Layout& w) {
    for (int64_t i = 0; i < t.n; ++i) {
      T off = 0;
      for (int64_t j = 0; j < t.n; ++j) {
        const int64_t low = i < j ? i : j, high = i < j ? j : i;
        const T d = K::entry(w.gram, low, high, 0) - T(i == j);
        off += d < 0 ? -d : d;
        if constexpr (kComplex) {
          const T e = K::entry(w.gram, low, high, 1);
          off += e < 0 ? -e : e;
        }
      }
      if (!(off < T(0.5))) return false;  // NaN too
    }
    return true;
  }

  // The factor r of the Gram matrix, its rows and columns brought to a diagonal of ones and
  // shifted, and r^-1 in strips. False where it is not positive definite.
  static bool factor(const QrTask& t, const Layout& w, double shift, Triangle* r, T* inverse) {
    const int64_t n = t.n;
    double norm[B];
    for (int64_t i = 0; i < n; ++i) {
      const double d = double(K::entry(w.gram, i, i, 0));
      if (!(d < __builtin_huge_val())) return false;
      norm[i] = d > 0 ? __builtin_sqrt(d) : 1;
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) {
        double re = double(K::entry(w.gram, i, j, 0)) / norm[i] / norm[j] + (i == j ? shift : 0);
        double im = 0;
        if constexpr (kComplex) im = double(K::entry(w.gram, i, j, 1)) / norm[i] / norm[j];
        for (int64_t l = 0; l < i; ++l) {  // less conj(r_li) r_lj
          re -= r->re[l][i] * r->re[l][j] + r->im[l][i] * r->im[l][j];
          im -= r->re[l][i] * r->im[l][j] - r->im[l][i] * r->re[l][j];
        }
        if (i == j) {
          if (!(re > 0)) return false;
          r->re[i][i] = __builtin_sqrt(re);
          r->im[i][i] = 0;
        } else {
          r->re[i][j] = re / r->re[i][i];
          r->im[i][j] = im / r->re[i][i];
        }
      }
    }
    Triangle back;
    for (int64_t j = 0; j < n; ++j) {
      back.re[j][j] = 1 / r->re[j][j];
      back.im[j][j] = 0;
      for (int64_t i = j - 1; i >= 0; --i) {
        double re = 0, im = 0;
        for (int64_t l = i + 1; l <= j; ++l) {
          re -= r->re[i][l] * back.re[l][j] - r->im[i][l] * back.im[l][j];
          im -= r->re[i][l] * back.im[l][j] + r->im[i][l] * back.re[l][j];
        }
        back.re[i][j] = re / r->re[i][i];
        back.im[i][j] = im / r->re[i][i];
      }
    }
    for (int64_t i = 0; i < kTri; ++i) inverse[i] = 0;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i <= j; ++i) {
        K::entry(inverse, i, j, 0) = T(back.re[i][j] / norm[i]);
        if constexpr (kComplex) K::entry(inverse, i, j, 1) = T(back.im[i][j] / norm[i]);
        r->re[i][j] *= norm[j];
        r->im[i][j] *= norm[j];
      }
    }
    return true;
  }

  static void multiply(int64_t n, const Triangle& x, const Triangle& y, Triangle* out) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) {
        double re = 0, im = 0;
        for (int64_t l = i; l <= j; ++l) {
          re += x.re[i][l] * y.re[l][j] - x.im[i][l] * y.im[l][j];
          im += x.re[i][l] * y.im[l][j] + x.im[i][l] * y.re[l][j];
        }
        out->re[i][j] = re;
        out->im[i][j] = im;
      }
    }
  }
};

}  // namespace jml::host::JML_ISA
