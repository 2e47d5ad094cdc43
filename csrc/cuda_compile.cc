#include "csrc/cuda_compile.h"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>

#include "csrc/cache.h"
#include "csrc/cuda_library.h"

namespace jml {
namespace {

// Contraction off: kernels say fma where they mean it, on every device.
constexpr const char* kOptions[] = {"-std=c++17", "-default-device", "-fmad=false"};
constexpr int kInvalidOption = 5;  // of NVRTC's codes
constexpr char kMagic[] = "JMLCUBIN1\n";

// The part of NVRTC's C interface in use; the struct behind a program stays opaque.
struct Nvrtc {
  int (*version)(int*, int*) = nullptr;
  int (*create)(void**, const char*, const char*, int, const char* const*,
                const char* const*) = nullptr;
  int (*compile)(void*, int, const char* const*) = nullptr;
  int (*log_size)(void*, size_t*) = nullptr;
  int (*log)(void*, char*) = nullptr;
  int (*cubin_size)(void*, size_t*) = nullptr;
  int (*cubin)(void*, char*) = nullptr;
  int (*destroy)(void**) = nullptr;
  const char* (*error_string)(int) = nullptr;
  int major = 0, minor = 0;
};

Result<Nvrtc> open_nvrtc() {
  Nvrtc n;
  const auto take = [&n](void* lib) {
    return bind(lib, "nvrtcVersion", &n.version) && bind(lib, "nvrtcCreateProgram", &n.create) &&
           bind(lib, "nvrtcCompileProgram", &n.compile) &&
           bind(lib, "nvrtcGetProgramLogSize", &n.log_size) &&
           bind(lib, "nvrtcGetProgramLog", &n.log) &&
           bind(lib, "nvrtcGetCUBINSize", &n.cubin_size) && bind(lib, "nvrtcGetCUBIN", &n.cubin) &&
           bind(lib, "nvrtcDestroyProgram", &n.destroy) &&
           bind(lib, "nvrtcGetErrorString", &n.error_string) && n.version(&n.major, &n.minor) == 0;
  };
  const Result<void*> lib =
      open_cuda_library("nvrtc", "NVRTC", "NVRTC 11.2 or newer", "nvidia-cuda-nvrtc", take);
  if (lib.error) return {{}, lib.error};
  return {n, {}};
}

std::mutex& compile_lock() {
  static std::mutex lock;
  return lock;
}

// The NVRTC in use: the first that opened. Callers hold compile_lock().
Result<Nvrtc> nvrtc() {
  static Nvrtc found;
  if (found.version == nullptr) {
    Result<Nvrtc> opened = open_nvrtc();
    if (opened.error) return opened;
    found = opened.value;
  }
  return {found, {}};
}

// A file is magic, digest of the cubin, newline, cubin. Anything else counts as absent.
bool read_cached(const std::string& path, std::string* bytes) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream all;
  if (!in || !(all << in.rdbuf())) return false;
  const std::string text = all.str();
  const size_t head = std::strlen(kMagic) + 33;
  if (text.size() <= head || text.compare(0, std::strlen(kMagic), kMagic) != 0) return false;
  *bytes = text.substr(head);
  return text.compare(std::strlen(kMagic), 33, digest(*bytes) + "\n") == 0;
}

// Whole or not at all, by rename. A full or read-only disk costs the next process a compile.
void write_cached(const std::string& folder, const std::string& path, const std::string& bytes) {
  static std::atomic<int> serial{0};
  std::error_code ignored;
  std::filesystem::create_directories(folder, ignored);
  const std::string part = path + "." + std::to_string(getpid()) + "." + std::to_string(serial++);
  std::ofstream out(part, std::ios::binary);
  out << kMagic << digest(bytes) << "\n" << bytes;
  out.close();
  if (out) std::filesystem::rename(part, path, ignored);
  if (!out || ignored) std::filesystem::remove(part, ignored);
}

std::string failed(const Nvrtc& n, int code) {
  return "NVRTC " + std::to_string(n.major) + "." + std::to_string(n.minor) + ": " +
         n.error_string(code);
}

Result<std::string> run_nvrtc(const Nvrtc& n, const char* source, const std::string& file,
                              const std::vector<std::string>& options) {
  void* program = nullptr;
  const char* names[] = {"msl_cuda.h"};
  int code = n.create(&program, source, file.c_str(), 1, &cuda_shim, names);
  if (code != 0) return {{}, failed(n, code) + ". " + kWithoutKernels};
  std::vector<const char*> argv;
  for (const std::string& o : options) argv.push_back(o.c_str());
  code = n.compile(program, static_cast<int>(argv.size()), argv.data());
  Result<std::string> out;
  size_t size = 0;
  if (code != 0) {
    std::string log;
    if (n.log_size(program, &size) == 0) log.resize(size);
    if (size > 0) n.log(program, log.data());
    const std::string way_out =
        code == kInvalidOption ? "It may be older than the GPU: pip install -U nvidia-cuda-nvrtc, "
                                 "or set JAXMETAL_CUDA_PATH to a newer CUDA toolkit"
                               : kWithoutKernels;
    out.error = failed(n, code) + " with " + options[0] + ". " + way_out + "\n" + log.c_str();
  } else {
    code = n.cubin_size(program, &size);
    out.value.resize(size);
    if (code == 0) code = n.cubin(program, out.value.data());
    if (code != 0) out.error = failed(n, code) + ". " + kWithoutKernels;
  }
  n.destroy(&program);
  return out;
}

}  // namespace

Result<std::string> nvrtc_version() {
  std::lock_guard<std::mutex> hold(compile_lock());
  Result<Nvrtc> lib = nvrtc();
  if (lib.error) return {{}, lib.error};
  return {std::to_string(lib.value.major) + "." + std::to_string(lib.value.minor), {}};
}

Result<Cubin> cuda_compile(const std::string& kernel, const std::string& arch,
                           const std::vector<ConstantValue>& constants) {
  const std::string entry = "JM_ENTRY_" + kernel;
  const CudaText* row = cuda_texts;
  while (row->stem != nullptr && std::strstr(row->text, (entry + ")").c_str()) == nullptr) ++row;
  if (row->stem == nullptr) return {{}, "no kernel named " + kernel + " in this library"};

  std::lock_guard<std::mutex> hold(compile_lock());
  Result<Nvrtc> lib = nvrtc();
  if (lib.error) return {{}, lib.error};
  // Only the wanted entry point is instantiated.
  std::vector<std::string> options = {"-arch=" + arch};
  options.insert(options.end(), std::begin(kOptions), std::end(kOptions));
  options.push_back("-D" + entry);
  for (const ConstantValue& c : constants) {
    options.push_back("-DJM_CONSTANT_" + std::to_string(c.index) + "=" + std::to_string(c.bits));
  }
  std::string text = std::to_string(lib.value.major) + "." + std::to_string(lib.value.minor);
  for (const std::string& o : options) text += "\n" + o;
  const std::string key = digest(text + "\n" + row->text + "\n" + cuda_shim);

  static std::map<std::string, std::string> memory;
  if (auto it = memory.find(key); it != memory.end()) return {{it->second, "memory"}, {}};
  const std::string folder = cache_folder();
  const std::string path = folder + "/" + row->stem + "-" + key + ".cubin";
  std::string bytes;
  if (!folder.empty() && read_cached(path, &bytes)) {
    memory[key] = bytes;
    return {{bytes, "disk"}, {}};
  }
  Result<std::string> built =
      run_nvrtc(lib.value, row->text, std::string(row->stem) + ".cu", options);
  if (built.error) return {{}, kernel + ": " + *built.error};
  if (!folder.empty()) write_cached(folder, path, built.value);
  memory[key] = built.value;
  return {{built.value, "nvrtc"}, {}};
}

}  // namespace jml
