// The half of a handler that every op has: from the text of a problem to its kernels on a device,
// and XLA's threads for its kernels on the host.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/caps.h"
#include "csrc/device_cuda.h"
#include "csrc/ffi_common.h"
#include "csrc/host/svd.h"
#include "csrc/json.h"
#include "csrc/plan.h"
#include "csrc/problem.h"

namespace jml {

// What an instantiated call keeps. Ops derive their state from it.
template <class ProblemType, class Row>
struct CallPlan {
  using Problem = ProblemType;

  Problem problem;
  const Row* variant = nullptr;  // of the host's
  std::string reason, error;
  // Where the device is not the host.
  DevicePlan on_device;
  std::shared_ptr<Runner> runner;
};

// A device with a plan's kernels ready.
ffi::ErrorOr<std::shared_ptr<Runner>> start_on_device(const char* op, const MatrixProblem& p,
                                                      const DevicePlan& plan);
ffi::Error run_on_device(const char* op, Runner& runner, const DevicePlan& plan,
                         const std::vector<CallBuffer>& buffers);

CallBuffer call_buffer(const ffi::AnyBuffer& buffer, bool result);
// Of a call with one operand.
std::vector<CallBuffer> call_buffers(const ffi::AnyBuffer& a, const ffi::RemainingRets& rets);

// The operand a [batch..., p.m, p.n]: `lead` gets the dimensions in front, `batch` their product.
ffi::Error check_matrices(const char* op, const MatrixProblem& p, const ffi::AnyBuffer& a,
                          ffi::DataType element, ffi::AnyBuffer::Dimensions* lead, int64_t* batch);

ffi::Error no_scratch(const char* op, int64_t bytes, const std::string& what);

// One for each op: the steps of its handlers that only its name, problem and plan tell apart.
template <class Plan>
struct Handler {
  using Problem = typename Plan::Problem;
  using Cuda = CudaConfig<Problem>;

  const char* op;
  // Empty on success, else the error.
  std::string (*parse)(const std::string& text, Problem* out);
  // Pure: which kernels with which launch sizes on a device with these limits.
  DevicePlan (*plan_device)(const Problem&, const Caps&);

  // `host` answers where the device is the host.
  std::string plan_json(const std::string& text, std::string (*host)(const Problem&)) const {
    Problem p;
    const std::string error = parse(text, &p);
    if (!error.empty()) return JsonWriter().field("error", error).text();
    if (p.device == "host") return host(p);
    const Caps& caps = *find_caps(p.caps);
    return device_plan_json(plan_device(p, caps), caps);
  }

  // `host` plans where the device is the host; its plan has an error, or a variant to run.
  ffi::ErrorOr<std::unique_ptr<Plan>> instantiate(std::string_view config,
                                                  Plan (*host)(const Problem&)) const {
    const HandedOver handed_over;
    Problem p;
    const std::string error = parse(std::string(config), &p);
    if (!error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(error));
    auto plan = std::make_unique<Plan>();
    if (p.device == "host") {
      *plan = host(p);
      if (!plan->error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(plan->error));
      return plan;
    }
    plan->problem = p;
    plan->on_device = plan_device(p, *find_caps(p.caps));
    auto runner = start_on_device(op, p, plan->on_device);
    if (runner.has_error()) return ffi::Unexpected(runner.error());
    plan->runner = *runner;
    return plan;
  }

  // For buffers that were checked, and hold so much.
  ffi::Error run(const Plan& plan, Sizes sizes, const std::vector<CallBuffer>& buffers) const {
    if (sizes == plan.problem.sizes()) {
      return run_on_device(op, *plan.runner, plan.on_device, buffers);
    }
    // Partitioned, or symbolic when it was lowered.
    return run_on_device(op, *plan.runner, plan_part(plan.problem, sizes), buffers);
  }

  // On the CUDA platform.
  Result<Cuda*> cuda(std::string_view config) const {
    return cuda_config<Problem>(op, config, parse);
  }
  ffi::Error instantiate_cuda(std::string_view config) const {
    const Result<Cuda*> call = cuda(config);
    if (call.error) return ffi::Error::InvalidArgument(*call.error);
    Sizes sizes = call.value->problem.sizes();
    for (int64_t& size : sizes) size = std::max<int64_t>(size, 1);
    return prepare_on_cuda(op, cuda_plan(*call.value, sizes));
  }
  ffi::Error enqueue(Cuda& call, Sizes sizes, const std::vector<CallBuffer>& buffers, void* stream,
                     ffi::ScratchAllocator& scratch) const {
    return enqueue_on_cuda(op, cuda_plan(call, sizes), buffers, stream, scratch);
  }

 private:
  const DevicePlan& cuda_plan(Cuda& call, Sizes sizes) const {
    return call.plan(sizes, [this](const Problem& p, Sizes of) { return plan_part(p, of); });
  }
  DevicePlan plan_part(Problem p, Sizes sizes) const {
    p.resize(sizes);
    return plan_device(p, *find_caps(p.caps));
  }
};

// XLA's threads, for one call.
class SharedPool {
 public:
  explicit SharedPool(ffi::ThreadPool& pool)
      : pool_(pool), threads_(std::max<int64_t>(1, pool.num_threads())) {}
  SharedPool(const SharedPool&) = delete;
  SharedPool& operator=(const SharedPool&) = delete;

  int64_t threads() const { return threads_; }

  // A variant of the host's kernels on all of `batch` matrices, multiples of `grain` at a time or,
  // where the threads share one, all in turn; `what` is one of them, in an error's words.
  template <class Variant, class Task>
  ffi::Error run(const char* op, const Variant& variant, Task& task, bool inside, int64_t batch,
                 int64_t grain, const std::string& what) {
    if (inside) {
      task.parallel = &inside_;
      grain = batch;
    }
    const int64_t scratch_bytes = variant.scratch_bytes(task);
    // Enough chunks that an unlucky thread does not hold up the rest, few enough that taking one
    // costs nothing.
    const int64_t chunk = grain * std::max<int64_t>(1, divide_up(batch, grain) / (threads_ * 16));
    std::atomic<bool> out_of_memory{false};
    parallel_for(pool_, threads_, divide_up(batch, chunk), [&](int64_t c) {
      AlignedBlock scratch = allocate_aligned(scratch_bytes);
      if (scratch == nullptr) {
        out_of_memory = true;
        return;
      }
      ScopedDenormals keep;
      variant.run(task, c * chunk, std::min(chunk, batch - c * chunk), scratch.get());
    });
    return out_of_memory ? no_scratch(op, scratch_bytes, what) : ffi::Error::Success();
  }

 private:
  static void run_inside(void* self, int64_t count, void (*body)(void*, int64_t), void* arg);

  ffi::ThreadPool& pool_;
  int64_t threads_;
  host::Parallel inside_{run_inside, this};
};

}  // namespace jml
