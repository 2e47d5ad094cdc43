// Compiles the embedded CUDA text of a kernel to a cubin; needs NVRTC at run time and no GPU.
#pragma once

#include <string>

#include "csrc/device.h"

namespace jml {

// Generated at build time from kernels/*.metal; the last row's stem is null.
struct CudaText {
  const char* stem;
  const char* text;
};
extern const CudaText cuda_texts[];
extern const char* const cuda_shim;

struct Cubin {
  std::string bytes;
  std::string origin;  // memory, disk or nvrtc
};

// `kernel` is an entry point of kernels/<stem>.metal, `arch` like sm_90. `nvrtc` is a library's
// path or empty for JAXMETAL_CUDA_PATH and the loader's path. Thread-safe; results are cached in
// memory and in JAXMETAL_CACHE_DIR, else XDG_CACHE_HOME/jaxmetal_linalg, else
// ~/.cache/jaxmetal_linalg.
Result<Cubin> cuda_compile(const std::string& stem, const std::string& kernel,
                           const std::string& arch, const std::string& nvrtc);

}  // namespace jml
