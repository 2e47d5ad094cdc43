// What every op's handler says about its problem in the same way: dtypes, the flat JSON a plan
// takes and the wording of errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "csrc/caps.h"
#include "csrc/ffi_common.h"
#include "csrc/host/svd.h"
#include "csrc/json.h"
#include "csrc/plan.h"

namespace jml {

struct DTypeRow {
  const char* name;
  host::DType dtype;
  ffi::DataType element, real;
  int64_t bytes;        // of one element
  bool wide;            // more work an element than float32: its own crossovers to LAPACK
  const char* storage;  // in kernels/*.metal

  // Kernels for it are rows apart, for GPUs that have 64-bit floating point (Caps::float64).
  bool is_double() const { return real == ffi::DataType::F64; }

  // In the names of kernels: f16, bf16, c64.
  std::string tag() const {
    return std::string(name, name[0] == 'b' ? 2 : 1) + std::to_string(8 * bytes);
  }
};
inline constexpr DTypeRow kDTypes[] = {
    {"float16", host::DType::kF16, ffi::DataType::F16, ffi::DataType::F16, 2, false, "half"},
    {"bfloat16", host::DType::kBF16, ffi::DataType::BF16, ffi::DataType::BF16, 2, false, "bfloat"},
    {"float32", host::DType::kF32, ffi::DataType::F32, ffi::DataType::F32, 4, false, "float"},
    {"float64", host::DType::kF64, ffi::DataType::F64, ffi::DataType::F64, 8, true, "double"},
    {"complex64", host::DType::kC64, ffi::DataType::C64, ffi::DataType::F32, 8, true, "float2"},
    {"complex128", host::DType::kC128, ffi::DataType::C128, ffi::DataType::F64, 16, true,
     "double2"},
};

// The row of a table by its name, or null.
template <class Row, size_t N>
const Row* row_named(const Row (&rows)[N], const std::string& name) {
  for (const Row& r : rows) {
    if (name == r.name) return &r;
  }
  return nullptr;
}
inline const DTypeRow* dtype_row(const std::string& name) { return row_named(kDTypes, name); }

// Lists of names in messages: "a, b, c", each once.
inline void add_name(std::string* names, const std::string& name) {
  if ((", " + *names + ",").find(", " + name + ",") != std::string::npos) return;
  *names += (names->empty() ? "" : ", ") + name;
}
template <class Row, size_t N>
std::string names_of(const Row (&rows)[N]) {
  std::string names;
  for (const Row& r : rows) add_name(&names, r.name);
  return names;
}

inline constexpr const char* kDTypeNames =
    "dtype float16, bfloat16, float32, float64, complex64 or complex128";
// Those that kernels of every op and on every GPU take.
inline constexpr const char* kKernelDTypeNames = "dtype float16, bfloat16, float32 or complex64";

inline std::string wrong(const std::string& op, const char* argument, const std::string& expected,
                         const std::string& got) {
  return op + ": argument " + argument + ": expected " + expected + ", got " + got;
}

// The same of what no kernel of a device does.
inline std::string not_on_device(const std::string& op, const Caps& caps, const char* argument,
                                 const std::string& expected, const std::string& got) {
  return wrong(op, argument, expected + " on the GPU kernels (limits of " + caps.name + ")", got) +
         ". Use device host, xla or auto";
}

// A key of a problem and where its value goes.
struct Field {
  const char* key;
  std::variant<int64_t*, double*, bool*, std::string*> to;
  int64_t low = 0;  // of an integer
  bool optional = false;
};

// Empty on success, else the error. Every key must be known and of its type; none may be missing.
inline std::string read_fields(const std::string& op, const FlatJson& json,
                               const std::vector<Field>& fields) {
  for (const Field& f : fields) {
    const JsonValue* v = json.find(f.key);
    if (v == nullptr && f.optional) continue;
    if (v == nullptr) return op + ": config: key " + f.key + " is missing";
    const double* d = std::get_if<double>(v);
    if (auto* to = std::get_if<int64_t*>(&f.to)) {
      if (d == nullptr || *d < double(f.low) || *d > 1e15 || *d != std::floor(*d)) {
        return wrong(op, f.key, "an integer of at least " + std::to_string(f.low),
                     d == nullptr ? "another type" : std::to_string(*d));
      }
      **to = int64_t(*d);
    } else if (auto* to = std::get_if<double*>(&f.to)) {
      if (d == nullptr) return wrong(op, f.key, "a number", "another type");
      **to = *d;
    } else if (auto* to = std::get_if<bool*>(&f.to)) {
      const bool* b = std::get_if<bool>(v);
      if (b == nullptr) return wrong(op, f.key, "true or false", "another type");
      **to = *b;
    } else {
      const std::string* s = std::get_if<std::string>(v);
      if (s == nullptr) return wrong(op, f.key, "a string", "another type");
      *std::get<std::string*>(f.to) = *s;
    }
  }
  for (const auto& [key, value] : json.values()) {
    auto is_key = [&key = key](const Field& f) { return key == f.key; };
    if (std::none_of(fields.begin(), fields.end(), is_key)) {
      return op + ": config: unknown key " + key;
    }
  }
  return "";
}

// The keys of a problem for another device than the host. Those that plan in pieces for the
// watchdog's sake are `cut`.
inline std::vector<Field> device_fields(MatrixProblem* out, bool cut) {
  std::vector<Field> fields = {{"caps", &out->caps},
                               {"sim_checked", &out->sim_checked, 0, true},
                               {"sim_shuffle", &out->sim_shuffle, 0, true},
                               {"sim_seed", &out->sim_seed, 0, true}};
  if (cut) fields.push_back({"max_submission_work", &out->max_submission_work, 0, true});
  fields.push_back({"planted_bytes", &out->planted_bytes, 0, true});
  return fields;
}

// Reads the text of a problem: `fields`, then those of its device. Empty on success, else the
// error.
inline std::string read_problem(const std::string& op, const std::string& text,
                                std::vector<Field> fields, const std::vector<Field>& host,
                                const std::vector<Field>& elsewhere) {
  FlatJson json;
  std::string error;
  if (!json.parse(text, &error)) return op + ": config: " + error;
  const JsonValue* device = json.find("device");
  const bool on_host = device == nullptr || *device == JsonValue("host");
  const std::vector<Field>& more = on_host ? host : elsewhere;
  fields.insert(fields.end(), more.begin(), more.end());
  return read_fields(op, json, fields);
}

// Empty where the problem's device has limits, else the error.
inline std::string check_caps(const std::string& op, const MatrixProblem& p) {
  if (p.device == "host" || find_caps(p.caps) != nullptr) return "";
  return wrong(op, "caps", "one of " + caps_names(), p.caps);
}

}  // namespace jml
