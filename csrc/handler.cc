#include "csrc/handler.h"

namespace jml {

ffi::ErrorOr<std::shared_ptr<Runner>> start_on_device(const char* op, const MatrixProblem& p,
                                                      const DevicePlan& plan) {
  if (!plan.error.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(plan.error));
  const std::string who = std::string(op) + ": ";
  DeviceChoice choice{p.device, *find_caps(p.caps), {}};
  choice.caps.max_submission_work = p.submission_work(choice.caps);
  choice.sim.checked = p.sim_checked;
  choice.sim.shuffle = p.sim_shuffle;
  choice.sim.seed = uint64_t(p.sim_seed);
  Result<std::unique_ptr<Device>> device = make_device(choice);
  if (device.error) return ffi::Unexpected(ffi::Error::InvalidArgument(who + *device.error));
  auto runner = std::make_shared<Runner>(std::move(device.value));
  if (Status bad = runner->prepare(plan)) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInternal, who + *bad));
  }
  return runner;
}

ffi::Error run_on_device(const char* op, Runner& runner, const DevicePlan& plan,
                         const std::vector<CallBuffer>& buffers) {
  const Status bad = plan.error.empty() ? runner.run(plan, buffers) : Status(plan.error);
  if (!bad) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string(op) + ": " + *bad);
}

CallBuffer call_buffer(const ffi::AnyBuffer& buffer, bool result) {
  return {buffer.untyped_data(), int64_t(buffer.size_bytes()), result};
}

std::vector<CallBuffer> call_buffers(const ffi::AnyBuffer& a, const ffi::RemainingRets& rets) {
  std::vector<CallBuffer> buffers = {call_buffer(a, false)};
  for (size_t i = 0; i < rets.size(); ++i) {
    buffers.push_back(call_buffer(**rets.get<ffi::AnyBuffer>(i), true));
  }
  return buffers;
}

ffi::Error check_matrices(const char* op, const MatrixProblem& p, const ffi::AnyBuffer& a,
                          ffi::DataType element, ffi::AnyBuffer::Dimensions* lead, int64_t* batch) {
  const ffi::AnyBuffer::Dimensions dims = a.dimensions();
  if (dims.size() < 2) {
    return invalid(op, "argument", "a", "rank of at least 2", "shape " + shape_text(dims));
  }
  *lead = ffi::AnyBuffer::Dimensions(dims.begin(), dims.size() - 2);
  *batch = 1;
  for (int64_t d : *lead) *batch *= d;
  return check_buffer(op, "argument", "a", a, element, *lead, {p.m, p.n});
}

ffi::Error no_scratch(const char* op, int64_t bytes, const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(op) + ": could not allocate " +
                                                            std::to_string(bytes) +
                                                            " bytes of scratch for " + what);
}

void SharedPool::run_inside(void* self, int64_t count, void (*body)(void*, int64_t), void* arg) {
  auto& pool = *static_cast<SharedPool*>(self);
  parallel_for(pool.pool_, pool.threads_, count, [&](int64_t i) {
    ScopedDenormals keep;
    body(arg, i);
  });
}

}  // namespace jml
