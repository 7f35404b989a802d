// Which candidates of a pool may still be equal to another once their first `depth` tokens are known: what remains to
// be decoded of a lazy pool, at the front of a list whose length only the device knows.
//
//   alive[b, s] = another candidate of pool b has the first `depth` tokens of candidate s, or s = kept[b]
//   order = the numbers b S + s of those alive, then of the others, each in their order; count = how many are alive
//
// Reads B*S*depth tokens (twice on CUDA) and B values, writes B*S + 1.
#pragma once
#include <cstdint>

#include "common/device.h"

namespace calm_rt {

struct Survivors {
  const int64_t* tokens;  // [B, S, K]
  const int64_t* kept;    // [B], a candidate, or no candidate's number
  uint8_t* alive;         // [B, S], workspace
  int64_t* totals;        // [B] on CUDA, workspace: those alive in each pool; nullptr on the CPU
  int64_t* order;         // [B S]
  int64_t* count;         // []
  int64_t num_rows;       // B
  int64_t pool;           // S >= 1
  int64_t patch;          // K
  int64_t depth;          // from 0 to K
};

void launch(Cpu device, const Survivors& p);
void launch(Cuda device, const Survivors& p);

}  // namespace calm_rt
