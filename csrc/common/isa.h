// The instruction set that the CPU kernels use, chosen once when the first kernel asks.
#pragma once

namespace calm_rt {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best that this processor has, or what CALM_RT_CPU_ISA=portable|avx2|avx512 asks for if it is no better than that.
Isa isa();
const char* isa_name(Isa isa);

// Whether the library multiplies these types at least as fast as float. An Intel processor with AVX-512 BF16 and
// without AMX does not: 83 GFLOP/s a core where float has 130.
bool has_fast_bfloat16();
bool has_fast_half();

}  // namespace calm_rt
