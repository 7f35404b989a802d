// Products of 8-bit numbers by the tiles of AMX, which Intel's server processors have since 2023 (Sapphire Rapids):
// 1,024 multiply-adds a cycle and core, where AVX-512 VNNI has 128. Part of the set avx512, for who asks isa() first.
#pragma once
#include "kernels/cpu/simd.h"

#ifdef __AVX512VNNI__
#define CALM_AMX __attribute__((target("amx-tile,amx-int8")))

namespace calm_rt::CALM_ISA {
namespace {

constexpr int kAmxRows = 16;       // of a tile, which has as many columns of 32 bits
constexpr int64_t kAmxDepth = 64;  // 8-bit numbers of a tile's row
constexpr int kAmxColumns = 48;    // of a product, three tiles

// Eight registers of sixteen rows of 64 bytes. A constant in memory, because GCC believes that the instruction reads
// eight bytes of it and leaves out stores to the others.
constexpr struct {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} kAmxShapes;

// The registers of the calling thread, taken and given back.
CALM_AMX CALM_INLINE void take_tiles() { _tile_loadconfig(&kAmxShapes); }
CALM_AMX CALM_INLINE void release_tiles() { _tile_release(); }

// total = start + left right^T for sixteen rows and 48 columns.
// left: [16, depth] of 0 to 255; right: [depth / 4, 48, 4] of -128 to 127; start: [48]; total: [16, 48].
CALM_AMX CALM_INLINE void multiply_tiles(const void* left, const void* right, const int32_t* start, int64_t depth,
                                         int32_t* total) {
  constexpr int64_t kStride = 4 * kAmxColumns;
  __asm__ volatile("" ::: "memory");  // what the tiles read is in memory: GCC does not know that they read it
  _tile_loadd(0, start, 0);           // the same sixteen numbers for each row
  _tile_loadd(1, start + 16, 0);
  _tile_loadd(2, start + 32, 0);
  const char* row = static_cast<const char*>(left);
  const char* column = static_cast<const char*>(right);
  for (int64_t k = 0; k < depth; k += kAmxDepth, row += kAmxDepth, column += kAmxDepth * kAmxColumns) {
    _tile_loadd(3, row, depth);
    _tile_loadd(4, column, kStride);
    _tile_dpbusd(0, 3, 4);
    _tile_loadd(5, column + 64, kStride);
    _tile_dpbusd(1, 3, 5);
    _tile_loadd(6, column + 128, kStride);
    _tile_dpbusd(2, 3, 6);
  }
  _tile_stored(0, total, kStride);
  _tile_stored(1, total + 16, kStride);
  _tile_stored(2, total + 32, kStride);
}

}  // namespace
}  // namespace calm_rt::CALM_ISA
#endif
