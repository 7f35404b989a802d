// The instruction set that the CPU kernels use, chosen once when somebody asks first: in Python that is at the import.
#pragma once

namespace calm_rt {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best that this processor has, or what CALM_RT_CPU_ISA=portable|avx2|avx512 asks for if it is no better than that.
// Any other request changes nothing here; calm_rt/_native.py warns of it.
Isa isa();
const char* isa_name(Isa isa);

// Whether bfloat16 products are instructions here, so that the library multiplies bfloat16 faster than float.
bool has_bfloat16_products();

}  // namespace calm_rt
