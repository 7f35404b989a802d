// Products by the library that have the same bits for every number of threads.
//
// A product on several threads may share its inner dimension out among them. Here threads take tasks, cut by shapes
// alone, and within a parallel region the library computes each product on one thread. torch's operators rely on
// thread-local state that its worker threads do not have, so a task wraps its operands from pointers and calls the
// product's CPU kernel itself. On a GPU tasks follow each other in the stream.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>

#include "ops/tensor.h"

// From torch's generated C shim, as inductor's programs call it.
extern "C" AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2);
extern "C" AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                                   AtenTensorHandle mat2, double beta, double alpha);

namespace calm_rt {

// A matrix of T in memory that somebody else owns.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
  bool transposed = false;  // lies in memory as [columns, rows]
  int64_t stride = 0;       // from one row in memory to the next; 0: dense

  Matrix operator~() const { return {data, columns, rows, !transposed, stride}; }

  int64_t leading() const { return stride ? stride : transposed ? rows : columns; }

  // Columns first ... first + count - 1.
  Matrix part(int64_t first, int64_t count) const {
    return {data + first * (transposed ? leading() : 1), rows, count, transposed, leading()};
  }

  Tensor tensor(const Tensor& like) const {
    const std::array<int64_t, 2> sizes{rows, columns};
    const std::array<int64_t, 2> strides{transposed ? 1 : leading(), transposed ? leading() : 1};
    return torch::stable::from_blob(const_cast<T*>(data), sizes, strides, like.device(), like.scalar_type());
  }
};

// Calls body(task, worker) for every task; workers that run at the same time have different numbers below num_workers.
template <class Device>
int64_t num_workers() {
  return std::is_same_v<Device, Cpu> ? torch::stable::get_num_threads() : 1;
}

template <class Device, class Body>
void each_task(int64_t count, const Body& body) {
  if constexpr (std::is_same_v<Device, Cpu>) {
    std::atomic<int64_t> next_worker{0};
    // an empty second task makes a lone one run inside a parallel region too
    torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
      const int64_t worker = next_worker++;
      for (int64_t task = begin; task < std::min(end, count); ++task) body(task, worker);
    });
  } else {
    for (int64_t task = 0; task < count; ++task) body(task, 0);
  }
}

// out = a b, in a task; `like` has their device and type.
template <class Device, class T>
void multiply(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out, const Tensor& like) {
  const Tensor a_ = a.tensor(like), b_ = b.tensor(like), out_ = out.tensor(like);
  if constexpr (std::is_same_v<Device, Cpu>) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out_.get(), a_.get(), b_.get()));
  } else {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a_), from(b_), from(out_)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes back what the call returns: out once more
  }
}

// out = bias + a b with bias [columns], in a task; `like` has their device and type.
template <class Device, class T>
void multiply(const Matrix<T>& a, const Matrix<T>& b, const T* bias, const Matrix<T>& out, const Tensor& like) {
  const std::array<int64_t, 1> sizes{out.columns}, strides{1};
  const Tensor bias_ =
      torch::stable::from_blob(const_cast<T*>(bias), sizes, strides, like.device(), like.scalar_type());
  const Tensor a_ = a.tensor(like), out_ = out.tensor(like);
  if constexpr (std::is_same_v<Device, Cpu>) {
    const Tensor b_ = b.tensor(like);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out_.get(), bias_.get(), a_.get(), b_.get(), 1, 1));
  } else {
    using torch::stable::detail::from;
    const Tensor weight = (~b).tensor(like);
    std::array<StableIValue, 4> stack{from(a_), from(weight), from(std::optional<Tensor>(bias_)), from(out_)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

}  // namespace calm_rt
