// Energy score on the CPU: one row at a time, a few targets at a time.
//
// A row's draws, its posterior and its gradients stay in a scratch of (2S + 14) L values, which fits the first caches.
// There they lie in the order in which Philox makes them, 4 vectors of one counter each, so normals are never
// rearranged: distances do not mind the order. Each target is made once and meets all S draws; a tile of 4 targets by
// kDrawTile draws shares its loads.
#include "kernels/energy_score.h"

#include "kernels/cpu/random.h"
#include "kernels/cpu/select.h"

#ifdef CALM_ISA_PORTABLE
#include <memory>
#endif

namespace calm_rt {

CALM_EACH_ISA(template <class T> void energy_score_kernel(const EnergyScore<T>& p, AccumulateType<T>* scratch,
                                                          int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

constexpr int kTargetTile = 4;
constexpr int kDrawTile = kLanes == 16 ? 4 : 2;  // 16 or 8 sums in registers beside their operands

// Scratch of one row. All vectors are `padded` long, zeros beyond L.
template <class Wide>
struct Row {
  int64_t padded, num_draws, draws_padded;
  Wide *x, *grad_x;                             // [S, padded]
  Wide *mean, *std, *grad_mean, *grad_log_std;  // [padded]
  Wide *y, *delta;                              // [kTargetTile, padded], y = mean + delta
  Wide* counters;                               // [2 padded], of start_uniforms
  Wide* weight;                                 // [kTargetTile draws_padded], squared distances, then gradient weights

  Row(Wide* scratch, int64_t draws, int64_t length, int width, int lane_count)
      : padded((length + width - 1) / width * width),
        num_draws(draws),
        draws_padded((draws + lane_count - 1) / lane_count * lane_count) {
    auto take = [&](int64_t count) {
      Wide* start = scratch;
      scratch += count;
      return start;
    };
    x = take(draws * padded);
    grad_x = take(draws * padded);
    mean = take(padded);
    std = take(padded);
    grad_mean = take(padded);
    grad_log_std = take(padded);
    y = take(kTargetTile * padded);
    delta = take(kTargetTile * padded);
    counters = take(2 * padded);
    weight = take(kTargetTile * draws_padded);
  }
};

// Vector j, lane i is number 4 i + j of 4 vectors; and back. Both halves of a result come from two vectors each.
CALM_INLINE void deinterleave(Float (&v)[4]) {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Int halves = lane + (lane >= kLanes / 2) * -(kLanes / 2), first = lane * 4;
  Float out[4];
  for (int j = 0; j < 4; ++j) {
    const Int from = (first + j) & (2 * kLanes - 1);
    out[j] = __builtin_shuffle(__builtin_shuffle(v[0], v[1], from), __builtin_shuffle(v[2], v[3], from), halves);
  }
  for (int j = 0; j < 4; ++j) v[j] = out[j];
}
CALM_INLINE void interleave(Float (&v)[4]) {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Int odd = lane & 1, second = (lane & 2) != 0;
  Float out[4];
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Int from = (lane >> 2) + quarter * (kLanes / 4) + odd * kLanes;
    out[quarter] = select(second, __builtin_shuffle(v[2], v[3], from), __builtin_shuffle(v[0], v[1], from));
  }
  for (int j = 0; j < 4; ++j) v[j] = out[j];
}
CALM_INLINE void deinterleave(double (&)[4]) {}
CALM_INLINE void interleave(double (&)[4]) {}

// A row's values in the order of the scratch, `beyond` behind them; and back.
template <class V, class T, class Wide>
CALM_INLINE void read_row(const T* from, int64_t length, int64_t padded, Wide beyond, Wide* to) {
  constexpr int kWidth = 4 * lanes<V>;
  for (int64_t base = 0; base < padded; base += kWidth) {
    V v[4];
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t first = base + j * lanes<V>;
      if (first + lanes<V> <= length) {
        if constexpr (lanes<V> == 1)
          v[j] = widen(from[first]);
        else
          v[j] = load(from + first);
        continue;
      }
      Wide part[lanes<V>];
      for (int64_t i = 0; i < lanes<V>; ++i) part[i] = first + i < length ? widen(from[first + i]) : beyond;
      v[j] = load(part);
    }
    deinterleave(v);
    for (int j = 0; j < 4; ++j) store(to + base + j * lanes<V>, v[j]);
  }
}

template <class V, class T, class Wide>
CALM_INLINE void write_row(const Wide* from, int64_t length, T* to) {
  constexpr int kWidth = 4 * lanes<V>;
  for (int64_t base = 0; base < length; base += kWidth) {
    V v[4];
    for (int j = 0; j < 4; ++j) v[j] = load(from + base + j * lanes<V>);
    interleave(v);
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t first = base + j * lanes<V>, count = length - first;
      if (count <= 0) break;
      store_some(to + first, v[j], count < lanes<V> ? count : lanes<V>);
    }
  }
}

template <class Wide>
constexpr double kLargestOf = sizeof(Wide) == 4 ? __FLT_MAX__ : __DBL_MAX__;

// Turns `count` squared distances into the weights scale * beta * d^(beta - 1) / d of their gradients, 0 at distance 0;
// returns the sum of d^beta.
template <class V, class Wide>
CALM_INLINE double weigh(Wide* squared, int64_t count, double beta, double scale) {
  double total = 0;
  if (beta == 1) {
    for (int64_t k = 0; k < count; k += lanes<V>) {
      V d = square_root(load(squared + k));
      V w = static_cast<Wide>(scale) / d;
      store(squared + k, d == 0 ? V{} : w);
      total += sum(d);
    }
    return total;
  }
  for (int64_t k = 0; k < count; ++k) {
    const double d = __builtin_sqrt(squared[k]);
    // in this order an infinite d gives NaN where beta > 1, as the overflow of a gradient that is not 0 should
    double weight = scale * beta * __builtin_pow(d, beta - 1) / d;
    if (weight > kLargestOf<Wide>) weight = kLargestOf<Wide>;  // of a d below 1e-20: the gradient stays finite
    if (weight < -kLargestOf<Wide>) weight = -kLargestOf<Wide>;
    squared[k] = d == 0 ? 0 : static_cast<Wide>(weight);
    total += d == 0 ? 0 : __builtin_pow(d, beta);
  }
  return total;
}

// The uniforms of a row's targets, in two steps: what all of them share, and those of values l ... of a few targets.
CALM_INLINE void start_targets(const Row<float>& row, int64_t row_id, const Keys& keys) {
  for (int64_t l = 0; l < row.padded; l += 4 * kLanes) {
    start_uniforms(static_cast<uint32_t>(l / 4), kTarget, row_id, keys, row.counters + l / (4 * kLanes) * kRowCounters);
  }
}
CALM_INLINE void start_targets(const Row<double>&, int64_t, const Keys&) {}

template <int kTargets>
CALM_INLINE void target_uniforms(const Row<float>& row, int64_t l, uint32_t target, int64_t row_id, const Keys& keys,
                                 Float (&value)[kTargets][4]) {
  finish_uniforms(row.counters + l / (4 * kLanes) * kRowCounters, target, row_id, keys, value);
}
template <int kTargets>
CALM_INLINE void target_uniforms(const Row<double>&, int64_t l, uint32_t target, int64_t row_id, const Keys& keys,
                                 double (&value)[kTargets][4]) {
  for (int t = 0; t < kTargets; ++t) {
    uniforms(static_cast<uint32_t>(l / 4), kTarget, target + static_cast<uint32_t>(t), row_id, keys, value[t]);
  }
}

// The mean of |x_i - x_j|^beta over pairs; its gradient starts grad_x.
template <class V, class Wide>
CALM_INLINE double diversity(const Row<Wide>& row, double beta) {
  double total = 0;
  const double pairs = 0.5 * static_cast<double>(row.num_draws) * static_cast<double>(row.num_draws - 1);
  for (int64_t i = 0; i + 1 < row.num_draws; ++i) {
    const Wide* a = row.x + i * row.padded;
    int64_t others = row.num_draws - i - 1;
    for (int64_t k = 0; k < row.draws_padded; ++k) row.weight[k] = 0;
    for (int64_t k = 0; k < others; ++k) {
      V squared{};
      for (int64_t l = 0; l < row.padded; l += lanes<V>) {
        V difference = load(a + l) - load(a + (k + 1) * row.padded + l);
        squared += difference * difference;
      }
      row.weight[k] = sum(squared);
    }
    total += weigh<V>(row.weight, row.draws_padded, beta, 1 / pairs);
    for (int64_t k = 0; k < others; ++k) {
      Wide *grad_a = row.grad_x + i * row.padded, *grad_b = grad_a + (k + 1) * row.padded;
      for (int64_t l = 0; l < row.padded; l += lanes<V>) {
        V step = row.weight[k] * (load(a + l) - load(a + (k + 1) * row.padded + l));
        store(grad_a + l, load(grad_a + l) + step);
        store(grad_b + l, load(grad_b + l) - step);
      }
    }
  }
  return total / pairs;
}

// Where the weights of draw s lie: those of Draws draws and Targets targets after each other, as registers hold them.
// Element t * stride is that of target t.
template <int Targets, class Wide>
struct DrawWeights {
  Wide* first;
  int64_t stride;

  DrawWeights(const Row<Wide>& row, int64_t s) {
    const bool tiled = s < row.num_draws / kDrawTile * kDrawTile;
    first = row.weight + (tiled ? s / kDrawTile * kDrawTile * Targets + s % kDrawTile : s * Targets);
    stride = tiled ? kDrawTile : 1;
  }
};

// out[i] = the sum over v[i].
template <int Count, class V, class Wide>
CALM_INLINE void store_sums(V (&v)[Count], Wide* out) {
  if constexpr (lanes<V> == kLanes && Count % kLanes == 0) {
    for (int first = 0; first < Count; first += kLanes) {
      V part[kLanes];
      for (int i = 0; i < kLanes; ++i) part[i] = v[first + i];
      store(out + first, sums(part));
    }
  } else {
    for (int i = 0; i < Count; ++i) out[i] = sum(v[i]);
  }
}

template <int Targets, int Draws, class V, class Wide>
CALM_INLINE void squared_distances(const Row<Wide>& row, int64_t draw) {
  V squared[Targets * Draws] = {};
  for (int64_t l = 0; l < row.padded; l += lanes<V>) {
    V y[Targets];
    for (int t = 0; t < Targets; ++t) y[t] = load(row.y + t * row.padded + l);
    for (int s = 0; s < Draws; ++s) {
      V x = load(row.x + (draw + s) * row.padded + l);
      for (int t = 0; t < Targets; ++t) squared[t * Draws + s] += (x - y[t]) * (x - y[t]);
    }
  }
  store_sums(squared, row.weight + draw * Targets);
}

template <int Targets, int Draws, class V, class Wide>
CALM_INLINE void add_gradients(const Row<Wide>& row, int64_t draw) {
  V weight[Draws][Targets];
  for (int s = 0; s < Draws; ++s) {
    const DrawWeights<Targets, Wide> weights(row, draw + s);
    for (int t = 0; t < Targets; ++t) weight[s][t] = splat<V>(weights.first[t * weights.stride]);
  }
  for (int64_t l = 0; l < row.padded; l += lanes<V>) {
    V y[Targets];
    for (int t = 0; t < Targets; ++t) y[t] = load(row.y + t * row.padded + l);
    for (int s = 0; s < Draws; ++s) {
      const int64_t k = (draw + s) * row.padded + l;
      V x = load(row.x + k), grad = load(row.grad_x + k);
      for (int t = 0; t < Targets; ++t) grad += weight[s][t] * (x - y[t]);
      store(row.grad_x + k, grad);
    }
  }
}

// Makes targets first ... first + Targets - 1 of the row and adds them to the fidelity and the gradients.
template <int Targets, class V, class T, class Wide>
CALM_INLINE double add_targets(const EnergyScore<T>& p, const Row<Wide>& row, int64_t r, int64_t first, double scale,
                               const Keys& keys) {
  // Two loops, because each is one long chain of dependent instructions an iteration: so more of them run at a time.
  constexpr int kTogether = Targets % 2 == 0 && kLanes == 16 ? 2 : 1;  // in 32 registers
  for (int t = 0; t < Targets; t += kTogether) {
    for (int64_t l = 0; l < row.padded; l += 4 * lanes<V>) {
      V uniform[kTogether][4];
      target_uniforms(row, l, static_cast<uint32_t>(first + t), p.rows[r], keys, uniform);
      for (int i = 0; i < kTogether; ++i) {
        for (int j = 0; j < 4; ++j) store(row.y + (t + i) * row.padded + l + j * lanes<V>, uniform[i][j]);
      }
    }
  }
  for (int t = 0; t < Targets; ++t) {
    for (int64_t l = 0; l < row.padded; l += 4 * lanes<V>) {
      Wide *y = row.y + t * row.padded + l, *delta = row.delta + t * row.padded + l;
      V eps[4];
      for (int j = 0; j < 4; ++j) eps[j] = load(y + j * lanes<V>);
      box_muller(eps);
      for (int j = 0; j < 4; ++j) {
        const int64_t k = j * lanes<V>;
        eps[j] *= load(row.std + l + k);
        if (p.grad_mean) store(delta + k, eps[j]);
        store(y + k, load(row.mean + l + k) + eps[j]);
      }
    }
  }
  int64_t draw = 0;
  for (; draw + kDrawTile <= row.num_draws; draw += kDrawTile) squared_distances<Targets, kDrawTile, V>(row, draw);
  for (; draw < row.num_draws; ++draw) squared_distances<Targets, 1, V>(row, draw);
  int64_t count = Targets * row.num_draws;
  for (; count % lanes<V> != 0; ++count) row.weight[count] = 0;
  double total = weigh<V>(row.weight, count, p.beta, scale);

  if (p.grad_x) {
    draw = 0;
    for (; draw + kDrawTile <= row.num_draws; draw += kDrawTile) add_gradients<Targets, kDrawTile, V>(row, draw);
    for (; draw < row.num_draws; ++draw) add_gradients<Targets, 1, V>(row, draw);
  }
  if (p.grad_mean) {
    for (int64_t l = 0; l < row.padded; l += lanes<V>) {
      V grad_mean = load(row.grad_mean + l), grad_log_std = load(row.grad_log_std + l);
      for (int t = 0; t < Targets; ++t) {
        V y = load(row.y + t * row.padded + l), grad_y{};
        for (int64_t s = 0; s < row.num_draws; ++s) {
          const DrawWeights<Targets, Wide> weights(row, s);
          grad_y += weights.first[t * weights.stride] * (y - load(row.x + s * row.padded + l));
        }
        grad_mean += grad_y;
        grad_log_std += grad_y * load(row.delta + t * row.padded + l);
      }
      store(row.grad_mean + l, grad_mean);
      store(row.grad_log_std + l, grad_log_std);
    }
  }
  return total;
}

}  // namespace

template <class T>
void energy_score_kernel(const EnergyScore<T>& p, AccumulateType<T>* scratch, int64_t begin, int64_t end) {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  const Keys keys(static_cast<uint64_t>(*p.seed));
  const Row<Wide> row(scratch, p.num_draws, p.size, 4 * lanes<V>, lanes<V>);
  const double draws_by_targets = static_cast<double>(p.num_draws) * static_cast<double>(p.num_targets);
  const double scale = -2 / draws_by_targets;  // of d fidelity in d score
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t s = 0; s < p.num_draws; ++s) {
      read_row<V>(p.x + (s * p.num_rows + r) * p.size, p.size, row.padded, Wide{0}, row.x + s * row.padded);
    }
    for (int64_t k = 0; k < p.num_draws * row.padded; ++k) row.grad_x[k] = 0;
    read_row<V>(p.mean + r * p.size, p.size, row.padded, Wide{0}, row.mean);
    read_row<V>(p.log_std + r * p.size, p.size, row.padded, -static_cast<Wide>(__builtin_inf()), row.std);
    for (int64_t k = 0; k < row.padded; k += lanes<V>) store(row.std + k, exponential(load(row.std + k)));
    for (int64_t k = 0; k < row.padded; ++k) row.grad_mean[k] = row.grad_log_std[k] = 0;

    const double mean_diversity = diversity<V>(row, p.beta);
    start_targets(row, p.rows[r], keys);
    double total = 0;
    int64_t m = 0;
    for (; m + kTargetTile <= p.num_targets; m += kTargetTile) {
      total += add_targets<kTargetTile, V>(p, row, r, m, scale, keys);
    }
    for (; m < p.num_targets; ++m) total += add_targets<1, V>(p, row, r, m, scale, keys);
    const double mean_fidelity = total / draws_by_targets;

    p.diversity[r] = static_cast<Wide>(mean_diversity);
    p.fidelity[r] = static_cast<Wide>(mean_fidelity);
    p.score[r] = static_cast<Wide>(mean_diversity - 2 * mean_fidelity);
    if (p.grad_x) {
      for (int64_t s = 0; s < p.num_draws; ++s) {
        write_row<V>(row.grad_x + s * row.padded, p.size, p.grad_x + (s * p.num_rows + r) * p.size);
      }
    }
    if (p.grad_mean) {
      write_row<V>(row.grad_mean, p.size, p.grad_mean + r * p.size);
      write_row<V>(row.grad_log_std, p.size, p.grad_log_std + r * p.size);
    }
  }
}

template void energy_score_kernel(const EnergyScore<float>&, float*, int64_t, int64_t);
template void energy_score_kernel(const EnergyScore<double>&, double*, int64_t, int64_t);
template void energy_score_kernel(const EnergyScore<bfloat16>&, float*, int64_t, int64_t);
template void energy_score_kernel(const EnergyScore<half>&, float*, int64_t, int64_t);

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
template <class T>
void launch(Cpu device, const EnergyScore<T>& p) {
  if (p.num_rows == 0) return;
  const int64_t padded = (p.size + 63) / 64 * 64, draws_padded = (p.num_draws + 15) / 16 * 16;  // of the widest vectors
  const int64_t scratch_size = (2 * p.num_draws + 14) * padded + 4 * draws_padded;
  const int64_t grain = 1 + 16384 / (p.num_targets * p.size + 1);  // about 20 us of work
  parallel_blocks(device, p.num_rows, grain, [&](Blocks& blocks) {
    auto scratch = std::make_unique<AccumulateType<T>[]>(static_cast<size_t>(scratch_size));
    for (int64_t begin, end; blocks.take(begin, end);) {
      CALM_SELECT(energy_score_kernel<T>)(p, scratch.get(), begin, end);
    }
  });
}

template void launch(Cpu, const EnergyScore<float>&);
template void launch(Cpu, const EnergyScore<double>&);
template void launch(Cpu, const EnergyScore<bfloat16>&);
template void launch(Cpu, const EnergyScore<half>&);
#endif

}  // namespace calm_rt
