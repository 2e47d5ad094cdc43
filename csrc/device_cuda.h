// The cuda device as the handlers and the C ABI see it. Nothing CUDA is linked: the driver and
// NVRTC are opened when they are first asked for.
#pragma once

#include <string>
#include <vector>

#include "csrc/ffi_common.h"
#include "csrc/plan.h"

namespace jml {

// JSON: driver and NVRTC versions, the GPUs that the process sees with the caps row of each, and
// `problem`, empty where kernels can run.
std::string cuda_json();

// One for the process: what it compiled serves every call and every GPU. An error where the driver,
// a GPU or NVRTC is missing; then the next call tries again.
Result<Runner*> cuda_runner();

// Puts a plan's launches on XLA's stream with XLA's scratch memory; waits for nothing.
ffi::Error enqueue_on_cuda(const char* op, const DevicePlan& plan,
                           const std::vector<CallBuffer>& buffers, void* stream,
                           ffi::ScratchAllocator& scratch);

}  // namespace jml
