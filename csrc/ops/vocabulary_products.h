// The three products of a vocabulary projection and its gradients, block by block of the vocabulary.
//
// The logits lie in blocks, one after the other, each of them [R, N] with nothing between its rows (see
// kernels/linear_cross_entropy.h). Every sum has one order whatever the number of threads: tasks are cut by shapes.
#pragma once
#include <algorithm>

#include "common/isa.h"
#include "kernels/linear_cross_entropy.h"
#include "ops/product.h"

namespace calm_rt {

// Up to so many rows a product on the CPU is a short one: four wide blocks will do, and grad_hidden is cut into blocks
// instead of still fewer rows (64 rows, H 256, V 4096: 0.94 ms in blocks of 1024, and in tiles of 16 rows 1.39 ms).
constexpr int64_t kFewProjectedRows = 128;

template <class Device>
bool few_rows(int64_t rows) {
  return std::is_same_v<Device, Cpu> && rows <= kFewProjectedRows;
}

// Entries of the vocabulary that a product takes. On the GPU one fills the device; on the CPU there are sixteen blocks
// for as many threads, of a size at which the library is fast and the gradient of the weight stays in a cache; of 256
// entries two, for one would leave all but one thread idle.
template <class Device>
int64_t vocabulary_block(int64_t vocabulary, int64_t rows) {
  if (!std::is_same_v<Device, Cpu>) return std::min<int64_t>(vocabulary, 16384);
  const auto part = [&](int64_t parts) { return (vocabulary / parts + 63) / 64 * 64; };
  const int64_t narrowest = few_rows<Device>(rows) ? std::clamp<int64_t>(part(4), 128, 1024) : 128;
  return std::min(vocabulary, std::clamp<int64_t>(part(16), narrowest, 2048));
}

// The type that products of `rows` rows are taken in: float where the library is slower with `type`. Products of few
// rows are bound by memory, and to widen the weight takes longer than it spares: forward and backward with 32,000
// entries of H 512 on one thread take 198 ms in float and 50 in bfloat16 for one row, 334 and 310 for 64 rows.
template <class Device>
ScalarType product_type(ScalarType type, int64_t rows) {
  constexpr int64_t kNarrowRows = 64;  // NARROW_ROWS in calm_rt/ops/linear_cross_entropy.py
  if constexpr (std::is_same_v<Device, Cpu>) {
    if (rows <= kNarrowRows) return type;
    if (type == ScalarType::BFloat16 && !has_fast_bfloat16()) return ScalarType::Float;
    if (type == ScalarType::Half && !has_fast_half()) return ScalarType::Float;
  }
  return type;
}

// Calls body with values of `type` and of the type that its products are taken in.
template <class Device, class Body>
void dispatch_products(ScalarType type, int64_t rows, const char* op, const Body& body) {
  dispatch<Device>(type, op, [&](auto element) {
    if constexpr (std::is_same_v<Device, Cpu> && sizeof(element) == 2) {
      if (product_type<Device>(type, rows) != type) return body(element, float{});
    }
    body(element, element);
  });
}

// T, of hidden and weight; P, of their products.
template <class Device, class T, class P>
class VocabularyProducts {
 public:
  using Wide = AccumulateType<T>;

  // For `rows` rows of hidden [R, H] at a time, with gradients or without.
  VocabularyProducts(Device device, const Tensor& hidden, const Tensor& weight, int64_t rows, bool need_grad)
      : device_(device),
        weight_(input<T>(weight)),
        vocabulary_(weight.size(0)),
        size_(weight.size(1)),
        block_(vocabulary_block<Device>(vocabulary_, rows)),
        num_blocks_((vocabulary_ + block_ - 1) / block_),
        tile_(row_tile(rows)),
        few_(few_rows<Device>(rows)),
        product_size_(need_grad ? std::max(tile_, block_) * size_ : 0) {
    const ScalarType type = kWidens ? ScalarType::Float : hidden.scalar_type();
    products_ = allocate(hidden, {num_workers<Device>() * product_size_}, type);
    parts_ = allocate(hidden, {need_grad && few_ ? num_blocks_ * rows * size_ : 0}, type);
    wide_hidden_ = allocate(hidden, {kWidens ? rows * size_ : 0}, type);
    wide_weight_ = allocate(hidden, {kWidens ? num_workers<Device>() * block_ * size_ : 0}, type);
  }

  int64_t block() const { return block_; }

  // hidden [rows, H] as products take it
  Matrix<P> rows_of(const T* hidden, int64_t rows) {
    return {widen(output<P>(wide_hidden_), hidden, rows * size_), rows, size_};
  }

  // logits [rows, V] in blocks = hidden weight^T
  void logits(const Matrix<P>& hidden, P* logits) {
    each_task<Device>(num_blocks_, [&](int64_t index, int64_t worker) {
      multiply<Device>(hidden, ~block_of_weight(index, worker), block_of(logits, hidden.rows, index), products_);
    });
  }

  // grad_hidden [rows, H] = grad_logits weight
  void grad_hidden(P* grad_logits, int64_t rows, Wide* grad_hidden) {
    if (few_) return grad_few(grad_logits, rows, grad_hidden);
    each_task<Device>((rows + tile_ - 1) / tile_, [&](int64_t task, int64_t worker) {
      const int64_t first = task * tile_, count = std::min(tile_, rows - first);
      for (int64_t index = 0; index < num_blocks_; ++index) {
        const P* part = block_of(grad_logits, rows, index).data + first * width(index);
        add_product(Matrix<P>{part, count, width(index)}, block_of_weight(index, worker), grad_hidden + first * size_,
                    index == 0, worker);
      }
    });
  }

  // grad_weight [V, H] = grad_logits^T hidden of all rows
  void grad_weight(P* grad_logits, const Matrix<P>& hidden, P* grad_weight) {
    each_task<Device>(num_blocks_, [&](int64_t index, int64_t) {
      const Matrix<P> part{grad_weight + index * block_ * size_, width(index), size_};
      multiply<Device>(~block_of(grad_logits, hidden.rows, index), hidden, part, products_);
    });
  }

  // The same, or that much more of it.
  void grad_weight(P* grad_logits, const Matrix<P>& hidden, Wide* grad_weight, bool first) {
    each_task<Device>(num_blocks_, [&](int64_t index, int64_t worker) {
      Wide* sum = grad_weight + index * block_ * size_;
      add_product(~block_of(grad_logits, hidden.rows, index), hidden, sum, first, worker);
    });
  }

 private:
  static constexpr bool kWidens = !std::is_same_v<T, P>;

  // Rows whose grad_hidden is one task. Each task takes the whole weight, and may have to widen it.
  static int64_t row_tile(int64_t rows) {
    if (!std::is_same_v<Device, Cpu>) return std::max<int64_t>(1, rows);
    return std::max<int64_t>(16, kWidens ? (rows + 3) / 4 : (rows + 7) / 8);
  }

  // The same with a task a block, whose parts are added up afterwards.
  void grad_few(P* grad_logits, int64_t rows, Wide* grad_hidden) {
    const int64_t count = rows * size_;
    P* parts = output<P>(parts_);  // [blocks, rows, H]
    each_task<Device>(num_blocks_, [&](int64_t index, int64_t worker) {
      const Matrix<P> part{parts + index * count, rows, size_};
      multiply<Device>(block_of(grad_logits, rows, index), block_of_weight(index, worker), part, parts_);
    });
    for (int64_t index = 0; index < num_blocks_; ++index) {
      launch(device_, AddProduct<P>{parts + index * count, grad_hidden, count, index == 0});
    }
  }

  int64_t width(int64_t index) const { return std::min(block_, vocabulary_ - index * block_); }

  Matrix<P> block_of(P* logits, int64_t rows, int64_t index) const {
    return {logits + index * block_ * rows, rows, width(index)};
  }

  Matrix<P> block_of_weight(int64_t index, int64_t worker) {
    P* wide = output<P>(wide_weight_) + worker * block_ * size_;
    return {widen(wide, weight_ + index * block_ * size_, width(index) * size_), width(index), size_};
  }

  const P* widen([[maybe_unused]] P* out, const T* in, [[maybe_unused]] int64_t count) {
    if constexpr (kWidens) {
      launch(device_, WidenValues<T>{in, out, count});
      return out;
    } else {
      return in;
    }
  }

  // sum = a b if it is the first product, otherwise sum += a b
  void add_product(const Matrix<P>& a, const Matrix<P>& b, Wide* sum, bool first, int64_t worker) {
    if constexpr (std::is_same_v<P, Wide>) {
      if (first) return multiply<Device>(a, b, Matrix<P>{sum, a.rows, b.columns}, products_);
    }
    const Matrix<P> product{output<P>(products_) + worker * product_size_, a.rows, b.columns};
    multiply<Device>(a, b, product, products_);
    launch(device_, AddProduct<P>{product.data, sum, a.rows * b.columns, first});
  }

  Device device_;
  const T* weight_;
  int64_t vocabulary_, size_, block_, num_blocks_, tile_;
  bool few_;
  int64_t product_size_;
  Tensor products_, parts_, wide_hidden_, wide_weight_;  // scratch
};

}  // namespace calm_rt
