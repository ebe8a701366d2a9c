// The logits of sampled rows in a byte each, as the training forward leaves them: steps of an eighth of an octave from
// 2^-28 of the row's bound on, 0 for all below and 255 for all from 2^4 up. The tail's shape, an average over rows, needs
// no more: a step rounds an entry by 4.4 % at most, as often up as down.
//
// A thread writes eight bytes for each 32 columns of its row, in the order in which it holds them, so that a quad fills a
// sector of memory: where the instructions' columns are paired, column 8 j + 2 q + e of the 32 is byte 8 q + 2 j + e.
#pragma once

#include "cuda/common/epilogue.cuh"

namespace cce::cuda {

constexpr float kLevelsPerOctave = 8.0f, kLowestOctave = -28.0f, kTopLevel = 255.0f;
static_assert(kGroupCols % kLevelCols == 0, "a stretch of columns starts at whole words");

// The byte of a column among its 32, and the column of an even byte; the next byte is the next column.
__device__ __forceinline__ int level_byte(int col, bool paired) {
  return paired ? col % 8 / 2 * 8 + col / 8 * 2 + col % 2 : col;
}
__device__ __forceinline__ int level_column(int byte, bool paired) {
  return paired ? byte % 8 / 2 * 8 + byte / 8 * 2 : byte;
}

// Four levels from base-2 logits by a factor and an offset: a sum with 2^23 has the level in its lowest byte. No number
// becomes 0.
__device__ __forceinline__ uint32_t pack_levels(float a, float b, float c, float d, float factor,
                                                float offset) {
  const auto level = [&](float x) {
    const float share = __saturatef(fmaf(x, factor, offset));
    return __float_as_uint(fmaf(share, kTopLevel, 0x1p23f));
  };
  const uint32_t low = __byte_perm(level(a), level(b), 0x0040);
  return __byte_perm(low, __byte_perm(level(c), level(d), 0x0040), 0x5410);
}

// Writes one row of the pair, if it is sampled. scale: base-2 logits are scale * acc; warp_col: shard-local id of the first
// of the warp's columns. All of this is made anew here, so that it takes no register from the accumulators before.
template <typename Columns, int kElements>
__device__ __forceinline__ void write_levels(const float (&acc)[kElements], int h,
                                             const Candidates& to, int position, int count,
                                             float scale, int warp_col) {
  static_assert(kElements % 16 == 0, "whole stretches of 32 columns");
  if (position >= count) return;
  const RowStart start = to.starts[position];
  if (start.slot < 0) return;
  const float factor = scale * (kLevelsPerOctave / kTopLevel);
  const float offset = (-kLowestOctave - start.bound2) * (kLevelsPerOctave / kTopLevel);
  uint8_t* row = to.levels + start.slot * to.ld_levels;
#pragma unroll
  for (int j = 0; j < kElements / 4; j += 4) {
    const auto two = [&](int i) {
      const int first = 4 * (j + i) + 2 * h;
      return pack_levels(acc[first], acc[first + 1], acc[first + 4], acc[first + 5], factor,
                         offset);
    };
    const int col = warp_col + 8 * j;
    if (col < to.ld_levels)
      *reinterpret_cast<uint2*>(row + col + threadIdx.x % 4 * 8) = make_uint2(two(0), two(2));
  }
}

}  // namespace cce::cuda
