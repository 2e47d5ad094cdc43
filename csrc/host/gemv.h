// The host gemv: what csrc/gemv.cc hands to the kernels that csrc/host/gemv.cc compiles once per
// instruction-set level.
#pragma once

#include <cstdint>

#include "csrc/host/svd.h"  // DType

namespace jml::host {

// Processors fetch ahead by page. Of shorter rows several lie in one, and read side by side they
// are no stream.
constexpr int64_t kPageBytes = 4096;

enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid };

// A batch of matrices, nrhs vectors for each, and where the results go; all dense and row-major.
struct GemvTask {
  int64_t m, n, nrhs;         // a as it is stored
  bool transpose, conjugate;  // op(a)
  DType a_dtype, x_dtype, out_dtype;
  Activation activation;
  double alpha_re, alpha_im, beta_re, beta_im;
  const void* a;         // [batch, m, n]
  const void* x;         // [batch, nrhs, depth]
  const void* y;         // [batch, nrhs, outputs] in out_dtype, or nullptr; so are the next two
  const void* bias;      //
  const void* residual;  //
  void* out;             // [batch, nrhs, outputs]
  int rows_in_flight;    // of the matrix: the variant's

  int64_t outputs() const { return transpose ? n : m; }
  int64_t depth() const { return transpose ? m : n; }
};

// A product is the sum of chunks of its depth, in order; a chunk is as long as depth says and
// nothing else, so that results do not depend on batch, neighbours or threads.
struct GemvKernels {
  int64_t (*chunks)(const GemvTask&);
  // Outputs a block should be a multiple of.
  int64_t grain;
  // Vectors x of one matrix as the kernels read them: bytes (0: as they lie), and the conversion.
  int64_t (*x_bytes)(const GemvTask&);
  void (*prepare)(const GemvTask&, int64_t matrix, void* x);
  // Sums of all chunks of one matrix; 0 where there is but one.
  int64_t (*partial_bytes)(const GemvTask&);
  int64_t (*scratch_bytes)(const GemvTask&);
  // Chunk `chunk` of outputs [first, first + count): all the way to `out` if it is the only chunk.
  void (*run)(const GemvTask&, int64_t matrix, const void* x, int64_t chunk, int64_t first,
              int64_t count, void* partial, void* scratch);
  // Adds the chunks up and writes `out`.
  void (*finish)(const GemvTask&, int64_t matrix, int64_t first, int64_t count, const void* partial,
                 void* scratch);
};

// nullptr when the build or the processor lacks the level.
const GemvKernels* gemv_kernels_baseline();
const GemvKernels* gemv_kernels_avx2();
const GemvKernels* gemv_kernels_avx512();

}  // namespace jml::host
