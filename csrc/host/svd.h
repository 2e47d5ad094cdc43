// The host SVD: what csrc/svd.cc hands to the kernels that csrc/host/svd.cc compiles once per
// instruction-set level.
#pragma once

#include <cstdint>

namespace jml::host {

enum class DType : int { kF16, kBF16, kF32, kF64, kC64, kC128 };

// Spreads body(arg, 0..count-1) over threads and returns when all are done.
struct Parallel {
  void (*run)(void* self, int64_t count, void (*body)(void* arg, int64_t index), void* arg);
  void* self;
};

// A batch of row-major matrices and where its results go. Strides are the dense ones.
struct SvdTask {
  int64_t m, n;  // one matrix
  DType dtype;
  bool compute_uv, full_matrices;
  int max_sweeps;              // of the first algorithm
  int interleaved_max_sweeps;  // then the interleaved variant hands a matrix to the column one
  int fallback_max_sweeps;     // of the second
  const void* a;               // [batch, m, n]
  void* u;                     // [batch, m, ku]   only if compute_uv
  void* s;                     // [batch, k]
  void* vh;                    // [batch, kv, n]   only if compute_uv
  int32_t* status;             // [batch]
  int32_t* sweeps;             // [batch]
  float* off_norm;             // [batch]
  Parallel* parallel;          // threads to share inside one matrix, or nullptr
};

inline constexpr int32_t kConverged = 0, kConvergedSecond = 1, kNotConverged = 2, kNonFinite = 3;

// Each function works on matrices [first, first + count) with scratch of its own, aligned to 64.
struct SvdVariant {
  int64_t (*scratch_bytes)(const SvdTask&);
  void (*run)(const SvdTask&, int64_t first, int64_t count, void* scratch);
};
struct SvdKernels {
  // Matrices across the lanes of a vector; thin factors (or square) only.
  SvdVariant interleaved;
  // One matrix at a time, its rows across the lanes; QR with column pivoting in front.
  SvdVariant column;
  // Matrices a vector holds in the interleaved layout.
  int (*lanes)(DType);
};

// nullptr when the build or the processor lacks the level.
const SvdKernels* svd_kernels_baseline();
const SvdKernels* svd_kernels_avx2();
const SvdKernels* svd_kernels_avx512();

}  // namespace jml::host
