// Entries that the sparse gradient may keep, on their way from a tile to the row block's pool in device memory. Each warp
// collects its own in shared memory and moves many at a time: one atomic and one coalesced copy instead of one each a tile.
#pragma once

#include <cuda_runtime.h>

#include "cuda/params.h"

namespace cce::cuda {

template <int kWarps, int kEntries>
struct CandidateBuffers {
  uint2 entries[kWarps][kEntries];
  int count[kWarps];  // of entries offered; those beyond kEntries went to the pool one by one
};

// A warp's buffer and the pool of the row block that it works on. Addresses are made where they are needed: registers are for
// the accumulators.
template <int kWarps, int kEntries>
struct CandidateSink {
  CandidateBuffers<kWarps, kEntries>& buffers;
  int warp;
  const Candidates& to;
  int row_block;

  // One entry; any lanes of the warp.
  __device__ __forceinline__ void put(uint32_t key, float logit) const {
    const uint2 entry = make_uint2(key, __float_as_uint(logit));
    const int at = atomicAdd(buffers.count + warp, 1);
    if (at < kEntries)
      buffers.entries[warp][at] = entry;
    else
      put_into_pool(atomicAdd(to.counts + row_block, 1), entry);
  }

  // Empties the buffer; all lanes of the warp.
  __device__ __forceinline__ void flush() const {
    __syncwarp();
    const int offered = buffers.count[warp], held = offered < kEntries ? offered : kEntries;
    if (held == 0) return;
    const int lane = threadIdx.x % 32;
    int first = 0;
    if (lane == 0) first = atomicAdd(to.counts + row_block, held);
    first = __shfl_sync(~0u, first, 0);
    for (int i = lane; i < held; i += 32) put_into_pool(first + i, buffers.entries[warp][i]);
    __syncwarp();
    if (lane == 0) buffers.count[warp] = 0;
    __syncwarp();
  }
  // The same where more than half is used.
  __device__ __forceinline__ void make_room() const {
    __syncwarp();
    if (buffers.count[warp] > kEntries / 2) flush();
  }

 private:
  __device__ __forceinline__ void put_into_pool(int place, uint2 entry) const {
    if (place < to.capacity) to.pool[row_block * to.capacity + place] = entry;
  }
};

}  // namespace cce::cuda
