// The cuda device as the handlers and the C ABI see it. Nothing CUDA is linked: the driver and
// NVRTC are opened when they are first asked for.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
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

// What a config means on the CUDA platform, made once: handlers there have no state, because its
// type could only be registered after the platform's plugin has started, and exported programs must
// run before that.
template <class Problem>
struct CudaConfig {
  Problem problem;
  std::mutex mutex;
  std::map<Sizes, DevicePlan> plans;

  // The plan for what the buffers hold, which may be a part of what the program was made for.
  template <class Make>
  const DevicePlan& plan(Sizes sizes, const Make& make) {
    std::lock_guard<std::mutex> hold(mutex);
    auto [it, is_new] = plans.try_emplace(sizes);
    if (is_new) it->second = make(problem, sizes);
    return it->second;
  }
};

// parse(text, problem) returns an error, empty on success.
template <class Problem, class Parse>
Result<CudaConfig<Problem>*> cuda_config(const char* op, std::string_view config,
                                         const Parse& parse) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<CudaConfig<Problem>>, std::less<>> known;
  std::lock_guard<std::mutex> hold(mutex);
  auto it = known.find(config);
  if (it == known.end()) {
    auto made = std::make_unique<CudaConfig<Problem>>();
    const std::string error = parse(std::string(config), &made->problem);
    if (!error.empty()) return {nullptr, error};
    if (made->problem.device != "cuda") {
      return {nullptr, std::string(op) +
                           ": argument device: expected cuda on the CUDA platform, got " +
                           made->problem.device};
    }
    it = known.emplace(std::string(config), std::move(made)).first;
  }
  return {it->second.get(), std::nullopt};
}

// Compiles a plan's kernels and loads them on every GPU in use.
ffi::Error prepare_on_cuda(const char* op, const DevicePlan& plan);

// Puts a plan's launches on XLA's stream with XLA's scratch memory; waits for nothing.
ffi::Error enqueue_on_cuda(const char* op, const DevicePlan& plan,
                           const std::vector<CallBuffer>& buffers, void* stream,
                           ffi::ScratchAllocator& scratch);

}  // namespace jml
