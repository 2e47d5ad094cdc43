#include "csrc/device_cuda.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "csrc/caps.h"
#include "csrc/cuda_blas.h"
#include "csrc/cuda_compile.h"
#include "csrc/cuda_library.h"
#include "csrc/json.h"

namespace jml {
namespace {

// What to do about a code of the driver.
const char* way_out(int code) {
  switch (code) {
    case 2:  // out of memory; what the driver itself allocates is not in XLA's pool
      return "Leave the driver more memory with XLA_PYTHON_CLIENT_MEM_FRACTION, or use smaller "
             "batches";
    case 3:    // deinitialised
    case 46:   // device unavailable
    case 100:  // no device
    case 101:  // invalid device
    case 802:  // system not ready
    case 803:  // driver and library differ
    case 804:  // no forward compatibility
    case 999:  // unknown
      return "Check with nvidia-smi";
    case 200:  // invalid image
    case 209:  // no binary for the GPU
    case 218:  // invalid PTX
    case 222:  // unsupported PTX version
      return "Update the NVIDIA driver, or set JAXMETAL_CUDA_PATH to a CUDA toolkit that is no "
             "newer than it";
    case 201:  // invalid context
    case 214:  // uncorrectable memory error
    case 700:  // illegal address
    case 702:  // launch timeout
    case 709:  // context destroyed
    case 710:  // assertion
    case 714:  // hardware stack error
    case 715:  // illegal instruction
    case 716:  // misaligned address
    case 717:  // invalid address space
    case 718:  // invalid program counter
    case 719:  // launch failed
      return "A kernel that ran before, of whichever library, has failed, and the GPU is lost to "
             "this process: start another. compute-sanitizer finds the kernel";
    default:
      return kWithoutKernels;
  }
}

// CUlaunchAttribute and CUlaunchConfig of the driver's interface.
struct LaunchAttribute {
  int id;
  alignas(8) unsigned char value[64];
};
struct LaunchConfig {
  unsigned grid[3], group[3], shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56);

// Programmatic dependent launch: a kernel may be placed on the GPU once the one ahead of it in the
// stream has no threadgroup left to run, before all it wrote is seen; ours wait for that as they
// begin (jm_begin of kernels/msl_cuda.h). On an H200 it takes a fifth of svd's time at 256 columns,
// a tenth at 2048. If kernels let the next one come while they run, its threadgroups crowd where
// there is room, and grid lost 5 % at 2048 columns: only gemv does.
constexpr LaunchAttribute kOverlap = {6, {1}};
constexpr int kOverlapMajor = 9;       // of the GPU's architecture
constexpr int kOverlapDriver = 12030;  // from which on graphs may hold such launches

// The part of the driver's C interface in use, under the names that its headers map to.
struct Driver {
  int (*init)(unsigned) = nullptr;
  int (*version)(int*) = nullptr;
  int (*device_count)(int*) = nullptr;
  int (*device_get)(int*, int) = nullptr;
  int (*device_name)(char*, int, int) = nullptr;
  int (*device_attribute)(int*, int, int) = nullptr;
  int (*primary_state)(int, unsigned*, int*) = nullptr;
  int (*primary_retain)(void**, int) = nullptr;
  int (*primary_release)(int) = nullptr;
  int (*context_current)(void**) = nullptr;
  int (*context_push)(void*) = nullptr;
  int (*context_pop)(void**) = nullptr;
  int (*context_device)(int*) = nullptr;
  int (*stream_context)(void*, void**) = nullptr;
  int (*module_load)(void**, const void*) = nullptr;
  int (*module_function)(void**, void*, const char*) = nullptr;
  int (*function_attribute)(void*, int, int) = nullptr;
  int (*launch)(const LaunchConfig*, void*, void**, void**) = nullptr;
  int (*error_name)(int, const char**) = nullptr;
  int (*error_string)(int, const char**) = nullptr;
  int serves = 0;  // version of CUDA
  std::string problem;

  // The reason and the way out, as the end of an error's text.
  std::string why(int code) const {
    const char *name = nullptr, *text = nullptr;
    error_name(code, &name);
    error_string(code, &text);
    return std::string(name != nullptr ? name : "CUDA error " + std::to_string(code)) +
           (text != nullptr ? std::string(" (") + text + ")" : "") + ". " + way_out(code);
  }
};

enum Attribute { kMultiprocessors = 16, kMajor = 75, kMinor = 76 };
constexpr int kMaxDynamicSharedBytes = 8;    // of cuFuncSetAttribute
constexpr int64_t kSharedBytes = 48 * 1024;  // a threadgroup may have so much without asking
constexpr int kOldestDriver = 12000;         // CUDA 12.0, as JAX needs

std::string cuda_version(int v) {
  return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
}

Driver open_driver() {
  Driver d;
  void* lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (lib == nullptr) {
    d.problem = std::string("the NVIDIA driver cannot be opened (") + dlerror() +
                "). Install it, and check with nvidia-smi";
    return d;
  }
  bool ok = true;
  auto need = [&](auto* f, const char* name) { ok = bind(lib, name, f) && ok; };
  need(&d.init, "cuInit");
  need(&d.version, "cuDriverGetVersion");
  need(&d.device_count, "cuDeviceGetCount");
  need(&d.device_get, "cuDeviceGet");
  need(&d.device_name, "cuDeviceGetName");
  need(&d.device_attribute, "cuDeviceGetAttribute");
  need(&d.primary_state, "cuDevicePrimaryCtxGetState");
  need(&d.primary_retain, "cuDevicePrimaryCtxRetain");
  need(&d.primary_release, "cuDevicePrimaryCtxRelease_v2");
  need(&d.context_current, "cuCtxGetCurrent");
  need(&d.context_push, "cuCtxPushCurrent_v2");
  need(&d.context_pop, "cuCtxPopCurrent_v2");
  need(&d.context_device, "cuCtxGetDevice");
  need(&d.stream_context, "cuStreamGetCtx");
  need(&d.module_load, "cuModuleLoadData");
  need(&d.module_function, "cuModuleGetFunction");
  need(&d.function_attribute, "cuFuncSetAttribute");
  need(&d.launch, "cuLaunchKernelEx");
  need(&d.error_name, "cuGetErrorName");
  need(&d.error_string, "cuGetErrorString");
  if (!ok) {
    d.problem = "libcuda.so.1 is not a driver of CUDA 12.0 or newer. Update the NVIDIA driver";
    return d;
  }
  if (int code = d.init(0)) {
    d.problem = "the NVIDIA driver does not start: " + d.why(code);
  } else if (int bad = d.version(&d.serves)) {
    d.problem = "the NVIDIA driver does not tell its version: " + d.why(bad);
  } else if (d.serves < kOldestDriver) {
    d.problem = "the NVIDIA driver serves CUDA " + cuda_version(d.serves) +
                ", and 12.0 is the oldest that will do. Update the NVIDIA driver";
  }
  return d;
}

const Driver& driver() {
  static const Driver d = open_driver();
  return d;
}

struct Gpu {
  int device = 0;
  std::string name, arch;
  int64_t multiprocessors = 0;
  bool overlaps = false;  // launches, with the ends of those before
};

Result<std::vector<Gpu>> find_gpus() {
  const Driver& d = driver();
  if (!d.problem.empty()) return {{}, d.problem};
  int count = 0;
  if (int code = d.device_count(&count)) return {{}, "the GPUs cannot be counted: " + d.why(code)};
  if (count == 0) return {{}, "the NVIDIA driver sees no GPU; is CUDA_VISIBLE_DEVICES set?"};
  std::vector<Gpu> gpus;
  for (int i = 0; i < count; ++i) {
    Gpu g;
    char name[256] = {};
    int major = 0, minor = 0, processors = 0;
    int code = d.device_get(&g.device, i);
    if (code == 0) code = d.device_name(name, sizeof(name) - 1, g.device);
    if (code == 0) code = d.device_attribute(&major, kMajor, g.device);
    if (code == 0) code = d.device_attribute(&minor, kMinor, g.device);
    if (code == 0) code = d.device_attribute(&processors, kMultiprocessors, g.device);
    if (code != 0) return {{}, "GPU " + std::to_string(i) + " does not answer: " + d.why(code)};
    g.name = name;
    g.overlaps = major >= kOverlapMajor && d.serves >= kOverlapDriver;
    g.arch = "sm_" + std::to_string(major) + std::to_string(minor);
    g.multiprocessors = processors;
    gpus.push_back(g);
  }
  return {gpus, std::nullopt};
}

// Makes a context current while it lives.
class ScopedContext {
 public:
  explicit ScopedContext(void* context) {
    void* current = nullptr;
    driver().context_current(&current);
    pushed_ = current != context;
    code_ = pushed_ ? driver().context_push(context) : 0;
    pushed_ = pushed_ && code_ == 0;
  }
  ~ScopedContext() {
    void* popped = nullptr;
    if (pushed_) driver().context_pop(&popped);
  }
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;
  int code() const { return code_; }

 private:
  bool pushed_ = false;
  int code_ = 0;
};

struct CudaKernel final : Kernel {
  std::string name;
  std::vector<ConstantValue> constants;
  bool of_library = false;  // cuBLAS stands for it
  struct Loaded {
    void* function = nullptr;
    int64_t shared_bytes = kSharedBytes;
    bool overlaps = false;  // as on its GPU
  };
  std::map<void*, Loaded> loaded;  // by context
};

// Runner serialises the calls, so there are no locks here.
class CudaDevice final : public Device {
 public:
  explicit CudaDevice(std::vector<Gpu> gpus) : gpus_(std::move(gpus)) {
    caps_ = caps_of_cuda_gpu(gpus_[0].name);
    for (const Gpu& g : gpus_) {
      if (g.name != gpus_[0].name) caps_ = *find_caps("nvidia");
    }
  }

  const Caps& caps() const override { return caps_; }

  // Loads the kernel on every GPU in use, because a launch may be captured into a graph, when
  // nothing can be loaded.
  Result<const Kernel*> compile(const std::string& source,
                                const std::vector<ConstantValue>& constants) override {
    auto kernel = std::make_unique<CudaKernel>();
    kernel->name = source;
    kernel->constants = constants;
    kernel->of_library = is_gemm(source);
    bool compiled = false;
    for (const Gpu& g : gpus_) {
      unsigned flags = 0;
      int active = 0;
      if (driver().primary_state(g.device, &flags, &active) != 0 || active == 0) continue;
      void* context = nullptr;
      if (int code = driver().primary_retain(&context, g.device)) {
        return {nullptr, g.name + " does not answer: " + driver().why(code)};
      }
      Status bad = ready(*kernel, context, g);
      driver().primary_release(g.device);
      if (bad) return {nullptr, *bad};
      compiled = true;
    }
    if (!compiled && !kernel->of_library) {
      Result<Cubin> cubin = cuda_compile(source, gpus_[0].arch, constants);
      if (cubin.error) return {nullptr, *cubin.error};
    }
    kernels_.push_back(std::move(kernel));
    return {kernels_.back().get(), std::nullopt};
  }

  Result<Buffer> scratch(int64_t bytes) override {
    return {{}, "cuda: scratch memory (" + std::to_string(bytes) + " bytes) is the caller's"};
  }

  Status launch(const Kernel& kernel, Size3 grid, Size3 group, const std::vector<Buffer>& buffers,
                const Params& params, void* stream) override {
    auto& k = const_cast<CudaKernel&>(static_cast<const CudaKernel&>(kernel));
    void* context = nullptr;
    if (int code = driver().stream_context(stream, &context)) {
      return k.name + ": the stream has no context: " + driver().why(code);
    }
    ScopedContext scope(context);
    if (scope.code() != 0) return k.name + ": " + driver().why(scope.code());
    if (k.of_library) return blas_.launch(k.name, context, buffers, params, stream);
    auto found = k.loaded.find(context);
    if (found == k.loaded.end()) {
      Status bad = load(k, context, gpu_of_current_context());
      if (bad) return bad;
      found = k.loaded.find(context);
    }
    CudaKernel::Loaded& here = found->second;

    int64_t bytes = 0;
    std::vector<uint32_t> offsets;
    for (int64_t b : params.threadgroup_bytes) {
      offsets.push_back(uint32_t(bytes));
      bytes += (b + 15) / 16 * 16;
    }
    if (bytes > here.shared_bytes) {
      if (int code =
              driver().function_attribute(here.function, kMaxDynamicSharedBytes, int(bytes))) {
        return k.name + ": " + std::to_string(bytes) +
               " bytes of threadgroup memory: " + driver().why(code);
      }
      here.shared_bytes = bytes;
    }
    // Arguments in the order of their indices, then where each threadgroup array but the first
    // begins, then how much to fetch ahead (tools/msl/emit.py).
    std::vector<const Buffer*> order;
    for (const Buffer& b : buffers) order.push_back(&b);
    std::sort(order.begin(), order.end(),
              [](const Buffer* a, const Buffer* b) { return a->index < b->index; });
    std::vector<void*> argv;
    bool params_in = params.bytes == 0;
    for (const Buffer* b : order) {
      if (!params_in && params.index < b->index) {
        argv.push_back(const_cast<void*>(params.data));
        params_in = true;
      }
      argv.push_back(const_cast<void**>(&b->data));
    }
    if (!params_in) argv.push_back(const_cast<void*>(params.data));
    for (size_t i = 1; i < offsets.size(); ++i) argv.push_back(&offsets[i]);
    if (params.ahead >= 0) argv.push_back(const_cast<int64_t*>(&params.ahead));
    const LaunchConfig config = {
        {grid.x, grid.y, grid.z}, {group.x, group.y, group.z}, unsigned(bytes), stream, &kOverlap,
        here.overlaps ? 1u : 0u};
    const int code = driver().launch(&config, here.function, argv.data(), nullptr);
    if (code == 0) return std::nullopt;
    auto text = [](const Size3& s) {
      return std::to_string(s.x) + "x" + std::to_string(s.y) + "x" + std::to_string(s.z);
    };
    return k.name + ": grid " + text(grid) + ", group " + text(group) + ", " +
           std::to_string(bytes) + " threadgroup bytes: " + driver().why(code);
  }

  // The caller's streams are the caller's to wait for.
  Status synchronize() override { return std::nullopt; }

 private:
  Gpu gpu_of_current_context() const {
    int device = 0;
    driver().context_device(&device);
    for (const Gpu& g : gpus_) {
      if (g.device == device) return g;
    }
    return gpus_[0];
  }

  Status ready(CudaKernel& k, void* context, const Gpu& g) {
    if (!k.of_library) return load(k, context, g);
    ScopedContext scope(context);
    if (scope.code() != 0) return k.name + ": " + driver().why(scope.code());
    Status bad = blas_.prepare(context);
    return bad ? k.name + ": " + *bad : bad;
  }

  static Status load(CudaKernel& k, void* context, const Gpu& g) {
    Result<Cubin> cubin = cuda_compile(k.name, g.arch, k.constants);
    if (cubin.error) return *cubin.error;
    ScopedContext scope(context);
    void* module = nullptr;
    CudaKernel::Loaded loaded;
    int code = scope.code();
    if (code == 0) code = driver().module_load(&module, cubin.value.bytes.data());
    if (code == 0) code = driver().module_function(&loaded.function, module, k.name.c_str());
    if (code != 0) {
      return k.name + ": " + std::to_string(cubin.value.bytes.size()) +
             " bytes of code cannot be loaded on " + g.name + " (" + g.arch +
             "): " + driver().why(code);
    }
    loaded.overlaps = g.overlaps;
    k.loaded[context] = loaded;
    return std::nullopt;
  }

  std::vector<Gpu> gpus_;
  Caps caps_;
  std::vector<std::unique_ptr<CudaKernel>> kernels_;
  CudaBlas blas_;
};

}  // namespace

Result<std::unique_ptr<Device>> make_cuda_device() {
  Result<std::vector<Gpu>> gpus = find_gpus();
  if (gpus.error) return {nullptr, *gpus.error};
  Result<std::string> nvrtc = nvrtc_version();
  if (nvrtc.error) return {nullptr, *nvrtc.error};
  return {std::make_unique<CudaDevice>(std::move(gpus.value)), std::nullopt};
}

std::string cuda_json() {
  JsonWriter w;
  std::string problem, rows, caps;
  Result<std::vector<Gpu>> gpus = find_gpus();
  if (gpus.error) problem = *gpus.error;
  for (const Gpu& g : gpus.value) {
    const std::string row = caps_of_cuda_gpu(g.name).name;
    if (caps.empty()) caps = row;
    if (caps != row) caps = "nvidia";
    rows += (rows.empty() ? "" : ", ") + JsonWriter()
                                             .field("name", g.name)
                                             .field("arch", g.arch)
                                             .field("multiprocessors", g.multiprocessors)
                                             .field("caps", row)
                                             .text();
  }
  Result<std::string> nvrtc = nvrtc_version();
  if (nvrtc.error && problem.empty()) problem = *nvrtc.error;
  const int version = driver().problem.empty() ? driver().serves : 0;
  return w.field("problem", problem)
      .field("driver", cuda_version(version))
      .field("nvrtc", nvrtc.value)
      .field("caps", caps.empty() ? "nvidia" : caps)
      .raw("gpus", "[" + rows + "]")
      .text();
}

Result<Runner*> cuda_runner() {
  static std::mutex lock;
  static std::unique_ptr<Runner> runner;
  std::lock_guard<std::mutex> hold(lock);
  if (runner == nullptr) {
    Result<std::unique_ptr<Device>> device = make_cuda_device();
    if (device.error) return {nullptr, *device.error};
    runner = std::make_unique<Runner>(std::move(device.value));
  }
  return {runner.get(), std::nullopt};
}

ffi::Error prepare_on_cuda(const char* op, const DevicePlan& plan) {
  if (!plan.error.empty()) return ffi::Error::InvalidArgument(plan.error);
  const std::string who = std::string(op) + ": ";
  Result<Runner*> runner = cuda_runner();
  if (runner.error) return ffi::Error(ffi::ErrorCode::kUnavailable, who + *runner.error);
  Status bad = runner.value->prepare(plan);
  return bad ? ffi::Error(ffi::ErrorCode::kInternal, who + *bad) : ffi::Error::Success();
}

ffi::Error enqueue_on_cuda(const char* op, const DevicePlan& plan,
                           const std::vector<CallBuffer>& buffers, void* stream,
                           ffi::ScratchAllocator& allocator) {
  if (!plan.error.empty()) return ffi::Error::InvalidArgument(plan.error);
  const std::string who = std::string(op) + ": ";
  Result<Runner*> runner = cuda_runner();
  if (runner.error) return ffi::Error(ffi::ErrorCode::kUnavailable, who + *runner.error);
  void* scratch = nullptr;
  if (plan.scratch_bytes > 0) {
    // XLA's allocator refuses to promise more than 16 bytes of alignment, and gives 256.
    std::optional<void*> got = allocator.Allocate(size_t(plan.scratch_bytes), 16);
    if (!got) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                        who + "the GPU has not got " + std::to_string(plan.scratch_bytes) +
                            " bytes left for intermediate results. Use smaller batches");
    }
    scratch = *got;
  }
  Status bad = runner.value->enqueue(plan, buffers, stream, scratch);
  return bad ? ffi::Error(ffi::ErrorCode::kInternal, who + *bad) : ffi::Error::Success();
}

}  // namespace jml
