// The host SVD kernels of one instruction-set level (JML_ISA): a table for csrc/svd.cc.
#include "csrc/host/svd.h"

#include "csrc/host/svd_column.h"
#include "csrc/host/svd_interleaved.h"

namespace jml::host {
namespace JML_ISA {

template <template <class> class Route>
static constexpr SvdVariant variant() {
  return {
      [](const SvdTask& t) {
        return with_format(t.dtype, [&](auto f) { return Route<decltype(f)>::scratch_bytes(t); });
      },
      [](const SvdTask& t, int64_t first, int64_t count, void* scratch) {
        with_format(t.dtype, [&](auto f) { Route<decltype(f)>::run(t, first, count, scratch); });
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
