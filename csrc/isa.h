// Instruction-set levels the host kernels are compiled for, and the one in use.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

namespace jml {

enum class Isa { kBaseline, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
// Levels in this build, lowest first.
std::vector<Isa> compiled_isas();
// The best compiled level the processor has, capped by JAXMETAL_ISA; fixed at the first call.
// `problem` is non-empty when JAXMETAL_ISA names no usable level (the best one is used then).
Isa active_isa(std::string* problem = nullptr);

// The table of host kernels of the level in use, JML_HOST_KERNELS(svd) for svd's.
#define JML_HOST_KERNELS(op)                                         \
  ::jml::active_kernels(::jml::host::op##_kernels_baseline,          \
                        JML_IF_AVX2(::jml::host::op##_kernels_avx2), \
                        JML_IF_AVX512(::jml::host::op##_kernels_avx512))
// Levels that are not in this build have no function to link.
#ifdef JML_HAVE_avx2
#define JML_IF_AVX2(f) f
#else
#define JML_IF_AVX2(f) nullptr
#endif
#ifdef JML_HAVE_avx512
#define JML_IF_AVX512(f) f
#else
#define JML_IF_AVX512(f) nullptr
#endif
template <class Table>
const Table& active_kernels(const Table* (*baseline)(),
                            std::type_identity_t<const Table* (*)()> avx2,
                            std::type_identity_t<const Table* (*)()> avx512) {
  const Isa isa = active_isa();
  return *(isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : baseline)();
}

}  // namespace jml
