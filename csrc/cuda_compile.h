// Compiles the embedded CUDA text of a kernel to a cubin; needs NVRTC at run time and no GPU.
#pragma once

#include <string>
#include <vector>

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

// The way out of what only a defect of this library explains.
inline constexpr char kWithoutKernels[] =
    "Please report this text; jaxmetal_linalg.use_device(\"xla\") does without these kernels";

// "13.0", or why NVRTC cannot be opened.
Result<std::string> nvrtc_version();

// `kernel` is an entry point of a kernels/*.metal, `arch` like sm_90. Thread-safe; results are
// cached in memory and in JAXMETAL_CACHE_DIR, else XDG_CACHE_HOME/jaxmetal_linalg, else
// ~/.cache/jaxmetal_linalg.
Result<Cubin> cuda_compile(const std::string& kernel, const std::string& arch,
                           const std::vector<ConstantValue>& constants);

}  // namespace jml
