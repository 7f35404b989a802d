// A product of float matrices on one CPU thread:
//
//   out = a b [+ bias]
//
// Where the library multiplies floats below the processor's rate, which its choice of instructions by the processor's
// maker brings about, and where there are few rows, the ops multiply here instead (Products in common/isa.h). Each
// number of `out` is a sum over depth in one order, whatever surrounds it and at whatever address: a row's bits depend
// on whether there are more than four rows and, up to four, on which of a and b lies transposed. Packed, reads a once
// for every 384 columns and b once; where it is not (few rows, shallow sums), b once for every four rows. Computes rows
// * depth * columns products.
#pragma once
#include <cstdint>

#include "common/device.h"

namespace calm_rt {

// Up to so many rows reading b is what takes the time, and packing it would double that.
constexpr int64_t kFewProductRows = 4;

struct MatrixProduct {
  const float* a;  // [rows, depth]
  int64_t a_row, a_column;
  const float* b;  // [depth, columns]
  int64_t b_row, b_column;
  const float* bias;  // [columns], or nullptr
  float* out;         // [rows, columns], its rows contiguous
  int64_t out_row;
  int64_t rows, depth, columns;  // a_row and the like: from row to row, and from column to column
};

// Runs on the calling thread.
void launch(Cpu device, const MatrixProduct& p);

}  // namespace calm_rt
