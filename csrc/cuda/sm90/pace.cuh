// Keeps the groups of blocks in step, so that a tile of C that one of them reads is still in the second-level cache when the
// others want it. Nothing else does: the tensor cores set the same speed for all, and who starts late, or found many
// candidates, stays behind for good; of the Gemma 2 2B shape's classifier every tile then came four times from memory instead
// of once a superblock.
//
// A tile's slices are cut into steps of about eight. Before the copies of a step a group waits until all groups have begun the
// last step but one: who is ahead loses nothing by that, since all have the same work and the last one ends it. Begun steps
// are counted in a ring in device memory. A thread of its own reads it, and says in shared memory which step may begin, so
// that the thread that copies waits for no memory. It is all a hint: it orders nothing, and where it waits in vain (other
// kernels keep some of the blocks from starting), it gives up.
#pragma once

#include <climits>

#include "cuda/ptx/counter.cuh"
#include "cuda/sm90/groups.cuh"

namespace cce::cuda::sm90 {

class Pace {
 public:
  static constexpr int kStepSlices = 8;
  static constexpr int kMostTries = 1024;  // reads of a counter: about a millisecond
  static constexpr int kAhead = 2;         // steps that may be begun when nobody has said anything

  // slices: of a tile; allowed: where in shared memory the step is that may begin.
  __device__ __forceinline__ Pace(const GroupWork& work, int slices, uint32_t allowed)
      : work_(work), allowed_(allowed) {
    const int steps = max(1, slices / kStepSlices);
    step_slices_ = (slices + steps - 1) / steps;
    tile_steps_ = (slices + step_slices_ - 1) / step_slices_;
  }
  __device__ __forceinline__ int step_slices() const { return step_slices_; }

  // Whether this block waits: of a cluster the first one, which the others cannot leave behind.
  __device__ __forceinline__ bool waits() const { return work_.pace && work_.cluster_rank() == 0; }

  // Before the copies of a step, in the thread that issues them.
  __device__ __forceinline__ void begin_step() {
    if (!waits()) return;
    while (ptx::shared_read(allowed_) < step_) {
    }
    count();
  }
  // Tiles that this unit does not have, but others do, count as begun.
  __device__ __forceinline__ void skip(int tiles) {
    if (!waits()) return;
#pragma unroll 1
    for (int i = tiles * tile_steps_; i > 0; --i) count();
  }

  // Says which steps may begin, to the end of the block's work; one thread, if this block waits. at: its first tile.
  __device__ __forceinline__ void keep(Cursor at) const {
    const int unit_steps = tile_steps_ * work_.tiles_per_split;
#pragma unroll 1
    for (int step = 0; !at.done(); at.unit = at.next_unit()) {
#pragma unroll 1
      for (const int end = step + unit_steps; step < end; ++step) {
        const int enough = begun_in_all(step, unit_steps, at.deal);
        int tries = 0;
        while (ptx::counter_read(counter(step)) < enough) {
          if (++tries < kMostTries) continue;
          ptx::shared_set(allowed_, INT_MAX);
          return;
        }
        ptx::shared_set(allowed_, step + kAhead);
      }
    }
  }

 private:
  __device__ __forceinline__ int32_t* counter(int step) const {
    return work_.pace + step % kPaceSteps;
  }
  // Once a group, of twins for both.
  __device__ __forceinline__ void count() {
    if (work_.group_rank() == 0) ptx::counter_add(counter(step_), 1 << work_.is_twin);
    ++step_;
  }
  // Groups that have a unit in a round after the periods.
  __device__ __forceinline__ int groups_in(int round, const Deal& deal) const {
    const int pairs = deal.twins_end - deal.periods_end - round * work_.twins;
    const int others =
        ((deal.pairs - deal.twins_end) << work_.pair_bits) + deal.loose - round * work_.singles;
    return 2 * max(0, min(pairs, work_.twins)) + max(0, min(others, work_.singles));
  }
  // What a step's counter says when all groups that have the step have begun it: earlier steps count there too.
  __device__ __forceinline__ int begun_in_all(int step, int unit_steps, const Deal& deal) const {
    const int whole = (deal.periods_end / work_.period() << work_.pair_bits) * unit_steps;
    int begun = 0;
#pragma unroll 1
    for (; step >= whole; step -= kPaceSteps) begun += groups_in((step - whole) / unit_steps, deal);
    return step < 0 ? begun : begun + (step / kPaceSteps + 1) * work_.period();
  }

  const GroupWork& work_;
  uint32_t allowed_;
  int step_slices_, tile_steps_, step_ = 0;
};

}  // namespace cce::cuda::sm90
