// The kernels between the products of a gated MLP in the simulator, against their definitions in double.
#include <functional>

#include "kernels/gated_mlp.h"
#include "simulator/check.h"

namespace calm_rt {
namespace {

constexpr double kEps = 1e-5;

template <class T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = convert<T>(random_value());
  return values;
}

// Compares every element with expected(i), whose absolute terms sum up to less than `magnitude`.
template <class T>
void check_values(const std::vector<T>& values, const char* what, const char* kernel, double magnitude,
                  const std::function<double(int64_t)>& expected) {
  const double bound = (kUnits * kRounding + kOutputRounding<T>)*magnitude + kSmallest * (sizeof(T) == 2);
  for (size_t i = 0; i < values.size(); ++i) {
    const double value = widen(values[i]), truth = expected(static_cast<int64_t>(i));
    check(std::fabs(value - truth) <= bound, what, kernel, static_cast<int64_t>(i), value, truth);
  }
}

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

template <class T>
void check_elements(int64_t count, const char* kernel) {
  const auto gate = random_values<T>(count), up = random_values<T>(count), grad = random_values<T>(count);
  const auto x = random_values<T>(count);
  std::vector<T> first, first_gate;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    std::vector<T> out(count), grad_gate(count), grad_up(count), gated = grad, sum(count);
    launch(Cuda{}, SwiGlu<T>{gate.data(), up.data(), out.data(), count});
    launch(Cuda{}, AddResidual<T, T>{x.data(), up.data(), sum.data(), count});
    launch(Cuda{}, SwiGluBackward<T>{gate.data(), up.data(), gated.data(), grad_gate.data(), grad_up.data(),
                                     gated.data(), count});
    check_same(out, first, schedule, "silu(gate) * up differs under schedule", kernel);
    check_same(grad_gate, first_gate, schedule, "grad_gate differs under schedule", kernel);
    const auto silu = [&](int64_t i) { return widen(gate[i]) * sigmoid(widen(gate[i])); };
    const auto gated_truth = [&](int64_t i) { return silu(i) * widen(up[i]); };
    check_values(out, "silu(gate) * up", kernel, 1, gated_truth);
    check_values(gated, "gated", kernel, 1, gated_truth);
    check_values(sum, "x + product", kernel, 2, [&](int64_t i) { return double{widen(x[i])} + widen(up[i]); });
    check_values(grad_up, "grad_up", kernel, 1, [&](int64_t i) { return widen(grad[i]) * silu(i); });
    check_values(grad_gate, "grad_gate", kernel, 2, [&](int64_t i) {
      const double share = sigmoid(widen(gate[i]));
      return widen(grad[i]) * widen(up[i]) * share * (1 + widen(gate[i]) * (1 - share));
    });
  }
}

template <class X, class T>
void check_norm(int64_t rows, int64_t size, const char* kernel) {
  const auto x = random_values<X>(rows * size), grad_out = random_values<X>(rows * size);
  const auto weight = random_values<float>(size);
  const auto grad_a = random_values<T>(rows * size), grad_b = random_values<T>(rows * size);
  const int64_t partials = (rows + kPartialRows - 1) / kPartialRows;
  const auto row_mean = [&](int64_t r, const std::function<double(int64_t)>& value) {
    double total = 0;
    for (int64_t i = r * size; i < (r + 1) * size; ++i) total += value(i);
    return total / static_cast<double>(size);
  };
  const auto grad = [&](int64_t i) { return double{widen(grad_a[i])} + widen(grad_b[i]); };
  std::vector<double> inverse(rows), turn(rows);  // 1 / rms, and the mean of weight * gradient * normal
  const auto normal = [&](int64_t i) { return widen(x[i]) * inverse[i / size]; };
  for (int64_t r = 0; r < rows; ++r) {
    inverse[r] = 1 / std::sqrt(row_mean(r, [&](int64_t i) { return double{widen(x[i])} * widen(x[i]); }) + kEps);
    turn[r] = row_mean(r, [&](int64_t i) { return weight[i % size] * grad(i) * normal(i); });
  }
  std::vector<X> first_x;
  std::vector<float> first_weight;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    std::vector<T> out(rows * size);
    std::vector<X> grad_x(rows * size);
    std::vector<float> partial(partials * size), grad_weight(size);
    launch(Cuda{}, RmsNorm<X, T>{x.data(), weight.data(), out.data(), rows, size, kEps});
    launch(Cuda{}, RmsNormBackward<X, T>{.x = x.data(),
                                         .weight = weight.data(),
                                         .grad_normal = {grad_a.data(), grad_b.data()},
                                         .grad_out = grad_out.data(),
                                         .grad_x = grad_x.data(),
                                         .partial = partial.data(),
                                         .num_rows = rows,
                                         .size = size,
                                         .eps = kEps});
    launch(Cuda{}, SumRows<float>{partial.data(), grad_weight.data(), partials, size});
    check_same(grad_x, first_x, schedule, "grad_x differs under schedule", kernel);
    check_same(grad_weight, first_weight, schedule, "grad_weight differs under schedule", kernel);
    const double most = 1 / std::sqrt(kEps);  // what a row of tiny values may be multiplied by
    check_values(out, "normalised", kernel, std::sqrt(static_cast<double>(size)),
                 [&](int64_t i) { return normal(i) * weight[i % size]; });
    check_values(grad_weight, "grad_weight", kernel, 4.0 * static_cast<double>(rows), [&](int64_t l) {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r) total += grad(r * size + l) * normal(r * size + l);
      return total;
    });
    check_values(grad_x, "grad_x", kernel, size == 1 ? most : 32, [&](int64_t i) {
      const int64_t r = i / size;
      return widen(grad_out[i]) + inverse[r] * (weight[i % size] * grad(i) - normal(i) * turn[r]);
    });
  }
}

void check_sum_rows(int64_t rows, int64_t size, const char* kernel) {
  const auto in = random_values<float>(rows * size);
  std::vector<float> first;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    std::vector<float> out(size, NAN);
    launch(Cuda{}, SumRows<float>{in.data(), out.data(), rows, size});
    check_same(out, first, schedule, "the sum of rows differs under schedule", kernel);
    check_values(out, "sum of rows", kernel, static_cast<double>(rows), [&](int64_t i) {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r) total += in[r * size + i];
      return total;
    });
  }
}

}  // namespace

void check_gated_mlp() {
  check_elements<float>(4096, "swiglu float");
  check_elements<bfloat16>(1003, "swiglu bfloat16");
  check_elements<half>(7, "swiglu half");
  check_norm<float, float>(70, 40, "rms_norm float");
  check_norm<float, bfloat16>(33, 24, "rms_norm float, bfloat16");
  check_norm<bfloat16, bfloat16>(5, 300, "rms_norm bfloat16");
  check_norm<half, half>(3, 13, "rms_norm half");
  check_sum_rows(300, 40, "sum_rows");
  check_sum_rows(17, 1, "sum_rows");
  check_sum_rows(0, 33, "sum_rows");
}

}  // namespace calm_rt
