// Random numbers by logical position: normal or uniform values that depend on (seed, row id, draw, position, stream)
// only.
//
//   out[d, r, l] = word l % 4 of philox(counter = (l / 4 | stream << 24, d, low rows[r], high rows[r]), key = seed)
//
// as a uniform in [0, 1) or, pairs of words through Box-Muller, as a normal (common/philox.h). Writes D*R*L values,
// reads R.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

template <class T>
struct Noise {
  const int64_t* seed;  // []
  const int64_t* rows;  // [R], logical row ids
  T* out;               // [D, R, L]
  int64_t num_draws;    // D
  int64_t num_rows;     // R
  int64_t length;       // L
  uint32_t stream;
  bool normal;  // else uniform
};

template <class T>
void launch(Cpu device, const Noise<T>& p);  // float, double
template <class T>
void launch(Cuda device, const Noise<T>& p);  // float

}  // namespace calm_rt
