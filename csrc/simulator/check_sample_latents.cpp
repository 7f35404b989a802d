// What stands between the products of the energy head in the simulator, against double arithmetic.
#include "common/philox.h"
#include "kernels/sample_latents.h"
#include "simulator/check.h"

namespace calm_rt {
namespace {

constexpr double kEps = 1e-6;

struct Shape {
  int64_t lines, size, first_line = 0, period = 1;
};

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
double silu(double z) { return z * sigmoid(z); }
double silu_slope(double z) { return sigmoid(z) * (1 + z * (1 - sigmoid(z))); }

template <class T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(convert<T>(2 * random_value()));
  return values;
}

// An output, the same under every schedule.
template <class T>
struct Output {
  std::vector<T> value, first;

  explicit Output(int64_t count) : value(count) {}
  T* data() {
    std::fill(value.begin(), value.end(), convert<T>(-77.0f));
    return value.data();
  }
  void same(uint32_t schedule, const char* kernel) {
    check_same(value, first, schedule, "out differs under schedule", kernel);
  }
  // `expected` is a sum of terms whose absolute values add up to `magnitude`.
  void near(int64_t i, double expected, double magnitude, const char* kernel) const {
    const double bound = kUnits * kRounding * magnitude + kOutputRounding<T> * std::fabs(expected) + kSmallest;
    check(std::fabs(widen(value[i]) - expected) <= bound, "out", kernel, i, widen(value[i]), expected);
  }
};

// Calls run() under every schedule and keeps its outputs.
template <class Run, class... Outputs>
void each_schedule(const char* kernel, const Run& run, Outputs&... outputs) {
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    run();
    (..., outputs.same(schedule, kernel));
  }
}

template <class T>
void check_noise(const Shape& shape, const char* kernel) {
  const int64_t seed = -5;
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < shape.period; ++r) rows.push_back((r << 33) + 7 * r);
  Output<T> out(shape.lines * shape.size);
  each_schedule(
      kernel,
      [&] {
        launch(Cuda{},
               HeadNoise<T>{&seed, rows.data(), out.data(), shape.first_line, shape.lines, shape.period, shape.size});
      },
      out);
  for (int64_t i = 0; i < shape.lines * shape.size; ++i) {
    const int64_t line = shape.first_line + i / shape.size;
    const int64_t row = rows[line % shape.period], draw = line / shape.period;
    out.near(i, reference_noise(false, seed, row, draw, i % shape.size, kHead) - 0.5, 0, kernel);
  }
}

template <class T>
void check_activations(const Shape& shape, const char* kernel) {
  const int64_t size = shape.size, count = shape.lines * size;
  const std::vector<T> product = random_values<T>(2 * count), grad = random_values<T>(count);
  const std::vector<T> added = random_values<T>(shape.period * size), bias = random_values<T>(2 * size);
  Output<T> silu_out(count), silu_grad(count), silu_again(count), gated(count), gated_grad(2 * count),
      gated_again(count);
  each_schedule(
      kernel,
      [&] {
        launch(Cuda{}, AddSilu<T>{product.data(), added.data(), silu_out.data(), shape.first_line, shape.lines,
                                  shape.period, size});
        launch(Cuda{}, AddSiluBackward<T>{product.data(), added.data(), grad.data(), silu_grad.data(),
                                          silu_again.data(), shape.first_line, shape.lines, shape.period, size});
        launch(Cuda{}, BiasSwiGlu<T>{product.data(), bias.data(), gated.data(), shape.lines, size});
        launch(Cuda{}, BiasSwiGluBackward<T>{product.data(), bias.data(), grad.data(), gated_grad.data(),
                                             gated_again.data(), shape.lines, size});
      },
      silu_out, silu_grad, silu_again, gated, gated_grad, gated_again);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t line = i / size, column = i % size, gates = 2 * line * size + column;
    const double z = widen(product[i]) + widen(added[(shape.first_line + line) % shape.period * size + column]);
    const double gate = widen(product[gates]) + widen(bias[column]), slope = widen(grad[i]);
    const double up = widen(product[gates + size]) + widen(bias[size + column]);
    silu_out.near(i, silu(z), 4, kernel);
    silu_again.near(i, silu(z), 4, kernel);
    silu_grad.near(i, slope * silu_slope(z), 8, kernel);
    gated.near(i, silu(gate) * up, 16, kernel);
    gated_again.near(i, silu(gate) * up, 16, kernel);
    gated_grad.near(gates, slope * up * silu_slope(gate), 32, kernel);
    gated_grad.near(gates + size, slope * silu(gate), 8, kernel);
  }
}

// Of a norm's inputs, one line after the other; a null vector stands for an input that is absent.
template <class T>
struct Inputs {
  std::vector<float> x;
  std::vector<T> product, bias;
  Shape shape;

  NormInput<T> pointers() const { return {pointer(x), pointer(product), pointer(bias)}; }
  double at(int64_t line, int64_t column) const {
    const int64_t i = line * shape.size + column;
    return (x.empty() ? 0 : x[i]) + (product.empty() ? 0 : widen(product[i])) +
           (bias.empty() ? 0 : widen(bias[column]));
  }
  double mean(int64_t line) const {
    double total = 0;
    for (int64_t j = 0; j < shape.size; ++j) total += at(line, j);
    return total / static_cast<double>(shape.size);
  }
  double inverse(int64_t line) const {
    const double middle = mean(line);
    double total = 0;
    for (int64_t j = 0; j < shape.size; ++j) total += (at(line, j) - middle) * (at(line, j) - middle);
    return 1 / std::sqrt(total / static_cast<double>(shape.size) + kEps);
  }

 private:
  template <class Value>
  static const Value* pointer(const std::vector<Value>& values) {
    return values.empty() ? nullptr : values.data();
  }
};

// A row for every range of lines, if there are several.
std::vector<float> partial_sums(int64_t lines, int64_t columns, int64_t count) {
  const int64_t num_ranges = LineShares(lines, columns).num_ranges;
  return std::vector<float>(num_ranges > 1 ? num_ranges * count * columns : 0);
}

template <class T, class Wide>
void check_norm(const Inputs<T>& inputs, bool with_sum, const char* kernel) {
  const int64_t lines = inputs.shape.lines, size = inputs.shape.size, count = lines * size;
  const std::vector<float> weight = random_values<float>(size), bias = random_values<float>(size);
  const std::vector<float> residual = random_values<float>(count);
  const std::vector<Wide> grad = random_values<Wide>(count);
  Output<Wide> out(count);
  Output<float> sum(with_sum ? count : 0), stream(count), statistics(2 * lines), grad_weight(size), grad_bias(size);
  Output<T> narrow(count);
  std::vector<float> partial = partial_sums(lines, size, 2);
  each_schedule(
      kernel,
      [&] {
        launch(Cuda{}, LayerNorm<T, Wide>{inputs.pointers(), with_sum ? sum.data() : nullptr, weight.data(),
                                          bias.data(), out.data(), lines, size, kEps});
        launch(Cuda{}, LayerNormBackward<T, Wide>{inputs.pointers(), weight.data(), grad.data(), residual.data(),
                                                  stream.data(), narrow.data(), statistics.data(), lines, size, kEps});
        std::fill(partial.begin(), partial.end(), NAN);
        launch(Cuda{}, NormGradients<T, Wide>{inputs.pointers(), statistics.value.data(), grad.data(),
                                              grad_weight.data(), grad_bias.data(), lines, size, partial.data()});
      },
      out, sum, stream, narrow, statistics, grad_weight, grad_bias);
  std::vector<double> weight_total(size), bias_total(size), weight_magnitude(size), bias_magnitude(size);
  for (int64_t line = 0; line < lines; ++line) {
    const double mean = inputs.mean(line), inverse = inputs.inverse(line);
    double slopes = 0, turns = 0;
    auto normal = [&](int64_t j) { return (inputs.at(line, j) - mean) * inverse; };
    auto slope = [&](int64_t j) { return static_cast<double>(widen(grad[line * size + j])) * weight[j]; };
    for (int64_t j = 0; j < size; ++j) {
      slopes += slope(j) / static_cast<double>(size);
      turns += slope(j) * normal(j) / static_cast<double>(size);
    }
    const double spread = 1 + 6 * inverse;  // how far rounding of the input moves what the norm makes of it
    for (int64_t j = 0; j < size; ++j) {
      const int64_t i = line * size + j;
      const double slope_of_grad = widen(grad[i]);
      out.near(i, normal(j) * weight[j] + bias[j], 4 * spread, kernel);
      if (with_sum) sum.near(i, inputs.at(line, j), 6, kernel);
      const double wanted = inverse * (slope(j) - slopes - normal(j) * turns) + residual[i];
      const double magnitude = 2 + 12 * inverse * spread * (1 + std::fabs(normal(j)));
      stream.near(i, wanted, magnitude, kernel);
      narrow.near(i, wanted, magnitude, kernel);
      weight_total[j] += slope_of_grad * normal(j);
      weight_magnitude[j] += 2 * spread * (1 + std::fabs(normal(j)));
      bias_total[j] += slope_of_grad;
      bias_magnitude[j] += 2;
    }
  }
  for (int64_t j = 0; j < size; ++j) {
    grad_weight.near(j, weight_total[j], weight_magnitude[j], kernel);
    grad_bias.near(j, bias_total[j], bias_magnitude[j], kernel);
  }
}

template <class T>
void check_norms(const Shape& shape, const char* kernel) {
  const int64_t size = shape.size, count = shape.lines * size;
  const Inputs<T> stream{random_values<float>(count), {}, {}, shape};
  const Inputs<T> mapped{{}, random_values<T>(count), random_values<T>(size), shape};
  const Inputs<T> all{random_values<float>(count), random_values<T>(count), random_values<T>(size), shape};
  check_norm<T, T>(stream, false, kernel);
  check_norm<T, float>(mapped, false, kernel);
  check_norm<T, T>(all, true, kernel);
}

template <class T>
void check_column_sums(const Shape& shape, const char* kernel) {
  const std::vector<T> x = random_values<T>(shape.lines * shape.size);
  Output<T> out(shape.size);
  std::vector<float> partial = partial_sums(shape.lines, shape.size, 1);
  each_schedule(
      kernel,
      [&] {
        std::fill(partial.begin(), partial.end(), NAN);
        launch(Cuda{}, ColumnSums<T>{x.data(), out.data(), shape.lines, shape.size, partial.data()});
      },
      out);
  for (int64_t j = 0; j < shape.size; ++j) {
    double total = 0;
    for (int64_t line = 0; line < shape.lines; ++line) total += widen(x[line * shape.size + j]);
    out.near(j, total, 2.0 * static_cast<double>(shape.lines), kernel);
  }
}

template <class T>
void check_all(const char* kernel) {
  for (const Shape& shape : {Shape{5, 24, 7, 3}, Shape{3, 7, 0, 1}, Shape{10, 300, 4, 5}, Shape{1, 1}}) {
    check_noise<T>(shape, kernel);
    check_activations<T>(shape, kernel);
    check_norms<T>(shape, kernel);
    check_column_sums<T>(shape, kernel);
  }
  check_column_sums<T>({0, 5}, kernel);
  // several ranges of lines: of equal length and not, in the narrowest blocks and in two blocks of columns
  for (const Shape& shape : {Shape{385, 7}, Shape{257, 24}, Shape{300, 520}}) check_column_sums<T>(shape, kernel);
  for (const Shape& shape : {Shape{67, 261}, Shape{67, 264}}) check_norms<T>(shape, kernel);
}

// Shapes alone say how a sum is shared out, and what the op sets aside is enough.
void check_shares() {
  const char* kernel = "shares of lines";
  for (const int64_t columns : {0, 1, 63, 64, 65, 128, 512, 1000, 1024, 2048, 5000, 1 << 19, 1 << 23}) {
    for (const int64_t lines : {0, 1, 31, 64, 127, 1024, 8191, 65504, 1 << 24}) {
      const LineShares shares(lines, columns);
      check(shares.tiles * shares.block_columns >= columns, "columns", kernel, lines, shares.tiles, columns);
      check(shares.num_ranges >= 1 && shares.num_ranges <= std::max<int64_t>(lines, 1), "ranges", kernel, columns,
            shares.num_ranges, lines);
      check(shares.num_ranges == 1 || shares.num_ranges * columns <= LineShares::kMostSums, "sums", kernel, columns,
            shares.num_ranges, LineShares::kMostSums);
    }
  }
  for (const int64_t size : {512, 1024, 2048}) {  // four blocks for each of 132 multiprocessors, of 65,504 lines
    const LineShares shares(65504, size);
    check(shares.num_ranges * shares.tiles >= (size < 1024 ? 512 : 1024), "blocks", kernel, size, shares.num_ranges, 0);
  }
}

}  // namespace

void check_sample_latents() {
  check_shares();
  check_all<float>("sample_latents float");
  check_all<bfloat16>("sample_latents bfloat16");
  check_all<half>("sample_latents half");
  check_column_sums<bfloat16>({5, (1 << 19) + 8}, "sample_latents bfloat16, columns enough");
}

}  // namespace calm_rt
