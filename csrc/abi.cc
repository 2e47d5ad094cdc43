// The C ABI that jaxmetal_linalg/_native.py opens with ctypes. Only these symbols are exported.
#include <cstdlib>
#include <cstring>
#include <string>

#include "csrc/caps.h"
#include "csrc/cuda_blas.h"
#include "csrc/cuda_compile.h"
#include "csrc/cuda_library.h"
#include "csrc/device_cuda.h"
#include "csrc/device_metal.h"
#include "csrc/ffi_common.h"
#include "csrc/isa.h"
#include "csrc/json.h"
#include "csrc/plan.h"
#include "csrc/registry.h"

#define JML_EXPORT extern "C" __attribute__((visibility("default")))

namespace jml {

std::vector<Op>& ops() {
  static std::vector<Op> table;
  return table;
}

const char* dtype_name(ffi::DataType t) {
  switch (t) {
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F64:
      return "float64";
    case ffi::DataType::C64:
      return "complex64";
    case ffi::DataType::C128:
      return "complex128";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::S64:
      return "int64";
    default:
      return "another dtype";
  }
}

namespace {

const Op* find_target(const char* target, const char* platform) {
  for (const Op& op : ops()) {
    if (std::strcmp(op.target, target) == 0 && std::strcmp(op.platform, platform) == 0) return &op;
  }
  return nullptr;
}

std::string describe() {
  std::string compiled, targets, problem;
  for (Isa isa : compiled_isas()) {
    compiled += (compiled.empty() ? "" : ", ") + json_quote(isa_name(isa));
  }
  const Isa active = active_isa(&problem);
  for (const Op& op : ops()) {
    JsonWriter t;
    t.field("op", op.name)
        .field("name", op.target)
        .field("platform", op.platform)
        .raw("stages", "[\"instantiate\", \"execute\"]")
        .field("state_type", op.state_type == nullptr ? "" : op.state_type);
    targets += (targets.empty() ? "" : ", ") + t.text();
  }
  std::string devices;
  for (const std::string& d : device_names()) {
    devices += (devices.empty() ? "" : ", ") + json_quote(d);
  }
  JsonWriter isa;
  isa.field("active", isa_name(active)).raw("compiled", "[" + compiled + "]");
  if (!problem.empty()) isa.field("problem", problem);
  JsonWriter w;
  w.field("abi", 4)
      .field("version", JML_VERSION)
      .raw("ffi_api",
           "[" + std::to_string(XLA_FFI_API_MAJOR) + ", " + std::to_string(XLA_FFI_API_MINOR) + "]")
      .field("compiler", __VERSION__)
      .raw("isa", isa.text())
      .raw("devices", "[" + devices + "]")
      .raw("caps", caps_json())
      .raw("targets", "[" + targets + "]");
  return w.text();
}

}  // namespace
}  // namespace jml

JML_EXPORT const char* jml_describe(void) {
  static const std::string text = jml::describe();
  return text.c_str();
}

JML_EXPORT void* jml_handler(const char* target, const char* platform, const char* stage) {
  const jml::Op* op = jml::find_target(target, platform);
  if (op == nullptr) return nullptr;
  if (std::strcmp(stage, "instantiate") == 0) return reinterpret_cast<void*>(op->instantiate);
  if (std::strcmp(stage, "execute") == 0) return reinterpret_cast<void*>(op->execute);
  return nullptr;
}

JML_EXPORT void* jml_type_id(const char* target, const char* platform) {
  const jml::Op* op = jml::find_target(target, platform);
  return op == nullptr ? nullptr : op->type_id;
}

JML_EXPORT void* jml_type_info(const char* target, const char* platform) {
  const jml::Op* op = jml::find_target(target, platform);
  return op == nullptr ? nullptr : const_cast<XLA_FFI_TypeInfo*>(op->type_info);
}

static char* copied(const std::string& text) {
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy != nullptr) std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

// The texts of these are the caller's, to be given to jml_free.
JML_EXPORT char* jml_launches(void) { return copied(jml::launches_json()); }

JML_EXPORT char* jml_plan(const char* op_name, const char* problem_json) {
  std::string text;
  for (const jml::Op& op : jml::ops()) {
    if (std::strcmp(op.name, op_name) == 0) text = op.plan(problem_json);
  }
  if (text.empty()) {
    text = jml::JsonWriter().field("error", std::string("no op named ") + op_name).text();
  }
  return copied(text);
}

// See cuda_json(); opens the driver.
JML_EXPORT char* jml_cuda(void) { return copied(jml::cuda_json()); }

// See metal_json(); looks for the GPU.
JML_EXPORT char* jml_metal(void) { return copied(jml::metal_json()); }

// Where a library of the CUDA toolkit is, by its stem as in "nvrtc"; opens nothing.
JML_EXPORT void jml_cuda_library(const char* stem, const char* path) {
  jml::use_cuda_library(stem, path);
}

// Opens cuBLAS. Its version, or why there is none.
JML_EXPORT char* jml_cublas(void) {
  const auto version = jml::cublas_version();
  return copied(jml::JsonWriter()
                    .field("version", version.value)
                    .field("problem", version.error.value_or(""))
                    .text());
}

// Compiles one kernel without a GPU. The cubin's size and where it came from, or an error.
JML_EXPORT char* jml_cuda_compile(const char* kernel, const char* arch) {
  const auto built = jml::cuda_compile(kernel, arch, {});
  jml::JsonWriter w;
  if (built.error) return copied(w.field("error", *built.error).text());
  w.field("bytes", int64_t(built.value.bytes.size())).field("origin", built.value.origin);
  return copied(w.text());
}

JML_EXPORT void jml_free(char* text) { std::free(text); }
