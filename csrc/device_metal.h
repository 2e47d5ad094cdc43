// The Metal device as the C ABI and the tests see it; csrc/device.h has what makes one.
#pragma once

#include <string>

namespace jml {

// JSON: `problem`, empty where kernels can run on an Apple GPU, else the GPU's name, family and row
// of the table of GPUs, and counters of what was done since the process started.
std::string metal_json();

// Lets go of the GPU and everything compiled for it, once its last user ends. For tests.
void metal_forget();

}  // namespace jml
