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
  int superblock = 1;  // row blocks
};

// Where a block is. What follows from the work is not kept: registers are for the accumulators.
template <typename AnyWork>
struct Place {
  const AnyWork& work;
  int unit = 0;
  int row_block = 0;
  int tile = 0;  // column tile

  __device__ int split() const { return tile / work.tiles_per_split; }
};

// A block's way through its stream of slices. Block b takes units b, b + gridDim.x, ....
struct Cursor : Place<Work> {
  int row_blocks;  // with rows that count
  int slice = 0;

  __device__ Cursor(const Work& w, int blocks)
      : Place{w, static_cast<int>(blockIdx.x)}, row_blocks(blocks) {
    enter();
  }
  // Where another one was.
  __device__ Cursor(const Work& w, int blocks, int4 place)
      : Place{w, place.x, place.y, place.z}, row_blocks(blocks) {}
  __device__ int4 place() const { return make_int4(unit, row_block, tile, 0); }
  __device__ bool done() const { return unit >= order().units(); }
  __device__ bool last_of_unit() const {
    return tile + 1 == min((split() + 1) * work.tiles_per_split, work.column_tiles);
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
    return next_unit() < order().units() ? order().at(next_unit()).row_block : 0;
  }

 private:
  __device__ UnitOrder order() const { return {row_blocks, work.splits, work.superblock}; }
  __device__ int next_unit() const { return unit + static_cast<int>(gridDim.x); }
  __device__ void enter() {
    if (done()) return;
    const Unit u = order().at(unit);
    row_block = u.row_block;
    tile = u.split * work.tiles_per_split;
  }
};

}  // namespace cce::cuda
