#include "csrc/isa.h"

#include <cstdlib>

namespace jml {
namespace {

struct Level {
  Isa isa;
  const char* name;
  bool compiled;
};
constexpr Level kLevels[] = {
#ifdef JML_HAVE_baseline
    {Isa::kBaseline, "baseline", true},
#endif
#ifdef JML_HAVE_avx2
    {Isa::kAvx2, "avx2", true},
#endif
#ifdef JML_HAVE_avx512
    {Isa::kAvx512, "avx512", true},
#endif
};

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:  // what -march=x86-64-v3 may emit
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    case Isa::kAvx512:  // x86-64-v4
      return processor_has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

struct Choice {
  Isa isa = Isa::kBaseline;
  std::string problem;
};

Choice choose() {
  Choice c;
  for (const Level& l : kLevels) {
    if (processor_has(l.isa)) c.isa = l.isa;
  }
  const char* wanted = std::getenv("JAXMETAL_ISA");
  if (wanted == nullptr || *wanted == '\0') return c;
  std::string names;
  for (const Level& l : kLevels) {
    if (!processor_has(l.isa)) continue;
    if (std::string(wanted) == l.name) {
      c.isa = l.isa;
      return c;
    }
    names += (names.empty() ? "" : ", ") + std::string(l.name);
  }
  c.problem = "JAXMETAL_ISA: expected one of " + names + ", got " + wanted;
  return c;
}

}  // namespace

const char* isa_name(Isa isa) {
  for (const Level& l : kLevels) {
    if (l.isa == isa) return l.name;
  }
  return "?";
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> r;
  for (const Level& l : kLevels) r.push_back(l.isa);
  return r;
}

Isa active_isa(std::string* problem) {
  static const Choice choice = choose();
  if (problem != nullptr) *problem = choice.problem;
  return choice.isa;
}

}  // namespace jml
