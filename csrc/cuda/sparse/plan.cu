// The small steps around the lists of kept entries: which columns bound the lse, where each row block's entries go, which ids
// are hot. One block where everything depends on everything; hot ids by a cooperative grid; a thread a row or a column
// elsewhere.
#include <cooperative_groups.h>

#include <algorithm>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/sparse/lists.h"
#include "cuda/sparse/together.cuh"

namespace cce::cuda {
namespace {

constexpr int kBlock = 1024, kThreads = 256;

// A thread a row that counts.
__global__ void __launch_bounds__(kThreads)
    count_targets_kernel(const __grid_constant__ BoundColumnsParams p) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (position >= *p.order.count) return;
  const int64_t local = p.targets[p.order.rows[position]] - p.vocab_start;
  if (local >= 0 && local < p.vocab) atomicAdd(p.target_counts + local, 1);
}

// A thread a column.
__global__ void __launch_bounds__(kThreads)
    bound_columns_kernel(const __grid_constant__ BoundColumnsParams p) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < p.strided) {
    const int64_t id = static_cast<int64_t>(i) * p.vocab / p.strided;
    p.ids[i] = id;
    p.counts[i] = p.slots[id] < 0;
  }
  const int64_t count = *p.order.count;
  if (i < p.classes) p.anchors[i] = count == 0 ? 0 : p.order.rows[i * count / p.classes];
}

// Where the row blocks' entries start; blocks beyond the lists' capacity go the exact way, as all after the first do, and
// have none; the tally.
__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ PlaceParams p) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  using Sum = cub::BlockReduce<int64_t, kThreads>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Sum::TempStorage sum;
  } storage;
  __shared__ int used;
  if (threadIdx.x == 0) used = 0;
  __syncthreads();
  int64_t before = 0, found = 0, overflowed = 0;
  for (int64_t base = 0; base < p.blocks; base += kThreads) {
    const int64_t block = base + threadIdx.x;
    const int64_t mine = block < p.blocks ? p.kept[block] : 0;
    int64_t start, all;
    Scan(storage.scan).ExclusiveSum(mine, start, all);
    __syncthreads();
    start += before;
    const bool fits = start + mine <= p.capacity;
    if (fits) atomicMax(&used, static_cast<int>(start + mine));
    __syncthreads();
    if (block < p.blocks) {
      // Of those that overflowed, how many were found depends on when it was noticed.
      found += min(int64_t{p.found[block]}, p.pool_capacity);
      overflowed += p.found[block] > p.pool_capacity;
      if (!fits) p.exact[block] = 1;
      p.first[block] = fits ? static_cast<int>(start) : used;
    }
    before += all;
  }
  found = Sum(storage.sum).Sum(found);
  __syncthreads();
  overflowed = Sum(storage.sum).Sum(overflowed);
  if (threadIdx.x == 0) {
    *p.end = used;
    p.tally[0] = found;
    p.tally[1] = before;
    p.tally[2] = overflowed;
    p.tally[3] = (*p.row_count + kRowBlock - 1) / kRowBlock;
    p.tally[4] = max(*p.row_count, 1);
  }
}

// Where the counts of the most frequent ids end: at `at`, of which some are among the `wanted` largest, with `above` larger
// ones. bins[x]: ids with value x; ids without any entry are not in it, and are more than anybody wants.
struct Threshold {
  int at, above;
};

constexpr int kBinsEach = kHotBins / kBlock;

template <typename Scan>
__device__ Threshold find_threshold(const int* bins, int wanted,
                                    typename Scan::TempStorage& storage, Threshold& found) {
  // From the top: thread 0 has the largest values.
  const int top = kHotBins - 1 - threadIdx.x * kBinsEach;
  int here[kBinsEach], mine = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) mine += here[i] = __ldcg(bins + top - i);
  int above;
  Scan(storage).ExclusiveSum(mine, above);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    const int value = top - i;
    if (above < wanted && (above + here[i] >= wanted || value == 0)) found = {value, above};
    above += here[i];
  }
  __syncthreads();
  return found;
}

// f(id, count) for the four neighbouring ids of every step-th of the fours from `first` to `end`.
template <typename F>
__device__ __forceinline__ void visit_counts(const int4* counts, int64_t first, int64_t end,
                                             int64_t step, F&& f) {
  for (int64_t i = first; i < end; i += step) {
    const int4 four = counts[i];
    f(4 * i, min(four.x, kHotBins - 1));
    f(4 * i + 1, min(four.y, kHotBins - 1));
    f(4 * i + 2, min(four.z, kHotBins - 1));
    f(4 * i + 3, min(four.w, kHotBins - 1));
  }
}

// A histogram of the counts, by each block for its stretch of ids, added up in `bins`; then where each stretch's hot ids go
// among all.
__global__ void __launch_bounds__(kBlock) hot_ids_kernel(const __grid_constant__ HotIdsParams p) {
  using Scan = cub::BlockScan<int, kBlock>;
  using Sum = cub::BlockReduce<int, kBlock>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Sum::TempStorage sum;
  } storage;
  __shared__ int bins[kHotBins];
  __shared__ Threshold found;
  __shared__ int places[2];
  const auto grid = cooperative_groups::this_grid();
  const auto* counts = reinterpret_cast<const int4*>(p.counts);
  // The block's stretch, in fours, and the thread's part of it.
  const int64_t fours = (p.vocab + 3) / 4, stretch = (fours + gridDim.x - 1) / gridDim.x;
  const int64_t first = min(blockIdx.x * stretch, fours), end = min(first + stretch, fours);
  const int64_t each = (end - first + kBlock - 1) / kBlock;
  const int64_t my_first = min(first + threadIdx.x * each, end), my_end = min(my_first + each, end);
  for (int i = threadIdx.x; i < kHotBins; i += kBlock) bins[i] = 0;
  __syncthreads();
  // Most counts are small, and atomics on one word wait for each other: those are counted by thread first.
  int small[4] = {};
  visit_counts(counts, first + threadIdx.x, end, kBlock, [&](int64_t, int count) {
    if (count >= 4) atomicAdd(bins + count, 1);
#pragma unroll
    for (int i = 1; i < 4; ++i) small[i] += count == i;
  });
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    const int all = __reduce_add_sync(~0u, small[i]);
    if (threadIdx.x % 32 == 0) atomicAdd(bins + i, all);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kHotBins; i += kBlock) {
    if (bins[i] > 0) atomicAdd(p.bins + i, bins[i]);
  }
  grid.sync();
  const Threshold limit = find_threshold<Scan>(p.bins, p.hot, storage.scan, found);
  // Ids above the limit, and as many at the limit as there is room for, before those of the stretches after.
  int above = 0, equal = 0;
  visit_counts(counts, my_first, my_end, 1, [&](int64_t, int count) {
    above += count > limit.at;
    equal += count == limit.at;
  });
  const int above_here = Sum(storage.sum).Sum(above);
  __syncthreads();
  const int equal_here = Sum(storage.sum).Sum(equal);
  if (threadIdx.x == 0) {
    p.places[blockIdx.x] = above_here;
    p.places[kHotBlocks + blockIdx.x] = equal_here;
  }
  grid.sync();
  if (threadIdx.x < 2) {
    int before = 0;
    for (unsigned i = 0; i < blockIdx.x; ++i)
      before += __ldcg(p.places + threadIdx.x * kHotBlocks + i);
    places[threadIdx.x] = before;
  }
  Scan(storage.scan).ExclusiveSum(above, above);
  __syncthreads();  // `places` and the storage
  Scan(storage.scan).ExclusiveSum(equal, equal);
  above += places[0];
  equal += places[1];
  const int room = p.hot - limit.above;
  visit_counts(counts, my_first, my_end, 1, [&](int64_t id, int count) {
    if (id >= p.vocab) return;
    const bool larger = count > limit.at, same = count == limit.at;
    const bool is_hot = larger || (same && equal < room);
    const int place = above + min(equal, room);
    if (is_hot) p.ids[place] = id;
    p.slots[id] = is_hot ? place : -1;
    above += larger;
    equal += same;
  });
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

cudaError_t count_targets(const BoundColumnsParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  count_targets_kernel<<<blocks_for(params.n), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t bound_columns(const BoundColumnsParams& params, cudaStream_t stream) {
  if (params.classes > kThreads) return cudaErrorInvalidValue;
  bound_columns_kernel<<<blocks_for(std::max(params.strided, 1)), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t place_kept(const PlaceParams& params, cudaStream_t stream) {
  place_kernel<<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t hot_ids(const HotIdsParams& params, cudaStream_t stream) {
  if (params.hot > params.vocab) return cudaErrorInvalidValue;
  return launch_together(hot_ids_kernel, params, kHotBlocks, kHotBlocks, kBlock, stream);
}

}  // namespace cce::cuda
