#include "csrc/cuda_blas.h"

#include <cstring>

#include "csrc/cuda_library.h"

namespace jml {
namespace {

#define JM_HOST
#include "kernels/gemm.metal"
#undef JM_HOST

// The part of cuBLAS's C interface in use; a handle stays opaque.
struct Blas {
  int (*create)(void**) = nullptr;
  int (*set_stream)(void*, void*) = nullptr;
  int (*set_workspace)(void*, void*, size_t) = nullptr;
  int (*gemm)(void*, int, int, int, int, int, const void*, const void*, int, int, long long,
              const void*, int, int, long long, const void*, void*, int, int, long long, int, int,
              int) = nullptr;
  const char* (*status_string)(int) = nullptr;
  int major = 0, minor = 0;
  std::string problem;

  std::string why(int code) const {
    return "cuBLAS: " + std::string(status_string(code)) +
           ". Please report this text; JAXMETAL_VARIANT=rsvd:cholesky does without it";
  }
};

enum { kNoTranspose = 0, kTranspose = 1 };
enum { kFloat = 0, kHalf = 2, kBfloat = 14 };  // cudaDataType_t
constexpr int kCompute32 = 68;                 // cublasComputeType_t
constexpr int kDefaultAlgorithm = -1;

Blas open_blas() {
  Blas b;
  int (*property)(int, int*) = nullptr;
  const auto take = [&](void* lib) {
    return bind(lib, "cublasCreate_v2", &b.create) && bind(lib, "cublasGetProperty", &property) &&
           bind(lib, "cublasSetStream_v2", &b.set_stream) &&
           bind(lib, "cublasSetWorkspace_v2", &b.set_workspace) &&
           bind(lib, "cublasGemmStridedBatchedEx", &b.gemm) &&
           bind(lib, "cublasGetStatusString", &b.status_string) && property(0, &b.major) == 0 &&
           property(1, &b.minor) == 0;
  };
  const Result<void*> lib =
      open_cuda_library("cublas", "cuBLAS", "cuBLAS 12 or newer", "nvidia-cublas", take);
  if (lib.error) b.problem = *lib.error;
  return b;
}

const Blas& blas() {
  static const Blas b = open_blas();
  return b;
}

}  // namespace

bool is_gemm(const std::string& kernel) {
#define JML_NAME(name, function, T) \
  if (kernel == #name) return true;
  GEMM_VARIANTS(JML_NAME)
#undef JML_NAME
  return false;
}

Result<std::string> cublas_version() {
  if (!blas().problem.empty()) return {{}, blas().problem};
  return {std::to_string(blas().major) + "." + std::to_string(blas().minor), std::nullopt};
}

Status CudaBlas::prepare(void* context) {
  if (!blas().problem.empty()) return blas().problem;
  if (handles_.count(context) != 0) return std::nullopt;
  void* handle = nullptr;
  if (int code = blas().create(&handle)) return blas().why(code);
  handles_[context] = handle;
  return std::nullopt;
}

Status CudaBlas::launch(const std::string& kernel, void* context,
                        const std::vector<Buffer>& buffers, const Params& params, void* stream) {
  if (Status bad = prepare(context)) return kernel + ": " + *bad;
  void* handle = handles_[context];
  GemmParams p;
  std::memcpy(&p, params.data, sizeof(p));
  const Buffer &a = buffers[0], &b = buffers[1], &c = buffers[2], &workspace = buffers[3];
  const int type = kernel == "gemm_f16" ? kHalf : kBfloat;
  const float alpha = 1, beta = p.accumulate != 0 ? 1 : 0;
  int code = blas().set_stream(handle, stream);
  if (code == 0) code = blas().set_workspace(handle, workspace.data, size_t(workspace.bytes));
  // cuBLAS counts down columns: what it is told is C^T = B^T A^T.
  if (code == 0) {
    code = blas().gemm(handle, kNoTranspose, p.a_col == 1 ? kNoTranspose : kTranspose, p.columns,
                       p.rows, p.depth, &alpha, b.data, type, p.b_row, p.b_next, a.data, type,
                       p.a_col == 1 ? p.a_row : p.a_col, p.a_next, &beta, c.data, kFloat, p.c_row,
                       p.c_next, p.count, kCompute32, kDefaultAlgorithm);
  }
  if (code == 0) return std::nullopt;
  return kernel + ": " + std::to_string(p.count) + " of " + std::to_string(p.rows) + "x" +
         std::to_string(p.columns) + "x" + std::to_string(p.depth) + ": " + blas().why(code);
}

}  // namespace jml
