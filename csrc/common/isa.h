// The instruction set that the CPU kernels use, chosen once when the first kernel asks.
#pragma once

namespace calm_rt {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best that this processor has, or what CALM_RT_CPU_ISA=portable|avx2|avx512 asks for if it is no better than that.
Isa isa();
const char* isa_name(Isa isa);

// Whether bfloat16 products are instructions here, so that the library multiplies bfloat16 faster than float.
bool has_bfloat16_products();

}  // namespace calm_rt
