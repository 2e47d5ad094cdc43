// What a qr call asks for: read by the plan of the host (csrc/qr.cc) and by that of a device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "csrc/plan.h"

namespace jml {

// a [batch, m, n] -> q [batch, m, kq] unless mode is r, r [batch, kq, n]; dense and row-major.
struct QrProblem {
  int64_t batch = 1, m = 0, n = 0;
  std::string dtype, mode = "reduced", method = "auto", variant;
  std::string device = "host";
  // Of other devices than the host: whose limits, and how the simulator runs.
  std::string caps;
  bool sim_checked = true, sim_shuffle = false;
  int64_t sim_seed = 0;
  int64_t planted_bytes = 0;  // a bug for the tests: so much threadgroup memory is left out
  // Tuning of the host: jaxmetal_linalg/hardware_params.json, host.qr.
  int64_t threads = 0;  // 0: as many as the processor has
  int64_t interleaved_max_n = 0, interleaved_max_kib = 0, interleaved_even = 0;
  int64_t interleaved_single_max = 0;
  int64_t tsqr_max_n = 0, tsqr_min_blocks = 0;

  int64_t k() const { return std::min(m, n); }
  int64_t kq() const { return mode == "complete" ? m : k(); }
  bool want_q() const { return mode != "r"; }
  std::string size() const { return std::to_string(m) + "x" + std::to_string(n); }
};

// Pure: which kernels with which launch sizes on a device with these limits.
DevicePlan plan_qr_device(const QrProblem& p, const Caps& caps);

}  // namespace jml
