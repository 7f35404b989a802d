// The instructions that only sm_90a has, for the device and for the simulator: copies of whole boxes by the copy
// engine, barriers that count their bytes, and products by the four warps of a warpgroup, which begin at a multiple of
// four.
#pragma once
#ifdef __CUDACC__
#include <cuda.h>  // of the driver: types alone, its function comes through the runtime
#else
#include "simulator/bulk.h"
#endif

#include "kernels/cuda/primitives.cuh"

namespace calm_rt {

constexpr int kBoxColumns = 64;            // 128 bytes of a row
constexpr int kBoxAlignment = 1024;        // of a box in shared memory
constexpr int kWarpgroup = 4 * kWarpSize;  // threads
constexpr int kProductRows = 64;           // of a warpgroup's product
constexpr int kProductColumns = 256;       // of it
constexpr int kProductInner = 16;          // columns of both operands
constexpr int kProductSums = 128;          // of a thread

#ifdef __CUDACC__

// Whether the device code that is being compiled may use what follows.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasBulk = true;
#else
constexpr bool kHasBulk = false;
#endif

// Whether the code that runs on the current device is one for sm_90a: an empty kernel, which a build for others has,
// takes fewer registers than a product's sums.
template <class... Parameters>
bool has_bulk_code(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.numRegs > kProductSums;
  cudaGetLastError();  // nothing has failed: there is another way
  return false;
}

// A [num_rows, size] matrix of bfloat16 in memory, of which boxes of 64 columns are copied.
using BoxMap = CUtensorMap;

// Whether the driver could make a map of boxes of `box_rows` rows.
inline bool make_box_map(const bfloat16* matrix, int64_t num_rows, int64_t size, int box_rows, BoxMap& map) {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned kSince = 12000;  // the version whose signature this is
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, kSince, cudaEnableDefault, &found) !=
          cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();  // nothing has failed: there is another way
    return false;
  }
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(size), static_cast<cuuint64_t>(num_rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(size) * sizeof(bfloat16)};
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
             &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bfloat16*>(matrix), sizes, stride, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- barriers ----

// A phase ends when `count` threads have arrived and all expected bytes have come. One thread initialises, then the
// block meets.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // for the copy engine
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended. The first is 0; of a new barrier that of parity 1 has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
}

// ---- copies of boxes ----

// Begins to copy a box, zeros beyond the matrix, to a place aligned to 1024 bytes; the barrier gets its bytes, all of
// them. Row r will lie at 128 r, its pack c at place c ^ (r % 8).
__device__ __forceinline__ void copy_box(void* shared, const BoxMap& map, int64_t row, int64_t column,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(static_cast<int>(column)), "r"(static_cast<int>(row))
      : "memory");
}

// ---- registers ----

// From here on the calling warpgroup's threads have this many, what others have given or what they need no longer.
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- products of a warpgroup ----

// Sixteen columns of a box, from column 16 * sixteen on, of the rows from `box` on.
__device__ __forceinline__ uint64_t box_slice(const void* box, int sixteen) {
  const uint64_t start = (shared_address(box) & 0x3FFFF) >> 4;  // in units of 16 bytes, as are the strides
  constexpr uint64_t kLeading = 1, kEightRows = 64, kSwizzle128 = 1;
  return (start + 2 * sixteen) | kLeading << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// Keeps the compiler from using sums before products that are on their way.
__device__ __forceinline__ void touch(float (&sum)[kProductSums]) {
#pragma unroll
  for (int i = 0; i < kProductSums; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Between other uses of the sums and the products that follow.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// What the warpgroup has begun since the last call is a group.
__device__ __forceinline__ void products_close() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but for the last OPEN: only then may their boxes be overwritten.
template <int OPEN>
__device__ __forceinline__ void products_read() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OPEN) : "memory");
}

// Waits for all of them: only then may their sums be used.
__device__ __forceinline__ void products_done(float (&sum)[kProductSums]) {
  products_read<0>();
  touch(sum);
}

// Begins sum (+)= a b by the 128 threads of a warpgroup, a a slice of 64 rows, b of 256: a warp has 16 rows, and of
// each tile of 8 columns what multiply_add has.
__device__ __forceinline__ void begin_product(float (&sum)[kProductSums], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
      "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "
      "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, "
      "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "
      "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "
      "}, %128, %129, p, 1, 1, 0, 0;\n}"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]), "+f"(sum[7]),
        "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]),
        "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]), "+f"(sum[21]),
        "+f"(sum[22]), "+f"(sum[23]), "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]), "+f"(sum[28]),
        "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31]), "+f"(sum[32]), "+f"(sum[33]), "+f"(sum[34]), "+f"(sum[35]),
        "+f"(sum[36]), "+f"(sum[37]), "+f"(sum[38]), "+f"(sum[39]), "+f"(sum[40]), "+f"(sum[41]), "+f"(sum[42]),
        "+f"(sum[43]), "+f"(sum[44]), "+f"(sum[45]), "+f"(sum[46]), "+f"(sum[47]), "+f"(sum[48]), "+f"(sum[49]),
        "+f"(sum[50]), "+f"(sum[51]), "+f"(sum[52]), "+f"(sum[53]), "+f"(sum[54]), "+f"(sum[55]), "+f"(sum[56]),
        "+f"(sum[57]), "+f"(sum[58]), "+f"(sum[59]), "+f"(sum[60]), "+f"(sum[61]), "+f"(sum[62]), "+f"(sum[63]),
        "+f"(sum[64]), "+f"(sum[65]), "+f"(sum[66]), "+f"(sum[67]), "+f"(sum[68]), "+f"(sum[69]), "+f"(sum[70]),
        "+f"(sum[71]), "+f"(sum[72]), "+f"(sum[73]), "+f"(sum[74]), "+f"(sum[75]), "+f"(sum[76]), "+f"(sum[77]),
        "+f"(sum[78]), "+f"(sum[79]), "+f"(sum[80]), "+f"(sum[81]), "+f"(sum[82]), "+f"(sum[83]), "+f"(sum[84]),
        "+f"(sum[85]), "+f"(sum[86]), "+f"(sum[87]), "+f"(sum[88]), "+f"(sum[89]), "+f"(sum[90]), "+f"(sum[91]),
        "+f"(sum[92]), "+f"(sum[93]), "+f"(sum[94]), "+f"(sum[95]), "+f"(sum[96]), "+f"(sum[97]), "+f"(sum[98]),
        "+f"(sum[99]), "+f"(sum[100]), "+f"(sum[101]), "+f"(sum[102]), "+f"(sum[103]), "+f"(sum[104]), "+f"(sum[105]),
        "+f"(sum[106]), "+f"(sum[107]), "+f"(sum[108]), "+f"(sum[109]), "+f"(sum[110]), "+f"(sum[111]), "+f"(sum[112]),
        "+f"(sum[113]), "+f"(sum[114]), "+f"(sum[115]), "+f"(sum[116]), "+f"(sum[117]), "+f"(sum[118]), "+f"(sum[119]),
        "+f"(sum[120]), "+f"(sum[121]), "+f"(sum[122]), "+f"(sum[123]), "+f"(sum[124]), "+f"(sum[125]), "+f"(sum[126]),
        "+f"(sum[127])
      : "l"(a), "l"(b), "r"(add ? 1 : 0));
}

#else

constexpr bool kHasBulk = true;

template <class... Parameters>
bool has_bulk_code(void (*)(Parameters...)) {
  return true;
}

using simulator::BoxMap;

inline bool make_box_map(const bfloat16* matrix, int64_t num_rows, int64_t size, int box_rows, BoxMap& map) {
  map = {matrix, num_rows, size, box_rows};
  simulator::check_map(map);
  return true;
}

inline uintptr_t shared_address(const void* shared) { return reinterpret_cast<uintptr_t>(shared); }

template <int REGISTERS>
void take_registers() {}

template <int REGISTERS>
void give_registers() {}

using simulator::barrier_arrive, simulator::barrier_arrive_expecting, simulator::barrier_init, simulator::barrier_wait;

// Where pack `pack` of row `row` lies of what begins at `box`, by bits of the address as on the device.
inline unsigned char* box_pack(const void* box, int row, int pack) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(box) + row * 128 + pack * 16;
  return reinterpret_cast<unsigned char*>(address ^ (address >> 7 & 7) << 4);
}

inline void write_box(const simulator::BulkCopy& copy) {
  const BoxMap& map = copy.map;
  const auto* matrix = static_cast<const bfloat16*>(map.matrix);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < kBoxColumns; c += kEight) {
      unsigned char* to = box_pack(copy.to, r, c / kEight);
      if (copy.row + r < map.num_rows && copy.column + c < map.size) {
        std::memcpy(to, matrix + (copy.row + r) * map.size + copy.column + c, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
  }
}

inline void copy_box(void* shared, const BoxMap& map, int64_t row, int64_t column, uint64_t* barrier,
                     simulator::Site site = simulator::Site::current()) {
  simulator::check_aligned(shared, kBoxAlignment, site);
  const int bytes = map.box_rows * kBoxColumns * static_cast<int>(sizeof(bfloat16));
  std::memset(shared, 0xFF, bytes);
  simulator::begin_copy({write_box, shared, map, row, column, barrier, bytes, site});
}

inline const void* box_slice(const void* box, int sixteen) { return static_cast<const char*>(box) + 32 * sixteen; }

// Each lane computes its own sums, from shared memory as it is now.
inline void compute_products(simulator::Products& products, int count) {
  const int lane = simulator::lane(), row = threadIdx.x % kWarpgroup / kWarpSize * 16 + lane / 4;
  auto read = [](const void* slice, int r, uint16_t (&line)[kProductInner]) {
    for (int c = 0; c < 2; ++c) std::memcpy(line + c * kEight, box_pack(slice, r, c), 16);
  };
  for (; products.computed < count; ++products.computed) {
    const simulator::Product& product = products.product[products.computed];
    uint16_t a[2][kProductInner], b[64][kProductInner];
    for (int half = 0; half < 2; ++half) read(product.a, row + half * 8, a[half]);
    for (int c = 0; c < 64; ++c) read(product.b, c / 2 * 8 + lane % 4 * 2 + c % 2, b[c]);
    simulator::multiply_rows(a, b, product.add, products.kept);
  }
}

inline void products_begin(simulator::Site site = simulator::Site::current()) {
  simulator::products(site).begun = true;
}

inline void products_close(simulator::Site site = simulator::Site::current()) { ++simulator::products(site).group; }

template <int OPEN>
void products_read(simulator::Site site = simulator::Site::current()) {
  simulator::Products& products = simulator::products(site);
  int done = 0;
  while (done < products.count && products.group - products.product[done].group > OPEN) ++done;
  compute_products(products, done);
  simulator::finish_products(products, done, site);
}

inline void products_done(float (&)[kProductSums], simulator::Site site = simulator::Site::current()) {
  products_read<0>(site);
}

inline void begin_product(float (&sum)[kProductSums], const void* a, const void* b, bool add,
                          simulator::Site site = simulator::Site::current()) {
  simulator::Products& products = simulator::products(site);
  compute_products(products, simulator::add_product(products, sum, a, b, add, site));
}

#endif

}  // namespace calm_rt
