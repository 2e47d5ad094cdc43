// C = A B or C += A B for matrices of 16 bits, sums in float32: what a step of a plan may leave to
// a GPU's own library. On NVIDIA GPUs a launch of one of these kernels is a call of cuBLAS
// (csrc/cuda_blas.cc); the simulator runs what stands here, one thread an entry of C.
//
// C is [count, rows, columns]. The sum of an entry is one run of additions, of no promised order.
//   Grid: count * ceil(rows columns / 256) threadgroups of 256 threads.

#ifndef JM_HOST
#include <metal_stdlib>
using namespace metal;
#endif

// Strides count numbers. One of A's two is 1.
struct GemmParams {
  long a_next;  // from one matrix to the next
  long b_next;
  long c_next;
  int count;
  int rows;  // of C
  int columns;
  int depth;
  int a_row;
  int a_col;
  int b_row;
  int c_row;
  int accumulate;  // 1: C += A B
};

// X(name, function, storage type)
#define GEMM_VARIANTS(X)  \
  X(gemm_f16, gemm, half) \
  X(gemm_bf16, gemm, bfloat)

#ifndef JM_HOST

// `workspace` is the library's.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void gemm(
    device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device float* c [[buffer(2)]],
    device float* workspace [[buffer(3)]], constant GemmParams& p [[buffer(4)]],
    uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  const uint size = uint(p.rows) * uint(p.columns);
  const uint groups = (size + threads - 1u) / threads;
  const long matrix = long(group / groups);
  const uint place = group % groups * threads + thread_index;
  const int depth = place < size ? p.depth : 0;
  const int i = int(place / uint(p.columns));
  const int j = int(place % uint(p.columns));
  device const T* row = a + matrix * p.a_next + long(i) * long(p.a_row);
  device const T* column = b + matrix * p.b_next + long(j);
  float sum = 0.0f;
  for (int k = 0; k < depth; ++k)
    sum = fma(float(row[long(k) * long(p.a_col)]), float(column[long(k) * long(p.b_row)]), sum);
  device float* to = c + matrix * p.c_next + long(i) * long(p.c_row) + long(j);
  if (place < size) to[0] = p.accumulate != 0 ? to[0] + sum : sum;
}

#define GEMM_INSTANTIATE(name, function, T) \
  template [[host_name(#name)]] [[kernel]] decltype(function<T>) function<T>;
GEMM_VARIANTS(GEMM_INSTANTIATE)

#endif  // JM_HOST
