// Receives what -fsanitize=bounds finds in kernels. Linked only where no UBSan runtime is.
#include <cstdint>

#include "runtime.h"

namespace {

// The layout GCC and Clang share.
struct OutOfBounds {
  const char* file;
  uint32_t line;
  uint32_t column;
  const void* array_type;
  const void* index_type;
};

}  // namespace

extern "C" void __ubsan_handle_out_of_bounds_abort(OutOfBounds* data, uintptr_t index) {
  jml::sim::array_out_of_bounds(data->file, static_cast<int>(data->line),
                                static_cast<long long>(static_cast<int32_t>(index)));
}
