// The kernels' text inside of the library, as tools/msl/embed_metal.py writes it. Each table ends
// with a row of nulls.
#pragma once

#include <cstdint>

namespace jml {

struct MetalText {
  const char* file;  // svd, of kernels/svd.metal
  const char* text;  // without instances of its templates
};
struct MetalKernelText {
  const char* kernel;
  const char* file;
  const char* instance;  // the line that makes it; empty for a kernel that is no template
  uint32_t written;      // bit i: it may write the buffer bound at i
};
struct MetalConstantText {
  const char* file;
  int index;
  const char* type;
};

extern const MetalText metal_texts[];
extern const MetalKernelText metal_kernels[];
extern const MetalConstantText metal_constants[];

}  // namespace jml
