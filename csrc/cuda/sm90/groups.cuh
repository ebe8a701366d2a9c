// Which blocks work side by side, and a block's way through the work.
//
// A group: 2 to group_bits neighbouring blocks on neighbouring row blocks of the same columns. It takes units, each of as many
// row blocks (of which the last ones may not exist) and one split. Twins are two groups in one cluster. Where there are twins,
// units come in pairs, of two splits and the same row blocks: twins have both units of a pair at the same time, a single
// group has them one after the other. Where the splits are odd in number, the last one's units are loose: single groups take
// them. (If those would be too few, or there are none, the second half of the last pairs has no tiles that exist.)
//
// A round: everybody's next unit. First come periods of as many rounds as a pair has units, in which twins take two pairs and
// single groups one, all of them neighbours. In the rounds that are left twins go on with pairs, as many as there is time for,
// and single groups share all other units, one at a time: no round is begun for want of a pair.
#pragma once

#include "cuda/common/work.cuh"

namespace cce::cuda::sm90 {

// How the units are dealt out, which the number of rows that count decides.
struct Deal {
  int row_groups = 0;  // row blocks of a group
  int splits = 0;      // pairs of splits; splits, where units do not come in pairs
  int pairs = 0;       // row_groups * splits
  int loose = 0;       // units without another
  int rounds = 0;
  // In pairs: what the periods take, and up to where twins take what comes then.
  int periods_end = 0, twins_end = 0;
};

struct GroupWork : Work {  // the superblock in row blocks of a group
  int group_bits = 0;
  int cluster_bits = 0;        // 2 to this power blocks of a group are in a cluster
  int pair_bits = 0;           // 1: units come in pairs
  int twins = 0, singles = 1;  // pairs of groups, and other groups, that share the work
  bool is_twin = false;        // what this launch's groups are
  int32_t* pace = nullptr;     // (kPaceSteps,): zeros, see sm90/pace.cuh; or null

  // Pairs of a period; units, where they do not come in pairs.
  __host__ __device__ int period() const { return 2 * twins + singles; }
  // Pairs of splits, an odd last one with one that has no tiles; splits, where units do not come in pairs.
  __host__ __device__ int paired_splits() const { return ceil_ratio(splits, 1 << pair_bits); }
  __host__ __device__ Deal deal(int row_blocks) const {
    const Deal full = deal(row_blocks, false);
    if (pair_bits == 0 || splits % 2 == 0 || singles == 0) return full;
    const Deal with_loose = deal(row_blocks, true);
    return with_loose.rounds <= full.rounds ? with_loose : full;
  }

  __host__ __device__ int cluster_size_bits() const { return cluster_bits + is_twin; }
  // Of two launches of a kernel the second one, which ends after the first.
  __host__ __device__ bool is_second() const { return twins > 0 && !is_twin; }
  // This block's place in its group; the group's number in the launch and, of twins, which one it is; and the block's place in
  // its cluster.
  __device__ int group_rank() const {
    return static_cast<int>(blockIdx.x) & ((1 << group_bits) - 1);
  }
  __device__ int group() const { return static_cast<int>(blockIdx.x) >> group_bits; }
  __device__ int side() const { return is_twin ? group() & 1 : 0; }
  __device__ int cluster_rank() const {
    return static_cast<int>(blockIdx.x) & ((1 << cluster_size_bits()) - 1);
  }

 private:
  __host__ __device__ static int ceil_ratio(int x, int y) { return (x + y - 1) / y; }
  __host__ __device__ Deal deal(int row_blocks, bool with_loose) const {
    Deal d;
    d.row_groups = ceil_ratio(row_blocks, 1 << group_bits);
    d.splits = with_loose ? splits >> pair_bits : paired_splits();
    d.pairs = d.row_groups * d.splits;
    d.loose = with_loose ? d.row_groups : 0;
    const int for_loose = d.loose > 0 ? ceil_ratio(d.loose, singles) : 0;
    // Everybody has a unit in a round; twins have as many pairs as rounds at most, the others any units.
    d.rounds = max(ceil_ratio((d.pairs << pair_bits) + d.loose, period()), for_loose);
    const int periods = min((d.rounds - for_loose) >> pair_bits, d.pairs / period());
    d.periods_end = periods * period();
    const int left = d.rounds - (periods << pair_bits);
    d.twins_end = min(d.pairs, d.periods_end + left * twins);
    return d;
  }
};

// A block's way through its tiles. unit counts the units of all pairs, then the loose ones. In a period twins t take the pairs
// t and t + twins, single group g the pair g + 2 twins; then they go on as described above.
struct Cursor : Place<GroupWork> {
  const Deal& deal;

  __device__ Cursor(const GroupWork& w, const Deal& dealt) : Place{w}, deal(dealt) {
    if (w.is_twin)
      unit = w.group();
    else if (deal.periods_end > 0)
      unit = (2 * w.twins + w.group()) << w.pair_bits;
    else
      unit = first_after_periods();
    enter();
  }
  __device__ bool done() const {
    return unit >= (work.is_twin ? 2 * deal.twins_end : paired_units() + deal.loose);
  }
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
      const bool jumps = pair < deal.periods_end && pair % period >= work.twins;
      return unit + 2 * (jumps ? period - work.twins : work.twins);
    }
    if (pair >= deal.periods_end) return unit + work.singles;
    // The pair's other unit, or the next pair.
    if ((unit + 1) & work.pair_bits) return unit + 1;
    return pair + period < deal.periods_end ? (pair + period) << work.pair_bits
                                            : first_after_periods();
  }

 private:
  __device__ int paired_units() const { return deal.pairs << work.pair_bits; }
  // Of a single group.
  __device__ int first_after_periods() const {
    return (deal.twins_end << work.pair_bits) + work.group();
  }
  __device__ void enter() {
    if (done()) return;
    const int bits = work.pair_bits, loose = unit - paired_units();
    Unit u{loose, work.splits - 1};
    if (loose < 0) {
      u = UnitOrder{deal.row_groups, deal.splits, work.superblock}.at(unit >> bits);
      u.split = (u.split << bits) + (unit & bits);
    }
    row_block = (u.row_block << work.group_bits) + work.group_rank();
    tile = u.split * work.tiles_per_split;
  }
};

}  // namespace cce::cuda::sm90
