// Losses, gradients and sums of products of the cross-entropy in the simulator, against double arithmetic.
#include <algorithm>

#include "kernels/linear_cross_entropy.h"
#include "simulator/check.h"

namespace calm_rt {
namespace {

constexpr int64_t kIgnored = -100;
constexpr const char* kKernel = "linear_cross_entropy";

struct Shape {
  int64_t rows, vocabulary, block;
  bool scaled = true, need_grad = true;
  float spread = 4;
};

template <class T>
struct Losses {
  std::vector<T> logits;
  std::vector<float> loss;
};

// Position of a logit in blocks of the vocabulary.
int64_t position(const Shape& shape, int64_t row, int64_t id) {
  const int64_t first = id / shape.block * shape.block, width = std::min(shape.block, shape.vocabulary - first);
  return first * shape.rows + row * width + id - first;
}

template <class T>
void check_row(const Shape& shape, const Losses<T>& given, const Losses<T>& got, int64_t row, int64_t target,
               double scale) {
  auto logit = [&](int64_t id) { return static_cast<double>(widen(given.logits[position(shape, row, id)])); };
  const bool ignored = target == kIgnored, known = target >= 0 && target < shape.vocabulary;
  double maximum = -INFINITY, total = 0;
  for (int64_t id = 0; id < shape.vocabulary; ++id) maximum = std::fmax(maximum, logit(id));
  for (int64_t id = 0; id < shape.vocabulary; ++id) total += std::exp(logit(id) - maximum);
  const double loss = ignored ? 0 : known ? maximum - logit(target) + std::log(total) : NAN;
  const double bound = kUnits * kRounding * (1 + 2 * shape.spread + std::log(total));
  const bool same = std::isnan(loss) ? std::isnan(got.loss[row]) : std::fabs(got.loss[row] - loss) <= bound;
  check(same, "loss", kKernel, row, got.loss[row], loss);
  for (int64_t id = 0; id < shape.vocabulary; ++id) {
    const int64_t at = position(shape, row, id);
    const double value = widen(got.logits[at]), softmax = std::exp(logit(id) - maximum) / total;
    const double wanted = !shape.need_grad ? logit(id) : ignored ? 0 : known ? scale * (softmax - (id == target)) : NAN;
    double room = 0;
    if (shape.need_grad && !ignored) {
      const double terms = std::fabs(scale) * (1 + 2 * shape.spread) * (softmax + (id == target));
      const double least = kOutputRounding<T> > 0 ? kSmallest : 0x1p-146;  // where the value underflows
      room = kUnits * kRounding * terms + kOutputRounding<T> * std::fabs(wanted) + least;
    }
    check(std::isnan(wanted) ? std::isnan(value) : std::fabs(value - wanted) <= room, "gradient", kKernel, at, value,
          wanted);
  }
}

template <class T>
void check_losses(const Shape& shape) {
  Losses<T> given, first;
  std::vector<int64_t> target;
  std::vector<float> scale;
  for (int64_t i = 0; i < shape.rows * shape.vocabulary; ++i) {
    given.logits.push_back(convert<T>(shape.spread * random_value()));
  }
  for (int64_t r = 0; r < shape.rows; ++r) {
    target.push_back(r * 7919 % shape.vocabulary);
    scale.push_back(2 * random_value());
  }
  target.back() = shape.vocabulary - 1;
  if (shape.rows > 3) {
    target[1] = kIgnored;
    target[2] = shape.vocabulary + (int64_t{1} << 40);
    target[3] = -1;
  }
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    Losses<T> got{given.logits, std::vector<float>(shape.rows, -1)};
    launch(Cuda{}, RowLosses<T>{.logits = got.logits.data(),
                                .target = target.data(),
                                .scale = shape.scaled ? scale.data() : nullptr,
                                .loss = got.loss.data(),
                                .num_rows = shape.rows,
                                .vocabulary = shape.vocabulary,
                                .block = shape.block,
                                .ignore_index = kIgnored,
                                .need_grad = shape.need_grad});
    for (int64_t r = 0; r < shape.rows && schedule == 0; ++r) {
      check_row(shape, given, got, r, target[r], shape.scaled ? scale[r] : 1);
    }
    check_same(got.loss, first.loss, schedule, "loss differs under schedule", kKernel);
    check_same(got.logits, first.logits, schedule, "gradient differs under schedule", kKernel);
  }
}

template <class T>
void check_products(int64_t count) {
  std::vector<T> products[2];
  std::vector<float> sum(count, NAN);
  for (auto& product : products) {
    for (int64_t i = 0; i < count; ++i) product.push_back(convert<T>(random_value()));
    launch(Cuda{}, AddProduct<T>{product.data(), sum.data(), count, &product == products});
  }
  for (int64_t i = 0; i < count; ++i) {
    const float wanted = widen(products[0][i]) + widen(products[1][i]);
    check(sum[i] == wanted, "sum of products", kKernel, i, sum[i], wanted);
  }
}

void check_total(int64_t rows) {
  std::vector<float> loss;
  double wanted = 0;
  for (int64_t r = 0; r < rows; ++r) wanted += loss.emplace_back(1 + random_value());
  float total = NAN;
  launch(Cuda{}, SumLosses<float>{loss.data(), &total, rows});
  check(std::fabs(total - wanted) <= kUnits * kRounding * wanted, "total", kKernel, 0, total, wanted);
}

template <class T>
void check_type() {
  const Shape shapes[] = {
      {1, 1, 1},                    // the least
      {5, 37, 37},                  // one block, not packed
      {4, 48, 16},                  // packed blocks
      {6, 53, 16, false},           // and a last one that is not
      {1, 8200, 4096},              // more than one run a thread; the last block is one run
      {2, 30, 30, true, false},     // losses only
      {3, 40, 24, true, true, 60},  // exponentials that vanish
  };
  for (const Shape& shape : shapes) check_losses<T>(shape);
  for (int64_t count : {1, 16, 27, 5000}) check_products<T>(count);
}

}  // namespace

void check_linear_cross_entropy() {
  check_type<float>();
  check_type<bfloat16>();
  check_type<half>();
  for (int64_t rows : {0, 1, 700}) check_total(rows);
}

}  // namespace calm_rt
