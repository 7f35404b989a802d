// Score and gradients against the formula in double, each within the rounding of the terms it sums up.
#include "common/philox.h"
#include "kernels/energy_score.h"
#include "simulator/check.h"

namespace calm_rt {
namespace {

struct Shape {
  int64_t draws, targets, rows, length;
  double beta;
  bool grad_x = true, grad_target = true;
  int64_t offset = 0;  // of every input, in elements behind where its memory begins
};

template <class T>
struct Results {
  std::vector<float> score, diversity, fidelity, grad_mean, grad_log_std;
  std::vector<T> grad_x;
};

// A value and the sum of the absolute terms that rounding errors are in proportion to.
struct Bounded {
  double value = 0, scale = 0;
  void add(double term, double size) {
    value += term;
    scale += size;
  }
};

template <class T>
void check_row(const Shape& shape, const T* x, const float* mean, const float* log_std, int64_t seed, int64_t id,
               int64_t row, const Results<T>& got) {
  const int64_t S = shape.draws, M = shape.targets, R = shape.rows, L = shape.length;
  Bounded diversity, fidelity;
  std::vector<Bounded> grad_x(S * L), grad_mean(L), grad_log_std(L);
  std::vector<double> y(L), delta(L);
  for (int64_t t = 0; t < S + M; ++t) {
    double y_norm = 0;
    for (int64_t l = 0; l < L; ++l) {
      const double eps = t < S ? 0 : reference_noise(true, seed, id, t - S, l, kTarget);
      delta[l] = std::exp(static_cast<double>(log_std[row * L + l])) * eps;
      y[l] = t < S ? widen(x[(t * R + row) * L + l]) : mean[row * L + l] + delta[l];
      y_norm += std::pow(std::fabs(y[l]) + std::fabs(delta[l]), 2);
    }
    const double scale = t < S ? 2.0 / (S * (S - 1)) : -2.0 / (S * M);
    for (int64_t i = 0; i < S; ++i) {
      double squared = 0, x_norm = 0;
      for (int64_t l = 0; l < L; ++l) {
        const double value = widen(x[(i * R + row) * L + l]);
        squared += (value - y[l]) * (value - y[l]);
        x_norm += value * value;
      }
      if (squared == 0) continue;
      const double distance = std::sqrt(squared), weight = scale * shape.beta * std::pow(distance, shape.beta - 2);
      // an error of the vectors' own size moves the distance, and with it power and weight
      const double shift = std::sqrt(x_norm) + std::sqrt(y_norm) + distance;
      (t < S ? diversity : fidelity)
          .add(std::pow(distance, shape.beta),
               shape.beta * std::pow(distance, shape.beta - 1) * shift + std::pow(distance, shape.beta));
      for (int64_t l = 0; l < L; ++l) {
        const double term = weight * (widen(x[(i * R + row) * L + l]) - y[l]);
        grad_x[i * L + l].add(term, std::fabs(weight) * shift);
        if (t < S) continue;
        grad_mean[l].add(-term, std::fabs(weight) * shift);
        grad_log_std[l].add(-term * delta[l],
                            std::fabs(weight * delta[l]) * shift + std::fabs(term) * std::fabs(delta[l]));
      }
    }
  }
  const char* kernel = "energy_score";
  auto near = [&](const char* what, int64_t index, double value, const Bounded& expected, double divisor = 1,
                  double output = 0) {
    const double wanted = expected.value / divisor;
    const double bound = kUnits * kRounding * expected.scale / divisor + output * (std::fabs(wanted) + kSmallest);
    check(std::fabs(value - wanted) <= bound, what, kernel, index, value, wanted);
  };
  near("diversity", row, got.diversity[row], diversity, S * (S - 1));
  near("fidelity", row, got.fidelity[row], fidelity, S * M);
  const double score = static_cast<double>(got.diversity[row]) - 2 * static_cast<double>(got.fidelity[row]);
  check(std::fabs(got.score[row] - score) <= kRounding * std::fabs(score), "score", kernel, row, got.score[row], score);
  for (int64_t l = 0; l < L; ++l) {
    const int64_t at = row * L + l;
    for (int64_t i = 0; i < S && shape.grad_x; ++i) {
      near("grad_x", i * R * L + at, widen(got.grad_x[i * R * L + at]), grad_x[i * L + l], 1, kOutputRounding<T>);
    }
    if (!shape.grad_target) continue;
    near("grad_mean", at, got.grad_mean[at], grad_mean[l]);
    near("grad_log_std", at, got.grad_log_std[at], grad_log_std[l]);
  }
}

template <class T>
void check_energy_score(const Shape& shape) {
  const int64_t S = shape.draws, R = shape.rows, L = shape.length, seed = -7;
  std::vector<T> all_x(shape.offset + S * R * L);
  std::vector<float> all_mean(shape.offset + R * L), all_log_std(shape.offset + R * L);
  T* x = all_x.data() + shape.offset;
  float *mean = all_mean.data() + shape.offset, *log_std = all_log_std.data() + shape.offset;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < S * R * L; ++i) x[i] = convert<T>(2 * random_value());
  for (int64_t l = 0; l < L; ++l) x[(S - 1) * R * L + l] = x[l];  // two equal draws in row 0
  for (int64_t i = 0; i < R * L; ++i) mean[i] = random_value();
  for (int64_t i = 0; i < R * L; ++i) log_std[i] = random_value() - 1;
  for (int64_t r = 0; r < R; ++r) ids.push_back((r + 1) << 33 | r);
  Results<T> first;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    Results<T> got;
    got.score.resize(R, NAN);
    got.diversity.resize(R, NAN);
    got.fidelity.resize(R, NAN);
    if (shape.grad_x) got.grad_x.resize(S * R * L, convert<T>(NAN));
    if (shape.grad_target) got.grad_mean.resize(R * L, NAN);
    if (shape.grad_target) got.grad_log_std.resize(R * L, NAN);
    launch(Cuda{}, EnergyScore<T>{.x = x,
                                  .mean = mean,
                                  .log_std = log_std,
                                  .seed = &seed,
                                  .rows = ids.data(),
                                  .score = got.score.data(),
                                  .diversity = got.diversity.data(),
                                  .fidelity = got.fidelity.data(),
                                  .grad_x = shape.grad_x ? got.grad_x.data() : nullptr,
                                  .grad_mean = shape.grad_target ? got.grad_mean.data() : nullptr,
                                  .grad_log_std = shape.grad_target ? got.grad_log_std.data() : nullptr,
                                  .num_draws = S,
                                  .num_rows = R,
                                  .size = L,
                                  .num_targets = shape.targets,
                                  .beta = shape.beta});
    for (int64_t row = 0; row < R && schedule == 0; ++row) check_row(shape, x, mean, log_std, seed, ids[row], row, got);
    check_same(got.score, first.score, schedule, "score differs under schedule", "energy_score");
    check_same(got.grad_x, first.grad_x, schedule, "grad_x differs under schedule", "energy_score");
    check_same(got.grad_mean, first.grad_mean, schedule, "grad_mean differs under schedule", "energy_score");
    check_same(got.grad_log_std, first.grad_log_std, schedule, "grad_log_std differs under schedule", "energy_score");
  }
}

}  // namespace

void check_energy_score() {
  const Shape shapes[] = {
      {2, 1, 1, 1, 1.0},                   // the least
      {3, 5, 5, 7, 0.5},                   // rows that are not packed, a short tile of 4
      {8, 6, 6, 128, 1.0},                 // full warps, more rows than warps in a block
      {9, 4, 2, 36, 2.0},                  // two tiles of 8
      {4, 3, 2, 130, 1.5},                 // two groups a lane
      {6, 3, 1, 256, 1.0},                 //
      {5, 7, 2, 257, 1.0},                 // a block a row
      {9, 250, 1, 260, 1.0},               // more targets than shared memory holds weights for
      {2, 3, 1, 1030, 0.7},                // two panels
      {3, 254, 1, 1030, 1.0},              // and both
      {4, 3, 2, 20, 1.0, true, false},     // only one of the gradients, or none
      {4, 3, 2, 20, 1.0, false, true},     //
      {4, 3, 2, 20, 1.0, false, false},    //
      {3, 3, 1, 300, 1.0, true, false},    //
      {3, 3, 1, 1028, 1.0, false, false},  //
      {3, 3, 2, 8, 1.0, true, true, 1},    // packs but for where they begin
      {3, 3, 1, 260, 1.0, true, true, 1},  //
  };
  for (const Shape& shape : shapes) check_energy_score<float>(shape);
  for (int64_t length : {5, 128, 260}) {
    check_energy_score<bfloat16>({5, 3, 2, length, 1.0});
    check_energy_score<half>({5, 3, 2, length, 1.0});
  }
}

}  // namespace calm_rt
