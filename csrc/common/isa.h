// The instruction set that the CPU kernels use, chosen once when somebody asks first: in Python that is at the import.
#pragma once

namespace calm_rt {

// kAmx: the kernels of kAvx512, whose products of 8 bits are AMX's (kernels/cpu/amx.h).
enum class Isa { kPortable, kAvx2, kAvx512, kAmx };

// The best that this processor has, or what CALM_RT_CPU_ISA=portable|avx2|avx512|amx asks for if it is no better than
// that. Any other request changes nothing here; calm_rt/_native.py warns of it.
Isa isa();
const char* isa_name(Isa isa);

// Whether the library multiplies these types at least as fast as float. An Intel processor with AVX-512 BF16 and
// without AMX does not: 83 GFLOP/s a core where float has 130.
bool has_fast_bfloat16();
bool has_fast_half();

// Which products of floats kernels/product.h takes, not the library. Those of few rows with AVX2: on a Xeon a
// gated_mlp of one to four rows takes MKL 0.9 to 1.6 times as long, on a Zen 4 1.5 to 2.7. All of them on AMD's
// processors, where MKL chooses other instructions: on a Zen 4 it reaches 84 % of their rate, and its rounding depends
// on where a matrix lies in memory. CALM_RT_CPU_PRODUCTS=own|few|library overrules.
enum class Products { kLibrary, kFewRows, kOwn };
Products products();
const char* products_name(Products products);

}  // namespace calm_rt
