// Energy score of S model draws against M target draws drawn inside the kernel (paper equations 9 and 10).
//
//   score[r] = diversity[r] - 2 fidelity[r]
//   diversity[r] = mean over i != j of |x[i,r] - x[j,r]|^beta
//   fidelity[r]  = mean over i, m of |x[i,r] - y[m,r]|^beta,  y[m,r] = mean[r] + exp(log_std[r]) * eps[m,r]
//
// eps comes from common/philox.h (stream kTarget, draw m, row id rows[r]); no y is ever stored. The gradients of the
// score are written in the same pass. Reads S*R*L + 2*R*L values and writes as many; computes R*M*L normals and R*S*M*L
// differences.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

template <class T>
struct EnergyScore {
  using Wide = AccumulateType<T>;  // float, or double for double

  const T* x;           // [S, R, L]
  const Wide* mean;     // [R, L]
  const Wide* log_std;  // [R, L]
  const int64_t* seed;  // []
  const int64_t* rows;  // [R], logical row ids
  Wide* score;          // [R]
  Wide* diversity;      // [R]
  Wide* fidelity;       // [R]
  T* grad_x;            // [S, R, L] of the score, or nullptr
  Wide* grad_mean;      // [R, L] of the score, or nullptr
  Wide* grad_log_std;   // [R, L] of the score, or nullptr with grad_mean
  int64_t num_draws;    // S >= 2
  int64_t num_rows;     // R
  int64_t size;         // L
  int64_t num_targets;  // M >= 1
  double beta;          // in (0, 2]
};

template <class T>
void launch(Cpu device, const EnergyScore<T>& p);  // float, double, bfloat16, half
template <class T>
void launch(Cuda device, const EnergyScore<T>& p);  // float, bfloat16, half

}  // namespace calm_rt
