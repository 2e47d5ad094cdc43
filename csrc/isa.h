// Instruction-set levels the host kernels are compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

namespace jml {

enum class Isa { kBaseline, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
// Levels in this build, lowest first.
std::vector<Isa> compiled_isas();
// The best compiled level the processor has, capped by JAXMETAL_ISA; fixed at the first call.
// `problem` is non-empty when JAXMETAL_ISA names no usable level (the best one is used then).
Isa active_isa(std::string* problem = nullptr);

}  // namespace jml
