// Exact argmax on the GPU: the rounding of operands, and the scan of a block of rounded scores.
//
// round_rows_kernel: a warp owns a row, a lane eight consecutive elements of each 256. Inputs are read once, outputs
// written once.
//
// scan_scores_kernel: a block owns a row and takes 8192 of its scores at a time, 32 a thread, all loads of a thread
// under way at once; the norms, the same for all rows, come from L1. A row ends here if its largest bound does not
// reach the best exact score, as most do after the first blocks of a vocabulary. Otherwise the warp that holds the
// largest bound computes that entry exactly, and then each warp those of its entries that can still win. What an
// entry's exact score is does not depend on who computes it, and the order among scores is total, so neither does the
// result.
#include <limits>

#include "kernels/cuda/winner.cuh"
#include "kernels/linear_argmax.h"

namespace calm_rt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVectors = 4;                           // of eight scores, that a thread looks after
constexpr int kPanel = kThreads * kVectors * kEight;  // entries that a block takes at a time
constexpr int64_t kMaxBlocks = 1 << 12;               // of rounding; further rows are strided over
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T, class S>
__global__ void __launch_bounds__(kThreads) round_rows_kernel(RoundRows<T, S> p, bool packed) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const float excess = 1 + static_cast<float>(p.size + kEight) * 1e-7f;  // more than the sum and the root may lose
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < p.num_rows; row += stride) {
    float sum = 0;
    bool any = false;
    for (int64_t first = lane * kEight; first < p.size; first += kWarpSize * kEight) {
      const Run<kEight> run = load_run<kEight>(p.in + row * p.size, first, p.size, packed);
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        sum += run.value[e] * run.value[e];
        any |= run.value[e] != 0;
      }
      if (p.out != nullptr) store_run(run, p.out + row * p.size, first, p.size, packed);
    }
    sum = warp_sum(sum);
    any = __ballot_sync(kFullMask, any) != 0;
    if (lane == 0) p.norm[row] = any ? sqrtf(sum) * excess + kNormRoom : 0;
  }
}

using Words = Pack<uint32_t, kEight / 2>;  // eight scores

// A panel of a row: up to kPanel entries. A thread looks after eight consecutive ones in each of kVectors vectors.
template <bool PACKED>
struct Panel {
  const bfloat16* scores;
  const float* norms;
  int length;
  float factor;      // of the row
  int64_t first_id;  // of the panel

  // Which entry thread `thread` holds as its `index`-th of 32.
  __device__ __forceinline__ static int entry(int index, int thread) {
    return (index / kEight * kThreads + thread) * kEight + index % kEight;
  }
  __device__ __forceinline__ static int first_entry(int v) { return entry(v * kEight, threadIdx.x); }

  __device__ __forceinline__ Words load(int v) const {
    const int first = first_entry(v);
    Words words{};
    if constexpr (PACKED) {
      if (first < length) words = load_pack<kEight / 2>(reinterpret_cast<const uint32_t*>(scores + first));
    } else {
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        if (first + e < length) words.value[e / 2] |= static_cast<uint32_t>(scores[first + e].bits) << e % 2 * 16;
      }
    }
    return words;
  }

  __device__ __forceinline__ bool holds(int v, int e) const { return first_entry(v) + (PACKED ? 0 : e) < length; }

  // The largest exact scores that the rounded ones of a vector can stand for. Always the same operations, so that a
  // bound is found again.
  __device__ __forceinline__ Run<kEight> bounds(int v, const Words& words) const {
    const Run<kEight> norm = load_run<kEight>(norms, first_entry(v), length, PACKED), score = widen_pairs(words);
    Run<kEight> bound;
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      bound.value[e] = fmaf(ScanScores<float, bfloat16>::kRelative, fabsf(score.value[e]),
                            fmaf(factor, norm.value[e], score.value[e]));
    }
    return bound;
  }

  // The largest bound of the thread.
  __device__ __forceinline__ float largest() const {
    Words words[kVectors];  // all on their way at once
#pragma unroll
    for (int v = 0; v < kVectors; ++v) words[v] = load(v);
    float largest = -kInfinity;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Run<kEight> bound = bounds(v, words[v]);
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        if (holds(v, e)) largest = max_nan(largest, bound.value[e]);
      }
    }
    return largest;
  }

  // A bit for each of the thread's 32 whose bound and id `wanted` accepts. Few threads come here: they read their part
  // again, which costs less than registers to keep it in.
  template <class Wanted>
  __device__ __forceinline__ uint32_t select(const Wanted& wanted) const {
    uint32_t selected = 0;
#pragma unroll 1
    for (int v = 0; v < kVectors; ++v) {
      const Run<kEight> bound = bounds(v, load(v));
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        if (holds(v, e) && wanted(bound.value[e], first_id + first_entry(v) + e)) selected |= 1u << (v * kEight + e);
      }
    }
    return selected;
  }
};

constexpr int kScanBlocks = 3;  // that the registers of a multiprocessor must hold; with one more ptxas spills

template <class T, class S, bool PACKED>
__global__ void __launch_bounds__(kThreads, kScanBlocks) scan_scores_kernel(ScanScores<T, S> p, float factor) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t row = blockIdx.x;
  if (!p.wanted.has(row)) return;
  Winner winner{p.best[row], p.id[row]};
  for (int64_t first = 0; first < p.block; first += kPanel) {
    const Panel<PACKED> panel{.scores = p.scores + row * p.block + first,
                              .norms = p.weight_norm + first,
                              .length = static_cast<int>(min(p.block - first, static_cast<int64_t>(kPanel))),
                              .factor = factor * p.hidden_norm[row],
                              .first_id = p.first_id + first};
    const float largest = panel.largest(), top = block_max<kThreads>(largest);
    if (!winner.may_lose_to(top, panel.first_id)) continue;
    auto is_top = [&](float bound) { return bound == top || (isnan(bound) && isnan(top)); };
    // First one entry with the largest bound, then what can still win after it.
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const bool only_top = pass == 0;
      const bool looks = only_top ? is_top(largest) : winner.may_lose_to(largest, panel.first_id);
      uint32_t selected = 0;
      if (looks) {
        selected = panel.select([&](float bound, int64_t id) {
          return only_top ? is_top(bound) : id != winner.id && winner.may_lose_to(bound, id);
        });
      }
      for (uint32_t lanes; (lanes = __ballot_sync(kFullMask, selected != 0)) != 0;) {
        const int source = __ffs(lanes) - 1;
        const int index = __ffs(__shfl_sync(kFullMask, selected, source)) - 1;
        const int64_t entry = first + panel.entry(index, warp * kWarpSize + source);
        const Winner candidate{
            exact_product(p.hidden + row * p.size, p.weight + entry * p.size, static_cast<int>(p.size)),
            p.first_id + entry};
        if (candidate.before(winner)) winner = candidate;
        if (only_top) break;
        if (lane == source) selected &= selected - 1;
      }
      winner = block_winner<kThreads>(winner);
    }
  }
  if (threadIdx.x == 0) {
    p.best[row] = winner.score;
    p.id[row] = winner.id;
  }
}

}  // namespace

template <class T, class S>
void launch(Cuda device, const RoundRows<T, S>& p) {
  if (p.num_rows == 0) return;
  launch_kernel("round_rows_kernel", round_rows_kernel<T, S>, grid_size(p.num_rows, kWarps, kMaxBlocks), kThreads,
                device, p, is_packed<kEight>(p.in, p.size) && is_packed<kEight>(p.out, p.size));
}

template <class T, class S>
void launch(Cuda device, const ScanScores<T, S>& p) {
  if (p.num_rows == 0) return;
  const bool packed = is_packed<kEight>(p.scores, p.block) && is_packed<kEight>(p.weight_norm, p.block);
  launch_kernel("scan_scores_kernel", packed ? scan_scores_kernel<T, S, true> : scan_scores_kernel<T, S, false>,
                static_cast<unsigned>(p.num_rows), kThreads, device, p, p.factor());
}

#define CALM_INSTANTIATE(T)                                  \
  template void launch(Cuda, const RoundRows<T, bfloat16>&); \
  template void launch(Cuda, const ScanScores<T, bfloat16>&);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE

}  // namespace calm_rt
