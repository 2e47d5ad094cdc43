// The host SVD kernels of one instruction-set level (JML_ISA): a table for csrc/svd.cc.
#include "csrc/host/svd.h"

#include <type_traits>

#include "csrc/host/svd_column.h"
#include "csrc/host/svd_interleaved.h"

namespace jml::host {
namespace JML_ISA {

// 16-bit matrices go to the float kernels as copies, a group at a time: one set of kernels less to
// compile for each of the two formats, and the copies stay in a cache.
template <class F, class Route>
struct Copied {
  using Stored = typename F::Stored;

  // A group in float at the start of scratch, its kernels' scratch behind it.
  struct Group {
    SvdTask t;
    float *a, *s, *u, *vh;
    void* scratch;
    int64_t bytes;
  };

  static Group group(const SvdTask& t, void* scratch) {
    const Oriented<F> o(t);
    Group g{};
    auto take = [&](int64_t elements) {
      float* p = reinterpret_cast<float*>(static_cast<char*>(scratch) + g.bytes);
      g.bytes += (Route::kGroup * elements * int64_t(sizeof(float)) + 63) / 64 * 64;
      return p;
    };
    g.a = take(t.m * t.n);
    g.s = take(o.cols);
    g.u = take(t.compute_uv ? t.m * o.ku : 0);
    g.vh = take(t.compute_uv ? o.kv * t.n : 0);
    g.scratch = static_cast<char*>(scratch) + g.bytes;
    g.t = t;
    g.t.dtype = DType::kF32;
    g.t.a = g.a;
    g.t.s = g.s;
    g.t.u = g.u;
    g.t.vh = g.vh;
    return g;
  }

  static int64_t scratch_bytes(const SvdTask& t) {
    const Group g = group(t, nullptr);
    return g.bytes + Route::scratch_bytes(g.t);
  }

  static void run(const SvdTask& t, int64_t first, int64_t count, void* scratch) {
    const Oriented<F> o(t);
    Group g = group(t, scratch);
    for (int64_t b = first; b < first + count; b += Route::kGroup) {
      const int64_t left = first + count - b, some = left < Route::kGroup ? left : Route::kGroup;
      const Stored* a = o.input(b);
      for (int64_t i = 0; i < some * t.m * t.n; ++i) g.a[i] = widen(a[i]);
      g.t.status = t.status + b;
      g.t.sweeps = t.sweeps + b;
      g.t.off_norm = t.off_norm + b;
      Route::run(g.t, 0, some, g.scratch);
      auto write = [&](const float* from, int64_t elements, Stored* to) {
        for (int64_t i = 0; i < some * elements; ++i) to[i] = narrow<F>(from[i]);
      };
      write(g.s, o.cols, o.values(b));
      if (!t.compute_uv) continue;
      write(g.u, t.m * o.ku, o.u(b).p);
      write(g.vh, o.kv * t.n, o.vh(b).p);
    }
  }
};

template <class F, template <class> class Route>
using Chosen = std::conditional_t<std::is_same_v<typename F::Stored, typename F::Real>, Route<F>,
                                  Copied<F, Route<FormatF32>>>;

template <template <class> class Route>
static constexpr SvdVariant variant() {
  return {[](const SvdTask& t) {
            return with_format(
                t.dtype, [&](auto f) { return Chosen<decltype(f), Route>::scratch_bytes(t); });
          },
          [](const SvdTask& t, int64_t first, int64_t count, void* scratch) {
            with_format(t.dtype,
                        [&](auto f) { Chosen<decltype(f), Route>::run(t, first, count, scratch); });
          }};
}

static int lanes(DType dtype) {
  return with_format(dtype, [](auto f) { return kLanes<typename decltype(f)::Real>; });
}

}  // namespace JML_ISA

#define JML_CONCAT_(a, b) a##b
#define JML_CONCAT(a, b) JML_CONCAT_(a, b)

const SvdKernels* JML_CONCAT(svd_kernels_, JML_ISA)() {
  static constexpr SvdKernels kKernels = {JML_ISA::variant<JML_ISA::Interleaved>(),
                                          JML_ISA::variant<JML_ISA::Column>(), JML_ISA::lanes};
  return &kKernels;
}

}  // namespace jml::host
