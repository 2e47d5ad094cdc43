// A device runs kernels: five verbs, and nothing that knows an operation by name.
//
// Implemented by device_sim.cc and device_cuda.cc. Errors are values: text that says what was asked
// and what the limit is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace jml {

// Limits of a device. Bytes and counts; 0 where a limit does not exist.
struct Caps {
  std::string name;
  int64_t simd_width = 32;
  int64_t max_threads_per_threadgroup = 1024;
  int64_t max_threadgroup_bytes = 32768;
  int64_t max_buffers = 31;
  int64_t max_params_bytes = 4096;
  bool async = false;    // launch returns before the work is done
  bool float64 = false;  // has 64-bit floating point
  std::string device;    // which device has these limits: metal, cuda
  std::string family;
  int64_t cores = 0;          // or multiprocessors
  int64_t shuffle_lanes = 0;  // lanes that a core shuffles in one clock
  int64_t registers = 0;      // of 32 bits a thread may have; 0: not known
  // Floating-point operations of one submission to a GPU that a watchdog guards; 0: no watchdog.
  double max_submission_work = 0;
};

// Empty means success.
using Status = std::optional<std::string>;

template <typename T>
struct Result {
  T value{};
  Status error;
};

struct Size3 {
  uint32_t x = 1, y = 1, z = 1;
};

// Memory bound at an index of the kernel's signature.
struct Buffer {
  int index = 0;
  void* data = nullptr;
  int64_t bytes = 0;
  // The caller's memory that it is a part of, for devices that must map or copy it as a whole.
  void* whole = nullptr;
  int64_t whole_bytes = 0;
  bool fresh = false;  // what the whole held before the call is of no use
};

// The value of a function constant.
struct ConstantValue {
  int index = 0;
  int64_t bits = 0;  // the value's bytes, lowest first
};

// The single struct of scalars of a launch, and the bytes of each threadgroup argument.
struct Params {
  int index = 0;
  const void* data = nullptr;
  int64_t bytes = 0;
  std::vector<int64_t> threadgroup_bytes;  // by [[threadgroup(i)]]
  double work = 0;  // of the launch, in floating-point operations; 0: not estimated
  // Bytes of the first buffer that may be fetched into a cache while what is ahead of the launch
  // still runs; -1: a kernel of which none are (STREAMING of tools/msl/emit.py).
  int64_t ahead = -1;
};

// A compiled kernel; belongs to its device.
class Kernel {
 public:
  virtual ~Kernel() = default;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const Caps& caps() const = 0;
  // `source` names the kernel; the text behind it is in the library or on disk.
  virtual Result<const Kernel*> compile(const std::string& source,
                                        const std::vector<ConstantValue>& constants) = 0;
  // Memory for intermediate results, alive until the device goes.
  virtual Result<Buffer> scratch(int64_t bytes) = 0;
  // grid counts threadgroups, group counts threads. `stream` is the caller's queue, in which the
  // launch is put; null: the device's own.
  virtual Status launch(const Kernel& kernel, Size3 grid, Size3 group,
                        const std::vector<Buffer>& buffers, const Params& params, void* stream) = 0;
  virtual Status synchronize() = 0;
};

// The simulator. Finds what a launch did wrong; synchronize() reports it.
struct SimOptions {
  bool checked = true;
  bool shuffle = false;  // run lanes, simdgroups and threadgroups in an order made from the seed
  uint64_t seed = 0;
  int64_t max_findings = 16;
};
std::unique_ptr<Device> make_sim_device(Caps caps, SimOptions options);

// The NVIDIA GPUs of this process, all behind one device: a launch goes to the GPU of its stream,
// and scratch memory is the caller's. An error where driver, GPU or NVRTC is missing.
Result<std::unique_ptr<Device>> make_cuda_device();

// The Apple GPU, given up to so much work at once (see Caps). An error where the library has no
// Metal device or the machine no such GPU.
Result<std::unique_ptr<Device>> make_metal_device(double max_submission_work);

}  // namespace jml
