// Energy score on the GPU. A target y is made in registers, meets a tile of draws, distances and then their gradients,
// and is gone.
//
//   score term of a draw:  d^beta, d = |x_i - y|
//   its gradient for x_i:  weight (x_i - y), weight = scale beta d^(beta - 2)
//
// Targets 0 ... S - 1 are the row's own draws (scale 2 / (S (S - 1)), a draw and itself left out), the M draws from the
// posterior follow (scale -2 / (S M)). The latter also give -sum_i weight_i (x_i - y) to the gradient for the mean, and
// that times std eps to the one for log_std. Differences are direct, gradients stay in float registers until they are
// complete, every sum has one order.
//
// energy_score_warp_kernel: a warp owns a row, lane l holds elements 4 l ... 4 l + 3 of each 128. Inputs are read once,
// x twice, and outputs written once. At the official S = 8, M = 100, L = 128 instruction issue bounds it: on sm_90a it
// takes 465 instructions a target with the gradient for x alone, 230 of them for the normals.
//
// energy_score_block_kernel: a block owns a row of any length. Each warp sums the distances to one target at a time
// over all of L and leaves the weights in shared memory. Then each thread adds up the gradients of its four elements
// and makes every target again.
#include "kernels/cuda/random.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/energy_score.h"

namespace calm_rt {
namespace {

constexpr int kWarpElements = kWarpSize * kFour;  // of a row that a warp holds at four a lane
constexpr int kWarpKernelThreads = 128;
constexpr int kBlockKernelThreads = 256;
constexpr int kBlockKernelDraws = 8;
constexpr int kChunk = 256;              // targets whose weights shared memory holds at a time, 8 KB
constexpr int64_t kMaxBlocks = 1 << 12;  // several times what any device holds at once; further rows are strided over

// Constants of a launch, worked out on the host.
struct Scales {
  float beta;
  float own_draw, target_draw;     // of a gradient: 2 / (S (S - 1)), -2 / (S M)
  float num_pairs, num_distances;  // divisors of the sums: S (S - 1), S M
  bool packed;                     // rows can be read and written four elements at once
};

// What a distance adds to the sum of its kind, and the weight of its difference in the gradient.
struct Term {
  float power, weight;
};

__device__ __forceinline__ Term distance_term(float squared, float beta) {
  const float distance = sqrtf(squared);
  if (distance == 0) return {0, 0};
  if (beta == 1) return {distance, rsqrtf(squared)};
  const float slope = powf(distance, beta - 1);
  const float weight = beta * slope * rsqrtf(squared);
  // of a distance below 1e-20 where beta is small: the gradient stays finite
  return {isinf(distance) ? distance : slope * distance, weight > __FLT_MAX__ ? __FLT_MAX__ : weight};
}

// One thread's part of a row: four elements in each of GROUPS groups, group g being row group `group + 32 g`.
template <int GROUPS>
struct Target {
  Four y[GROUPS], eps[GROUPS];
};

template <class T, int DRAWS, int GROUPS>
struct Tile {
  Four x[DRAWS][GROUPS], grad_x[DRAWS][GROUPS];
  Four mean[GROUPS], std[GROUPS], grad_mean[GROUPS], grad_log_std[GROUPS];

  // Zeros stand for draws beyond S and for elements beyond L, where targets are zero too.
  __device__ __forceinline__ Tile(const EnergyScore<T>& p, int64_t row, int64_t draw, int64_t group, bool packed) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int64_t first = (group + g * kWarpSize) * kFour;
#pragma unroll
      for (int i = 0; i < DRAWS; ++i) {
        x[i][g] = grad_x[i][g] = {};
        if (draw + i < p.num_draws) {
          x[i][g] = load_four(p.x + ((draw + i) * p.num_rows + row) * p.size, first, p.size, packed);
        }
      }
      mean[g] = load_four(p.mean + row * p.size, first, p.size, packed);
      std[g] = load_four(p.log_std + row * p.size, first, p.size, packed);
      grad_mean[g] = grad_log_std[g] = {};
#pragma unroll
      for (int e = 0; e < kFour; ++e) std[g].value[e] = first + e < p.size ? expf(std[g].value[e]) : 0.0f;
    }
  }

  __device__ __forceinline__ Target<GROUPS> target(const EnergyScore<T>& p, int64_t row, int64_t row_id, uint64_t seed,
                                                   int64_t index, int64_t group, bool packed) const {
    Target<GROUPS> target{};
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int64_t row_group = group + g * kWarpSize;
      if (index < p.num_draws) {
        target.y[g] = load_four(p.x + (index * p.num_rows + row) * p.size, row_group * kFour, p.size, packed);
      } else {
        const uint32_t draw = static_cast<uint32_t>(index - p.num_draws);
        target.eps[g] =
            normal_four(philox(philox_counter(static_cast<uint32_t>(row_group), kTarget, draw, row_id), seed));
#pragma unroll
        for (int e = 0; e < kFour; ++e) {
          target.y[g].value[e] = mean[g].value[e] + std[g].value[e] * target.eps[g].value[e];
        }
      }
    }
    return target;
  }

  // squared[i] += this thread's part of |x_i - y|^2
  __device__ __forceinline__ void add_squares(const Target<GROUPS>& target, float (&squared)[DRAWS]) const {
#pragma unroll
    for (int i = 0; i < DRAWS; ++i) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int e = 0; e < kFour; ++e) {
          const float difference = x[i][g].value[e] - target.y[g].value[e];
          squared[i] += difference * difference;
        }
      }
    }
  }

  __device__ __forceinline__ void add_grad_x(const Target<GROUPS>& target, const float (&weight)[DRAWS]) {
#pragma unroll
    for (int i = 0; i < DRAWS; ++i) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int e = 0; e < kFour; ++e) {
          grad_x[i][g].value[e] += weight[i] * (x[i][g].value[e] - target.y[g].value[e]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_grad_target(const Target<GROUPS>& target, const float (&weight)[DRAWS]) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
      for (int e = 0; e < kFour; ++e) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < DRAWS; ++i) sum += weight[i] * (x[i][g].value[e] - target.y[g].value[e]);
        grad_mean[g].value[e] -= sum;
        grad_log_std[g].value[e] -= sum * target.eps[g].value[e];
      }
    }
  }

  // The target's gradients add up over the tiles of a row.
  __device__ __forceinline__ void store(const EnergyScore<T>& p, int64_t row, int64_t draw, int64_t group,
                                        bool packed) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int64_t first = (group + g * kWarpSize) * kFour;
#pragma unroll
      for (int i = 0; i < DRAWS; ++i) {
        if (p.grad_x != nullptr && draw + i < p.num_draws) {
          store_four(grad_x[i][g], p.grad_x + ((draw + i) * p.num_rows + row) * p.size, first, p.size, packed);
        }
      }
      if (p.grad_mean != nullptr) {
        float *out_mean = p.grad_mean + row * p.size, *out_log_std = p.grad_log_std + row * p.size;
        Four total_mean{}, total_log_std{};
        if (draw > 0) {
          total_mean = load_four(out_mean, first, p.size, packed);
          total_log_std = load_four(out_log_std, first, p.size, packed);
        }
#pragma unroll
        for (int e = 0; e < kFour; ++e) {
          total_mean.value[e] += grad_mean[g].value[e];
          total_log_std.value[e] += grad_log_std[g].value[e] * std[g].value[e];
        }
        store_four(total_mean, out_mean, first, p.size, packed);
        store_four(total_log_std, out_log_std, first, p.size, packed);
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void store_score(const EnergyScore<T>& p, const Scales& scales, int64_t row, float pairs,
                                            float distances) {
  const float diversity = pairs / scales.num_pairs, fidelity = distances / scales.num_distances;
  p.diversity[row] = diversity;
  p.fidelity[row] = fidelity;
  p.score[row] = diversity - 2 * fidelity;
}

// Blocks that the registers of a multiprocessor must hold. With one more ptxas spills, and so it does for tiles of
// 8 draws by 2 groups.
template <int DRAWS, int GROUPS>
constexpr int kWarpKernelBlocks = GROUPS == 2 ? 2 : (DRAWS == 8 ? 3 : 4);

template <class T, int DRAWS, int GROUPS>
__global__ void __launch_bounds__(kWarpKernelThreads, kWarpKernelBlocks<DRAWS, GROUPS>)
    energy_score_warp_kernel(EnergyScore<T> p, Scales scales) {
  constexpr int kRows = kWarpKernelThreads / kWarpSize;
  constexpr int kLanesPerDraw = kWarpSize / DRAWS;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int own = lane / kLanesPerDraw;  // the draw of the tile whose distances this lane looks after
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + warp; row < p.num_rows; row += stride) {
    const int64_t row_id = p.rows[row];
    CompensatedSum pairs, distances;
    for (int64_t draw = 0; draw < p.num_draws; draw += DRAWS) {
      Tile<T, DRAWS, GROUPS> tile(p, row, draw, lane, scales.packed);
      for (int64_t index = 0; index < p.num_draws + p.num_targets; ++index) {
        const bool is_own_draw = index < p.num_draws;
        const Target<GROUPS> target = tile.target(p, row, row_id, seed, index, lane, scales.packed);
        float squared[DRAWS] = {};
        tile.add_squares(target, squared);
        Term term = distance_term(warp_sum_many(squared), scales.beta);
        if (draw + own >= p.num_draws || draw + own == index) term = {0, 0};
        if (is_own_draw) {
          pairs.add(term.power);
        } else {
          distances.add(term.power);
        }
        term.weight *= is_own_draw ? scales.own_draw : scales.target_draw;
        float weight[DRAWS];
#pragma unroll
        for (int i = 0; i < DRAWS; ++i) weight[i] = __shfl_sync(kFullMask, term.weight, i * kLanesPerDraw);
        if (p.grad_x != nullptr) tile.add_grad_x(target, weight);
        if (p.grad_mean != nullptr && !is_own_draw) tile.add_grad_target(target, weight);
      }
      tile.store(p, row, draw, lane, scales.packed);
    }
    const bool speaks = lane % kLanesPerDraw == 0;  // for its draw
    const float all_pairs = warp_sum(speaks ? pairs.total() : 0);
    const float all_distances = warp_sum(speaks ? distances.total() : 0);
    if (lane == 0) store_score(p, scales, row, all_pairs, all_distances);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockKernelThreads) energy_score_block_kernel(EnergyScore<T> p, Scales scales) {
  constexpr int DRAWS = kBlockKernelDraws;
  constexpr int kWarps = kBlockKernelThreads / kWarpSize;
  constexpr int kLanesPerDraw = kWarpSize / DRAWS;
  CALM_SHARED(float, weights, (kChunk * DRAWS));  // [kChunk, DRAWS]
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int own = lane / kLanesPerDraw;
  const bool speaks = lane % kLanesPerDraw == 0;
  const bool any_grad = p.grad_x != nullptr || p.grad_mean != nullptr;
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const int64_t num_indices = p.num_draws + p.num_targets;
  const int64_t groups = (p.size + kFour - 1) / kFour;
  for (int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const int64_t row_id = p.rows[row];
    CompensatedSum pairs, distances;
    for (int64_t draw = 0; draw < p.num_draws; draw += DRAWS) {
      // A panel is what the block's threads hold of a row at four elements each. Weights that all fit in shared memory
      // are worked out in the first panel and serve the others.
      for (int64_t panel = 0; panel == 0 || (any_grad && panel < groups); panel += kBlockKernelThreads) {
        const int64_t group = panel + threadIdx.x;
        Tile<T, DRAWS, 1> tile(p, row, draw, group, scales.packed);
        for (int64_t chunk = 0; chunk < num_indices; chunk += kChunk) {
          const int64_t chunk_end = min(chunk + kChunk, num_indices);
          if (panel == 0 || num_indices > kChunk) {
            __syncthreads();  // the weights before these have been read
            for (int64_t index = chunk + warp; index < chunk_end; index += kWarps) {
              float squared[DRAWS] = {};
              for (int64_t slice = lane; slice < groups; slice += kWarpSize) {
                const Tile<T, DRAWS, 1> part(p, row, draw, slice, scales.packed);
                part.add_squares(part.target(p, row, row_id, seed, index, slice, scales.packed), squared);
              }
              const bool is_own_draw = index < p.num_draws;
              Term term = distance_term(warp_sum_many(squared), scales.beta);
              if (draw + own >= p.num_draws || draw + own == index) term = {0, 0};
              if (panel == 0 && is_own_draw) pairs.add(term.power);
              if (panel == 0 && !is_own_draw) distances.add(term.power);
              term.weight *= is_own_draw ? scales.own_draw : scales.target_draw;
              if (speaks) weights[(index - chunk) * DRAWS + own] = term.weight;
            }
            __syncthreads();
          }
          if (!any_grad) continue;
          for (int64_t index = chunk; index < chunk_end; ++index) {
            const Target<1> target = tile.target(p, row, row_id, seed, index, group, scales.packed);
            float weight[DRAWS];
#pragma unroll
            for (int i = 0; i < DRAWS; ++i) weight[i] = weights[(index - chunk) * DRAWS + i];
            tile.add_grad_x(target, weight);
            if (index >= p.num_draws) tile.add_grad_target(target, weight);
          }
        }
        tile.store(p, row, draw, group, scales.packed);
      }
    }
    const float all_pairs = block_sum<kBlockKernelThreads>(speaks ? pairs.total() : 0);
    const float all_distances = block_sum<kBlockKernelThreads>(speaks ? distances.total() : 0);
    if (threadIdx.x == 0) store_score(p, scales, row, all_pairs, all_distances);
  }
}

template <class T, int DRAWS, int GROUPS>
void launch_warp_kernel(Cuda device, const EnergyScore<T>& p, const Scales& scales) {
  launch_kernel("energy_score_warp_kernel", energy_score_warp_kernel<T, DRAWS, GROUPS>,
                grid_size(p.num_rows, kWarpKernelThreads / kWarpSize, kMaxBlocks), kWarpKernelThreads, device, p,
                scales);
}

}  // namespace

// The path depends on S and L alone, so a row's result depends on nothing else in the batch.
template <class T>
void launch(Cuda device, const EnergyScore<T>& p) {
  if (p.num_rows == 0) return;
  const double draws = static_cast<double>(p.num_draws), targets = static_cast<double>(p.num_targets);
  const Scales scales{.beta = static_cast<float>(p.beta),
                      .own_draw = static_cast<float>(2 / (draws * (draws - 1))),
                      .target_draw = static_cast<float>(-2 / (draws * targets)),
                      .num_pairs = static_cast<float>(draws * (draws - 1)),
                      .num_distances = static_cast<float>(draws * targets),
                      .packed = is_packed(p.x, p.size) && is_packed(p.mean, p.size) && is_packed(p.log_std, p.size) &&
                                is_packed(p.grad_x, p.size) && is_packed(p.grad_mean, p.size) &&
                                is_packed(p.grad_log_std, p.size)};
  if (p.size <= kWarpElements) {
    if (p.num_draws <= 4) return launch_warp_kernel<T, 4, 1>(device, p, scales);
    return launch_warp_kernel<T, 8, 1>(device, p, scales);
  }
  if (p.size <= 2 * kWarpElements) return launch_warp_kernel<T, 4, 2>(device, p, scales);
  launch_kernel("energy_score_block_kernel", energy_score_block_kernel<T>, grid_size(p.num_rows, 1, kMaxBlocks),
                kBlockKernelThreads, device, p, scales);
}

template void launch(Cuda, const EnergyScore<float>&);
template void launch(Cuda, const EnergyScore<bfloat16>&);
template void launch(Cuda, const EnergyScore<half>&);

}  // namespace calm_rt
