// Libraries of the CUDA toolkit, opened at run time.
#pragma once

#include <dlfcn.h>

#include <functional>
#include <string>

#include "csrc/device.h"

namespace jml {

// Which file is lib`stem`, where JAXMETAL_CUDA_PATH does not say; without one it is the loader's.
void use_cuda_library(const std::string& stem, const std::string& path);

// Opens lib`stem` of CUDA 13 or 12: the first that `bind`, which looks its functions up, takes.
// Else what was tried and that none was an `oldest` or newer, and the wheel that has one.
Result<void*> open_cuda_library(const std::string& stem, const std::string& title,
                                const std::string& oldest, const std::string& wheel,
                                const std::function<bool(void*)>& bind);

// A function of an open library by its name.
template <typename F>
bool bind(void* lib, const char* name, F* f) {
  *f = reinterpret_cast<F>(dlsym(lib, name));
  return *f != nullptr;
}

}  // namespace jml
