// The host QR: what csrc/qr.cc hands to the kernels that csrc/host/qr.cc compiles once per
// instruction-set level.
#pragma once

#include <cstdint>

#include "csrc/host/svd.h"

namespace jml::host {

// A batch of row-major matrices and where its factors go. Strides are the dense ones.
struct QrTask {
  int64_t m, n;  // one matrix
  DType dtype;
  bool want_q, complete;
  const void* a;       // [batch, m, n]
  void* q;             // [batch, m, kq], kq = complete ? m : min(m, n)   only if want_q
  void* r;             // [batch, kq, n]
  Parallel* parallel;  // threads to share inside one matrix, or nullptr
  int64_t slots;       // pieces that one matrix is worked on in at a time, each with scratch

  int64_t k() const { return m < n ? m : n; }
  int64_t kq() const { return complete ? m : k(); }
};

struct QrVariant {
  int64_t (*scratch_bytes)(const QrTask&);
  void (*run)(const QrTask&, int64_t first, int64_t count, void* scratch);
};
struct QrKernels {
  // Matrices across the lanes of a vector.
  QrVariant interleaved;
  // Blocks of rows of one matrix across the lanes, then the R of all blocks, and so on; m >= n,
  // reduced factors.
  QrVariant tsqr;
  // One matrix by panels and products, any shape and mode.
  QrVariant blocked;
  // One tall matrix of no more than panel_columns by Cholesky factorisations of Gram matrices.
  QrVariant gram;
  // Rows of a block of tsqr.
  int64_t (*tsqr_rows)(const QrTask&);
  // Columns of a panel of blocked.
  int64_t (*panel_columns)(DType);
  int (*lanes)(DType);
};

const QrKernels* qr_kernels_baseline();
const QrKernels* qr_kernels_avx2();
const QrKernels* qr_kernels_avx512();

}  // namespace jml::host
