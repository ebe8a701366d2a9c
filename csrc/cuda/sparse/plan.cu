// The small steps around the lists of kept entries: which columns bound the lse, where each row block's entries go, which ids
// are hot, where each id's entries start. One block where everything depends on everything, one thread a boundary
// elsewhere; hot ids by a cooperative grid.
#include <cooperative_groups.h>

#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/sparse/lists.h"
#include "cuda/sparse/together.cuh"

namespace cce::cuda {
namespace {

constexpr int kBlock = 1024, kThreads = 256;

// The first of `count` ascending values that is not below `bound`.
template <typename T>
__device__ int64_t first_not_below(const T* values, int64_t count, T bound) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] < bound)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Sampled columns: equal steps through the vocabulary, then the distinct ids among targets at equal steps through the rows, the
// first ones if there are too many. What is both counts as a target.
__global__ void __launch_bounds__(kBlock)
    bound_columns_kernel(const __grid_constant__ BoundColumnsParams p) {
  using Sort = cub::BlockRadixSort<uint32_t, kBlock, 1, int>;
  using Scan = cub::BlockScan<int, kBlock>;
  __shared__ union {
    typename Sort::TempStorage sort;
    typename Scan::TempStorage scan;
  } storage;
  __shared__ uint32_t sorted[kBlock];
  __shared__ uint16_t sample_of[kBlock];  // of a sorted id
  __shared__ uint32_t chosen[kBlock];  // by sample: its id, if none before has it and there is room
  const int i = threadIdx.x;
  const auto none = static_cast<uint32_t>(p.vocab);  // beyond all ids
  uint32_t id[1] = {none};
  if (i < p.sampled) {
    const int64_t place = static_cast<int64_t>(i) * *p.order.count / p.sampled;
    const int64_t local = p.targets[p.order.rows[place]] - p.vocab_start;
    if (local >= 0 && local < p.vocab) id[0] = static_cast<uint32_t>(local);
  }
  int sample[1] = {i};
  Sort(storage.sort).Sort(id, sample, 0, 32 - __clz(none));  // stable
  sorted[i] = id[0];
  sample_of[i] = static_cast<uint16_t>(sample[0]);
  __syncthreads();
  chosen[sample[0]] = i == 0 || sorted[i - 1] != id[0] ? id[0] : none;
  __syncthreads();
  const uint32_t mine = chosen[i];
  int place, all;
  Scan(storage.scan).ExclusiveSum(mine != none, place, all);
  if (mine != none && place < p.distinct) {
    p.ids[p.strided + place] = mine;
    p.counts[p.strided + place] = 1;
  } else {
    chosen[i] = none;
  }
  if (i >= all && i < p.distinct) {
    p.ids[p.strided + i] = 0;
    p.counts[p.strided + i] = 0;
  }
  __syncthreads();
  for (int c = i; c < p.strided; c += kBlock) {
    const auto strided = static_cast<uint32_t>(static_cast<int64_t>(c) * p.vocab / p.strided);
    const int64_t first = first_not_below(sorted, kBlock, strided);
    const bool target =
        first < kBlock && sorted[first] == strided && chosen[sample_of[first]] == strided;
    p.ids[c] = strided;
    p.counts[c] = !target;
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
      found += p.found[block];
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
    f(4 * i, four.x);
    f(4 * i + 1, four.y);
    f(4 * i + 2, four.z);
    f(4 * i + 3, four.w);
  }
}

// A histogram of the counts (of their upper bits first, where they may be large), by each block for its stretch of ids, added
// up in `bins`; then where each stretch's hot ids go among all.
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
  int shift = 0;
  while (p.n >> shift >= kHotBins) ++shift;
  // The block's stretch, in fours, and the thread's part of it.
  const int64_t fours = (p.vocab + 3) / 4, stretch = (fours + gridDim.x - 1) / gridDim.x;
  const int64_t first = min(blockIdx.x * stretch, fours), end = min(first + stretch, fours);
  const int64_t each = (end - first + kBlock - 1) / kBlock;
  const int64_t my_first = min(first + threadIdx.x * each, end), my_end = min(my_first + each, end);
  // Adds the bins of ids for which bin(count) is not negative to those of all blocks.
  const auto histogram = [&](int32_t* to, auto&& bin) {
    for (int i = threadIdx.x; i < kHotBins; i += kBlock) bins[i] = 0;
    __syncthreads();
    // Most counts are small, and atomics on one word wait for each other: those are counted by thread first.
    int small[4] = {};
    visit_counts(counts, first + threadIdx.x, end, kBlock, [&](int64_t, int count) {
      const int b = count > 0 ? bin(count) : -1;
      if (b >= 4) atomicAdd(bins + b, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) small[i] += b == i;
    });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int all = __reduce_add_sync(~0u, small[i]);
      if (threadIdx.x % 32 == 0) atomicAdd(bins + i, all);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kHotBins; i += kBlock) {
      if (bins[i] > 0) atomicAdd(to + i, bins[i]);
    }
    grid.sync();
  };
  histogram(p.bins, [&](int count) { return count >> shift; });
  Threshold limit = find_threshold<Scan>(p.bins, p.hot, storage.scan, found);
  if (shift > 0) {
    const Threshold upper = limit;
    histogram(p.bins + kHotBins, [&](int count) {
      return count >> shift == upper.at ? count & ((1 << shift) - 1) : -1;
    });
    limit = find_threshold<Scan>(p.bins + kHotBins, p.hot - upper.above, storage.scan, found);
    limit = {upper.at << shift | limit.at, limit.above + upper.above};
  }
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

// Where each id's entries start.
__global__ void column_starts_kernel(const int32_t* sorted_ids, int64_t capacity, int64_t vocab,
                                     int32_t* column_first) {
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id > vocab) return;
  const int64_t place = first_not_below(sorted_ids, capacity, static_cast<int32_t>(id));
  column_first[id] = static_cast<int32_t>(place);
}

int blocks_for(int64_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

}  // namespace

cudaError_t bound_columns(const BoundColumnsParams& params, cudaStream_t stream) {
  if (params.sampled > kBlock || params.classes > kBlock) return cudaErrorInvalidValue;
  bound_columns_kernel<<<1, kBlock, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t place_kept(const PlaceParams& params, cudaStream_t stream) {
  place_kernel<<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t hot_ids(const HotIdsParams& params, cudaStream_t stream) {
  if (params.hot > params.vocab || params.n >= int64_t{1} << 24) return cudaErrorInvalidValue;
  return launch_together(hot_ids_kernel, params, kHotBlocks, kHotBlocks, kBlock, stream);
}

cudaError_t column_starts(const int32_t* sorted_ids, int64_t capacity, int64_t vocab,
                          int32_t* column_first, cudaStream_t stream) {
  column_starts_kernel<<<blocks_for(vocab + 1), kThreads, 0, stream>>>(sorted_ids, capacity, vocab,
                                                                       column_first);
  return cudaGetLastError();
}

}  // namespace cce::cuda
