// From candidates to kept entries, once the lse is final: count, then write, kKeepParts thread blocks a row block of 128 rows,
// each with every so many candidates, the first with the targets too. An entry is kept if its probability reaches the
// threshold; the target of a row always is, with its own logit. The place inside a row's stretch is first come, first
// served: sort_rows makes the order. Between count and write the ids that many rows keep are chosen.
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
      if (p.bound2[row] > rows.lse2[i]) atomicOr(&hopeless, 1);
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

// Of this thread block: kept entries by row.
__device__ __forceinline__ int32_t* row_counts(const KeepParams& p) {
  return p.row_counts + (static_cast<int64_t>(blockIdx.x) * kKeepParts + blockIdx.y) * kRows;
}

struct Entry {
  int row, id;
  float logit;
  bool keep;
};

__device__ __forceinline__ Entry make_entry(const KeepParams& p, const Rows& rows, uint2 raw) {
  Entry e;
  e.row = static_cast<int>(raw.x >> kCandidateIdBits);
  e.id = static_cast<int>(raw.x & ((1u << kCandidateIdBits) - 1));
  e.logit = __uint_as_float(raw.y);
  e.keep =
      e.id != rows.target[e.row] && ptx::ex2(fmaf(e.logit, kLog2E, -rows.lse2[e.row])) >= p.eps;
  return e;
}

// Those of this thread's candidates that are kept; several are on their way at once.
template <typename Visit>
__device__ __forceinline__ void visit_kept(const KeepParams& p, const Rows& rows, int found,
                                           Visit&& visit) {
  constexpr int kInFlight = 4;
  const uint2* pool = p.candidates.pool + blockIdx.x * p.candidates.capacity;
  for (int first = first_candidate(); first < found; first += kInFlight * kCandidateStep) {
    uint2 raw[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) raw[i] = pool[min(first + i * kCandidateStep, found - 1)];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const Entry e = make_entry(p, rows, raw[i]);
      if (first + i * kCandidateStep < found && e.keep) visit(e);
    }
  }
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
    visit_kept(p, rows, found, [&](const Entry& e) {
      atomicAdd(of_row + e.row, 1);
      if (voting) atomicAdd(p.column_counts + e.id, 1);
    });
    if (has_targets() && threadIdx.x < kRows && rows.target[threadIdx.x] >= 0) {
      atomicAdd(of_row + threadIdx.x, 1);
      if (voting) atomicAdd(p.column_counts + rows.target[threadIdx.x], 1);
    }
  }
  if (threadIdx.x == 0 && has_targets()) p.exact[blockIdx.x] = exact;
  __syncthreads();
  if (threadIdx.x >= kRows) return;
  const int mine = of_row[threadIdx.x];
  row_counts(p)[threadIdx.x] = mine;
  const int all = __reduce_add_sync(~0u, mine);
  if (threadIdx.x % 32 == 0 && all > 0) atomicAdd(p.kept + blockIdx.x, all);
}

// Where the rows' stretches start, and the entries into them, part after part.
__global__ void __launch_bounds__(kThreads) write_kernel(const __grid_constant__ KeepParams p) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ Rows rows;
  __shared__ int hopeless, next[kRows];
  const bool exact = p.exact[blockIdx.x];
  const int i = threadIdx.x;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kRows;
  int before = 0, all = 0, start;  // of the row's: those of the parts before, of all parts
  if (i < kRows && !exact) {
    const int32_t* counts = p.row_counts + block * kKeepParts + i;
#pragma unroll
    for (int part = 0; part < kKeepParts; ++part) {
      const int count = counts[part * kRows];
      before += part < static_cast<int>(blockIdx.y) ? count : 0;
      all += count;
    }
  }
  Scan(storage).ExclusiveSum(all, start);
  start += p.first[blockIdx.x];
  if (i < kRows) next[i] = start + before;
  if (has_targets() && i < kRows && block + i < p.n) p.row_first[block + i] = start;
  if (exact) return;
  load_rows(p, rows, hopeless);
  const auto write = [&](int row, int id, float logit) {
    const int at = atomicAdd(next + row, 1);
    p.keys[at] = (p.slots[id] >= 0 ? 1 << p.id_bits : 0) | id;
    p.logits[at] = logit;
  };
  visit_kept(p, rows, p.candidates.counts[blockIdx.x],
             [&](const Entry& e) { write(e.row, e.id, e.logit); });
  if (has_targets() && i < kRows && rows.target[i] >= 0)
    write(i, rows.target[i], rows.target_logit[i]);
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

}  // namespace cce::cuda
