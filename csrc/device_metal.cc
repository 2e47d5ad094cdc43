// The Apple GPU, by metal-cpp, whose headers come from the mlx-metal wheel.
//
// One command queue and one set of pipelines for the process; a command buffer a call, its launches
// encoded in order on a serial encoder with tracked resources, so that Metal orders them. The host
// waits once, at the end of the call. Memory of the caller is GPU memory already: operands and
// results that begin on a page are wrapped in place, anything else is copied through pooled shared
// buffers. Scratch memory is a pooled buffer for the time of a call.
//
// NS::SharedPtr is not used: it sends release to null, from which clang 20 and later conclude that
// the pointer never was null. Held checks first. Nothing global may touch metal-cpp, whose
// selectors are initialised when the library is loaded.
#define NS_PRIVATE_IMPLEMENTATION
#define MTL_PRIVATE_IMPLEMENTATION
#define METALCPP_SYMBOL_VISIBILITY_HIDDEN
#include "csrc/device_metal.h"

#include <dlfcn.h>
#include <objc/message.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

// After <cmath>, which they need.
#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>

#include "csrc/cache.h"
#include "csrc/caps.h"
#include "csrc/device.h"
#include "csrc/json.h"
#include "csrc/metal_text.h"

namespace jml {
namespace {

// ---- ownership ----

// One reference to an object, or none. Methods that start with new, alloc or copy give one away
// (take); everything else is borrowed from the autorelease pool (keep).
template <typename T>
class Held {
 public:
  Held() = default;
  static Held take(T* p) {
    Held h;
    h.p_ = p;
    return h;
  }
  static Held keep(T* p) {
    if (p != nullptr) p->retain();
    return take(p);
  }
  Held(Held&& other) noexcept : p_(std::exchange(other.p_, nullptr)) {}
  Held& operator=(Held&& other) noexcept {
    if (this != &other) {
      reset();
      p_ = std::exchange(other.p_, nullptr);
    }
    return *this;
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { reset(); }
  void reset() {
    if (p_ != nullptr) p_->release();
    p_ = nullptr;
  }
  T* get() const { return p_; }
  T* operator->() const { return p_; }
  explicit operator bool() const { return p_ != nullptr; }

 private:
  T* p_ = nullptr;
};

// What is borrowed inside of a scope ends with it. XLA's threads have no pool of their own.
class Pool {
 public:
  Pool() : pool_(Held<NS::AutoreleasePool>::take(NS::AutoreleasePool::alloc()->init())) {}

 private:
  Held<NS::AutoreleasePool> pool_;
};

NS::String* text(const std::string& s) {
  return NS::String::string(s.c_str(), NS::UTF8StringEncoding);
}

std::string text(const NS::String* s) {
  const char* p = s == nullptr ? nullptr : s->utf8String();
  return p == nullptr ? "" : p;
}

std::string text(NS::Error* e) {
  if (e == nullptr) return "Metal gave no reason";
  return text(e->localizedDescription()) + " (" + text(e->domain()) + " " +
         std::to_string(e->code()) + ")";
}

bool responds(const void* object, const char* selector) {
  using Send = bool (*)(const void*, SEL, SEL);
  return reinterpret_cast<Send>(&objc_msgSend)(object, sel_registerName("respondsToSelector:"),
                                               sel_registerName(selector));
}

int64_t page_bytes() { return sysconf(_SC_PAGESIZE); }

int64_t whole_pages(int64_t bytes) {
  return (std::max<int64_t>(bytes, 1) + page_bytes() - 1) / page_bytes() * page_bytes();
}

struct Counters {
  std::atomic<int64_t> calls{0}, command_buffers{0}, wrapped{0}, copied_in{0}, copied_out{0},
      buffers_made{0}, libraries_compiled{0}, libraries_loaded{0}, archives_loaded{0},
      archives_written{0};
};
Counters& counters() {
  static Counters c;
  return c;
}

// ---- which GPU ----

int family_of(MTL::Device* device) {
  for (int family = 10; family >= 7; --family) {
    if (device->supportsFamily(MTL::GPUFamily(1000 + family))) return family;
  }
  return 0;
}

// The row of the table by the GPU's name, "Apple M1 Pro", or the first of its family: limits are
// the same in a family.
const Caps* caps_row(MTL::Device* device) {
  std::string name = text(device->name());
  for (char& c : name) c = c == ' ' ? '-' : char(std::tolower(static_cast<unsigned char>(c)));
  const std::string family = "apple" + std::to_string(family_of(device));
  for (const Caps& c : all_caps()) {
    if (c.name == name && c.family == family) return &c;
  }
  for (const Caps& c : all_caps()) {
    if (c.family == family) return &c;
  }
  return nullptr;
}

// ---- the GPU and what was compiled for it ----

class Metal;
struct MetalKernel : Kernel {
  const MetalKernelText* row = nullptr;
  std::vector<ConstantValue> constants;
};

class Metal {
 public:
  // The GPU of the process, found again after it was lost.
  static Result<std::shared_ptr<Metal>> get();
  static void forget();

  const Caps& caps() const { return caps_; }
  MTL::Device* device() const { return device_.get(); }
  MTL::CommandQueue* queue() const { return queue_.get(); }
  void lose() { lost_ = true; }

  Result<MTL::ComputePipelineState*> pipeline(const MetalKernel& kernel) {
    std::string key = kernel.row->kernel;
    for (const ConstantValue& v : kernel.constants)
      key += ";" + std::to_string(v.index) + "=" + std::to_string(v.bits);
    std::lock_guard<std::mutex> hold(compile_mutex_);
    auto it = pipelines_.find(key);
    if (it == pipelines_.end()) {
      Held<MTL::ComputePipelineState> made;
      if (Status bad = make_pipeline(kernel, key, &made)) return {nullptr, bad};
      it = pipelines_.emplace(key, std::move(made)).first;
    }
    return {it->second.get(), std::nullopt};
  }

  // A shared buffer of at least so many bytes, and back. Kept ones are few: calls repeat sizes.
  Held<MTL::Buffer> take_buffer(int64_t bytes) {
    const int64_t size = pooled_bytes(bytes);
    {
      std::lock_guard<std::mutex> hold(pool_mutex_);
      auto it = pool_.find(size);
      if (it != pool_.end()) {
        Held<MTL::Buffer> found = std::move(it->second);
        pool_.erase(it);
        pooled_ -= size;
        return found;
      }
    }
    ++counters().buffers_made;
    auto made = Held<MTL::Buffer>::take(
        device_->newBuffer(NS::UInteger(size), MTL::ResourceStorageModeShared));
    if (made || size == 0) return made;
    {
      std::lock_guard<std::mutex> hold(pool_mutex_);  // what is kept for later may be in the way
      pool_.clear();
      pooled_ = 0;
    }
    return Held<MTL::Buffer>::take(
        device_->newBuffer(NS::UInteger(size), MTL::ResourceStorageModeShared));
  }

  void give_buffer(Held<MTL::Buffer> buffer) {
    const int64_t size = int64_t(buffer->length());
    std::lock_guard<std::mutex> hold(pool_mutex_);
    if (lost_ || pooled_ + size > kPoolBytes) return;
    pooled_ += size;
    pool_.emplace(size, std::move(buffer));
  }

 private:
  static constexpr int64_t kPoolBytes = int64_t{512} << 20;

  // Four sizes a power of two: at most a quarter is wasted, and sizes meet again.
  static int64_t pooled_bytes(int64_t bytes) {
    const int64_t pages = whole_pages(bytes);
    int64_t step = page_bytes();
    while (step * 8 <= pages) step *= 2;
    return (pages + step - 1) / step * step;
  }

  // With the compile mutex held.
  Status make_pipeline(const MetalKernel& kernel, const std::string& key,
                       Held<MTL::ComputePipelineState>* out) {
    const MetalKernelText& row = *kernel.row;
    const std::string what = std::string("metal: kernel ") + row.kernel;
    MTL::Library* library = nullptr;
    if (Status bad = find_library(row, &library)) return bad;
    NS::Error* error = nullptr;
    Held<MTL::Function> function;
    if (kernel.constants.empty()) {
      function = Held<MTL::Function>::take(library->newFunction(text(row.kernel)));
    } else {
      auto values =
          Held<MTL::FunctionConstantValues>::take(MTL::FunctionConstantValues::alloc()->init());
      for (const ConstantValue& v : kernel.constants) {
        MTL::DataType type = MTL::DataTypeNone;
        for (const MetalConstantText* c = metal_constants; c->file != nullptr; ++c) {
          if (std::strcmp(c->file, row.file) == 0 && c->index == v.index) type = data_type(c->type);
        }
        if (type == MTL::DataTypeNone)
          return what + " has no function constant " + std::to_string(v.index);
        values->setConstantValue(&v.bits, type, NS::UInteger(v.index));
      }
      function =
          Held<MTL::Function>::take(library->newFunction(text(row.kernel), values.get(), &error));
    }
    if (!function) return what + " is not in the compiled library: " + text(error);

    auto wanted =
        Held<MTL::ComputePipelineDescriptor>::take(MTL::ComputePipelineDescriptor::alloc()->init());
    wanted->setComputeFunction(function.get());
    wanted->setThreadGroupSizeIsMultipleOfThreadExecutionWidth(true);
    const std::string file = archive_file(row, key);
    Held<MTL::BinaryArchive> archive = open_archive(file);
    const bool known = bool(archive);
    if (archive) {
      const NS::Object* one = archive.get();
      wanted->setBinaryArchives(NS::Array::array(&one, 1));
    }
    error = nullptr;
    auto made = Held<MTL::ComputePipelineState>::take(
        device_->newComputePipelineState(wanted.get(), MTL::PipelineOptionNone, nullptr, &error));
    if (!made) return what + " has no pipeline on " + caps_.name + ": " + text(error);
    const auto width = int64_t(made->threadExecutionWidth());
    if (width != caps_.simd_width) {
      return what + ": simdgroups of " + std::to_string(width) + " threads on " + caps_.name +
             ", the kernels are written for " + std::to_string(caps_.simd_width) +
             ". Use device host";
    }
    if (!known && !file.empty()) write_archive(file, wanted.get());
    *out = std::move(made);
    return std::nullopt;
  }

  static MTL::DataType data_type(const std::string& type) {
    static const std::map<std::string, MTL::DataType> types = {
        {"bool", MTL::DataTypeBool},     {"int", MTL::DataTypeInt},
        {"uint", MTL::DataTypeUInt},     {"short", MTL::DataTypeShort},
        {"ushort", MTL::DataTypeUShort}, {"float", MTL::DataTypeFloat},
        {"half", MTL::DataTypeHalf}};
    auto it = types.find(type);
    return it == types.end() ? MTL::DataTypeNone : it->second;
  }

  // A file compiled by the build (lib<name>.metallib's place is beside this library), or the text.
  Status find_library(const MetalKernelText& row, MTL::Library** out) {
    auto prebuilt = libraries_.find(row.file);
    if (prebuilt == libraries_.end()) {
      Held<MTL::Library> loaded;
      const std::string file = prebuilt_file(row.file);
      if (!file.empty()) {
        NS::Error* error = nullptr;
        loaded = Held<MTL::Library>::take(
            device_->newLibrary(NS::URL::fileURLWithPath(text(file)), &error));
        if (!loaded) return "metal: " + file + " cannot be loaded: " + text(error);
        ++counters().libraries_loaded;
      }
      prebuilt = libraries_.emplace(row.file, std::move(loaded)).first;
    }
    if (prebuilt->second) {
      *out = prebuilt->second.get();
      return std::nullopt;
    }
    const std::string key = std::string(row.file) + ":" + row.instance;
    auto it = libraries_.find(key);
    if (it == libraries_.end()) {
      Held<MTL::Library> made;
      if (Status bad = compile(row, &made)) return bad;
      it = libraries_.emplace(key, std::move(made)).first;
    }
    *out = it->second.get();
    return std::nullopt;
  }

  static std::string source(const MetalKernelText& row) {
    for (const MetalText* t = metal_texts; t->file != nullptr; ++t) {
      if (std::strcmp(t->file, row.file) == 0) return std::string(t->text) + row.instance + "\n";
    }
    return "";
  }

  Status compile(const MetalKernelText& row, Held<MTL::Library>* out) {
    auto options = Held<MTL::CompileOptions>::take(MTL::CompileOptions::alloc()->init());
    options->setLanguageVersion(MTL::LanguageVersion3_1);  // bfloat; macOS 14
    // Kernels count on NaN, infinities and the order of operations as written.
    if (responds(options.get(), "setMathMode:")) {
      options->setMathMode(MTL::MathModeSafe);  // macOS 15
    } else {
      options->setFastMathEnabled(false);
    }
    NS::Error* error = nullptr;
    ++counters().libraries_compiled;
    *out = Held<MTL::Library>::take(device_->newLibrary(text(source(row)), options.get(), &error));
    if (*out) return std::nullopt;
    return "metal: kernels/" + std::string(row.file) + ".metal does not compile for " + row.kernel +
           " on " + caps_.name + ". Please report it with this log:\n" + text(error);
  }

  static std::string prebuilt_file(const char* stem) {
    Dl_info here;
    static const char anchor = 0;
    if (dladdr(&anchor, &here) == 0 || here.dli_fname == nullptr) return "";
    const auto path =
        std::filesystem::path(here.dli_fname).parent_path() / (std::string(stem) + ".metallib");
    std::error_code none;
    return std::filesystem::exists(path, none) ? path.string() : "";
  }

  // GPU code on disk; a GPU, a system and a text each have their own. Losing it costs only time, so
  // that failures here are not reported.
  std::string archive_file(const MetalKernelText& row, const std::string& key) const {
    const std::string folder = cache_folder();
    if (folder.empty()) return "";
    return folder + "/metal-" + digest(source(row) + key + archive_salt_) + ".binarchive";
  }

  Held<MTL::BinaryArchive> open_archive(const std::string& file) {
    std::error_code none;
    if (file.empty() || !std::filesystem::exists(file, none)) return {};
    auto at =
        Held<MTL::BinaryArchiveDescriptor>::take(MTL::BinaryArchiveDescriptor::alloc()->init());
    at->setUrl(NS::URL::fileURLWithPath(text(file)));
    NS::Error* error = nullptr;
    auto found = Held<MTL::BinaryArchive>::take(device_->newBinaryArchive(at.get(), &error));
    if (found) {
      ++counters().archives_loaded;
    } else {
      std::filesystem::remove(file, none);  // of another system, or cut short
    }
    return found;
  }

  void write_archive(const std::string& file, MTL::ComputePipelineDescriptor* wanted) {
    auto empty =
        Held<MTL::BinaryArchiveDescriptor>::take(MTL::BinaryArchiveDescriptor::alloc()->init());
    NS::Error* error = nullptr;
    auto archive = Held<MTL::BinaryArchive>::take(device_->newBinaryArchive(empty.get(), &error));
    if (!archive || !archive->addComputePipelineFunctions(wanted, &error)) return;
    std::error_code bad;
    std::filesystem::create_directories(std::filesystem::path(file).parent_path(), bad);
    // Whole or not at all: other processes read it.
    const std::string part = file + "." + std::to_string(getpid());
    if (archive->serializeToURL(NS::URL::fileURLWithPath(text(part)), &error)) {
      std::filesystem::rename(part, file, bad);
      if (!bad) ++counters().archives_written;
    }
    std::filesystem::remove(part, bad);
  }

  Caps caps_;
  std::string archive_salt_;
  Held<MTL::Device> device_;
  Held<MTL::CommandQueue> queue_;
  std::atomic<bool> lost_{false};
  std::mutex compile_mutex_;
  std::map<std::string, Held<MTL::Library>> libraries_;
  std::map<std::string, Held<MTL::ComputePipelineState>> pipelines_;
  std::mutex pool_mutex_;
  std::multimap<int64_t, Held<MTL::Buffer>> pool_;
  int64_t pooled_ = 0;

  static std::mutex& current_mutex() {
    static std::mutex m;
    return m;
  }
  static std::shared_ptr<Metal>& current() {
    static auto* c = new std::shared_ptr<Metal>;  // outlives whatever still runs at exit
    return *c;
  }
};

Result<std::shared_ptr<Metal>> Metal::get() {
  std::lock_guard<std::mutex> hold(current_mutex());
  std::shared_ptr<Metal>& now = current();
  if (now != nullptr && !now->lost_) return {now, std::nullopt};
  now = nullptr;
  auto made = std::make_shared<Metal>();
  made->device_ = Held<MTL::Device>::take(MTL::CreateSystemDefaultDevice());
  if (!made->device_) return {nullptr, "this process sees no Metal device"};
  MTL::Device* device = made->device_.get();
  const Caps* row = caps_row(device);
  if (row == nullptr || !device->hasUnifiedMemory()) {
    return {nullptr,
            "the kernels need an Apple GPU of family 7 (M1) or newer with unified memory, "
            "and this one is \"" +
                text(device->name()) + "\""};
  }
  made->caps_ = *row;
  made->caps_.max_threadgroup_bytes =
      std::min(row->max_threadgroup_bytes, int64_t(device->maxThreadgroupMemoryLength()));
  made->archive_salt_ = text(device->name()) + ";" +
                        text(NS::ProcessInfo::processInfo()->operatingSystemVersionString());
  made->queue_ = Held<MTL::CommandQueue>::take(device->newCommandQueue());
  if (!made->queue_) return {nullptr, "Metal gave no command queue"};
  now = made;
  return {now, std::nullopt};
}

void Metal::forget() {
  std::lock_guard<std::mutex> hold(current_mutex());
  current() = nullptr;
}

// ---- the device ----

std::string failure(MTL::CommandBuffer* done, Metal& metal) {
  NS::Error* error = done->error();
  const NS::Integer code = error == nullptr ? 0 : error->code();
  const char* way_out = "";
  switch (code) {
    case MTL::CommandBufferErrorTimeout:
      way_out =
          "; the system stops work that holds the GPU for seconds: use smaller batches, or "
          "device host";
      break;
    case MTL::CommandBufferErrorPageFault:
    case MTL::CommandBufferErrorInvalidResource:
      way_out = "; a kernel reached memory that is not its own: please report it";
      break;
    case MTL::CommandBufferErrorOutOfMemory:
      way_out = "; the GPU had no memory left: use smaller batches, or device host";
      break;
    case MTL::CommandBufferErrorAccessRevoked:
    case MTL::CommandBufferErrorNotPermitted:
      way_out = "; the system does not let this process use the GPU: use device host";
      break;
    case MTL::CommandBufferErrorDeviceRemoved:
      way_out = "; the GPU is gone, the next call looks for one again: or use device host";
      metal.lose();
      break;
    default:
      break;
  }
  return "metal: the GPU did not finish on " + metal.caps().name + ": " + text(error) + way_out;
}

class MetalDevice : public Device {
 public:
  MetalDevice(std::shared_ptr<Metal> metal, double max_submission_work)
      : metal_(std::move(metal)), caps_(metal_->caps()) {
    caps_.max_submission_work = max_submission_work;
  }

  ~MetalDevice() override {
    Pool pool;
    abandon();
    for (Scratch& s : scratch_) munmap(s.data, size_t(s.bytes));
    metal_.reset();
  }

  const Caps& caps() const override { return caps_; }

  Result<const Kernel*> compile(const std::string& source,
                                const std::vector<ConstantValue>& constants) override {
    Pool pool;
    const MetalKernelText* row = metal_kernels;
    while (row->kernel != nullptr && source != row->kernel) ++row;
    if (row->kernel == nullptr) return {nullptr, "metal: no kernel named " + source};
    auto kernel = std::make_unique<MetalKernel>();
    kernel->row = row;
    kernel->constants = constants;
    auto made = metal_->pipeline(*kernel);
    if (made.error) return {nullptr, made.error};
    kernels_.push_back(std::move(kernel));
    return {kernels_.back().get(), std::nullopt};
  }

  // Addresses only, by which launches name parts of it; a call finds memory for them (locate).
  Result<Buffer> scratch(int64_t bytes) override {
    const int64_t size = whole_pages(bytes);
    void* data = mmap(nullptr, size_t(size), PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (data == MAP_FAILED) {
      return {{}, "metal: no addresses for " + std::to_string(bytes) + " bytes of scratch"};
    }
    scratch_.push_back({data, size, {}});
    return {{0, data, bytes, data, size, true}, std::nullopt};
  }

  Status launch(const Kernel& kernel, Size3 grid, Size3 group, const std::vector<Buffer>& buffers,
                const Params& params, void*) override {
    Pool pool;
    Status bad = encode(static_cast<const MetalKernel&>(kernel), grid, group, buffers, params);
    if (bad) broken_ = true;
    return bad;
  }

  Status synchronize() override {
    Pool pool;
    if (broken_) {
      abandon();
      return std::nullopt;
    }
    Status bad = submit();
    for (Held<MTL::CommandBuffer>& sent : sent_) {
      sent->waitUntilCompleted();
      if (!bad && sent->status() != MTL::CommandBufferStatusCompleted)
        bad = failure(sent.get(), *metal_);
    }
    sent_.clear();
    for (Operand& o : operands_) {
      if (!bad && !o.wrapped && o.written) {
        std::memcpy(o.data, o.buffer->contents(), size_t(o.bytes));
        ++counters().copied_out;
      }
    }
    finish();
    return bad;
  }

 private:
  struct Scratch {
    void* data;
    int64_t bytes;
    Held<MTL::Buffer> buffer;
  };
  // Memory of the caller, for the time of a call.
  struct Operand {
    void* data;
    int64_t bytes;
    bool wrapped, written;
    Held<MTL::Buffer> buffer;
  };

  Status encode(const MetalKernel& kernel, Size3 grid, Size3 group,
                const std::vector<Buffer>& buffers, const Params& params) {
    const char* name = kernel.row->kernel;
    if (!encoder_) {
      if (Status bad = begin()) return bad;
    }
    auto pipeline = metal_->pipeline(kernel);
    if (pipeline.error) return pipeline.error;
    const int64_t threads = int64_t{group.x} * group.y * group.z;
    const auto most = int64_t(pipeline.value->maxTotalThreadsPerThreadgroup());
    if (threads > most) {
      return std::string("metal: kernel ") + name + ": " + std::to_string(threads) +
             " threads per threadgroup exceed the " + std::to_string(most) +
             " that its registers leave on " + caps_.name + ". Use device host";
    }
    encoder_->setComputePipelineState(pipeline.value);
    for (const Buffer& b : buffers) {
      MTL::Buffer* found = nullptr;
      int64_t offset = 0;
      if (Status bad = locate(b, (kernel.row->written >> b.index & 1) != 0, &found, &offset))
        return std::string("metal: kernel ") + name + ": " + *bad;
      encoder_->setBuffer(found, NS::UInteger(offset), NS::UInteger(b.index));
    }
    if (params.bytes > 0) {
      encoder_->setBytes(params.data, NS::UInteger(params.bytes), NS::UInteger(params.index));
    }
    for (size_t i = 0; i < params.threadgroup_bytes.size(); ++i) {
      // Metal wants multiples of 16, and more than none.
      const int64_t bytes = std::max<int64_t>((params.threadgroup_bytes[i] + 15) / 16 * 16, 16);
      encoder_->setThreadgroupMemoryLength(NS::UInteger(bytes), NS::UInteger(i));
    }
    encoder_->dispatchThreadgroups(MTL::Size(grid.x, grid.y, grid.z),
                                   MTL::Size(group.x, group.y, group.z));
    // What is not estimated counts as a fair amount a thread.
    constexpr double kWorkOfThread = 20000;
    work_ +=
        params.work > 0 ? params.work : kWorkOfThread * double(threads) * grid.x * grid.y * grid.z;
    // The queue keeps the order; only a call that the watchdog might stop is more than one.
    if (caps_.max_submission_work > 0 && work_ >= caps_.max_submission_work) return submit();
    return std::nullopt;
  }

  Status begin() {
    if (!in_call_) {
      in_call_ = true;
      ++counters().calls;
      auto now = Metal::get();  // another one, if the last was lost
      if (now.error) return "metal: " + *now.error;
      metal_ = now.value;
    }
    commands_ = Held<MTL::CommandBuffer>::keep(metal_->queue()->commandBuffer());
    if (!commands_) return "metal: no command buffer on " + caps_.name;
    encoder_ = Held<MTL::ComputeCommandEncoder>::keep(commands_->computeCommandEncoder());
    if (!encoder_) return "metal: no compute encoder on " + caps_.name;
    return std::nullopt;
  }

  Status submit() {
    if (encoder_) {
      encoder_->endEncoding();
      encoder_.reset();
    }
    if (commands_) {
      commands_->commit();
      ++counters().command_buffers;
      sent_.push_back(std::move(commands_));
    }
    work_ = 0;
    return std::nullopt;
  }

  Status locate(const Buffer& b, bool written, MTL::Buffer** found, int64_t* offset) {
    for (Scratch& s : scratch_) {
      auto* start = static_cast<std::byte*>(s.data);
      auto* at = static_cast<std::byte*>(b.data);
      if (at < start || at >= start + s.bytes) continue;
      if (!s.buffer) s.buffer = metal_->take_buffer(s.bytes);
      if (!s.buffer) return "no memory for " + std::to_string(s.bytes) + " bytes of scratch";
      *found = s.buffer.get();
      *offset = at - start;
      return std::nullopt;
    }
    void* whole = b.whole == nullptr ? b.data : b.whole;
    const int64_t bytes = b.whole == nullptr ? b.bytes : b.whole_bytes;
    *offset = static_cast<std::byte*>(b.data) - static_cast<std::byte*>(whole);
    for (Operand& o : operands_) {
      if (o.data == whole && o.bytes == bytes) {
        o.written = o.written || written;
        *found = o.buffer.get();
        return std::nullopt;
      }
    }
    Operand o{whole, bytes, false, written, {}};
    // Pages are mapped as a whole, so the last one may be counted in full.
    if (bytes >= page_bytes() && reinterpret_cast<uintptr_t>(whole) % uintptr_t(page_bytes()) == 0)
      o.buffer = wrap(whole, whole_pages(bytes));
    o.wrapped = bool(o.buffer);
    if (o.wrapped) {
      ++counters().wrapped;
    } else {  // or Metal would not map it, as pages that are only readable
      o.buffer = metal_->take_buffer(bytes);
      if (!o.buffer) return "no memory for a buffer of " + std::to_string(bytes) + " bytes";
      if (!b.fresh) {
        std::memcpy(o.buffer->contents(), whole, size_t(bytes));
        ++counters().copied_in;
      }
    }
    *found = o.buffer.get();
    operands_.push_back(std::move(o));
    return std::nullopt;
  }

  Held<MTL::Buffer> wrap(void* data, int64_t bytes) {
    return Held<MTL::Buffer>::take(metal_->device()->newBuffer(
        data, NS::UInteger(bytes), MTL::ResourceStorageModeShared, nullptr));
  }

  // After a failed launch: what was encoded is dropped, what was sent is waited for.
  void abandon() {
    if (encoder_) encoder_->endEncoding();
    encoder_.reset();
    commands_.reset();
    for (Held<MTL::CommandBuffer>& sent : sent_) sent->waitUntilCompleted();
    sent_.clear();
    finish();
  }

  void finish() {
    for (Operand& o : operands_) {
      if (!o.wrapped && o.buffer) metal_->give_buffer(std::move(o.buffer));
    }
    operands_.clear();
    for (Scratch& s : scratch_) {
      if (s.buffer) metal_->give_buffer(std::move(s.buffer));
    }
    work_ = 0;
    broken_ = false;
    in_call_ = false;
  }

  std::shared_ptr<Metal> metal_;
  Caps caps_;
  std::vector<std::unique_ptr<MetalKernel>> kernels_;
  std::vector<Scratch> scratch_;
  std::vector<Operand> operands_;
  std::vector<Held<MTL::CommandBuffer>> sent_;
  Held<MTL::CommandBuffer> commands_;
  Held<MTL::ComputeCommandEncoder> encoder_;
  double work_ = 0;
  bool broken_ = false;   // a launch of this call failed
  bool in_call_ = false;  // between the first launch and synchronize()
};

}  // namespace

Result<std::unique_ptr<Device>> make_metal_device(double max_submission_work) {
  Pool pool;
  auto metal = Metal::get();
  if (metal.error) return {nullptr, "metal: " + *metal.error};
  return {std::make_unique<MetalDevice>(metal.value, max_submission_work), std::nullopt};
}

void metal_forget() {
  Pool pool;
  Metal::forget();
}

std::string metal_json() {
  Pool pool;
  auto metal = Metal::get();
  JsonWriter w;
  w.field("problem", metal.error ? *metal.error : std::string());
  if (!metal.error) {
    MTL::Device* device = metal.value->device();
    w.field("name", text(device->name()))
        .field("caps", metal.value->caps().name)
        .field("family", metal.value->caps().family)
        .field("working_set_bytes", int64_t(device->recommendedMaxWorkingSetSize()));
  }
  const Counters& c = counters();
  w.field("calls", c.calls.load())
      .field("command_buffers", c.command_buffers.load())
      .field("wrapped", c.wrapped.load())
      .field("copied_in", c.copied_in.load())
      .field("copied_out", c.copied_out.load())
      .field("buffers_made", c.buffers_made.load())
      .field("libraries_compiled", c.libraries_compiled.load())
      .field("libraries_loaded", c.libraries_loaded.load())
      .field("archives_loaded", c.archives_loaded.load())
      .field("archives_written", c.archives_written.load());
  return w.text();
}

}  // namespace jml
