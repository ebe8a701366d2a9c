// The rows whose tails stand for all, drawn before the forward: it writes down their logits as it passes. A cooperative grid:
// each block has a stretch of the row order. It adds up the shares of its rows; what all blocks have goes through memory at
// a barrier; then it goes through its stretch in tiles, a thread a row, which finds the equal steps that end in its own share.
// Counted in integers, so that the result depends on no order of a sum; cce_ext/sparse/tail.py has the same steps in PyTorch.
#include <cooperative_groups.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/sparse/lists.h"
#include "cuda/sparse/tail_steps.cuh"
#include "cuda/sparse/together.cuh"

namespace cce::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kDrawBlocks <= kThreads, "a thread reads what a block has");
constexpr float kShareSteps =
    0x1p30f;  // of a row that drops everything; 2^31 rows of them fit into 64 bits

__device__ __forceinline__ int64_t steps_of(float share) {
  return static_cast<int64_t>(share * kShareSteps);
}

__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ DrawRowsParams p) {
  using Sum = cub::BlockReduce<int64_t, kThreads>;
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ union {
    typename Sum::TempStorage sum;
    typename Scan::TempStorage scan;
  } storage;
  __shared__ int64_t steps_in_others;  // in the stretches before this one
  const auto grid = cooperative_groups::this_grid();
  const int64_t tiles = (p.n + kThreads - 1) / kThreads;
  const int64_t stretch = (tiles + gridDim.x - 1) / gridDim.x * kThreads;
  const int64_t begin = min(blockIdx.x * stretch, p.n), end = min(begin + stretch, p.n);
  const int64_t count = *p.order.count;
  const bool few = count <= p.samples;

  int64_t mine = 0;
  for (int64_t position = begin + threadIdx.x; position < min(end, count); position += kThreads)
    mine += steps_of(p.share[p.order.rows[position]]);
  mine = Sum(storage.sum).Sum(mine);
  if (threadIdx.x == 0) p.steps[blockIdx.x] = mine;
  grid.sync();

  int64_t before, all;
  mine = threadIdx.x < gridDim.x ? p.steps[threadIdx.x] : 0;
  Scan(storage.scan).ExclusiveSum(mine, before, all);
  if (threadIdx.x == blockIdx.x) steps_in_others = before;
  __syncthreads();
  before = steps_in_others;
  const Aims aims(few ? 1 : all / p.samples, p.samples);
  for (int64_t tile = begin; tile < end; tile += kThreads) {
    const int64_t position = tile + threadIdx.x;
    const bool counts = position < min(end, count);
    const int row = counts ? p.order.rows[position] : 0;
    const float share = counts ? p.share[row] : 0.0f;
    int64_t at, in_tile;
    Scan(storage.scan).ExclusiveSum(steps_of(share), at, in_tile);
    __syncthreads();  // the storage
    at += before;
    before += in_tile;
    if (position >= end) continue;
    // Every aim has a slot, the k-th the k-th; of those that a row has, the first carries its weight.
    const int first = few ? static_cast<int>(position) : aims.before(at);
    const int next = few ? first + counts : aims.before(at + steps_of(share));
    p.starts[position] = {counts ? p.bound2[row] : INFINITY, next > first ? first : -1};
    for (int slot = first; slot < next; ++slot) {
      p.rows[slot] = row;
      p.draws[slot] = slot > first ? 0.0f : few ? 1.0f : static_cast<float>(next - first) / share;
    }
  }
  if (!few || blockIdx.x > 0) return;
  // Slots that nobody has: a row that may be read, of no weight.
  for (int64_t slot = count + threadIdx.x; slot < p.samples; slot += kThreads) {
    p.rows[slot] = count > 0 ? p.order.rows[count - 1] : 0;
    p.draws[slot] = 0.0f;
  }
}

}  // namespace

cudaError_t draw_rows(const DrawRowsParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  if (params.n > INT32_MAX) return cudaErrorInvalidValue;  // positions are 32-bit
  const int64_t tiles = (params.n + kThreads - 1) / kThreads;
  return launch_together(draw_kernel, params, tiles, kDrawBlocks, kThreads, stream);
}

}  // namespace cce::cuda
