// From candidates to kept entries, once the lse is final: count, then write, kKeepParts thread blocks a row block of 128 rows,
// each with every so many candidates, the first with the targets too; then sort, a thread block a row. An
// entry is kept if its probability reaches the threshold; the target of a row always is, with its own logit. The place
// inside a row's stretch is first come, first served: the sort makes the order. Between count and write the ids that
// many rows keep are chosen: entries of such hot ids are sorted to the end of their row and multiplied as a dense matrix.
#include <climits>
#include <cub/block/block_scan.cuh>

#include "cuda/common/epilogue.cuh"
#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kRows = kRowBlock, kThreads = 256;
constexpr int kVotingStep = 8;  // of so many row blocks one says which ids are kept by most rows

// What one row block's threads need to know of its rows.
struct Rows {
  float lse2[kRows];
  float target_logit[kRows];
  int target[kRows];  // shard-local id, -1: in another shard, or no row
};

__device__ void load_rows(const KeepParams& p, Rows& rows, int& hopeless) {
  const int i = threadIdx.x;
  if (i == 0) hopeless = 0;
  __syncthreads();
  if (i < kRows) {
    const int position = static_cast<int>(blockIdx.x) * kRows + i;
    rows.target[i] = -1;
    rows.lse2[i] = INFINITY;  // keeps nothing
    if (position < *p.order.count) {
      const int64_t row = p.order.rows[position];
      rows.lse2[i] = p.lse[row] * kLog2E;
      rows.target_logit[i] = p.target_logit[row];
      if (p.candidates.bound2[row] > rows.lse2[i]) atomicOr(&hopeless, 1);
      const int64_t target = p.targets[row];
      if (core::classify_target(target, p.shard_size, p.options) == core::TargetKind::kHere)
        rows.target[i] = static_cast<int>(target - p.options.vocab_start);
    }
  }
  __syncthreads();
}

// The candidates of this thread, and whether its block has the targets.
constexpr int kCandidateStep = kThreads * kKeepParts;
__device__ __forceinline__ int first_candidate() { return blockIdx.y * kThreads + threadIdx.x; }
__device__ __forceinline__ bool has_targets() { return blockIdx.y == 0; }

struct Entry {
  int row, id;
  float logit;
  bool keep;
};

__device__ __forceinline__ Entry read_entry(const KeepParams& p, const Rows& rows, int64_t i) {
  const uint2 raw = p.candidates.pool[blockIdx.x * p.candidates.capacity + i];
  Entry e;
  e.row = static_cast<int>(raw.x >> kCandidateIdBits);
  e.id = static_cast<int>(raw.x & ((1u << kCandidateIdBits) - 1));
  e.logit = __uint_as_float(raw.y);
  e.keep =
      e.id != rows.target[e.row] && ptx::ex2(fmaf(e.logit, kLog2E, -rows.lse2[e.row])) >= p.eps;
  return e;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ KeepParams p) {
  __shared__ Rows rows;
  __shared__ int hopeless, of_row[kRows];
  if (threadIdx.x < kRows) of_row[threadIdx.x] = 0;
  load_rows(p, rows, hopeless);
  const int found = p.candidates.counts[blockIdx.x];
  const bool exact = hopeless || found > p.candidates.capacity;
  // Which ids are hot shows in a part of the rows too, at a part of the atomics.
  const bool voting = blockIdx.x % (gridDim.x < 4 * kVotingStep ? 1 : kVotingStep) == 0;
  if (!exact) {
    for (int i = first_candidate(); i < found; i += kCandidateStep) {
      const Entry e = read_entry(p, rows, i);
      if (!e.keep) continue;
      atomicAdd(of_row + e.row, 1);
      if (voting) atomicAdd(p.column_counts + e.id, 1);
    }
    if (has_targets() && threadIdx.x < kRows && rows.target[threadIdx.x] >= 0) {
      atomicAdd(of_row + threadIdx.x, 1);
      if (voting) atomicAdd(p.column_counts + rows.target[threadIdx.x], 1);
    }
  }
  if (threadIdx.x == 0 && has_targets()) p.exact[blockIdx.x] = exact;
  __syncthreads();
  if (threadIdx.x >= kRows) return;
  const int mine = of_row[threadIdx.x];
  if (mine > 0) atomicAdd(p.row_counts + blockIdx.x * kRows + threadIdx.x, mine);
  const int all = __reduce_add_sync(~0u, mine);
  if (threadIdx.x % 32 == 0 && all > 0) atomicAdd(p.kept + blockIdx.x, all);
}

// Where the rows' stretches start, and the entries into them.
__global__ void __launch_bounds__(kThreads) write_kernel(const __grid_constant__ KeepParams p) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ Rows rows;
  __shared__ int hopeless, first[kRows];
  const bool exact = p.exact[blockIdx.x];
  const int i = threadIdx.x;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kRows;
  const bool is_row = i < kRows && block + i < p.n;
  int start;
  Scan(storage).ExclusiveSum(is_row && !exact ? p.row_counts[block + i] : 0, start);
  start += p.first[blockIdx.x];
  if (is_row) {
    first[i] = start;
    if (has_targets()) p.row_first[block + i] = start;
  }
  if (exact) return;
  load_rows(p, rows, hopeless);
  const auto write = [&](int row, int id, float logit) {
    const int at = first[row] + atomicAdd(p.row_used + block + row, 1);
    p.keys[at] = (p.slots[id] >= 0 ? 1 << p.id_bits : 0) | id;
    p.logits[at] = logit;
  };
  const int found = p.candidates.counts[blockIdx.x];
  for (int c = first_candidate(); c < found; c += kCandidateStep) {
    const Entry e = read_entry(p, rows, c);
    if (e.keep) write(e.row, e.id, e.logit);
  }
  if (has_targets() && i < kRows && rows.target[i] >= 0)
    write(i, rows.target[i], rows.target_logit[i]);
}

constexpr int kSortThreads = 128, kMine = 2, kTile = 1024;

// A row's entries by key: a thread counts for each of its own how many of the row's are smaller. Rows have a few hundred
// entries, one turn of the loops; no key is there twice.
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const __grid_constant__ SortRowsParams p) {
  __shared__ alignas(16) int tile[kTile];
  const int64_t position = blockIdx.x;
  const int begin = p.row_first[position], end = p.row_first[position + 1];
  const int row = p.order.rows[position];
  const int hot_bit = 1 << p.id_bits;
  int cold = 0;
  for (int base = begin; base < end; base += kSortThreads * kMine) {
    int key[kMine], place[kMine];
#pragma unroll
    for (int k = 0; k < kMine; ++k) {
      const int at = base + k * kSortThreads + threadIdx.x;
      key[k] = at < end ? p.keys[at] : INT_MAX;
      place[k] = begin;
      cold += __syncthreads_count(key[k] < hot_bit);
    }
    for (int from = begin; from < end; from += kTile) {
      const int count = min(end - from, kTile), padded = (count + 3) / 4 * 4;
      __syncthreads();  // the last tile has been read
      for (int i = threadIdx.x; i < padded; i += kSortThreads)
        tile[i] = i < count ? p.keys[from + i] : INT_MAX;
      __syncthreads();
      for (int i = 0; i < padded; i += 4) {
        const int4 other = *reinterpret_cast<const int4*>(tile + i);
#pragma unroll
        for (int k = 0; k < kMine; ++k)
          place[k] +=
              (other.x < key[k]) + (other.y < key[k]) + (other.z < key[k]) + (other.w < key[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kMine; ++k) {
      const int at = base + k * kSortThreads + threadIdx.x;
      if (at >= end) continue;
      p.ids[place[k]] = key[k] & (hot_bit - 1);
      p.rows[place[k]] = row;
      p.sorted_logits[place[k]] = p.logits[at];
    }
  }
  if (threadIdx.x != 0) return;
  p.row_hot[position] = begin + cold;
  p.exact_rows[row] = position < *p.order.count && p.exact[position / kRows];
}

// 0, 1, 2, ... for all places, and an id beyond all where no entry is.
__global__ void __launch_bounds__(kThreads)
    number_kernel(const __grid_constant__ SortRowsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.capacity) return;
  p.numbers[i] = static_cast<int32_t>(i);
  if (i >= p.row_first[p.n]) p.ids[i] = (1 << p.id_bits) - 1;
}

dim3 grid(const KeepParams& p) {
  return dim3(static_cast<unsigned>((p.n + kRows - 1) / kRows), kKeepParts);
}

}  // namespace

cudaError_t count_kept(const KeepParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  count_kernel<<<grid(params), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t write_kept(const KeepParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  write_kernel<<<grid(params), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t sort_rows(const SortRowsParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  sort_kernel<<<static_cast<unsigned>(params.n), kSortThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t number_entries(const SortRowsParams& params, cudaStream_t stream) {
  if (params.capacity == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((params.capacity + kThreads - 1) / kThreads);
  number_kernel<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
