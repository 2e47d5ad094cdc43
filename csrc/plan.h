// What a plan for a device is made from, what it consists of, and what carries it out. Knows no
// operation by name.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "csrc/device.h"

namespace jml {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a call holds of what its plan is for, where that may vary: batch, and a second number or 1.
using Sizes = std::array<int64_t, 2>;

// What every op's problem says. Ops derive theirs from it.
struct MatrixProblem {
  int64_t batch = 1, m = 0, n = 0;
  std::string variant;  // asked for by name; empty: none
  std::string device = "host";
  // Of other devices than the host: whose limits, and how the simulator runs.
  std::string caps;
  bool sim_checked = true, sim_shuffle = false;
  int64_t sim_seed = 0;
  int64_t max_submission_work = 0;  // 0: that of the GPU
  int64_t planted_bytes = 0;        // a bug for the tests: so much threadgroup memory is left out

  int64_t k() const { return std::min(m, n); }
  int64_t longest() const { return std::max(m, n); }
  std::string size() const { return std::to_string(m) + "x" + std::to_string(n); }
  double submission_work(const Caps& of) const {
    return max_submission_work > 0 ? double(max_submission_work) : of.max_submission_work;
  }
  // Of a step with so many bytes of threadgroup memory; without it there is no argument.
  std::vector<int64_t> threadgroup_argument(int64_t bytes) const {
    if (bytes == 0) return {};
    return {std::max<int64_t>(bytes - planted_bytes, 0)};
  }
  Sizes sizes() const { return {batch, 1}; }
  void resize(Sizes sizes) { batch = sizes[0]; }
};

// One launch.
struct Step {
  struct Arg {
    int index = 0;       // in the kernel's signature
    int operand = 0;     // of the custom call, operands then results; -1: scratch
    int64_t offset = 0;  // bytes
    int64_t bytes = 0;
  };
  std::string kernel;
  Size3 grid, group;
  std::vector<int64_t> threadgroup_bytes;
  std::vector<Arg> args;
  int params_index = 0;
  std::vector<std::byte> params;
  double work = 0;     // see Params
  int64_t ahead = -1;  // see Params
};

// `params`, a kernel's struct of scalars, is bound behind `args`.
template <class ParamsOfKernel>
Step make_step(const std::string& kernel, int64_t groups, int64_t threads,
               std::vector<Step::Arg> args, const ParamsOfKernel& params) {
  Step s;
  s.kernel = kernel;
  s.grid.x = uint32_t(groups);
  s.group.x = uint32_t(threads);
  s.args = std::move(args);
  s.params_index = int(s.args.size());
  const auto* from = reinterpret_cast<const std::byte*>(&params);
  s.params.assign(from, from + sizeof(params));
  return s;
}

// The memory of a plan of many steps by name.
class Regions {
 public:
  // Of the custom call: the next operand or result.
  void add_operand(const char* name, int64_t bytes) { regions_[name] = {operands_++, 0, bytes}; }
  void add_scratch(const char* name, int64_t bytes) {
    regions_[name] = {-1, scratch_bytes_, bytes};
    scratch_bytes_ += divide_up(bytes, 256) * 256;
  }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  // In the order of a kernel's signature.
  std::vector<Step::Arg> args(const std::vector<const char*>& names) const {
    std::vector<Step::Arg> args;
    for (const char* name : names) {
      const Region& r = regions_.at(name);
      args.push_back({int(args.size()), r.operand, r.offset, r.bytes});
    }
    return args;
  }

 private:
  struct Region {
    int operand;
    int64_t offset, bytes;
  };
  std::map<std::string, Region> regions_;
  int operands_ = 0;
  int64_t scratch_bytes_ = 0;
};

// One row of a table of kernels that are compiled for each storage.
struct StorageRow {
  const char *name, *function, *storage;
};
// The kernel of a function for a storage.
template <size_t N>
std::string kernel_for(const StorageRow (&rows)[N], const std::string& function,
                       const std::string& storage) {
  for (const StorageRow& r : rows) {
    if (r.function == function && r.storage == storage) return r.name;
  }
  return function;
}

struct DevicePlan {
  std::vector<Step> steps;
  int64_t scratch_bytes = 0;
  std::string variant;  // the row of the op's variant table
  std::string reason;
  std::string error;  // why there is no plan
};

// Threadgroup memory of a step as a device counts it: each argument starts at a multiple of 16.
int64_t threadgroup_bytes(const Step& step);

// Every step against the limits; the text has all the numbers.
Status check_limits(const DevicePlan& plan, const Caps& caps);

// The custom call's operands, then its results.
struct CallBuffer {
  void* data = nullptr;
  int64_t bytes = 0;
  bool result = false;  // its first content is of no use
};

// A device with the kernels that were compiled for it. Any number of threads may run plans: one at
// a time launches.
class Runner {
 public:
  explicit Runner(std::unique_ptr<Device> device) : device_(std::move(device)) {}
  // Checks the limits and compiles.
  Status prepare(const DevicePlan& plan);
  // prepare(), launches in order, synchronize().
  Status run(const DevicePlan& plan, const std::vector<CallBuffer>& buffers);
  // prepare() and launches in order on the caller's stream, with the caller's scratch memory of
  // plan.scratch_bytes; returns before the work is done.
  Status enqueue(const DevicePlan& plan, const std::vector<CallBuffer>& buffers, void* stream,
                 void* scratch);

 private:
  Status prepare_locked(const DevicePlan& plan);
  Status run_locked(const DevicePlan& plan, const std::vector<CallBuffer>& buffers);
  Status launch_locked(const DevicePlan& plan, const std::vector<CallBuffer>& buffers, void* stream,
                       CallBuffer scratch);
  std::mutex mutex_;
  std::unique_ptr<Device> device_;
  std::map<std::string, const Kernel*> kernels_;
  Buffer scratch_;
};

// What explain prints of a plan, and its route: kernel, or none with the reason why not.
std::string device_plan_json(const DevicePlan& plan, const Caps& caps);

// How often each kernel was launched by this process, as a JSON object.
std::string launches_json();

// Which device to make.
struct DeviceChoice {
  std::string device;  // a name of device_names()
  Caps caps;
  SimOptions sim;
};
// The devices of this library that run kernels.
const std::vector<std::string>& device_names();
Result<std::unique_ptr<Device>> make_device(const DeviceChoice& choice);

}  // namespace jml
