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
  bool ascending = false;  // see RowOrder
  int n = 0;               // rows in the order, ignored ones included
  int column_tiles = 0;
  int tiles_per_split = 1;
  int splits = 1;
  int superblock = 1;
};

// Where a block is in its stream of slices: unit, column tile, slice.
struct Cursor {
  UnitOrder order;
  int unit, step;  // this block's units are unit, unit + step, ...
  int row_block = 0, split = 0;
  int tile = 0, tile_end = 0;  // column tiles of the split
  int slice = 0;

  __device__ Cursor(const Work& w, int row_blocks)
      : order{row_blocks, w.splits, w.superblock}, unit(blockIdx.x), step(gridDim.x) {
    enter(w);
  }
  __device__ bool done() const { return unit >= order.units(); }
  __device__ void enter(const Work& w) {
    if (done()) return;
    const Unit u = order.at(unit);
    row_block = u.row_block;
    split = u.split;
    tile = split * w.tiles_per_split;
    tile_end = min(tile + w.tiles_per_split, w.column_tiles);
  }
  // To the next column tile; true when that was the unit's last.
  __device__ bool next_tile(const Work& w) {
    slice = 0;
    if (++tile < tile_end) return false;
    unit += step;
    enter(w);
    return true;
  }
};

}  // namespace cce::cuda
