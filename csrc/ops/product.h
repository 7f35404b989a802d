// Products that have the same bits for every number of threads, by the library or, of floats where that is slow, by
// kernels/product.h.
//
// A product on several threads may share its inner dimension out among them. Here threads take tasks, and within a
// parallel region the library computes each product on one thread: the tasks are those of an op, or ranges of the
// columns of a product that is called outside of tasks. They are cut by shapes alone, but for the columns of our own
// products, whose sums have one order whatever the cut: those by the number of threads. torch's operators rely on
// thread-local state that its worker threads do not have, so a task wraps its operands from pointers and calls the
// product's CPU kernel itself. On a GPU tasks follow each other in the stream.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <utility>

#include "common/isa.h"
#include "kernels/product.h"
#include "ops/tensor.h"

// From torch's generated C shim, as inductor's programs call it.
extern "C" AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2);
extern "C" AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                                   AtenTensorHandle mat2, double beta, double alpha);
// Of the calling thread's products; returns what it was, 0 for none of its own. Absent from a torch without MKL.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int num_threads);

namespace calm_rt {

// A matrix of T in memory that somebody else owns.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
  bool transposed = false;  // lies in memory as [columns, rows]
  int64_t stride = 0;       // from row to row in memory; 0 where nothing lies between them

  Matrix operator~() const { return {data, columns, rows, !transposed, stride}; }

  int64_t step() const { return stride ? stride : transposed ? rows : columns; }

  Matrix column_range(int64_t first, int64_t count) const {
    return {data + (transposed ? first * step() : first), rows, count, transposed, step()};
  }

  Tensor tensor(const Tensor& like) const {
    const std::array<int64_t, 2> sizes{rows, columns};
    const std::array<int64_t, 2> strides{transposed ? 1 : step(), transposed ? step() : 1};
    return torch::stable::from_blob(const_cast<T*>(data), sizes, strides, like.device(), like.scalar_type());
  }
};

// Workers that run at the same time have different numbers below num_workers.
template <class Device>
int64_t num_workers() {
  return std::is_same_v<Device, Cpu> ? torch::stable::get_num_threads() : 1;
}

inline thread_local bool in_task = false;  // whether this thread works on a task

// A thread's work on tasks. MKL cuts a product for the number of threads that torch.set_num_threads gave it, also
// within a parallel region, and so changes its bits: here it has one.
class TaskScope {
 public:
  TaskScope() : was_in_task_(std::exchange(in_task, true)) {
    if (&MKL_Set_Num_Threads_Local) mkl_threads_ = MKL_Set_Num_Threads_Local(1);
  }
  ~TaskScope() {
    if (&MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl_threads_);
    in_task = was_in_task_;
  }
  TaskScope(const TaskScope&) = delete;
  TaskScope& operator=(const TaskScope&) = delete;

 private:
  bool was_in_task_;
  int mkl_threads_ = 0;
};

// Calls body(task, worker) for every task. `share_products` lets a lone task leave its products to all threads.
template <class Device, class Body>
void each_task(int64_t count, const Body& body, bool share_products = false) {
  if constexpr (std::is_same_v<Device, Cpu>) {
    if (count == 1 && share_products) return body(0, 0);
    // Whoever is done takes the next task, so a thread that others disturb does not keep the rest waiting. An empty
    // second task makes a lone one run inside a parallel region too.
    std::atomic<int64_t> next_worker{0}, next_task{0};
    torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t, int64_t) {
      const int64_t worker = next_worker++;
      const TaskScope scope;
      for (int64_t task = next_task++; task < count; task = next_task++) body(task, worker);
    });
  } else {
    for (int64_t task = 0; task < count; ++task) body(task, 0);
  }
}

// Whether a product of so many rows of T is taken without the library.
template <class Device, class T>
bool multiplies_here(int64_t rows) {
  if (!std::is_same_v<Device, Cpu> || !std::is_same_v<T, float>) return false;
  return products() == Products::kOwn || (products() == Products::kFewRows && rows <= kFewProductRows);
}

// Calls body(first, count) for all columns of a product a b: in a task for all of them, elsewhere in tasks of ranges.
template <class Device, class T, class Body>
void each_column_range(const Matrix<T>& a, const Matrix<T>& b, const Body& body) {
  // The library is slow at few columns, the more so the fewer rows: 16 rows through a map of 512 to 1,280 take 0.31 ms
  // at once, 0.31 in ranges of 256 columns, 0.45 of 128 and 0.50 of 64; 200 rows 1.75, 1.81, 1.88 and 2.04 ms. Its bits
  // depend on the range: there are as many for any number of threads, and 2, 4 and 8 threads share them evenly.
  constexpr int64_t kMost = 8, kNarrowRows = 96, kUnit = 32;
  constexpr int64_t kSmallest = 1 << 17;  // multiplications, 10 us of one thread where memory bounds them
  if (std::is_same_v<Device, Cuda> || in_task) return body(0, b.columns);
  const bool small = a.rows * a.columns * b.columns < kSmallest;
  const int64_t narrowest = a.rows < kNarrowRows ? 256 : 96;
  int64_t count = 1;
  if (multiplies_here<Device, T>(a.rows)) {  // each range packs a anew
    count = small ? 1 : std::clamp<int64_t>(b.columns / narrowest, 1, num_workers<Device>());
  } else {
    while (!small && count < kMost && b.columns >= 2 * count * narrowest) count *= 2;
  }
  const int64_t most = ((b.columns + count - 1) / count + kUnit - 1) / kUnit * kUnit;
  each_task<Device>(most == 0 ? 0 : (b.columns + most - 1) / most,
                    [&](int64_t task, int64_t) { body(task * most, std::min(most, b.columns - task * most)); });
}

// out = a b [+ bias] without the library; false where the library is to do it.
template <class Device, class T>
bool multiply_here(const Matrix<T>& a, const Matrix<T>& b, const T* bias, const Matrix<T>& out) {
  if constexpr (std::is_same_v<Device, Cpu> && std::is_same_v<T, float>) {
    if (out.transposed || !multiplies_here<Device, T>(a.rows)) return false;
    const auto strides = [](const Matrix<T>& matrix) {
      return matrix.transposed ? std::pair<int64_t, int64_t>{1, matrix.step()}
                               : std::pair<int64_t, int64_t>{matrix.step(), 1};
    };
    const auto [a_row, a_column] = strides(a);
    const auto [b_row, b_column] = strides(b);
    launch(Cpu{}, MatrixProduct{.a = a.data,
                                .a_row = a_row,
                                .a_column = a_column,
                                .b = b.data,
                                .b_row = b_row,
                                .b_column = b_column,
                                .bias = bias,
                                .out = const_cast<T*>(out.data),
                                .out_row = out.step(),
                                .rows = a.rows,
                                .depth = a.columns,
                                .columns = b.columns});
    return true;
  }
  return false;
}

// out = a b; `like` has their device and type.
template <class Device, class T>
void multiply(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out, const Tensor& like) {
  each_column_range<Device>(a, b, [&](int64_t first, int64_t count) {
    if (multiply_here<Device, T>(a, b.column_range(first, count), nullptr, out.column_range(first, count))) return;
    const Tensor a_ = a.tensor(like), b_ = b.column_range(first, count).tensor(like);
    const Tensor out_ = out.column_range(first, count).tensor(like);
    if constexpr (std::is_same_v<Device, Cpu>) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out_.get(), a_.get(), b_.get()));
    } else {
      using torch::stable::detail::from;
      std::array<StableIValue, 3> stack{from(a_), from(b_), from(out_)};
      TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
      torch::stable::detail::to<Tensor>(stack[0]);  // takes back what the call returns: out once more
    }
  });
}

// out = bias + a b with bias [columns]; `like` has their device and type.
template <class Device, class T>
void multiply(const Matrix<T>& a, const Matrix<T>& b, const T* bias, const Matrix<T>& out, const Tensor& like) {
  each_column_range<Device>(a, b, [&](int64_t first, int64_t count) {
    if (multiply_here<Device, T>(a, b.column_range(first, count), bias + first, out.column_range(first, count))) return;
    const std::array<int64_t, 1> sizes{count}, strides{1};
    const Tensor bias_ =
        torch::stable::from_blob(const_cast<T*>(bias) + first, sizes, strides, like.device(), like.scalar_type());
    const Tensor a_ = a.tensor(like), out_ = out.column_range(first, count).tensor(like);
    if constexpr (std::is_same_v<Device, Cpu>) {
      const Tensor b_ = b.column_range(first, count).tensor(like);
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out_.get(), bias_.get(), a_.get(), b_.get(), 1, 1));
    } else {
      using torch::stable::detail::from;
      const Tensor weight = (~b).tensor(like);
      std::array<StableIValue, 4> stack{from(a_), from(weight), from(std::optional<Tensor>(bias_)), from(out_)};
      TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
      torch::stable::detail::to<Tensor>(stack[0]);
    }
  });
}

}  // namespace calm_rt
