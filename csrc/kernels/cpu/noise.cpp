// Noise on the CPU: one vector of counters at a time, put back into the order of positions. Where a row has fewer
// counters than a vector has lanes, several rows share it.
#include "kernels/noise.h"

#include "kernels/cpu/random.h"
#include "kernels/cpu/select.h"

namespace calm_rt {

CALM_EACH_ISA(template <class T> void noise_kernel(const Noise<T>& p, int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

// Rows of at most kLanes counters.
void short_rows(const Noise<float>& p, int64_t begin, int64_t end) {
  const Keys keys(static_cast<uint64_t>(*p.seed));
  int64_t i = begin, position = 0, draw = begin / p.num_rows, row = begin % p.num_rows;
  while (i < end) {
    uint64_t word[4][2][kLanes / 2] = {};
    float* to[kLanes];
    int64_t left[kLanes];  // numbers of the row from here on
    int count = 0;
    for (; count < kLanes && i < end; ++count) {
      const PhiloxWords counter =
          philox_counter(static_cast<uint32_t>(position / 4), p.stream, static_cast<uint32_t>(draw), p.rows[row]);
      for (int j = 0; j < 4; ++j) word[j][count % 2][count / 2] = counter.word[j];
      to[count] = p.out + i * p.length + position;
      left[count] = p.length - position;
      position += 4;
      if (position < p.length) continue;
      position = 0;
      ++i;
      if (++row < p.num_rows) continue;
      row = 0;
      ++draw;
    }
    Counters counters;
    std::memcpy(&counters, word, sizeof word);
    Float value[4];
    uniforms(counters, keys, value);
    if (p.normal) box_muller(value);
    float block[4][kLanes];
    for (int j = 0; j < 4; ++j) store(block[j], value[j]);
    for (int n = 0; n < count; ++n) {
      for (int j = 0; j < 4 && j < left[n]; ++j) to[n][j] = block[j][n];
    }
  }
}

}  // namespace

// Rows of the output, one per draw and row id, from begin to end.
template <class T>
void noise_kernel(const Noise<T>& p, int64_t begin, int64_t end) {
  using V = Vector<T>;
  constexpr int kWidth = 4 * lanes<V>;
  if constexpr (lanes<V> == kLanes) {
    if (p.length < kWidth) return short_rows(p, begin, end);
  }
  const Keys keys(static_cast<uint64_t>(*p.seed));
  for (int64_t i = begin; i < end; ++i) {
    T* out = p.out + i * p.length;
    const uint32_t draw = static_cast<uint32_t>(i / p.num_rows);
    const int64_t row = p.rows[i % p.num_rows];
    for (int64_t l = 0; l < p.length; l += kWidth) {
      V value[4];
      T block[4][lanes<V>];
      uniforms(static_cast<uint32_t>(l / 4), p.stream, draw, row, keys, value);
      if (p.normal) box_muller(value);
      for (int j = 0; j < 4; ++j) store(block[j], value[j]);
      if (l + kWidth <= p.length) {
        for (int i = 0; i < lanes<V>; ++i) {
          for (int j = 0; j < 4; ++j) out[l + 4 * i + j] = block[j][i];
        }
      } else {
        for (int64_t k = 0; l + k < p.length; ++k) out[l + k] = block[k % 4][k / 4];
      }
    }
  }
}

template void noise_kernel(const Noise<float>&, int64_t, int64_t);
template void noise_kernel(const Noise<double>&, int64_t, int64_t);

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
template <class T>
void launch(Cpu device, const Noise<T>& p) {
  if (p.length == 0) return;
  const int64_t grain = 1 + 16384 / p.length;  // about 20 us of work
  parallel_rows(device, p.num_draws * p.num_rows, grain,
                [&](int64_t begin, int64_t end) { CALM_SELECT(noise_kernel<T>)(p, begin, end); });
}

template void launch(Cpu, const Noise<float>&);
template void launch(Cpu, const Noise<double>&);
#endif

}  // namespace calm_rt
