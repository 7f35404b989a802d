// Four random numbers at once: the words of one Philox counter (common/philox.h) as uniforms or as normals.
#pragma once
#include "common/philox.h"
#include "kernels/cuda/primitives.cuh"

namespace calm_rt {

__device__ __forceinline__ Four uniform_four(const PhiloxWords& words) {
  Four u;
#pragma unroll
  for (int e = 0; e < kFour; ++e) u.value[e] = uniform(words.word[e]);
  return u;
}

// Box-Muller on words (0, 1) and (2, 3), cosine first. The accurate functions: sincospif takes the angle in half turns,
// so its argument is exact, and the fast ones would miss the bound that all devices share.
__device__ __forceinline__ Four normal_four(const PhiloxWords& words) {
  Four normal;
#pragma unroll
  for (int e = 0; e < kFour; e += 2) {
    const float radius = sqrtf(-2.0f * logf(uniform(words.word[e]) + kUniformStep));
    float sine, cosine;
    sincospif(2.0f * uniform(words.word[e + 1]), &sine, &cosine);
    normal.value[e] = radius * cosine;
    normal.value[e + 1] = radius * sine;
  }
  return normal;
}

}  // namespace calm_rt
