#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace calm_rt {

#ifdef __x86_64__
// Whether tiles can be used: a process asks Linux for the memory that holds them while it waits.
static bool has_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

static Isa detect() {
  Isa best = Isa::kPortable;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
      best = has_tiles() ? Isa::kAmx : Isa::kAvx512;
    }
  }
#endif
  if (const char* wanted = std::getenv("CALM_RT_CPU_ISA")) {
    if (std::strcmp(wanted, "portable") == 0) best = Isa::kPortable;
    if (std::strcmp(wanted, "avx2") == 0 && best > Isa::kAvx2) best = Isa::kAvx2;
    if (std::strcmp(wanted, "avx512") == 0 && best > Isa::kAvx512) best = Isa::kAvx512;
  }
  return best;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

bool has_fast_bfloat16() {
#ifdef __x86_64__
  return __builtin_cpu_supports("amx-bf16") || (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"));
#else
  return false;
#endif
}

bool has_fast_half() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512fp16");
#else
  return false;
#endif
}

static Products choose_products() {
  if (const char* wanted = std::getenv("CALM_RT_CPU_PRODUCTS")) {
    for (Products one : {Products::kLibrary, Products::kFewRows, Products::kOwn}) {
      if (std::strcmp(wanted, products_name(one)) == 0) return one;
    }
  }
#ifdef __x86_64__
  if (isa() != Isa::kPortable) return __builtin_cpu_is("amd") ? Products::kOwn : Products::kFewRows;
#endif
  return Products::kLibrary;
}

Products products() {
  static const Products chosen = choose_products();
  return chosen;
}

const char* products_name(Products products) {
  switch (products) {
    case Products::kOwn:
      return "own";
    case Products::kFewRows:
      return "few";
    default:
      return "library";
  }
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace calm_rt
