// Function constants, which no kernel of this package has and the Metal device serves all the same:
// y = x * times + plus, negated or not.
#include <metal_stdlib>
using namespace metal;

constant int kTimes [[function_constant(0)]];
constant uint kThreads [[function_constant(1)]];
constant float kPlus [[function_constant(2)]];
constant bool kNegate [[function_constant(3)]];

struct ProbeParams {
  int count;
};

[[kernel]] void probe(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                      constant ProbeParams& p [[buffer(2)]],
                      uint g [[threadgroup_position_in_grid]],
                      uint t [[thread_index_in_threadgroup]]) {
  const int i = int(g * kThreads + t);
  if (i < p.count) {
    const float z = x[i] * float(kTimes) + kPlus;
    y[i] = kNegate ? -z : z;
  }
}
