// What stands for the Metal device in libraries without one.
#include "csrc/device.h"
#include "csrc/device_metal.h"
#include "csrc/json.h"

namespace jml {
namespace {

constexpr const char* kAbsent =
    "it needs an Apple GPU, and this library was built without the Metal device";

}  // namespace

Result<std::unique_ptr<Device>> make_metal_device(double) {
  return {nullptr, "device metal is not in this library: " + std::string(kAbsent)};
}

void metal_forget() {}

std::string metal_json() { return JsonWriter().field("problem", kAbsent).text(); }

}  // namespace jml
