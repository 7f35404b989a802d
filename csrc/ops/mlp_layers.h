// What encode and decode share: a chain of gated MLPs over one task's rows, and how many rows a task takes.
#pragma once
#include <algorithm>
#include <vector>

#include "ops/gated_mlp.h"
#include "ops/product.h"

namespace calm_rt {

constexpr int64_t kFewPatches = 128;  // of which no tasks are made

// Patches in a task; few of them are a lone task, whose products are shared out. On the CPU a task's intermediates stay
// in the second cache of its thread, and there are tasks for four threads; the number of threads itself must not
// matter. A product reads and packs its weights whatever its rows are: 64 patches at H 512 take 16.2 ms of one thread
// in tasks of 16, 13.6 in tasks of 32 and 12.0 in one. On the GPU a tile holds kCudaTileRows of the rows that the
// layers see, which are `rows_of_patch` a patch.
template <class Device>
int64_t patches_per_task(int64_t num_rows, int64_t rows_of_patch) {
  if (std::is_same_v<Device, Cuda>) {
    return std::clamp<int64_t>(kCudaTileRows / std::max<int64_t>(1, rows_of_patch), 1, std::max<int64_t>(1, num_rows));
  }
  if (num_rows <= kFewPatches) return std::max<int64_t>(1, num_rows);
  return std::clamp<int64_t>((num_rows + 3) / 4, 32, 128);
}

// Layers of norm [H] in the accumulation type, gate [I, H], up [I, H] and down [H, I].
class MlpLayers {
 public:
  MlpLayers(const std::vector<Tensor>& weights, ScalarType type, int64_t size, const Operands& operands, const char* op)
      : size_(size) {
    STD_TORCH_CHECK(weights.size() % 4 == 0, op, ": a layer has four weights");
    for (size_t i = 0; i < weights.size(); i += 4) {
      const int64_t intermediate = weights[i + 1].size(0);
      STD_TORCH_CHECK(has_shape(weights[i], accumulate_type(type), {size}) &&
                          has_shape(weights[i + 1], type, {intermediate, size}) &&
                          has_shape(weights[i + 2], type, {intermediate, size}) &&
                          has_shape(weights[i + 3], type, {size, intermediate}),
                      op, ": a layer must have norm [H], gate and up [I, H] and down [H, I], of one dtype");
      widest_ = std::max(widest_, intermediate);
    }
    for (const Tensor& weight : weights) weights_.push_back(operands.factor(weight));
  }

  int64_t scratch(int64_t rows) const { return weights_.empty() ? 0 : gated_mlp_scratch(rows, size_, widest_); }

  // hidden [rows, H] through all layers, in place.
  template <class Device, class T>
  void run(Device device, T* hidden, int64_t rows, double eps, T* scratch, const Tensor& like) const {
    for (size_t i = 0; i < weights_.size(); i += 4) {
      const int64_t intermediate = weights_[i + 1].size(0);
      const MlpWeights<T> weights{.norm = input<AccumulateType<T>>(weights_[i]),
                                  .gate = {input<T>(weights_[i + 1]), intermediate, size_},
                                  .up = {input<T>(weights_[i + 2]), intermediate, size_},
                                  .down = {input<T>(weights_[i + 3]), size_, intermediate}};
      gated_mlp_rows(device, hidden, rows, weights, eps, scratch, hidden, like);
    }
  }

 private:
  std::vector<Tensor> weights_;
  int64_t size_, widest_ = 0;
};

}  // namespace calm_rt
