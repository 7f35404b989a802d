// Exact argmax over a vocabulary through a low-precision screen.
//
//   id[r] = argmax_v <hidden[r], weight[v]>, ties to the lowest id, NaN before all else
//
// A screen gives every score approximately, with a bound of its error that holds for certain; only the few entries
// whose upper bound exceeds what has been reached are computed exactly, in double, where products of the inputs are
// exact, and added up in one order on each kind of device. So the ids do not depend on what a library does, on threads
// or, but for double inputs, on the instruction set; they are those of exact arithmetic wherever the two best scores
// differ by more than the sums round, 2^-53 of the terms.
//
// On the CPU (LinearArgmax) the screen multiplies rows rounded to 8 bits. With h = s (q + e), w = t q' + e',
//   |<h, w> - s t <q, q'>| <= s (|e| |w| + |q| |e'|)                              (Cauchy-Schwarz)
// for a few rows, which memory bounds, it multiplies the rows as they are. A panel of the vocabulary is rounded, met by
// all rows and forgotten, so each weight is read once and no score is stored. Reads R*H + V*H values, and 2 H for each
// entry that is computed exactly, some tens a row for a vocabulary of 128k; computes R*V*H products of 8 bits.
// ScreenVocabulary stores the rounded panels (V*H bytes, or 2 V*H where the processor multiplies 16 bits), for a weight
// that stays: then they are read instead of V*H values, and few rows are screened too.
//
// On the GPU tensor cores multiply operands rounded to bfloat16, and of 64 entries only the largest bound of a score,
// which entry has it, and the next bound are kept (BoundGroups): no score is stored. SearchGroups computes an entry
// exactly whose bound can win, and all of a group whose next bound can. BoundGroups reads each row of hidden once for
// each tile of entries and of weight once for each tile of rows, mostly from L2, and writes R*V/8 bytes. Tiles are 128
// rows by 256 entries where there is wgmma, 256 rows by 128 entries elsewhere.
//
// Where rows are not whole packs of eight (H odd, say), the library multiplies operands rounded to bfloat16 block by
// block of the vocabulary; no more than one block of scores exists. A rounded score differs from the exact one by no
// more than
//   relative * |score| + factor * |hidden[r]| |weight[v]|
// RoundRows reads R*H values and writes as many of the screen's type, and R norms. ScanScores reads R*N scores, and H
// values for each entry that it computes exactly.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

// 2^-8 for each of two operands.
constexpr double kOperandRounding = 1.0 / 128;

// The same, which a setting of torch lets the library do also where S is float, and as much again for a library that
// adds up parts of a product in bfloat16 (split-K).
constexpr double kBfloat16Rounding = 2 * kOperandRounding;

// Of a sum of H products in float, for each product. A tensor core lines up some products with the sum so far and cuts
// off what lies below 2^-23 of the largest, of 9 terms for 8 products at worst, and once more of what it returns; each
// is no more than |hidden[r]| |weight[v]|.
constexpr double kSumRounding = 1.5e-7;  // above 10 / 8 * 2^-23

// A norm's least excess over 0. With it the bounds also cover what underflows in the screen's products and sums, where
// an error is not in proportion to anything: up to 2^-126 (1.2e-38) for each of H products, where factor times the
// square of this is 8e-33 of rounded operands and H times 1.5e-37 of exact ones.
constexpr float kNormRoom = 1e-15f;

template <class T>
struct LinearArgmax {
  const T* hidden;     // [R, H]
  const T* weight;     // [V, H]
  int64_t* id;         // [R]
  const void* panels;  // what ScreenVocabulary wrote for this weight, or nullptr
  int64_t num_rows;    // R
  int64_t vocabulary;  // V > 0
  int64_t size;        // H
};

// The panels of a vocabulary in the layout of this process's instruction set.
template <class T>
struct ScreenVocabulary {
  const T* weight;     // [V, H]
  void* panels;        // [num_panels, panel_bytes], aligned to 64
  int64_t vocabulary;  // V
  int64_t size;        // H
};

// How many panels a vocabulary has, and the bytes of one; a multiple of 64.
struct PanelSizes {
  int64_t num_panels, panel_bytes;
};

constexpr int64_t kLongestScreened = 32768;  // H up to which whole products fit 32 bits (LONGEST in linear_argmax.py)

// How many rows of a launch are wanted, where only the device knows: those before *count, of which `before` belonged to
// earlier launches. All where count is nullptr.
struct WantedRows {
  const int64_t* count = nullptr;  // []
  int64_t before = 0;

  CALM_HOST_DEVICE int64_t of(int64_t num_rows) const {
    if (count == nullptr) return num_rows;
    const int64_t left = *count - before;
    return left < 0 ? 0 : left < num_rows ? left : num_rows;
  }
  CALM_HOST_DEVICE bool has(int64_t row) const { return count == nullptr || row < *count - before; }
};

template <class T, class S>
struct RoundRows {
  const T* in;       // [R, H]
  S* out;            // [R, H], or nullptr where T is S
  float* norm;       // [R], rounded up
  int64_t num_rows;  // R
  int64_t size;      // H
};

template <class T, class S>
struct ScanScores {
  const S* scores;           // [R, N], rounded scores of the block's entries
  const T* hidden;           // [R, H]
  const T* weight;           // [N, H], the block's rows
  const float* hidden_norm;  // [R]
  const float* weight_norm;  // [N]
  double* best;              // [R], the best exact score so far
  int64_t* id;               // [R], and whose it is; -1 before the first block
  int64_t first_id;          // of the block
  int64_t num_rows;          // R
  int64_t block;             // N
  int64_t size;              // H
  WantedRows wanted = {};    // of others best and id stay

  // What the library's rounding of a score may amount to, beside `factor` below.
  static constexpr float kRelative = sizeof(S) == 2 ? 1.f / 256 : 1.f / (1 << 20);

  // Rounding of both operands, of H additions in float that may truncate, and room for the bound's own rounding.
  float factor() const { return static_cast<float>(1.01 * (kBfloat16Rounding + static_cast<double>(size) * 1.2e-7)); }
};

constexpr int kGroup = 64;  // entries that share a bound

CALM_HOST_DEVICE int64_t num_groups(int64_t entries) { return (entries + kGroup - 1) / kGroup; }

// Upper bounds of exact scores: the lowest six bits of the largest say which entry of the group has it, unless NaN.
struct GroupBound {
  float largest, next;
};

// bfloat16 operands; `exact` if nothing was rounded to make them.
struct BoundGroups {
  const bfloat16* hidden;    // [R, H]
  const bfloat16* weight;    // [N, H]
  const float* hidden_norm;  // [R]
  const float* weight_norm;  // [N]
  GroupBound* bounds;        // [R, num_groups(N)]
  int64_t num_rows;          // R
  int64_t block;             // N
  int64_t size;              // H > 0
  bool exact;
  WantedRows wanted = {};  // others get no bounds, or any

  // Rows must be whole packs of 16 bytes.
  static bool fits(const void* hidden, const void* weight, int64_t size) {
    const auto address = reinterpret_cast<uintptr_t>(hidden) | reinterpret_cast<uintptr_t>(weight);
    return size > 0 && size % 8 == 0 && address % 16 == 0;
  }

  // What the six bits may take from a bound, and the bound's own rounding.
  static constexpr float kRelative = 1.f / (1 << 16);
  float factor() const {
    return static_cast<float>(1.01 * ((exact ? 0 : kOperandRounding) + static_cast<double>(size) * kSumRounding));
  }
};

template <class T>
struct SearchGroups {
  const GroupBound* bounds;  // [R, num_groups(N)]
  const T* hidden;           // [R, H]
  const T* weight;           // [N, H], the block's rows
  double* best;              // [R], the best exact score so far
  int64_t* id;               // [R], and whose it is; -1 before the first block
  int64_t first_id;          // of the block
  int64_t num_rows;          // R
  int64_t block;             // N
  int64_t size;              // H
  WantedRows wanted = {};    // of others best and id stay
};

template <class T>
void launch(Cpu device, const LinearArgmax<T>& p);  // float, double, bfloat16, half
template <class T>
void launch(Cpu device, const ScreenVocabulary<T>& p);  // float, bfloat16, half; H up to kLongestScreened
PanelSizes panel_sizes(Cpu device, int64_t vocabulary, int64_t size);
// Whether panels of these sizes have no entry behind V - 1, of which a search would read the weight.
bool screen_ends_with(Cpu device, const void* panels, int64_t vocabulary, int64_t size);
template <class T, class S>
void launch(Cuda device, const RoundRows<T, S>& p);  // T float, bfloat16, half; S bfloat16
template <class T, class S>
void launch(Cuda device, const ScanScores<T, S>& p);
void launch(Cuda device, const BoundGroups& p);
template <class T>
void launch(Cuda device, const SearchGroups<T>& p);  // float, bfloat16, half

}  // namespace calm_rt
