// The order of the work: which rows and which columns each step of a persistent block, or of a cluster of them, takes.
//
// A unit is one row block times one split (a run of consecutive column tiles). Units go rows first inside a superblock
// of row blocks whose part of E stays in the second-level cache, then to the next split, then to the next superblock;
// so blocks that run at the same time share column tiles, and the classifier streams from memory once a superblock.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace cce::cuda {

struct Unit {
  int row_block = 0;
  int split = 0;
};

struct UnitOrder {
  int row_blocks = 0;
  int splits = 0;
  int superblock = 1;  // row blocks

  __host__ __device__ int units() const { return row_blocks * splits; }

  __host__ __device__ Unit at(int unit) const {
    const int per_superblock = superblock * splits;
    const int s = unit / per_superblock;
    const int rest = unit - s * per_superblock;
    const int left = row_blocks - s * superblock;
    const int height = left < superblock ? left : superblock;
    return {s * superblock + rest % height, rest / height};
  }
};

// Height of the superblocks, of so many row blocks in all: about 18 MB of [E, U], measured best on chips with 40 to 60 MB of
// second-level cache, a quarter more at most, and all of a height: a low one that is left over reads the classifier once more
// for a few rows.
inline int superblock_height(int row_blocks, int64_t bytes_of_a_block) {
  constexpr double kBytes = 18 << 20;
  const double superblocks = static_cast<double>(bytes_of_a_block) * row_blocks / kBytes;
  const int count = std::max(1, static_cast<int>(std::ceil(superblocks - 0.25)));
  return std::max(1, (row_blocks + count - 1) / count);
}

}  // namespace cce::cuda
