// Where a 16-byte piece of a tile row lies in shared memory, so that the eight rows that ldmatrix reads at one piece, and the
// pieces of one row that cp.async writes, touch all 32 banks once. Tiles are (rows, kBlockK) of 16-bit elements.
#pragma once

#include <cstdint>

namespace cce::cuda {

template <int kBlockK, typename Mask>
struct Swizzle {
  static_assert(kBlockK == 32 || kBlockK == 64);
  static constexpr int kPieces = kBlockK / 8;
  static constexpr int kRowBytes = kBlockK * 2;

  // What the piece numbers of this row are xor-ed with.
  static __device__ __forceinline__ int mask(int row) { return Mask::template of<kPieces>(row); }
  static __device__ __forceinline__ uint32_t offset(int row, int piece) {
    return row * kRowBytes + ((piece ^ mask(row)) << 4);
  }
};

// For reads of eight consecutive rows. Rows 16 apart have the same mask.
struct ConsecutiveRows {
  template <int kPieces>
  static __device__ __forceinline__ int of(int row) {
    return (row / (8 / kPieces)) & (kPieces - 1);
  }
};

// For reads of the row pairs (2 i, 2 i + 1) of four groups of eight rows, as SpreadColumns (common/epilogue) asks for. Rows
// that differ by 2, 4 or 32 have the same mask.
struct PairsOfEights {
  template <int kPieces>
  static __device__ __forceinline__ int of(int row) {
    const int group = (row >> 3) & 3;
    return kPieces == 8 ? group * 2 + (row & 1) : group;
  }
};

}  // namespace cce::cuda
