// The order of the work: which rows and which columns each step of a persistent block, or of a cluster of them, takes.
//
// A unit is one row block times one split (a run of consecutive column tiles). Units go rows first inside a superblock
// of row blocks whose part of E stays in the second-level cache, then to the next split, then to the next superblock;
// so blocks that run at the same time share column tiles, and the classifier streams from memory once a superblock.
#pragma once

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

// Row blocks whose part of [E, U] is about 18 MB: measured best on chips with 40 to 60 MB of second-level cache.
inline int superblock_rows(int64_t k_elements, int block_m) {
  constexpr int64_t kBytes = 18 << 20;
  const int64_t blocks = kBytes / (2 * (k_elements > 0 ? k_elements : 1) * block_m);
  return static_cast<int>(blocks < 1 ? 1 : (blocks > 1024 ? 1024 : blocks));
}

}  // namespace cce::cuda
