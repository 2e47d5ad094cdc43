// What the library opens of cuBLAS, and counts the products. FAKE_BLAS names a function that fails.
#include <stdlib.h>
#include <string.h>

static int calls, streams, workspaces;

int fake_products(void) { return calls; }
int fake_prepared(void) { return streams == calls && workspaces == calls; }

static int fails(const char* name) {
  const char* which = getenv("FAKE_BLAS");
  return which != NULL && strcmp(which, name) == 0 ? 13 : 0;
}
int cublasGetProperty(int kind, int* value) {
  *value = kind == 0 ? 13 : 1;
  return 0;
}
const char* cublasGetStatusString(int status) {
  return status == 13 ? "CUBLAS_STATUS_EXECUTION_FAILED" : "CUBLAS_STATUS_SUCCESS";
}
int cublasCreate_v2(void** handle) {
  *handle = &calls;
  return fails("create");
}
int cublasSetStream_v2(void* handle, void* stream) {
  ++streams;
  return 0;
}
int cublasSetWorkspace_v2(void* handle, void* memory, size_t bytes) {
  workspaces += memory != NULL && bytes >= (32 << 20);
  return 0;
}
int cublasGemmStridedBatchedEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                               const void* alpha, const void* a, int a_type, int lda,
                               long long a_next, const void* b, int b_type, int ldb,
                               long long b_next, const void* beta, void* c, int c_type, int ldc,
                               long long c_next, int count, int compute, int algorithm) {
  ++calls;
  // What cuBLAS itself would refuse.
  if (lda < m || ldb < (transpose_b ? n : k) || ldc < m || count < 1) return 7;
  return fails("gemm");
}
