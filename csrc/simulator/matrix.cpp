// What the matrix instructions of a warp do with what its 32 lanes brought. Not instrumented, as all of the scheduler:
// lanes exchange registers here, which is no access to memory.
//
// Lane l is l / 4 and l % 4 in the layouts of the PTX manual: of an 8 x 8 matrix it holds two elements of row l / 4
// from column 2 (l % 4) on.
#include <cmath>
#include <cstring>

#include "simulator/engine.h"

namespace calm_rt::simulator {
namespace {

constexpr int kRows = 16, kColumns = 8, kInner = 16;

float element(uint32_t words, int half) {
  const uint32_t bits = half == 0 ? words << 16 : words & 0xFFFF0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

float truncate(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) && std::isfinite(x) ? std::nextafter(nearest, 0.0f)
                                                                                    : nearest;
}

void load_matrices(const std::array<uint64_t, kLanes>& rows) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto* row = reinterpret_cast<const MatrixRow*>(rows[matrix * 8 + lane / 4]);
      reinterpret_cast<MatrixRow*>(rows[lane])->result[matrix] = row->words[lane % 4];
    }
  }
}

void multiply_matrices(const std::array<uint64_t, kLanes>& products) {
  float a[kRows][kInner], b[kColumns][kInner];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* product = reinterpret_cast<const MatrixProduct*>(products[lane]);
    const int row = lane / 4, first = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][first + half + i / 2 * 8] = element(product->a[i], half);
      for (int i = 0; i < 2; ++i) b[row][first + half + i * 8] = element(product->b[i], half);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* sum = reinterpret_cast<const MatrixProduct*>(products[lane])->sum;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double total = sum[i];
      for (int k = 0; k < kInner; ++k) total += static_cast<double>(a[row][k]) * static_cast<double>(b[column][k]);
      sum[i] = truncate(total);
    }
  }
}

}  // namespace calm_rt::simulator
