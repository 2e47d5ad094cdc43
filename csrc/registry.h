// The one table of custom-call targets. Each op's .cc adds its row with JML_REGISTER_OP, so a new
// op edits no list; csrc/abi.cc reads the table.
#pragma once

#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jml {

struct Op {
  const char* name;        // "svd": the stem
  const char* target;      // "jml_svd_v1"
  const char* platform;    // as jax.ffi takes it: "cpu", "CUDA"
  const char* state_type;  // name under which XLA knows the instantiated plan; null: no state
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* execute;
  XLA_FFI_TypeId* type_id;
  const XLA_FFI_TypeInfo* type_info;
  // Pure: problem (flat JSON) to plan (JSON), or to {"error": ...}.
  std::string (*plan)(const std::string& problem_json);
};

std::vector<Op>& ops();
struct RegisterOp {
  explicit RegisterOp(const Op& op) { ops().push_back(op); }
};

}  // namespace jml
