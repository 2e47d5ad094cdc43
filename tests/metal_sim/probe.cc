// Launches of tests/metal_sim/probe.metal by way of csrc/device.h, for what plans do not ask for.
#include <cstring>
#include <string>

#include "csrc/device.h"

namespace {

struct ProbeParams {
  int32_t count;
};

template <typename T>
int64_t bits(T value) {
  int64_t out = 0;
  std::memcpy(&out, &value, sizeof(value));
  return out;
}

// y = 3 * (2 * x + 0.5) + 0.5 negated, the inner part in scratch memory.
std::string run(int32_t constant, float* x, float* y, int32_t count) {
  auto made = jml::make_metal_device(0);
  if (made.error) return *made.error;
  jml::Device& device = *made.value;
  auto values = [&](int32_t times, bool negate) {
    std::vector<jml::ConstantValue> out = {
        {0, bits(times)}, {1, bits(uint32_t{32})}, {2, bits(0.5f)}, {3, bits(negate)}};
    if (constant < 0) out.pop_back();                // one is missing
    if (constant > 3) out.push_back({constant, 1});  // one that is not in the text
    return out;
  };
  auto inner = device.compile("probe", values(2, false));
  if (inner.error) return *inner.error;
  auto outer = device.compile("probe", values(3, true));
  if (outer.error) return *outer.error;
  auto memory = device.scratch(count * 4 + 512);
  if (memory.error) return *memory.error;
  jml::Buffer in{0, x, count * 4}, half = memory.value, out{1, y, count * 4};
  half.data = static_cast<char*>(half.data) + 512;
  half.bytes = count * 4;
  const ProbeParams params{count};
  const jml::Params bound{2, &params, sizeof(params), {}};
  const jml::Size3 grid{uint32_t(count + 31) / 32}, group{32};
  half.index = 1;
  jml::Status bad = device.launch(*inner.value, grid, group, {in, half}, bound, nullptr);
  half.index = 0;
  if (!bad) bad = device.launch(*outer.value, grid, group, {half, out}, bound, nullptr);
  jml::Status worse = device.synchronize();
  return bad ? *bad : worse.value_or("");
}

}  // namespace

// "" or the error. `constant`: 0 for a good program; see run().
extern "C" __attribute__((visibility("default"))) const char* jml_metal_sim_probe(int32_t constant,
                                                                                  float* x,
                                                                                  float* y,
                                                                                  int32_t count) {
  static thread_local std::string text;
  text = run(constant, x, y, count);
  return text.c_str();
}
