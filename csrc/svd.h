// What plans of other operations take from svd's.
#pragma once

#include <cstdint>

#include "csrc/plan.h"

namespace jml {

// Of float32 matrices n x n, for an operation that has one left: operand a, results u, s, vh,
// status, sweeps and off_norm. The row is that of method "auto".
DevicePlan plan_square_svd(int64_t batch, int64_t n, int64_t max_sweeps, const Caps& caps);

}  // namespace jml
