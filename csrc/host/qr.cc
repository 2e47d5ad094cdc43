// The host QR kernels of one instruction-set level (JML_ISA): a table for csrc/qr.cc.
#include "csrc/host/qr.h"

#include "csrc/host/qr_gram.h"

namespace jml::host {
namespace JML_ISA {

template <template <class> class Route>
static constexpr QrVariant qr_variant() {
  return {
      [](const QrTask& t) {
        return with_format(t.dtype, [&](auto f) { return Route<decltype(f)>::scratch_bytes(t); });
      },
      [](const QrTask& t, int64_t first, int64_t count, void* scratch) {
        with_format(t.dtype, [&](auto f) { Route<decltype(f)>::run(t, first, count, scratch); });
      }};
}

static int64_t tsqr_rows(const QrTask& t) {
  return with_format(t.dtype, [&](auto f) { return QrTsqr<decltype(f)>::block_rows(t); });
}

static int64_t panel_columns(DType dtype) {
  return with_format(dtype, [](auto f) { return int64_t(QrBlocked<decltype(f)>::B); });
}

static int qr_lanes(DType dtype) {
  return with_format(dtype, [](auto f) { return kLanes<typename decltype(f)::Real>; });
}

}  // namespace JML_ISA

#define JML_CONCAT_(a, b) a##b
#define JML_CONCAT(a, b) JML_CONCAT_(a, b)

const QrKernels* JML_CONCAT(qr_kernels_, JML_ISA)() {
  static constexpr QrKernels kKernels = {JML_ISA::qr_variant<JML_ISA::QrInterleaved>(),
                                         JML_ISA::qr_variant<JML_ISA::QrTsqr>(),
                                         JML_ISA::qr_variant<JML_ISA::QrBlocked>(),
                                         JML_ISA::qr_variant<JML_ISA::QrGram>(),
                                         JML_ISA::tsqr_rows,
                                         JML_ISA::panel_columns,
                                         JML_ISA::qr_lanes};
  return &kKernels;
}

}  // namespace jml::host
