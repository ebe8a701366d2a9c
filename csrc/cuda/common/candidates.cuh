// Entries that the sparse gradient may keep, on their way from a tile to the row block's pool in device memory. Each warp
// collects its own in shared memory and moves many at a time: one atomic and one coalesced copy instead of one each a tile.
#pragma once

#include <cuda_runtime.h>

#include "cuda/params.h"
#include "cuda/ptx/counter.cuh"

namespace cce::cuda {

// What an entry's share must reach, base 2. Nothing does in a row block that has had more candidates than its pool holds: it
// goes the exact way, whatever else is found. Flat rows are such, and looking on would cost them up to a twentieth of the
// pass. count: rows that count; a group's last row blocks may have none.
__device__ __forceinline__ float least_share(const Candidates& to, int row_block, int count) {
  const bool exists = row_block * kRowBlock < count;
  if (!exists || ptx::counter_read(to.counts + row_block) > to.capacity) return INFINITY;
  return to.log2_eps;
}

template <int kWarps, int kEntries>
struct CandidateBuffers {
  uint2 entries[kWarps][kEntries];
  int count[kWarps];
};

// A warp's buffer and the pool of the row block that it works on. Addresses are made where they are needed: registers are for
// the accumulators. A thread's columns are behind kGateCount gates; a vote passes over those behind which nobody has any. Of
// the others, kPairCount pairs get room at a time.
template <int kWarps, int kEntries, int kGateCount, int kPairCount>
struct CandidateSink {
  static constexpr int kGates = kGateCount, kPairs = kPairCount;
  static_assert(32 * 2 * kPairs <= kEntries);
  CandidateBuffers<kWarps, kEntries>& buffers;
  int warp, lane;
  const Candidates& to;
  int row_block;

  // Room for `mine` entries of each lane, 2 kPairs at most. All lanes of the warp take part; no atomic unless the buffer is
  // full. Frequent ids are neighbours in many vocabularies: all of a lane's columns may well be candidates.
  __device__ __forceinline__ uint2* reserve(int mine) const {
    int until = mine;  // of the lanes up to this one
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int before = __shfl_up_sync(~0u, until, d);
      if (lane >= d) until += before;
    }
    const int total = __shfl_sync(~0u, until, 31);
    __syncwarp();
    if (buffers.count[warp] + total > kEntries) flush();
    const int at = buffers.count[warp] + until - mine;
    __syncwarp();
    if (lane == 31) buffers.count[warp] = at + mine;
    return buffers.entries[warp] + at;
  }

  // Empties the buffer; all lanes of the warp.
  __device__ __forceinline__ void flush() const {
    __syncwarp();
    const int held = buffers.count[warp];
    if (held == 0) return;
    int first = 0;
    if (lane == 0) first = atomicAdd(to.counts + row_block, held);
    first = __shfl_sync(~0u, first, 0);
    for (int i = lane; i < held; i += 32) {
      if (first + i < to.capacity)
        to.pool[row_block * to.capacity + first + i] = buffers.entries[warp][i];
    }
    __syncwarp();
    if (lane == 0) buffers.count[warp] = 0;
    __syncwarp();
  }
};

}  // namespace cce::cuda
