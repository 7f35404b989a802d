// Exits with 1 where kernels/cpu/product.cpp is wrong: a number farther from the double sum than rounding every step of
// it allows, a row whose bits depend on the rows beside it, or a write outside of `out`.
#include "kernels/cpu/product.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

using namespace calm_rt;

struct Input {
  std::vector<float> data;
  int64_t row, column;

  float at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
};

// A matrix in either order, with room between its rows that holds NaN.
static Input make_input(std::mt19937& random, int64_t rows, int64_t columns) {
  const bool transposed = random() % 2;
  const int64_t step = (transposed ? rows : columns) + random() % 3;
  Input input{std::vector<float>((transposed ? columns : rows) * step, NAN), transposed ? 1 : step,
              transposed ? step : 1};
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) input.data[i * input.row + j * input.column] = normal(random);
  }
  return input;
}

static bool is_right(std::mt19937& random, int64_t rows, int64_t depth, int64_t columns) {
  const Input a = make_input(random, rows, depth), b = make_input(random, depth, columns);
  const Input bias = make_input(random, 1, columns);
  const bool biased = random() % 2;
  const int64_t out_row = columns + random() % 3;
  std::vector<float> out(rows * out_row, 7.f);
  MatrixProduct product{.a = a.data.data(),
                        .a_row = a.row,
                        .a_column = a.column,
                        .b = b.data.data(),
                        .b_row = b.row,
                        .b_column = b.column,
                        .bias = nullptr,
                        .out = out.data(),
                        .out_row = out_row,
                        .rows = rows,
                        .depth = depth,
                        .columns = columns};
  std::vector<float> bias_row(columns);
  for (int64_t j = 0; j < columns; ++j) bias_row[j] = bias.at(0, j);
  if (biased) product.bias = bias_row.data();
  CALM_ISA::product_kernel(product);
  const int64_t fewer = rows <= 4 ? 1 : 5;  // up to four rows are multiplied in an order of their own
  const int64_t first = random() % (rows - fewer + 1);
  std::vector<float> apart(fewer * columns);
  product.a += first * a.row;
  product.out = apart.data();
  product.out_row = columns;
  product.rows = fewer;
  CALM_ISA::product_kernel(product);
  std::vector<float> untouched(columns, 7.f);
  product.out = untouched.data();
  product.rows = 0;
  CALM_ISA::product_kernel(product);
  for (const float value : untouched) {
    if (value != 7.f) return false;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < out_row; ++j) {
      const float got = out[i * out_row + j];
      if (j >= columns) {
        if (got != 7.f) return false;
        continue;
      }
      double sum = biased ? bias_row[j] : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(a.at(i, k)) * b.at(k, j);
        sum += term;
        size += std::fabs(term);
      }
      const double steps = 2 * static_cast<double>(depth) + 2;  // each rounds by half an ulp of no more than `size`
      if (!(std::fabs(got - sum) <= steps * std::ldexp(size, -24))) return false;
      if (i >= first && i < first + fewer && got != apart[(i - first) * columns + j]) return false;
    }
  }
  return true;
}

int main() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 400; ++trial) {
    const bool deep = trial % 8 == 0, wide = trial % 8 == 1;  // beyond one block
    const int64_t rows = 1 + random() % (trial % 3 ? 40 : 5), depth = random() % (deep ? 700 : 60);
    const int64_t columns = 1 + random() % (wide ? 900 : 90);
    if (!is_right(random, rows, depth, columns)) {
      std::printf("rows %ld, depth %ld, columns %ld\n", static_cast<long>(rows), static_cast<long>(depth),
                  static_cast<long>(columns));
      return 1;
    }
  }
  return 0;
}
