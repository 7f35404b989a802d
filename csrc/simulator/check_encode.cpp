// Sums of table rows in the simulator, against the definition.
#include "kernels/encode.h"
#include "simulator/check.h"

namespace calm_rt {
namespace {

template <class T>
void check_gather_sum(int64_t rows, int64_t tables, int64_t vocabulary, int64_t size, const char* kernel) {
  std::vector<T> table(tables * vocabulary * size);
  for (T& value : table) value = convert<T>(random_value());
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < rows * tables; ++i) ids.push_back(i * 7 % vocabulary);
  if (rows > 2) ids[1] = -1, ids[2 * tables] = vocabulary;
  std::vector<T> first;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    std::vector<T> out(rows * size, convert<T>(0.5f));
    launch(Cuda{}, GatherSum<T>{ids.data(), table.data(), out.data(), rows, tables, vocabulary, size});
    check_same(out, first, schedule, "out differs under schedule", kernel);
  }
  for (int64_t i = 0; i < rows * size; ++i) {
    double expected = 0, magnitude = 0;
    for (int64_t j = 0; j < tables; ++j) {
      const int64_t id = ids[i / size * tables + j];
      const bool known = id >= 0 && id < vocabulary;
      const double term = known ? widen(table[(j * vocabulary + id) * size + i % size]) : std::nan("");
      expected += term;
      magnitude += std::fabs(term);
    }
    const double value = widen(first[i]), bound = (kUnits * kRounding + kOutputRounding<T>)*magnitude;
    const bool holds = std::isnan(expected) ? std::isnan(value) : std::fabs(value - expected) <= bound;
    check(holds, "out", kernel, i, value, expected);
  }
}

}  // namespace

void check_encode() {
  check_gather_sum<float>(5, 4, 9, 33, "gather_sum float");
  check_gather_sum<float>(3, 1, 6, 300, "gather_sum float");
  check_gather_sum<bfloat16>(4, 3, 5, 17, "gather_sum bfloat16");
  check_gather_sum<half>(2, 2, 5, 1, "gather_sum half");
}

}  // namespace calm_rt
