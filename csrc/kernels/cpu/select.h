// What a launch needs on the CPU: the kernel of the instruction set in use, and rows spread over torch's threads.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/isa.h"

// The function of this name that the processor can run; only in the portable copy of a source.
#ifdef __x86_64__
#define CALM_SELECT(...)                                                            \
  (::calm_rt::isa() == ::calm_rt::Isa::kAvx512                                      \
       ? &::calm_rt::avx512::__VA_ARGS__                                            \
       : (::calm_rt::isa() == ::calm_rt::Isa::kAvx2 ? &::calm_rt::avx2::__VA_ARGS__ \
                                                    : &::calm_rt::portable::__VA_ARGS__))
#else
#define CALM_SELECT(...) (&::calm_rt::portable::__VA_ARGS__)
#endif

namespace calm_rt {
namespace {

// Runs body(begin, end) over [0, count).
template <class Body>
void parallel_rows(Cpu device, int64_t count, int64_t grain, const Body& body) {
  if (count == 0) return;
  device.parallel_for(
      count, grain,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); }, &body);
}

}  // namespace
}  // namespace calm_rt
