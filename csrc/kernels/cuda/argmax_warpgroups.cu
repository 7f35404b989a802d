// Bounds of groups by the warpgroups and the copy engine of sm_90a; argmax_groups.cu has the search and the kernel for
// other devices, whose bounds are not the same bits but lead to the same ids.
//
// A block is as long as the launch and takes tiles of 128 rows by 256 entries in turn. One thread only copies: boxes
// of 64 columns of both operands into a ring of kStages in shared memory, as soon as a stage is free, across the tiles'
// ends too, so that the ring fills up while the others turn sums into bounds. Two warpgroups multiply, each 64 of the
// rows with all entries, one slice of columns always under way while they wait for the next. Blocks that run at the
// same time have the same entries and other rows, so a weight comes from memory once and from L2 after that.
//
// A stage has two barriers: `full` counts the bytes of its boxes, `read` the warps whose products no longer need them.
#include "kernels/cuda/bounds.cuh"
#include "kernels/cuda/primitives_bulk.cuh"

namespace calm_rt {
namespace {

constexpr int kStages = 4;  // 192 KB of the 227 that a block may have
constexpr int kMultipliers = 2;
constexpr int kTileRows = kMultipliers * kProductRows, kTileEntries = kProductColumns;
constexpr int kWarps = kMultipliers * kWarpgroup / kWarpSize;  // that multiply
constexpr int kThreads = (kMultipliers + 1) * kWarpgroup;
constexpr int kRegisters = 240, kCopierRegisters = 24;  // of a thread; all threads get 168 at first
constexpr int kRowElements = kTileRows * kBoxColumns, kEntryElements = kTileEntries * kBoxColumns;  // of a stage
constexpr int kStageElements = kRowElements + kEntryElements;
constexpr int kStageBytes = kStageElements * static_cast<int>(sizeof(bfloat16));
constexpr size_t kSharedBytes = kStages * kStageBytes + kBoxAlignment;
constexpr int kTileGroups = kTileEntries / kGroup;

// A stage of the ring, and the parity of the phases of its barriers.
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__global__ void __launch_bounds__(kThreads, 1)
    bound_groups_wgmma_kernel(const __grid_constant__ BoxMap hidden, const __grid_constant__ BoxMap weight,
                              BoundGroups p, float factor, int num_entry_tiles) {
  if constexpr (kHasBulk) {
    CALM_DYNAMIC_SHARED(shared);
    CALM_SHARED(uint64_t, full, kStages);
    CALM_SHARED(uint64_t, read, kStages);
    bfloat16* ring = reinterpret_cast<bfloat16*>(shared + (-shared_address(shared) & (kBoxAlignment - 1)));
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int slices = static_cast<int>((p.size + kBoxColumns - 1) / kBoxColumns);
    const int num_row_tiles = static_cast<int>((p.wanted.of(p.num_rows) + kTileRows - 1) / kTileRows);
    const int num_tiles = num_row_tiles * num_entry_tiles;
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(&full[stage], 1);
        barrier_init(&read[stage], kWarps);
      }
    }
    __syncthreads();

    if (warp >= kWarps) {
      give_registers<kCopierRegisters>();
      if (warp > kWarps || lane != 0) return;
      Place place;
      for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        for (int slice = 0; slice < slices; ++slice, place.advance()) {
          bfloat16* rows = ring + place.stage * kStageElements;
          barrier_wait(&read[place.stage], place.parity ^ 1);  // at first nobody has anything to read
          barrier_arrive_expecting(&full[place.stage], kStageBytes);
          copy_box(rows, hidden, tile % num_row_tiles * kTileRows, slice * kBoxColumns, &full[place.stage]);
          copy_box(rows + kRowElements, weight, tile / num_row_tiles * kTileEntries, slice * kBoxColumns,
                   &full[place.stage]);
        }
      }
    } else {
      take_registers<kRegisters>();
      const int warpgroup = warp / 4;
      float sum[kProductSums] = {};
      Place place;
      for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        int last = 0;  // stage of the slice before
        for (int slice = 0; slice < slices; ++slice, place.advance()) {
          const bfloat16* rows = ring + place.stage * kStageElements + warpgroup * kProductRows * kBoxColumns;
          const bfloat16* entries = ring + place.stage * kStageElements + kRowElements;
          barrier_wait(&full[place.stage], place.parity);
          products_begin();
#pragma unroll
          for (int k = 0; k < kBoxColumns / kProductInner; ++k) {
            begin_product(sum, box_slice(rows, k), box_slice(entries, k), slice > 0 || k > 0);
          }
          products_close();
          products_read<1>();
          if (slice > 0 && lane == 0) barrier_arrive(&read[last]);
          last = place.stage;
        }
        products_done(sum);
        if (lane == 0) barrier_arrive(&read[last]);

        const int64_t first_row = static_cast<int64_t>(tile % num_row_tiles) * kTileRows + warp * 16 + lane / 4;
        const int64_t first_entry = static_cast<int64_t>(tile / num_row_tiles) * kTileEntries;
#pragma unroll
        for (int group = 0; group < kTileGroups; ++group) {
          if (first_entry + group * kGroup >= p.block) break;
          const GroupEntries part = load_entries(p, first_entry + group * kGroup, lane);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            store_bounds(p, part, first_row + half * 8, factor, lane,
                         [&](int j, int e) { return sum[(group * kGroupPairs + j) * 4 + half * 2 + e]; });
          }
        }
      }
    }
  }
}

}  // namespace

bool launch_warpgroups(Cuda device, const BoundGroups& p) {
  const Chip chip = current_chip();
  const int64_t row_tiles = (p.num_rows + kTileRows - 1) / kTileRows;
  const int64_t entry_tiles = (p.block + kTileEntries - 1) / kTileEntries, tiles = row_tiles * entry_tiles;
  BoxMap hidden, weight;
  constexpr int64_t kMost = INT32_MAX - kTileEntries;  // what the copy engine counts with
  const bool possible = chip.capability == 90 && has_bulk_code(bound_groups_wgmma_kernel) && p.num_rows <= kMost &&
                        p.block <= kMost && tiles <= kMost - chip.multiprocessors &&
                        make_box_map(p.hidden, p.num_rows, p.size, kTileRows, hidden) &&
                        make_box_map(p.weight, p.block, p.size, kTileEntries, weight);
  if (possible) {
    launch_shared_kernel("bound_groups_wgmma_kernel", bound_groups_wgmma_kernel,
                         grid_size(tiles, 1, chip.multiprocessors), kThreads, kSharedBytes, device, hidden, weight, p,
                         p.factor(), static_cast<int>(entry_tiles));
  }
  return possible;
}

}  // namespace calm_rt
