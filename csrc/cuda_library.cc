#include "csrc/cuda_library.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

namespace jml {
namespace {

struct Paths {
  std::mutex mutex;
  std::map<std::string, std::string> of;
};
Paths& paths() {
  static Paths p;
  return p;
}

}  // namespace

void use_cuda_library(const std::string& stem, const std::string& path) {
  std::lock_guard<std::mutex> hold(paths().mutex);
  paths().of[stem] = path;
}

Result<void*> open_cuda_library(const std::string& stem, const std::string& title,
                                const std::string& oldest, const std::string& wheel,
                                const std::function<bool(void*)>& bind) {
  const std::string file = "lib" + stem + ".so";
  const std::vector<std::string> files = {file + ".13", file + ".12", file};
  std::vector<std::string> names;
  const char* home = std::getenv("JAXMETAL_CUDA_PATH");
  for (const std::string& name : files) {
    if (home == nullptr || *home == 0) break;
    for (const char* sub : {"/", "/lib/", "/lib64/"}) names.push_back(home + (sub + name));
  }
  // What the environment names is used or reported, never passed over.
  if (names.empty()) {
    std::lock_guard<std::mutex> hold(paths().mutex);
    if (!paths().of[stem].empty()) names.push_back(paths().of[stem]);
  }
  if (names.empty()) names = files;
  std::string tried;
  for (const std::string& name : names) {
    void* lib = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (lib != nullptr && bind(lib)) return {lib, std::nullopt};
    tried += (tried.empty() ? "" : "; ") + (lib == nullptr ? dlerror() : name + ": not " + oldest);
  }
  return {nullptr, title + " cannot be opened (" + tried + "). pip install " + wheel +
                       ", or set JAXMETAL_CUDA_PATH to a CUDA toolkit"};
}

}  // namespace jml
