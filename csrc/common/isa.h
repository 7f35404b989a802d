// The instruction set that the CPU kernels use, chosen once when somebody asks first: in Python that is at the import.
#pragma once

namespace calm_rt {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best that this processor has, or what CALM_RT_CPU_ISA=portable|avx2|avx512 asks for if it is no better than that.
// Any other request changes nothing here; calm_rt/_native.py warns of it.
Isa isa();
const char* isa_name(Isa isa);

// Whether the library multiplies these types at least as fast as float. An Intel processor with AVX-512 BF16 and
// without AMX does not: 83 GFLOP/s a core where float has 130.
bool has_fast_bfloat16();
bool has_fast_half();

// Whether kernels/product.h multiplies floats, not the library: MKL, torch's on x86, chooses other instructions on
// AMD's processors. On a Zen 4 it reaches 84 % of their rate and products of one to four rows take it 1.5 to 2.7 times
// as long; and its rounding depends there on where a matrix lies in memory. CALM_RT_CPU_PRODUCTS=own|library overrules.
bool own_products();

}  // namespace calm_rt
