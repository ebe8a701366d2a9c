// The rows whose tails stand for all, drawn before the forward: it writes down their logits as it passes. One block of 512
// threads, a tile of as many positions of the row order at a time; first all shares are added up, then each row finds how
// many of the equal steps end in its own. Counted in integers, so that the result depends on no order of a sum;
// cce_ext/sparse/tail.py has the same steps in PyTorch.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/sparse/lists.h"
#include "cuda/sparse/tail_steps.cuh"

namespace cce::cuda {
namespace {

constexpr int kBlock = 512;
constexpr float kShareSteps =
    0x1p30f;  // of a row that drops everything; 2^31 rows of them fit into 64 bits

__device__ __forceinline__ int64_t steps_of(float share) {
  return static_cast<int64_t>(share * kShareSteps);
}

__global__ void __launch_bounds__(kBlock) draw_kernel(const __grid_constant__ DrawRowsParams p) {
  using Sum = cub::BlockReduce<int64_t, kBlock>;
  using Steps = cub::BlockScan<int64_t, kBlock>;
  using Places = cub::BlockScan<int, kBlock>;
  __shared__ union {
    typename Sum::TempStorage sum;
    typename Steps::TempStorage steps;
    typename Places::TempStorage places;
  } storage;
  __shared__ int64_t all;
  const int count = *p.order.count;
  const bool few = count <= p.samples;
  int64_t mine = 0;
  for (int position = threadIdx.x; position < count; position += kBlock)
    mine += steps_of(p.share[p.order.rows[position]]);
  mine = Sum(storage.sum).Sum(mine);
  if (threadIdx.x == 0) all = mine;
  __syncthreads();
  const int64_t step = few ? 1 : all / p.samples;
  int64_t steps_before = 0;
  int drawn_before = 0;
  for (int64_t tile = 0; tile < p.n; tile += kBlock) {
    const int64_t position = tile + threadIdx.x;
    const bool counts = position < count;
    const int row = counts ? p.order.rows[position] : 0;
    const float share = counts ? p.share[row] : 1.0f;
    int64_t before, in_tile;
    Steps(storage.steps).ExclusiveSum(counts ? steps_of(share) : 0, before, in_tile);
    before += steps_before;
    steps_before += in_tile;
    __syncthreads();  // the storage
    int draws = 0;
    if (counts)
      draws = few ? 1
                  : aims_before(before + steps_of(share), step, p.samples) -
                        aims_before(before, step, p.samples);
    int slot, drawn;
    Places(storage.places).ExclusiveSum(draws > 0, slot, drawn);
    slot += drawn_before;
    drawn_before += drawn;
    __syncthreads();
    if (position < p.n)
      p.starts[position] = {counts ? p.bound2[row] : INFINITY, draws > 0 ? slot : -1};
    if (draws == 0) continue;
    p.rows[slot] = row;
    p.draws[slot] = few ? 1.0f : static_cast<float>(draws) / share;
  }
  // Slots that nobody has: a row that may be read, of no weight.
  __syncthreads();
  const int64_t last = drawn_before > 0 ? p.rows[drawn_before - 1] : 0;
  for (int slot = drawn_before + threadIdx.x; slot < p.samples; slot += kBlock) {
    p.rows[slot] = last;
    p.draws[slot] = 0.0f;
  }
}

}  // namespace

cudaError_t draw_rows(const DrawRowsParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  if (params.n > INT32_MAX) return cudaErrorInvalidValue;  // positions are 32-bit
  draw_kernel<<<1, kBlock, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
