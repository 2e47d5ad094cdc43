#include "csrc/plan.h"

#include <algorithm>
#include <new>

#include "csrc/json.h"

namespace jml {
namespace {

struct Launches {
  std::mutex mutex;
  std::map<std::string, int64_t> count;
};
Launches& launches() {
  static Launches l;
  return l;
}

std::string over(const Step& s, const char* what, int64_t got, const char* relation, int64_t limit,
                 const Caps& caps) {
  return s.kernel + ": " + what + ": " + std::to_string(got) + " " + relation + " " +
         std::to_string(limit) + " of " + caps.name;
}

}  // namespace

int64_t threadgroup_bytes(const Step& step) {
  int64_t sum = 0;
  for (int64_t b : step.threadgroup_bytes) sum += (b + 15) / 16 * 16;
  return sum;
}

Status check_limits(const DevicePlan& plan, const Caps& caps) {
  for (const Step& s : plan.steps) {
    const int64_t threads = int64_t{s.group.x} * s.group.y * s.group.z;
    const int64_t groups = int64_t{s.grid.x} * s.grid.y * s.grid.z;
    const int64_t bytes = threadgroup_bytes(s);
    const int64_t params = int64_t(s.params.size());
    const int64_t buffers = int64_t(s.args.size()) + (s.params.empty() ? 0 : 1);
    if (groups < 1) return s.kernel + ": empty grid";
    if (threads < 1 || threads > caps.max_threads_per_threadgroup)
      return over(s, "threads per threadgroup", threads, "exceed the",
                  caps.max_threads_per_threadgroup, caps);
    if (threads % caps.simd_width != 0)
      return over(s, "threads per threadgroup", threads, "are no multiple of the simdgroup's",
                  caps.simd_width, caps);
    if (bytes > caps.max_threadgroup_bytes)
      return over(s, "threadgroup bytes", bytes, "exceed the", caps.max_threadgroup_bytes, caps);
    if (params > caps.max_params_bytes)
      return over(s, "params bytes", params, "exceed the", caps.max_params_bytes, caps);
    if (buffers > caps.max_buffers)
      return over(s, "buffers", buffers, "exceed the", caps.max_buffers, caps);
  }
  return std::nullopt;
}

Status Runner::prepare(const DevicePlan& plan) {
  std::lock_guard<std::mutex> lock(mutex_);
  return prepare_locked(plan);
}

Status Runner::prepare_locked(const DevicePlan& plan) {
  if (Status bad = check_limits(plan, device_->caps())) return bad;
  for (const Step& s : plan.steps) {
    if (kernels_.count(s.kernel) != 0) continue;
    Result<const Kernel*> kernel = device_->compile(s.kernel, {});
    if (kernel.error) return kernel.error;
    kernels_[s.kernel] = kernel.value;
  }
  return std::nullopt;
}

Status Runner::run(const DevicePlan& plan, const std::vector<CallBuffer>& buffers) {
  std::lock_guard<std::mutex> lock(mutex_);
  try {
    return run_locked(plan, buffers);
  } catch (const std::bad_alloc&) {
    return "out of memory for the launch of " + plan.steps.front().kernel;
  }
}

Status Runner::run_locked(const DevicePlan& plan, const std::vector<CallBuffer>& buffers) {
  if (Status bad = prepare_locked(plan)) return bad;
  if (plan.scratch_bytes > scratch_.bytes) {
    Result<Buffer> more = device_->scratch(plan.scratch_bytes);
    if (more.error) return more.error;
    scratch_ = more.value;
  }
  Status bad = launch_locked(plan, buffers, nullptr, {scratch_.data, plan.scratch_bytes});
  // After a failure too: what ran before must not outlive its buffers, nor be reported later.
  Status worse = device_->synchronize();
  return bad ? bad : worse;
}

Status Runner::enqueue(const DevicePlan& plan, const std::vector<CallBuffer>& buffers, void* stream,
                       void* scratch) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (Status bad = prepare_locked(plan)) return bad;
  return launch_locked(plan, buffers, stream, {scratch, plan.scratch_bytes});
}

Status Runner::launch_locked(const DevicePlan& plan, const std::vector<CallBuffer>& buffers,
                             void* stream, CallBuffer scratch) {
  for (const Step& s : plan.steps) {
    std::vector<Buffer> bound;
    for (const Step::Arg& a : s.args) {
      if (a.operand >= int(buffers.size()))
        return s.kernel + ": argument " + std::to_string(a.index) + ": the call has no operand " +
               std::to_string(a.operand);
      const CallBuffer from = a.operand < 0 ? scratch : buffers[size_t(a.operand)];
      if (a.offset < 0 || a.bytes < 0 || a.offset > from.bytes - a.bytes)
        return s.kernel + ": argument " + std::to_string(a.index) + ": bytes " +
               std::to_string(a.offset) + " to " + std::to_string(a.offset + a.bytes) +
               " are outside of the " + std::to_string(from.bytes) + " of its buffer";
      bound.push_back({a.index, static_cast<std::byte*>(from.data) + a.offset, a.bytes, from.data,
                       from.bytes, from.result});
    }
    const Params params{s.params_index,      s.params.data(), int64_t(s.params.size()),
                        s.threadgroup_bytes, s.work,          s.ahead};
    Status bad = device_->launch(*kernels_.at(s.kernel), s.grid, s.group, bound, params, stream);
    if (bad) return bad;
    std::lock_guard<std::mutex> lock(launches().mutex);
    ++launches().count[s.kernel];
  }
  return std::nullopt;
}

std::string device_plan_json(const DevicePlan& plan, const Caps& caps) {
  if (!plan.error.empty()) {
    return JsonWriter()
        .field("route", "none")
        .field("device", caps.device)
        .field("variant", "")
        .field("launches", 0)
        .field("reason", plan.error)
        .text();
  }
  auto list = [](const Size3& s) {
    return "[" + std::to_string(s.x) + ", " + std::to_string(s.y) + ", " + std::to_string(s.z) +
           "]";
  };
  std::string names;
  for (const Step& s : plan.steps) {
    const std::string name = json_quote(s.kernel);
    if (names.find(name) == std::string::npos) names += (names.empty() ? "" : ", ") + name;
  }
  // The one that uses most threadgroup memory stands for all.
  const Step& first = *std::max_element(
      plan.steps.begin(), plan.steps.end(),
      [](const Step& a, const Step& b) { return threadgroup_bytes(a) < threadgroup_bytes(b); });
  return JsonWriter()
      .field("route", "kernel")
      .field("device", caps.device)
      .field("variant", plan.variant)
      .field("reason", plan.reason)
      .field("launches", int64_t(plan.steps.size()))
      .raw("kernels", "[" + names + "]")
      .raw("grid", list(first.grid))
      .raw("group", list(first.group))
      .field("threadgroup_bytes", threadgroup_bytes(first))
      .field("scratch_bytes", plan.scratch_bytes)
      .text();
}

std::string launches_json() {
  std::lock_guard<std::mutex> lock(launches().mutex);
  JsonWriter w;
  for (const auto& [kernel, count] : launches().count) w.field(kernel.c_str(), count);
  return w.text();
}

const std::vector<std::string>& device_names() {
  static const std::vector<std::string> names = {"sim"};
  return names;
}

Result<std::unique_ptr<Device>> make_device(const DeviceChoice& choice) {
  if (choice.device == "sim") {
    Caps caps = choice.caps;
    caps.async = false;
    return {make_sim_device(caps, choice.sim), std::nullopt};
  }
  if (choice.device == "metal") return make_metal_device(choice.caps.max_submission_work);
  return {nullptr, "device " + choice.device + " is not in this library"};
}

}  // namespace jml
