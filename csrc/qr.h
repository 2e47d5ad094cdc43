// What a qr call asks for: read by the plan of the host (csrc/qr.cc) and by that of a device.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/plan.h"

namespace jml {

// a [batch, m, n] -> q [batch, m, kq] unless mode is r, r [batch, kq, n]; dense and row-major.
struct QrProblem : MatrixProblem {
  std::string dtype, mode = "reduced", method = "auto";
  // Tuning of the host: jaxmetal_linalg/hardware_params.json, host.qr.
  int64_t threads = 0;  // 0: as many as the processor has
  int64_t interleaved_max_n = 0, interleaved_max_kib = 0, interleaved_even = 0;
  int64_t interleaved_single_max = 0;
  int64_t cholesky_min_n = 0, cholesky_max_n = 0, cholesky_aspect = 1;
  int64_t tsqr_max_n = 0, tsqr_min_blocks = 0;
  int64_t gram_min_m = 0, blocked_min_n = 0, blocked_max_n = 0;  // gram_min_m = 0: never

  int64_t kq() const { return mode == "complete" ? m : k(); }
  bool want_q() const { return mode != "r"; }
};

// Pure: which kernels with which launch sizes on a device with these limits.
DevicePlan plan_qr_device(const QrProblem& p, const Caps& caps);

}  // namespace jml
