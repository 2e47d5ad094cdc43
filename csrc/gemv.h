// What a gemv call asks for: read by the plan of the host (csrc/gemv.cc) and by that of a device.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/plan.h"

namespace jml {

// activation(alpha op(a) x + beta y + bias) + residual, for `nrhs` vectors x of each matrix.
//
// Operands of the custom call, in this order: a [batch, m, n] in a_dtype, x [batch, nrhs, depth]
// in x_dtype; then y, bias and residual, each only if its flag is set, [batch, nrhs, outputs] in
// out_dtype like the result. All dense and row-major.
struct GemvProblem : MatrixProblem {  // m x n is a as it is stored
  int64_t nrhs = 1;
  bool transpose = false, conjugate = false;  // op(a): N, T, C and the conjugate alone
  std::string a_dtype, x_dtype, out_dtype;
  double alpha_re = 1, alpha_im = 0, beta_re = 0, beta_im = 0;
  bool y = false, bias = false, residual = false;
  std::string activation = "none";  // a name of kActivations
  // Tuning of the host: jaxmetal_linalg/hardware_params.json, host.gemv.
  int64_t threads = 0;            // 0: as many as XLA's pool has
  int64_t serial_bytes = 0;       // matrices of a call that one thread reads alone
  int64_t xla_min_nrhs = 0;       // from so many vectors a matrix on, XLA's matmul does the work
  int64_t xla_min_nrhs_half = 0;  // the same where a is float16 or bfloat16

  int64_t outputs() const { return transpose ? n : m; }
  int64_t depth() const { return transpose ? m : n; }  // terms of each sum
  Sizes sizes() const { return {batch, nrhs}; }
  void resize(Sizes sizes) {
    batch = sizes[0];
    nrhs = sizes[1];
  }
};

inline constexpr const char* kActivations[] = {"none", "relu", "gelu",   "gelu_tanh",
                                               "silu", "tanh", "sigmoid"};

// Pure: which kernels with which launch sizes on a device with these limits.
DevicePlan plan_gemv_device(const GemvProblem& p, const Caps& caps);

}  // namespace jml
