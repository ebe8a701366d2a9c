// The small steps between the counting of kept entries and their lists: where each part's entries go, which ids are hot, and
// what the sorted keys say. One block where everything depends on everything, one thread an entry or a boundary elsewhere.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kBlock = 1024, kThreads = 256;

// Whether `value` is among the ascending values[0, count).
__device__ bool among(const uint32_t* values, int count, uint32_t value) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (values[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low < count && values[low] == value;
}

// Sampled columns: equal steps through the vocabulary, then the distinct ids among targets at equal steps through the rows.
// What is both counts as a target.
__global__ void __launch_bounds__(kBlock)
    bound_columns_kernel(const __grid_constant__ BoundColumnsParams p) {
  using Sort = cub::BlockRadixSort<uint32_t, kBlock, 1>;
  __shared__ typename Sort::TempStorage storage;
  __shared__ uint32_t sorted[kBlock];
  const int i = threadIdx.x;
  const auto none = static_cast<uint32_t>(p.vocab);  // beyond all ids
  uint32_t id[1] = {none};
  if (i < p.sampled) {
    const int64_t place = static_cast<int64_t>(i) * *p.order.count / p.sampled;
    const int64_t local = p.targets[p.order.rows[place]] - p.vocab_start;
    if (local >= 0 && local < p.vocab) id[0] = static_cast<uint32_t>(local);
  }
  Sort(storage).Sort(id, 0, 32 - __clz(none));
  sorted[i] = id[0];
  __syncthreads();
  for (int c = i; c < p.strided; c += kBlock) {
    const int64_t strided = static_cast<int64_t>(c) * p.vocab / p.strided;
    p.ids[c] = strided;
    p.counts[c] = !among(sorted, kBlock, static_cast<uint32_t>(strided));
  }
  if (i >= p.sampled) return;
  const bool fresh = id[0] != none && (i == 0 || sorted[i - 1] != id[0]);
  p.ids[p.strided + i] = id[0] == none ? 0 : id[0];
  p.counts[p.strided + i] = fresh;
}

// Where the parts' entries start; blocks beyond the lists' capacity go the exact way; the tally.
__global__ void __launch_bounds__(kBlock) place_kernel(const __grid_constant__ PlaceParams p) {
  using Scan = cub::BlockScan<int64_t, kBlock>;
  using Sum = cub::BlockReduce<int64_t, kBlock>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Sum::TempStorage sum;
  } storage;
  int64_t before = 0, found = 0, overflowed = 0;
  for (int64_t base = 0; base < p.blocks; base += kBlock) {
    const int64_t block = base + threadIdx.x;
    int64_t mine = 0;
    if (block < p.blocks) {
      for (int i = 0; i < kKeepParts; ++i) mine += p.kept[block * kKeepParts + i];
      found += p.found[block];
      overflowed += p.found[block] > p.pool_capacity;
    }
    int64_t start, all;
    Scan(storage.scan).ExclusiveSum(mine, start, all);
    __syncthreads();
    if (block < p.blocks) {
      start += before;
      if (start + mine > p.capacity) p.exact[block] = 1;
      for (int i = 0; i < kKeepParts; ++i) {
        p.first[block * kKeepParts + i] = start;
        start += p.kept[block * kKeepParts + i];
      }
    }
    before += all;
  }
  found = Sum(storage.sum).Sum(found);
  __syncthreads();
  overflowed = Sum(storage.sum).Sum(overflowed);
  if (threadIdx.x == 0) {
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

constexpr int kBins = 4096, kBinsEach = kBins / kBlock;

template <typename Scan>
__device__ Threshold find_threshold(const int* bins, int wanted,
                                    typename Scan::TempStorage& storage, Threshold& found) {
  // From the top: thread 0 has the largest values.
  const int top = kBins - 1 - threadIdx.x * kBinsEach;
  int mine = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) mine += bins[top - i];
  int above;
  Scan(storage).ExclusiveSum(mine, above);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    const int value = top - i, here = bins[value];
    if (above < wanted && (above + here >= wanted || value == 0)) found = {value, above};
    above += here;
  }
  __syncthreads();
  return found;
}

// f(id, count) for every step-th four neighbouring ids from `first` (in fours) to `end`. Many loads at a time: one block has
// nothing else to hide their latency with.
template <typename F>
__device__ __forceinline__ void visit_counts(const int4* counts, int64_t first, int64_t end,
                                             int64_t step, F&& f) {
  constexpr int kLoads = 8;
  for (int64_t i = first; i < end; i += kLoads * step) {
    int4 four[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      four[k] = i + k * step < end ? counts[i + k * step] : make_int4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (i + k * step >= end) continue;
      const int64_t id = 4 * (i + k * step);
      f(id, four[k].x);
      f(id + 1, four[k].y);
      f(id + 2, four[k].z);
      f(id + 3, four[k].w);
    }
  }
}

// The `hot` ids with the largest counts, the smaller id first, ascending, and every id's place among them. One block: a
// histogram of the counts (of their upper bits first, where they may be large), then each thread's stretch of ids.
__global__ void __launch_bounds__(kBlock)
    hot_ids_kernel(const int4* counts, int64_t n, int64_t vocab, int hot, int64_t* ids,
                   int32_t* slots) {
  using Scan = cub::BlockScan<int, kBlock>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int bins[kBins];
  __shared__ Threshold found;
  int shift = 0;
  while (n >> shift >= kBins) ++shift;
  const auto clear = [&] {
    for (int i = threadIdx.x; i < kBins; i += kBlock) bins[i] = 0;
    __syncthreads();
  };
  const int64_t fours = (vocab + 3) / 4;
  clear();
  // Most counts are small, and atomics on one word wait for each other: those are counted by thread first.
  int small[4] = {};
  visit_counts(counts, threadIdx.x, fours, kBlock, [&](int64_t, int count) {
    const int bin = count >> shift;
    if (bin >= 4) atomicAdd(bins + bin, 1);
#pragma unroll
    for (int b = 0; b < 4; ++b) small[b] += count > 0 && bin == b;
  });
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const int all = __reduce_add_sync(~0u, small[b]);
    if (threadIdx.x % 32 == 0) atomicAdd(bins + b, all);
  }
  __syncthreads();
  Threshold limit = find_threshold<Scan>(bins, hot, storage, found);
  if (shift > 0) {
    const int upper = limit.at, above = limit.above;
    clear();
    visit_counts(counts, threadIdx.x, fours, kBlock, [&](int64_t, int count) {
      if (count > 0 && count >> shift == upper) atomicAdd(bins + (count & ((1 << shift) - 1)), 1);
    });
    __syncthreads();
    limit = find_threshold<Scan>(bins, hot - above, storage, found);
    limit = {upper << shift | limit.at, limit.above + above};
  }
  // A thread's stretch: ids above the limit, and as many at the limit as there is room for.
  const int64_t each = (fours + kBlock - 1) / kBlock, begin = threadIdx.x * each;
  const int64_t end = begin + each < fours ? begin + each : fours;
  const int room = hot - limit.above;
  int above = 0, equal = 0;
  visit_counts(counts, begin, end, 1, [&](int64_t, int count) {
    above += count > limit.at;
    equal += count == limit.at;
  });
  Scan(storage).ExclusiveSum(above, above);
  __syncthreads();
  Scan(storage).ExclusiveSum(equal, equal);
  visit_counts(counts, begin, end, 1, [&](int64_t id, int count) {
    const bool larger = count > limit.at, same = count == limit.at;
    if (larger || (same && equal < room && id < vocab)) {
      const int place = above + (equal < room ? equal : room);
      ids[place] = id;
      slots[id] = place;
    }
    above += larger;
    equal += same;
  });
}

// Keys into ids and rows; unused ones into an id beyond all.
__global__ void unpack_kernel(const __grid_constant__ UnpackParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.capacity) return;
  const int64_t key = p.keys[i], mask = (int64_t{1} << p.id_bits) - 1;
  const int64_t position = key >> (p.id_bits + 1);
  p.ids[i] = static_cast<int32_t>(key & mask);
  p.rows[i] = p.order.rows[position >= 0 && position < p.n ? position : p.n - 1];
  p.numbers[i] = static_cast<int32_t>(i);
}

// The first of `count` ascending values that is at least `bound`; negative values count as largest.
template <typename T>
__device__ int32_t first_at_least(const T* values, int64_t count, T bound) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const T value = values[middle];
    if (value >= 0 && value < bound)
      low = middle + 1;
    else
      high = middle;
  }
  return static_cast<int32_t>(low);
}

// Where positions, and in them the hot ids, start; and which rows go the exact way.
__global__ void row_starts_kernel(const __grid_constant__ UnpackParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i > 2 * p.n) return;
  const int32_t at = first_at_least(p.keys, p.capacity, i << p.id_bits);
  if (i % 2 == 0)
    p.row_first[i / 2] = at;
  else
    p.row_hot[i / 2] = at;
  if (i < p.n) p.exact_rows[p.order.rows[i]] = i < *p.order.count && p.exact[i / kRowBlock];
}

__global__ void column_starts_kernel(const int32_t* sorted_ids, int64_t capacity, int64_t vocab,
                                     int32_t* column_first) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i <= vocab) column_first[i] = first_at_least(sorted_ids, capacity, static_cast<int32_t>(i));
}

int blocks_for(int64_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

}  // namespace

cudaError_t bound_columns(const BoundColumnsParams& params, cudaStream_t stream) {
  if (params.sampled > kBlock) return cudaErrorInvalidValue;
  bound_columns_kernel<<<1, kBlock, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t place_kept(const PlaceParams& params, cudaStream_t stream) {
  place_kernel<<<1, kBlock, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t hot_ids(const int32_t* counts, int64_t n, int64_t hot, int64_t vocab, int64_t* ids,
                    int32_t* slots, cudaStream_t stream) {
  if (hot > vocab || n >= int64_t{1} << 24) return cudaErrorInvalidValue;
  cudaError_t error = cudaMemsetAsync(slots, 0xff, sizeof(*slots) * vocab, stream);
  if (error != cudaSuccess) return error;
  hot_ids_kernel<<<1, kBlock, 0, stream>>>(reinterpret_cast<const int4*>(counts), n, vocab,
                                           static_cast<int>(hot), ids, slots);
  return cudaGetLastError();
}

cudaError_t unpack_keys(const UnpackParams& params, cudaStream_t stream) {
  unpack_kernel<<<blocks_for(params.capacity), kThreads, 0, stream>>>(params);
  row_starts_kernel<<<blocks_for(2 * params.n + 1), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t column_starts(const int32_t* sorted_ids, int64_t capacity, int64_t vocab,
                          int32_t* column_first, cudaStream_t stream) {
  column_starts_kernel<<<blocks_for(vocab + 1), kThreads, 0, stream>>>(sorted_ids, capacity, vocab,
                                                                       column_first);
  return cudaGetLastError();
}

}  // namespace cce::cuda
