// Token embeddings of the encoder: a row of a table, or the sum of one row of each of several tables.
//
//   out[r] = sum over j of tables[j, ids[r, j]],  NaN where an id is outside [0, V)
//
// With one table this is the embedding. With K tables it is the squeeze of a folded encoder: what the layers and the
// squeeze make of a token depends on the token and its slot alone, so it stands ready in a table of the slot. Reads
// R*J rows of H values wherever they lie, writes R*H.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

template <class T>
struct GatherSum {
  const int64_t* ids;  // [R, J]
  const T* tables;     // [J, V, H]
  T* out;              // [R, H]
  int64_t num_rows;    // R
  int64_t num_tables;  // J
  int64_t vocabulary;  // V
  int64_t size;        // H
};

template <class T>
void launch(Cpu device, const GatherSum<T>& p);  // float, double, bfloat16, half
template <class T>
void launch(Cuda device, const GatherSum<T>& p);  // float, bfloat16, half

}  // namespace calm_rt
