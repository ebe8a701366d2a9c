// Which blocks work side by side, and a block's way through the work.
//
// A group: 2 to group_bits neighbouring blocks on neighbouring row blocks of the same columns. It takes units, each of as many
// row blocks (of which the last ones may not exist) and one split. Twins are two groups in one cluster. Where there are twins,
// units are dealt out in pairs, of two splits and the same row blocks: twins have both units of a pair at the same time, a single
// group has them one after the other. So twins get through two pairs while a single group gets through one. The second split
// of a pair has as many tiles as the first, of which the last ones, or all, may not exist.
#pragma once

#include "cuda/common/work.cuh"

namespace cce::cuda::sm90 {

struct GroupWork : Work {  // the superblock in row blocks of a group
  int group_bits = 0;
  int cluster_bits = 0;        // 2 to this power blocks of a group are in a cluster
  int pair_bits = 0;           // 1: units come in pairs
  int twins = 0, singles = 1;  // pairs of groups, and other groups, that share the work
  bool is_twin = false;        // what this launch's groups are
  int32_t* pace = nullptr;     // (kPaceSteps,): zeros, see sm90/pace.cuh; or null

  // Pairs that are dealt out before everyone's turn comes again (units, where they do not come in pairs).
  __host__ __device__ int period() const { return 2 * twins + singles; }
  __host__ __device__ int cluster_size_bits() const { return cluster_bits + is_twin; }
  // This block's place in its group; of twins, in which one; and its place in its cluster.
  __device__ int group_rank() const {
    return static_cast<int>(blockIdx.x) & ((1 << group_bits) - 1);
  }
  __device__ int side() const {
    return is_twin ? static_cast<int>(blockIdx.x) >> group_bits & 1 : 0;
  }
  __device__ int cluster_rank() const {
    return static_cast<int>(blockIdx.x) & ((1 << cluster_size_bits()) - 1);
  }
};

// A block's way through its tiles. Twins t take the pairs t and t + twins of every period, single group g the pair
// g + 2 twins.
struct Cursor : Place<GroupWork> {
  __device__ Cursor(const GroupWork& w, int blocks)
      : Place{w, blocks, static_cast<int>(blockIdx.x) >> w.group_bits} {
    if (!w.is_twin) unit = (unit + 2 * w.twins) << w.pair_bits;
    enter();
  }
  __device__ int pairs() const { return order().units(); }
  __device__ bool done() const { return unit >> work.pair_bits >= pairs(); }
  __device__ bool tile_exists() const { return tile < work.column_tiles; }
  // Whether no tile of the unit that exists comes after this one.
  __device__ bool last_of_unit() const {
    return (tile + 1) % work.tiles_per_split == 0 || tile + 1 == work.column_tiles;
  }
  // Tiles of this unit, those that do not exist included.
  __device__ int tiles_of_unit() const {
    const int pair_first = split() >> work.pair_bits << work.pair_bits;
    return min(work.tiles_per_split, work.column_tiles - pair_first * work.tiles_per_split);
  }
  __device__ bool ends_unit() const {
    return tile - split() * work.tiles_per_split + 1 == tiles_of_unit();
  }
  __device__ void next_tile() {
    const bool last = ends_unit();
    ++tile;
    if (!last) return;
    unit = next_unit();
    enter();
  }
  __device__ int next_unit() const {
    const int pair = unit >> work.pair_bits, period = work.period();
    if (work.is_twin) {
      const bool first_turn = pair % period < work.twins;
      return unit + 2 * (first_turn ? work.twins : period - work.twins);
    }
    // The pair's other unit, or the next pair.
    const bool second = (unit + 1) & work.pair_bits;
    return second ? unit + 1 : (pair + period) << work.pair_bits;
  }

 private:
  __device__ UnitOrder order() const {
    const int bits = work.group_bits;
    return {(row_blocks + (1 << bits) - 1) >> bits,
            (work.splits + work.pair_bits) >> work.pair_bits, work.superblock};
  }
  __device__ void enter() {
    if (done()) return;
    const Unit u = order().at(unit >> work.pair_bits);
    row_block = (u.row_block << work.group_bits) + work.group_rank();
    tile = ((u.split << work.pair_bits) + (unit & work.pair_bits)) * work.tiles_per_split;
  }
};

}  // namespace cce::cuda::sm90
