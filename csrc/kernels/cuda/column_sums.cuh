// Sums of columns over many lines, each in an order that depends on shapes alone.
//
// Blocks share out the columns and, where those are few, ranges of lines (LineShares). A thread owns eight columns and
// every so-manieth line of its block's range; what the threads of a column have is added in the order of their lines.
// Several ranges leave rows of sums, which sum_rows_kernel adds.
#pragma once
#include "kernels/cuda/sum_rows.cuh"
#include "kernels/sample_latents.h"

namespace calm_rt {
namespace {

constexpr int kSumThreads = LineShares::kThreads;
constexpr int kSumBlocks = 4;  // of a multiprocessor at once: says that 64 registers may be spent on reading ahead

// What a thread of a sum over lines has to do.
struct SumShare {
  int64_t num_ranges, range, first_line, last_line;  // the block's lines
  int64_t first_column, columns;                     // the block's, and all of them
  int width;                                         // threads beside each other

  __device__ __forceinline__ SumShare(const LineShares& shares, int64_t num_lines, int64_t num_columns)
      : num_ranges(shares.num_ranges), columns(num_columns), width(static_cast<int>(shares.block_columns / kEight)) {
    range = blockIdx.x / shares.tiles;
    first_line = range * num_lines / num_ranges;
    last_line = (range + 1) * num_lines / num_ranges;
    first_column = blockIdx.x % shares.tiles * shares.block_columns;
  }

  // The thread's first of eight columns, which may lie beyond all of them.
  __device__ __forceinline__ int64_t own_column() const {
    return first_column + static_cast<int>(threadIdx.x) % width * kEight;
  }

  // Calls add(load(line)) for the thread's lines, TOGETHER of which are under way at once.
  template <int TOGETHER, class Load, class Add>
  __device__ __forceinline__ void each_line(const Load& load, const Add& add) const {
    if (own_column() >= columns) return;
    const int step = kSumThreads / width;
    int64_t line = first_line + static_cast<int>(threadIdx.x) / width;
    for (; line + (TOGETHER - 1) * step < last_line; line += TOGETHER * step) {
      decltype(load(line)) terms[TOGETHER];
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) terms[i] = load(line + i * step);
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) add(terms[i]);
    }
    for (; line < last_line; line += step) add(load(line));
  }

  // The sums of the block's columns, of which sum[which] are the thread's own: to out, or to the range's row of
  // partial [ranges, COUNT, columns] where there are several.
  template <int COUNT, class Out>
  __device__ __forceinline__ void store(const float (&sum)[COUNT][kEight], Out* const (&out)[COUNT],
                                        float* partial) const {
    // a word between every 32 keeps what a warp writes at once in different banks
    constexpr int kPlaces = kSumThreads * kEight, kPadded = kPlaces + kPlaces / kWarpSize;
    auto place = [](int which, int i) { return which * kPadded + i + i / kWarpSize; };
    constexpr int kSums = COUNT * kPadded;
    CALM_SHARED(float, sums, kSums);
#pragma unroll
    for (int which = 0; which < COUNT; ++which) {
#pragma unroll
      for (int e = 0; e < kEight; ++e) sums[place(which, static_cast<int>(threadIdx.x) * kEight + e)] = sum[which][e];
    }
    __syncthreads();
    const int block_columns = width * kEight;
    for (int i = static_cast<int>(threadIdx.x); i < block_columns && first_column + i < columns; i += kSumThreads) {
#pragma unroll
      for (int which = 0; which < COUNT; ++which) {
        float total = 0;
        for (int other = i; other < kPlaces; other += block_columns) total += sums[place(which, other)];
        if (num_ranges == 1) {
          narrow(total, out[which][first_column + i]);
        } else {
          partial[(range * COUNT + which) * columns + first_column + i] = total;
        }
      }
    }
  }
};

template <class T, bool PACKED>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks) column_sums_kernel(ColumnSums<T> p, LineShares shares) {
  const SumShare share(shares, p.num_lines, p.columns);
  float sum[1][kEight] = {};
  share.each_line<sizeof(T) == 2 ? 4 : 2>(  // 64 bytes
      [&](int64_t line) { return load_run<kEight>(p.x + line * p.columns, share.own_column(), p.columns, PACKED); },
      [&](const Run<kEight>& run) {
#pragma unroll
        for (int e = 0; e < kEight; ++e) sum[0][e] += run.value[e];
      });
  share.store(sum, {p.out}, p.partial);
}

}  // namespace
}  // namespace calm_rt
