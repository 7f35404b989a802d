// What a launch needs on the CPU: the kernel of the instruction set in use, and rows spread over torch's threads.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/isa.h"

// The function of this name that the processor can run; only in the portable copy of a source.
#ifdef __x86_64__
#define CALM_SELECT(...)                                                            \
  (::calm_rt::isa() >= ::calm_rt::Isa::kAvx512                                      \
       ? &::calm_rt::avx512::__VA_ARGS__                                            \
       : (::calm_rt::isa() == ::calm_rt::Isa::kAvx2 ? &::calm_rt::avx2::__VA_ARGS__ \
                                                    : &::calm_rt::portable::__VA_ARGS__))
#else
#define CALM_SELECT(...) (&::calm_rt::portable::__VA_ARGS__)
#endif

namespace calm_rt {
namespace {

// Blocks of [0, count), which threads take one after another: one that others disturb, or of a slower kind, takes fewer
// and does not keep the rest waiting.
struct Blocks {
  int64_t count, size, next;

  Blocks(int64_t count, int64_t grain) : count(count), size(grain), next(0) {
    constexpr int64_t kMost = 64, kUnit = 64;  // long blocks end where cache lines and vectors do
    const int64_t even = (count + kMost - 1) / kMost;
    if (even > grain) size = even < kUnit ? even : (even + kUnit - 1) / kUnit * kUnit;
  }

  bool take(int64_t& begin, int64_t& end) {
    begin = __atomic_fetch_add(&next, size, __ATOMIC_RELAXED);
    end = begin + size < count ? begin + size : count;
    return begin < count;
  }
};

// Calls work(blocks) on as many threads as there are blocks of at least `grain` for; each takes blocks until none is
// left.
template <class Work>
void parallel_blocks(Cpu device, int64_t count, int64_t grain, const Work& work) {
  if (count == 0) return;
  struct Context {
    const Work& work;
    Blocks blocks;
  } context{work, Blocks(count, grain)};
  const auto run = [](const void* context, int64_t, int64_t) {
    auto* shared = static_cast<Context*>(const_cast<void*>(context));
    shared->work(shared->blocks);
  };
  device.parallel_for((count + context.blocks.size - 1) / context.blocks.size, 1, run, &context);
}

// Runs body(begin, end) over [0, count).
template <class Body>
void parallel_rows(Cpu device, int64_t count, int64_t grain, const Body& body) {
  parallel_blocks(device, count, grain, [&](Blocks& blocks) {
    for (int64_t begin, end; blocks.take(begin, end);) body(begin, end);
  });
}

}  // namespace
}  // namespace calm_rt
