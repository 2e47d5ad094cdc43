// cuBLAS in place of the kernels of kernels/gemm.metal on NVIDIA GPUs. Nothing of it is linked.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "csrc/device.h"

namespace jml {

// Whether it is a kernel of kernels/gemm.metal.
bool is_gemm(const std::string& kernel);

// "13.1", or why cuBLAS cannot be opened.
Result<std::string> cublas_version();

// The handles of a device. Its caller makes the context current, and calls one at a time.
class CudaBlas {
 public:
  // Before launches are captured into a graph, when no handle can be made.
  Status prepare(void* context);
  // Puts the product on `stream`.
  Status launch(const std::string& kernel, void* context, const std::vector<Buffer>& buffers,
                const Params& params, void* stream);

 private:
  std::map<void*, void*> handles_;  // by context
};

}  // namespace jml
