#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace freedave::cpu {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      return "baseline";
  }
  return "unknown";
}

bool is_compiled(Isa isa) { return isa == Isa::kBaseline || FREEDAVE_X86; }

namespace {

bool cpu_supports(Isa isa) {
#if FREEDAVE_X86
  // These ask the CPU and whether the operating system saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa best_isa() {
  Isa best = Isa::kBaseline;
  for (Isa isa : kIsas) {
    if (is_usable(isa)) best = isa;
  }
  return best;
}

}  // namespace

bool is_usable(Isa isa) { return is_compiled(isa) && cpu_supports(isa); }

bool is_intel() {
#if FREEDAVE_X86
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel") != 0);
  return intel;
#else
  return false;
#endif
}

Isa chosen_isa() {
  static const Isa best = best_isa();
  const char* wanted = std::getenv("FREEDAVE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  std::string usable;
  for (Isa isa : kIsas) {
    if (!is_usable(isa)) continue;
    if (std::string(wanted) == name(isa)) return isa;
    usable += (usable.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::runtime_error("FREEDAVE_CPU_ISA=" + std::string(wanted) +
                           " cannot run on this machine; usable: " + usable);
}

}  // namespace freedave::cpu
