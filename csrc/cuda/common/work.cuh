// The work of one launch as the kernels see it, and a block's way through it.
#pragma once

#include "cuda/common/tile_scheduler.cuh"
#include "cuda/params.h"

namespace cce::cuda {

// The work of a launch as the kernels see it.
struct Work {
  Matrix e, c, u, lora_b;
  const int32_t* row_order = nullptr;
  const int32_t* row_count = nullptr;
  bool compact = false;  // whether E and U are there in the row order too
  int n = 0;             // rows in the order, ignored ones included
  int column_tiles = 0;
  int tiles_per_split = 1;
  int splits = 1;
  int superblock = 1;  // in row blocks of a group
  // A group: 2 to group_bits neighbouring blocks, on neighbouring row blocks of the same columns. 2 to cluster_bits of them
  // are a cluster.
  int group_bits = 0, cluster_bits = 0;
  int first_group = 0, groups = 1;  // of this launch the first, and how many share the work
  int32_t* pace = nullptr;          // (kPaceSteps,): zeros, see sm90/pace.cuh; or null

  // This block's place in its group, and in its cluster.
  __device__ int group_rank() const {
    return static_cast<int>(blockIdx.x) & ((1 << group_bits) - 1);
  }
  __device__ int cluster_rank() const {
    return static_cast<int>(blockIdx.x) & ((1 << cluster_bits) - 1);
  }
};

// Where a block is in its stream of slices: unit, column tile, slice. Group g of blocks takes units g, g + groups, ..., of
// as many row blocks as it has blocks, of which the last ones may not exist. What follows from the work is not kept: registers
// are for the accumulators.
struct Cursor {
  const Work& work;
  int row_blocks;  // with rows that count
  int unit;
  int row_block = 0;
  int tile = 0;  // column tile
  int slice = 0;

  __device__ Cursor(const Work& w, int blocks)
      : work(w),
        row_blocks(blocks),
        unit(w.first_group + (static_cast<int>(blockIdx.x) >> w.group_bits)) {
    enter();
  }
  // Where another one was.
  __device__ Cursor(const Work& w, int blocks, int4 place)
      : work(w), row_blocks(blocks), unit(place.x), row_block(place.y), tile(place.z) {}
  __device__ int4 place() const { return make_int4(unit, row_block, tile, 0); }
  __device__ int units() const { return order().units(); }
  __device__ bool done() const { return unit >= units(); }
  __device__ int split() const { return tile / work.tiles_per_split; }
  __device__ bool last_of_unit() const {
    return (tile + 1) % work.tiles_per_split == 0 || tile + 1 == work.column_tiles;
  }
  // To the next column tile; true when that was the unit's last.
  __device__ bool next_tile() {
    slice = 0;
    const bool last = last_of_unit();
    ++tile;
    if (!last) return false;
    unit = next_unit();
    enter();
    return true;
  }
  // The row block of the unit after this one; 0 if there is none.
  __device__ int next_row_block() const {
    return next_unit() < units() ? order().at(next_unit()).row_block : 0;
  }

 private:
  __device__ UnitOrder order() const {
    const int bits = work.group_bits;
    return {(row_blocks + (1 << bits) - 1) >> bits, work.splits, work.superblock};
  }
  __device__ int next_unit() const { return unit + work.groups; }
  __device__ void enter() {
    if (done()) return;
    const Unit u = order().at(unit);
    row_block = (u.row_block << work.group_bits) + work.group_rank();
    tile = u.split * work.tiles_per_split;
  }
};

}  // namespace cce::cuda
