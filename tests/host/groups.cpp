// Deals out the work of many launches as the blocks of csrc/cuda/sm90 do, and complains where a tile is taken by nobody or twice,
// where blocks of a cluster do not go in step, where a block has more units than there are rounds, or where sm90/pace.cuh
// expects another count than there will be.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <map>
#include <random>
#include <utility>
#include <vector>

#define private public  // Pace's counts
#include "cuda/sm90/pace.cuh"
#undef private

using namespace cce::cuda::sm90;

namespace {

struct Launch {
  GroupWork work;
  int row_blocks, slices;
};

// Places of a block, one a tile; row block and tile.
std::vector<std::pair<int, int>> way_of(const Launch& l, int block) {
  blockIdx.x = static_cast<unsigned>(block);
  std::vector<std::pair<int, int>> way;
  const Deal deal = l.work.deal(l.row_blocks);
  for (Cursor at(l.work, deal); !at.done(); at.next_tile()) way.emplace_back(at.row_block, at.tile);
  return way;
}

bool check(Launch l) {
  GroupWork& w = l.work;
  std::map<std::pair<int, int>, int> taken;
  std::map<int, int> begun;  // groups by step
  const Pace pace(w, l.slices, 0);
  const Deal deal = w.deal(l.row_blocks);
  // As many as if the last pairs' second halves existed, at most.
  const int padded = deal.row_groups * ((w.splits + w.pair_bits) >> w.pair_bits << w.pair_bits);
  if (deal.rounds > (padded + w.period() - 1) / w.period()) return std::puts("too many"), false;
  for (const bool twins : {true, false}) {
    w.is_twin = twins;
    const int groups = twins ? 2 * w.twins : w.singles, size = 1 << w.group_bits;
    for (int group = 0; group < groups; ++group) {
      const auto first = way_of(l, group * size);
      for (int rank = 0; rank < size; ++rank) {
        const auto way = way_of(l, group * size + rank);
        if (way.size() != first.size()) return std::puts("a group's blocks part"), false;
        for (size_t i = 0; i < way.size(); ++i) {
          if (way[i] != std::pair(first[i].first + rank, first[i].second))
            return std::puts("a group's blocks have other columns"), false;
          ++taken[way[i]];
        }
      }
      if (twins && group % 2) {
        const auto other = way_of(l, (group - 1) * size);
        if (other.size() != first.size()) return std::puts("twins part"), false;
        for (size_t i = 0; i < first.size(); ++i)
          if (other[i].first != first[i].first) return std::puts("twins have other rows"), false;
      }
      // Steps, with those of tiles that others have.
      blockIdx.x = static_cast<unsigned>(group * size);
      int step = 0, units = 0;
      for (Cursor at(w, deal); !at.done(); at.next_tile()) {
        int tiles = 1;
        if (at.ends_unit()) {
          tiles += w.tiles_per_split - at.tiles_of_unit();
          ++units;
        }
        for (int i = tiles * pace.tile_steps_; i > 0; --i) ++begun[step++];
      }
      if (units > deal.rounds) return std::puts("more units than rounds"), false;
    }
  }
  const int rows = (l.row_blocks + (1 << w.group_bits) - 1) >> w.group_bits << w.group_bits;
  for (int row = 0; row < rows; ++row)
    for (int tile = 0; tile < w.column_tiles; ++tile)
      if (taken[{row, tile}] != 1) return std::printf("%d times\n", taken[{row, tile}]), false;
  const int unit_steps = pace.tile_steps_ * w.tiles_per_split;
  for (const auto& [step, groups] : begun) {
    int count = 0;
    for (int s = step; s >= 0; s -= cce::cuda::kPaceSteps) count += begun[s];
    if (pace.begun_in_all(step, unit_steps, deal) != count) return std::puts("pace"), false;
  }
  return true;
}

// An H200's groups, in as many rounds as there are units for each: no pair has an empty half.
bool check_rounds() {
  GroupWork w;
  w.pair_bits = 1;
  w.group_bits = 2;
  w.twins = 15;
  w.singles = 3;
  const auto rounds = [&](int splits, int row_blocks) {
    w.splits = splits;
    return w.deal(row_blocks).rounds;
  };
  return rounds(167, 64) == 81 && rounds(171, 64) == 83 && rounds(198, 64) == 96 &&
         rounds(86, 64) == 42 && rounds(11, 256) == 22 &&
         // Too many units of a last split for three groups.
         rounds(7, 256) == 16 && rounds(0, 64) == 0 && rounds(7, 0) == 0;
}

}  // namespace

int main() {
  if (!check_rounds()) return std::puts("rounds"), 1;
  std::mt19937 random(1);
  const auto any = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  for (int i = 0; i < 3000; ++i) {
    Launch l;
    GroupWork& w = l.work;
    w.pair_bits = any(0, 2) > 0;
    w.group_bits = w.pair_bits ? 2 : any(0, 2);
    w.twins = w.pair_bits ? any(1, 16) : 0;
    w.singles = w.pair_bits ? any(0, any(0, 1) ? 4 : 31) : any(1, 33);
    w.column_tiles = any(1, 150);
    w.tiles_per_split = any(1, 12);
    w.splits = (w.column_tiles + w.tiles_per_split - 1) / w.tiles_per_split;
    w.superblock = any(1, 9);
    l.row_blocks = any(0, 40);
    l.slices = any(1, 90);
    if (!check(l)) {
      std::printf(
          "launch %d: pairs %d, groups of %d, %d twins, %d singles, %d tiles, %d a split, %d "
          "row blocks, superblock %d\n",
          i, w.pair_bits, 1 << w.group_bits, w.twins, w.singles, w.column_tiles, w.tiles_per_split,
          l.row_blocks, w.superblock);
      return 1;
    }
  }
}
