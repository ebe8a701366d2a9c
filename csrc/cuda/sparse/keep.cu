// From candidates to kept entries, once the lse is final: count, then write, kKeepParts thread blocks a row block of 128 rows,
// each with every so many candidates, the first with the targets too. An
// entry is kept if its probability reaches the threshold; the target of a row always is, with its own logit. The place
// inside a part's stretch is first come, first served: the sort that follows makes the order. Between the two the ids that
// many rows keep are chosen: entries of such hot ids are sorted to the end of their row and multiplied as a dense matrix.
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
  __shared__ int hopeless, total;
  if (threadIdx.x == 0) total = 0;
  load_rows(p, rows, hopeless);
  const int found = p.candidates.counts[blockIdx.x];
  const bool exact = hopeless || found > p.candidates.capacity;
  // Which ids are hot shows in a part of the rows too, at a part of the atomics.
  const bool voting = blockIdx.x % (gridDim.x < 4 * kVotingStep ? 1 : kVotingStep) == 0;
  int mine = 0;
  if (!exact) {
    for (int i = first_candidate(); i < found; i += kCandidateStep) {
      const Entry e = read_entry(p, rows, i);
      if (!e.keep) continue;
      ++mine;
      if (voting) atomicAdd(p.column_counts + e.id, 1);
    }
    if (has_targets() && threadIdx.x < kRows && rows.target[threadIdx.x] >= 0) {
      ++mine;
      if (voting) atomicAdd(p.column_counts + rows.target[threadIdx.x], 1);
    }
  }
  mine = __reduce_add_sync(~0u, mine);
  if (threadIdx.x % 32 == 0) atomicAdd(&total, mine);
  __syncthreads();
  if (threadIdx.x == 0) {
    p.kept[blockIdx.x * kKeepParts + blockIdx.y] = total;
    if (has_targets()) p.exact[blockIdx.x] = exact;
  }
}

__global__ void __launch_bounds__(kThreads) write_kernel(const __grid_constant__ KeepParams p) {
  __shared__ Rows rows;
  __shared__ int hopeless, used;
  if (p.exact[blockIdx.x]) return;
  if (threadIdx.x == 0) used = 0;
  load_rows(p, rows, hopeless);
  const int64_t first = p.first[blockIdx.x * kKeepParts + blockIdx.y],
                block = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto write = [&](int row, int id, float logit) {
    const int64_t at = first + atomicAdd(&used, 1);
    const int64_t hot = p.slots[id] >= 0;
    p.keys[at] = ((block + row) << 1 | hot) << p.id_bits | id;
    p.logits[at] = logit;
  };
  const int found = p.candidates.counts[blockIdx.x];
  for (int i = first_candidate(); i < found; i += kCandidateStep) {
    const Entry e = read_entry(p, rows, i);
    if (e.keep) write(e.row, e.id, e.logit);
  }
  const int i = threadIdx.x;
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
