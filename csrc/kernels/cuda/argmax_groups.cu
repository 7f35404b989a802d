// Exact argmax on the GPU without scores in memory: tensor cores from sm_80 on. Where there are more than 64
// rows and the device has warpgroups' products, argmax_warpgroups.cu makes the bounds.
//
// bound_groups_kernel: a block has 64 BAND rows and two of its warps 64 rows, each warp 64 entries of a tile of 128; it
// takes kBlockTiles tiles of entries one after the other. Slices of 32 columns of both operands stream through a ring
// of kStages in shared memory by asynchronous copies, across the tiles' ends too, so that the ring is full while the
// warps turn sums into bounds. Neighbouring blocks have the same entries and other rows, so a weight comes from memory
// once and from L2 after that.
//
// In shared memory a row's slice is 64 bytes, four packs, and pack c of row r lies at place c ^ (r / 2 % 4): eight rows
// that a matrix load reads at once then lie in different banks, and so do the eight packs that a copy writes.
//
// A group's entries are the 64 of a warp. A lane has 16 of them for each of eight rows (bounds.cuh).
//
// search_groups_kernel: a block owns a row and reads its bounds. It computes the entry with the largest bound exactly,
// then the others that can still win, and all of a group whose next bound can. Most rows are done after two or three.
#include "kernels/cuda/bounds.cuh"
#include "kernels/cuda/winner.cuh"
#include "kernels/linear_argmax.h"

namespace calm_rt {
namespace {

constexpr int kSlice = 32;                // columns of a stage
constexpr int kPacks = kSlice / kEight;   // of a row's slice
constexpr int kStages = 4;                // 96 KB with 256 rows, which every device from sm_80 on has
constexpr int kTile = 128;                // entries
constexpr int kBand = 64;                 // rows of a warp
constexpr int kBlockTiles = 2;            // few, so that a block of the vocabulary fills the device; not yet tuned
constexpr int kRowMatrices = kBand / 16;  // sums of a warp: 4 by 8 tiles of 16 by 8
constexpr int kEntryMatrices = kGroupPairs;

// Where pack `pack` of row `row` lies in a slice.
__device__ __forceinline__ bfloat16* place(bfloat16* slice, int row, int pack) {
  return slice + (row * kPacks + (pack ^ (row / 2 % kPacks))) * kEight;
}

// Begins to copy columns first ... first + 31 of COUNT rows of a [length, size] matrix; zeros beyond its edges.
template <int COUNT, int THREADS>
__device__ __forceinline__ void copy_slice(bfloat16* slice, const bfloat16* matrix, int64_t first_row, int64_t length,
                                           int64_t size, int64_t first) {
#pragma unroll
  for (int i = 0; i < COUNT * kPacks / THREADS; ++i) {
    const int row = (i * THREADS + threadIdx.x) / kPacks, pack = threadIdx.x % kPacks;
    const int64_t column = first + pack * kEight;
    const bool wanted = first_row + row < length && column < size;
    copy_async(place(slice, row, pack), wanted ? matrix + (first_row + row) * size + column : matrix, wanted);
  }
}

template <int BANDS>
constexpr int kStageElements = (BANDS * kBand + kTile) * kSlice;

template <int BANDS>
__global__ void __launch_bounds__(BANDS * 2 * kWarpSize, 1)
    bound_groups_kernel(BoundGroups p, float factor, int num_row_blocks) {
  constexpr int kThreads = BANDS * 2 * kWarpSize;
  CALM_DYNAMIC_SHARED(shared);
  bfloat16* ring = reinterpret_cast<bfloat16*>(shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int band = warp / 2 * kBand, half = warp % 2 * kGroup;  // the warp's rows and entries
  const int64_t first_row = static_cast<int64_t>(blockIdx.x % num_row_blocks) * BANDS * kBand;
  if (!p.wanted.has(first_row)) return;
  const int64_t first_tile = static_cast<int64_t>(blockIdx.x / num_row_blocks) * kBlockTiles;
  const int64_t num_tiles = min((p.block + kTile - 1) / kTile - first_tile, static_cast<int64_t>(kBlockTiles));
  const int slices = static_cast<int>((p.size + kSlice - 1) / kSlice), steps = static_cast<int>(num_tiles) * slices;

  int64_t next_entry = first_tile * kTile, next_column = 0;  // of the step that is copied next
  auto copy_step = [&](int step) {
    if (step < steps) {
      bfloat16* stage = ring + step % kStages * kStageElements<BANDS>;
      copy_slice<BANDS * kBand, kThreads>(stage, p.hidden, first_row, p.num_rows, p.size, next_column);
      copy_slice<kTile, kThreads>(stage + BANDS * kBand * kSlice, p.weight, next_entry, p.block, p.size, next_column);
      next_column += kSlice;
      if (next_column >= p.size) next_column = 0, next_entry += kTile;
    }
    close_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);

  float sum[kRowMatrices][kEntryMatrices][4] = {};
  int64_t first_entry = first_tile * kTile + half;
  int slice = 0;
  for (int step = 0; step < steps; ++step) {
    copies_done<kStages - 2>();
    __syncthreads();  // this step's copies are there, the last stage has been read
    copy_step(step + kStages - 1);
    bfloat16* rows = ring + step % kStages * kStageElements<BANDS>;
    bfloat16* entries = rows + BANDS * kBand * kSlice;
#pragma unroll
    for (int pack = 0; pack < kPacks; pack += 2) {
      uint32_t a[kRowMatrices][4], b[kEntryMatrices / 2][4];
#pragma unroll
      for (int i = 0; i < kRowMatrices; ++i) {
        load_matrices(a[i], place(rows, band + i * 16 + lane % 16, pack + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kEntryMatrices / 2; ++j) {
        load_matrices(b[j], place(entries, half + j * 16 + lane % 16, pack + lane / 16));
      }
#pragma unroll
      for (int i = 0; i < kRowMatrices; ++i) {
#pragma unroll
        for (int j = 0; j < kEntryMatrices; ++j) multiply_add(sum[i][j], a[i], b[j / 2][j % 2], b[j / 2][j % 2 + 2]);
      }
    }
    if (++slice != slices) continue;

    slice = 0;
    if (first_entry < p.block) {
      const GroupEntries group = load_entries(p, first_entry, lane);
#pragma unroll
      for (int i = 0; i < kRowMatrices * 2; ++i) {
        store_bounds(p, group, first_row + band + i * 8 + lane / 4, factor, lane,
                     [&](int j, int e) { return sum[i / 2][j][i % 2 * 2 + e]; });
      }
    }
    first_entry += kTile;
    memset(sum, 0, sizeof sum);
  }
}

constexpr int kSearchThreads = 128;
constexpr int kSearchBlocks = 4;                // whose registers fit; with five, sm_90a's spill
constexpr int kHeld = 4;                        // groups of a thread
constexpr int kPanel = kSearchThreads * kHeld;  // groups that a block takes at a time
constexpr int kAtOnce = 4;                      // entries of a group that half a warp computes together

template <class T>
__global__ void __launch_bounds__(kSearchThreads, kSearchBlocks) search_groups_kernel(SearchGroups<T> p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = blockIdx.x, groups = num_groups(p.block);
  if (!p.wanted.has(row)) return;
  const T* hidden = p.hidden + row * p.size;
  const int size = static_cast<int>(p.size);
  Winner winner{p.best[row], p.id[row]};

  auto try_entry = [&](int64_t entry) {  // by the whole warp
    const Winner candidate{exact_product(hidden, p.weight + entry * p.size, size), p.first_id + entry};
    if (candidate.before(winner)) winner = candidate;
  };
  auto try_group = [&](int64_t first) {  // by the whole warp, all entries of the group that begins here
    const int count = static_cast<int>(min(p.block - first, static_cast<int64_t>(kGroup)));
    if (count < kAtOnce) {
      for (int e = 0; e < count; ++e) try_entry(first + e);
      return;
    }
    for (int e = 0; e < count; e += 2 * kAtOnce) {
      // where fewer are left the last ones are computed again
      const int64_t entry = first + min(e + lane / kSums * kAtOnce, count - kAtOnce);
      double score[kAtOnce];
      exact_products(hidden, p.weight + entry * p.size, size, score);
      Winner candidate{0, -1};
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const Winner one{score[c], p.first_id + entry + c};
        if (one.before(candidate)) candidate = one;
      }
      const Winner other{__shfl_xor_sync(kFullMask, candidate.score, kSums),
                         __shfl_xor_sync(kFullMask, candidate.id, kSums)};
      if (other.before(candidate)) candidate = other;
      if (candidate.before(winner)) winner = candidate;
    }
  };

  for (int64_t first = 0; first < groups; first += kPanel) {
    auto bound_of = [&](int h) {  // of the thread's h-th group in this panel
      const int64_t group = first + h * kSearchThreads + threadIdx.x;
      if (group >= groups) return Pack<float, 2>{-kInfinity, -kInfinity};
      return load_pack<2>(&p.bounds[row * groups + group].largest);
    };
    float own = -kInfinity;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) own = max_nan(own, bound_of(h).value[0]);
    const float top = block_max<kSearchThreads>(own);
    if (!winner.may_lose_to(without_entry(top), p.first_id + first * kGroup)) continue;
    // First one entry with the largest bound, if that is known, then what can still win after it. Bounds are read
    // again, which costs less than registers to keep them in.
#pragma unroll 1
    for (int look = 0; look < 2 * kHeld; ++look) {
      const bool only_top = look < kHeld;
      if (look == kHeld) winner = block_winner<kSearchThreads>(winner);
      const Pack<float, 2> bound = bound_of(look % kHeld);
      const float largest = bound.value[0], next = bound.value[1];
      const int64_t group = first + look % kHeld * kSearchThreads + threadIdx.x, first_entry = group * kGroup;
      const int64_t top_entry = first_entry + (bits_of(largest) & kEntryBits);
      bool wants_entry = false, wants_group = false;
      if (only_top) {
        wants_entry = group < groups && largest == top;
      } else if (group < groups) {
        wants_group = isnan(largest) || winner.may_lose_to(without_entry(next), p.first_id + first_entry);
        wants_entry = !wants_group && p.first_id + top_entry != winner.id &&
                      winner.may_lose_to(without_entry(largest), p.first_id + top_entry);
      }
      const uint32_t whole = __ballot_sync(kFullMask, wants_group);
      for (uint32_t lanes = whole | __ballot_sync(kFullMask, wants_entry); lanes != 0; lanes &= lanes - 1) {
        const int source = __ffs(static_cast<int>(lanes)) - 1;
        const int64_t entry = __shfl_sync(kFullMask, wants_group ? first_entry : top_entry, source);
        if (whole >> source & 1) {
          try_group(entry);
        } else {
          try_entry(entry);
          if (only_top) break;
        }
      }
    }
    winner = block_winner<kSearchThreads>(winner);
  }
  if (threadIdx.x == 0) {
    p.best[row] = winner.score;
    p.id[row] = winner.id;
  }
}

template <int BANDS>
void launch_bands(Cuda device, const BoundGroups& p) {
  const int64_t row_blocks = (p.num_rows + BANDS * kBand - 1) / (BANDS * kBand);
  const int64_t tiles = (p.block + kTile - 1) / kTile, blocks = row_blocks * ((tiles + kBlockTiles - 1) / kBlockTiles);
  launch_shared_kernel("bound_groups_kernel", bound_groups_kernel<BANDS>, static_cast<unsigned>(blocks),
                       BANDS * 2 * kWarpSize, kStages * kStageElements<BANDS> * sizeof(bfloat16), device, p, p.factor(),
                       static_cast<int>(row_blocks));
}

}  // namespace

// A block of 256 rows reads the least; for fewer rows smaller ones leave fewer sums unused.
void launch(Cuda device, const BoundGroups& p) {
  if (p.num_rows == 0 || p.block == 0) return;
  if (p.num_rows <= kBand) return launch_bands<1>(device, p);
  if (launch_warpgroups(device, p)) return;
  if (p.num_rows <= 2 * kBand) return launch_bands<2>(device, p);
  launch_bands<4>(device, p);
}

template <class T>
void launch(Cuda device, const SearchGroups<T>& p) {
  if (p.num_rows == 0 || p.block == 0) return;
  launch_kernel("search_groups_kernel", search_groups_kernel<T>, static_cast<unsigned>(p.num_rows), kSearchThreads,
                device, p);
}

template void launch(Cuda, const SearchGroups<float>&);
template void launch(Cuda, const SearchGroups<bfloat16>&);
template void launch(Cuda, const SearchGroups<half>&);

}  // namespace calm_rt
