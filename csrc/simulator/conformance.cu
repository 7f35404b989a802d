// Every primitive of the CUDA kernels on given words, so that a device can be compared with the simulator.
//
//   conformance IN OUT    reads kWords words of 32 bits and writes, word by word, what the kernels below make of them
//
// One source for both: nvcc makes a program for the device, the host compiler one for the simulator. A thread has a
// word. python_tests/test_primitives.py knows what comes out.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "kernels/cuda/primitives_bulk.cuh"
#include "kernels/cuda/random.cuh"
#include "kernels/cuda/reduce.cuh"

namespace calm_rt {
namespace {

constexpr int kWords = 4096, kThreads = 128, kBlocks = kWords / kThreads, kMany = 8;

__device__ __forceinline__ int word_of() { return blockIdx.x * kThreads + threadIdx.x; }

// One of 2^24 numbers from -1/2 on, whose sums depend on their order.
__device__ __forceinline__ float fraction(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f - 0.5f; }

// Two bfloat16 of a middling size, from 1/8 to 16 and their negatives, made of the words' bits.
__device__ __forceinline__ uint32_t tame(uint32_t word) {
  return (word & 0x807F807Fu) | ((word >> 7 & 0x00070007u) + 0x007C007Cu) << 7;
}

// [5, kWords]
__global__ void __launch_bounds__(kThreads) convert_kernel(const uint32_t* in, uint32_t* out) {
  const int i = word_of();
  const float x = float_of(in[i]), other = float_of(in[i ^ 1]);
  const uint16_t low = static_cast<uint16_t>(in[i]);
  bfloat16 brief;
  half short_float;
  narrow(x, brief);
  narrow(x, short_float);
  out[i] = brief.bits;
  out[kWords + i] = short_float.bits;
  out[2 * kWords + i] = bits_of(widen(bfloat16{low}));
  out[3 * kWords + i] = bits_of(widen(half{low}));
  out[4 * kWords + i] = bits_of(max_nan(x, other));
}

// [4, kWords]: rows of eight bfloat16 as packs, and as single elements of which three are beyond the row; two floats of
// each word.
__global__ void __launch_bounds__(kThreads) runs_kernel(const uint32_t* in, uint32_t* out) {
  const int i = word_of();
  if (i % 4 == 0) {
    const auto* from = reinterpret_cast<const bfloat16*>(in) + 2 * i;
    store_run(load_run<kEight>(from, 0, kEight, true), reinterpret_cast<bfloat16*>(out) + 2 * i, 0, kEight, true);
    auto* to = reinterpret_cast<bfloat16*>(out + kWords) + 2 * i;
    store_run(load_run<kEight>(from, 0, 5, false), to, 0, kEight, false);
  }
  const Run<2> pair = widen_pairs(load_pack<1>(in + i));
  out[2 * kWords + 2 * i] = bits_of(pair.value[0]);
  out[2 * kWords + 2 * i + 1] = bits_of(pair.value[1]);
}

// [7, kWords]
__global__ void __launch_bounds__(kThreads) reduce_kernel(const uint32_t* in, uint32_t* out) {
  const int i = word_of(), lane = threadIdx.x % kWarpSize;
  const float x = fraction(in[i]);
  float many[kMany];
#pragma unroll
  for (int k = 0; k < kMany; ++k) many[k] = fraction(in[i] * (2 * k + 1));
  out[i] = bits_of(warp_sum(x));
  out[kWords + i] = bits_of(warp_max(x));
  out[2 * kWords + i] = bits_of(block_sum<kThreads>(x));
  out[3 * kWords + i] = bits_of(block_max<kThreads>(x));
  out[4 * kWords + i] = bits_of(warp_sum_many(many));
  out[5 * kWords + i] = __ballot_sync(kFullMask, x > 0);
  out[6 * kWords + i] = __shfl_down_sync(kFullMask, in[i], 3) + __shfl_sync(kFullMask, in[i], lane * 5 % kWarpSize);
}

// [12, kWords]: Philox's four words of each thread's counter and key, and what uniforms and normals become of them.
__global__ void __launch_bounds__(kThreads) random_kernel(const uint32_t* in, uint32_t* out) {
  const int i = word_of();
  const uint64_t seed = in[i ^ 4] | static_cast<uint64_t>(in[i ^ 5]) << 32;
  const PhiloxWords words = philox({{in[i], in[i ^ 1], in[i ^ 2], in[i ^ 3]}}, seed);
  const Four uniforms = uniform_four(words), normals = normal_four(words);
#pragma unroll
  for (int e = 0; e < kFour; ++e) {
    out[4 * i + e] = words.word[e];
    out[4 * (kWords + i) + e] = bits_of(uniforms.value[e]);
    out[4 * (2 * kWords + i) + e] = bits_of(normals.value[e]);
  }
}

// [kWords]: a warp copies 32 rows of four words, every fifth of them as zeros, in two groups, and loads matrices.
__global__ void __launch_bounds__(kThreads) matrices_kernel(const uint32_t* in, uint32_t* out) {
  CALM_DYNAMIC_SHARED(shared);
  if (word_of() >= kWords / 4) return;  // a row each
  const int lane = threadIdx.x % kWarpSize;
  unsigned char* row = shared + threadIdx.x * 16;
  if (lane < 16) copy_async(row, in + 4 * word_of(), lane % 5 != 0);
  close_copies();
  if (lane >= 16) copy_async(row, in + 4 * word_of(), lane % 5 != 0);
  close_copies();
  copies_done<1>();
  copies_done<0>();
  __syncthreads();
  uint32_t matrix[4];
  load_matrices(matrix, row);
#pragma unroll
  for (int m = 0; m < 4; ++m) out[4 * word_of() + m] = matrix[m];
}

// [kWords]: sums of a warp's products; a lane has four words of a, two of b and four sums.
__global__ void __launch_bounds__(kThreads) products_kernel(const uint32_t* in, uint32_t* out) {
  if (word_of() >= kWords / 4) return;
  uint32_t a[4], b[2];
  float sum[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    a[k] = tame(in[4 * word_of() + k]);
    sum[k] = fraction(in[4 * word_of() + (k + 1) % 4]);
  }
  b[0] = tame(in[4 * word_of()] * 3), b[1] = tame(in[4 * word_of() + 1] * 3);
  multiply_add(sum, a, b[0], b[1]);
#pragma unroll
  for (int k = 0; k < 4; ++k) out[4 * word_of() + k] = bits_of(sum[k]);
}

// [kWords]
__global__ void __launch_bounds__(kThreads) tame_kernel(const uint32_t* in, uint32_t* out) {
  out[word_of()] = tame(in[word_of()]);
}

constexpr int kMatrixRows = 128, kBoxRow = 40, kBoxColumn = 16, kFirstRow = 8;  // of a product in the box

// [5, kWords]: of a matrix of 128 rows and 64 columns a box that it reaches in part, as it lies in shared memory, and
// the sums of a warpgroup's products of 64 of its rows with all of the matrix, and with zeros beyond it.
__global__ void __launch_bounds__(kThreads)
    boxes_kernel(const __grid_constant__ BoxMap part, const __grid_constant__ BoxMap whole, uint32_t* out) {
  if constexpr (kHasBulk) {
    CALM_DYNAMIC_SHARED(shared);
    CALM_SHARED(uint64_t, barrier, 1);
    unsigned char* a = shared + (-shared_address(shared) & (kBoxAlignment - 1));
    unsigned char* b = a + kMatrixRows * kBoxColumns * sizeof(bfloat16);
    if (threadIdx.x == 0) {
      barrier_init(barrier, 2);
      barrier_arrive(barrier);
      barrier_arrive_expecting(barrier, kMatrixRows * kBoxColumns * sizeof(bfloat16));
      copy_box(a, part, kBoxRow, kBoxColumn, barrier);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    __syncthreads();  // nobody waits for this phase when the next one ends
    if (threadIdx.x == 0) {
      barrier_arrive_expecting(barrier, kProductColumns * kBoxColumns * sizeof(bfloat16));
      copy_box(b, whole, 0, 0, barrier);
      barrier_arrive(barrier);
    }
    barrier_wait(barrier, 1);
    for (int i = threadIdx.x; i < kWords; i += kThreads) memcpy(out + i, a + 4 * i, 4);
    float sum[kProductSums] = {};
    products_begin();
#pragma unroll
    for (int k = 0; k < kBoxColumns / kProductInner; ++k) {
      begin_product(sum, box_slice(a + kFirstRow * kBoxColumns * sizeof(bfloat16), k), box_slice(b, k), k > 0);
      products_close();
    }
    products_read<1>();
    products_done(sum);
#pragma unroll
    for (int i = 0; i < kProductSums; ++i) out[kWords + threadIdx.x * kProductSums + i] = bits_of(sum[i]);
  }
}

// [6, kWords]: the words as they are multiplied, and the above; nothing but NaN on a device that has no such products.
void launch_boxes(const uint32_t* in, uint32_t* out) {
  launch_kernel("tame_kernel", tame_kernel, kBlocks, kThreads, Cuda{}, in, out);
  const auto* matrix = reinterpret_cast<const bfloat16*>(out);
  BoxMap part, whole;
  if (current_chip().capability != 90) return;
  if (!make_box_map(matrix, kMatrixRows, kBoxColumns, kMatrixRows, part) ||
      !make_box_map(matrix, kMatrixRows, kBoxColumns, kProductColumns, whole)) {
    throw std::runtime_error("the driver makes no maps of boxes");
  }
  constexpr size_t kShared = (kMatrixRows + kProductColumns) * kBoxColumns * sizeof(bfloat16) + kBoxAlignment;
  launch_shared_kernel("boxes_kernel", boxes_kernel, 1, kThreads, kShared, Cuda{}, part, whole, out + kWords);
}

using Kernel = void (*)(const uint32_t*, uint32_t*);

struct Step {
  const char* name;
  Kernel kernel;
  int words;  // of output, in kWords
  size_t shared = 0;

  void launch(const uint32_t* in, uint32_t* out) const {
    if (kernel == nullptr) return launch_boxes(in, out);
    launch_shared_kernel(name, kernel, kBlocks, kThreads, shared, Cuda{}, in, out);
  }
};

constexpr Step kSteps[] = {{"convert", convert_kernel, 5},
                           {"runs", runs_kernel, 4},
                           {"reduce", reduce_kernel, 7},
                           {"random", random_kernel, 12},
                           {"matrices", matrices_kernel, 1, kThreads * 16},
                           {"products", products_kernel, 1},
                           {"boxes", nullptr, 6}};

#ifdef __CUDACC__

void must(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// The output of a step, which begins as NaN.
std::vector<uint32_t> run(const Step& step, const std::vector<uint32_t>& in) {
  std::vector<uint32_t> out(static_cast<size_t>(step.words) * kWords);
  uint32_t *device_in = nullptr, *device_out = nullptr;
  must(cudaMalloc(&device_in, in.size() * sizeof(uint32_t)));
  must(cudaMalloc(&device_out, out.size() * sizeof(uint32_t)));
  must(cudaMemcpy(device_in, in.data(), in.size() * sizeof(uint32_t), cudaMemcpyHostToDevice));
  must(cudaMemset(device_out, 0xFF, out.size() * sizeof(uint32_t)));
  step.launch(device_in, device_out);
  must(cudaMemcpy(out.data(), device_out, out.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost));
  must(cudaFree(device_in));
  must(cudaFree(device_out));
  return out;
}

#else

std::vector<uint32_t> run(const Step& step, const std::vector<uint32_t>& in) {
  std::vector<uint32_t> out(static_cast<size_t>(step.words) * kWords, ~0u);
  simulator::set_schedule(1);
  simulator::set_capability(90);
  step.launch(in.data(), out.data());
  return out;
}

#endif

}  // namespace
}  // namespace calm_rt

int main(int argc, char** argv) try {
  using namespace calm_rt;
  std::vector<uint32_t> in(kWords);
  std::FILE* file = argc == 3 ? std::fopen(argv[1], "rb") : nullptr;
  if (file == nullptr || std::fread(in.data(), sizeof(uint32_t), kWords, file) != kWords) {
    std::fprintf(stderr, "conformance IN OUT: IN must be a file of %d words\n", kWords);
    return 2;
  }
  std::fclose(file);
  file = std::fopen(argv[2], "wb");
  if (file == nullptr) {
    std::fprintf(stderr, "conformance IN OUT: OUT must be a file that can be written\n");
    return 2;
  }
  for (const Step& step : kSteps) {
    const std::vector<uint32_t> out = run(step, in);
    std::fwrite(out.data(), sizeof(uint32_t), out.size(), file);
  }
  return std::fclose(file) == 0 ? 0 : 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
