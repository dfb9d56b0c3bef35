#pragma once

namespace freedave::cpu {

// The instruction sets that SIMD kernels are compiled for, slowest first.
enum class Isa { kBaseline, kAvx2, kAvx512 };
inline constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

const char* name(Isa isa);

// Compiled into this binary, and supported by this CPU and its operating system.
bool is_compiled(Isa isa);
bool is_usable(Isa isa);

bool is_intel();

// The one that kernels run: the best usable one, or the one that FREEDAVE_CPU_ISA=avx512|avx2|baseline names. Throws
// std::runtime_error when that one is unknown or unusable here.
Isa chosen_isa();

}  // namespace freedave::cpu
