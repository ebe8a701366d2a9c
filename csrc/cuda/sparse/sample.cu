// The rows whose tails stand for all, drawn before the forward: it writes down their logits as it passes. One block, a tile
// of 4096 positions of the row order at a time, eight neighbouring ones a thread, all on their way at once; first all shares
// are added up, then each row finds how many of the equal steps end in its own. Counted in integers, so that the
// result depends on no order of a sum; cce_ext/sparse/tail.py has the same steps in PyTorch.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/sparse/lists.h"
#include "cuda/sparse/tail_steps.cuh"

namespace cce::cuda {
namespace {

constexpr int kBlock = 512, kItems = 8, kTile = kBlock * kItems;
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
  for (int64_t tile = 0; tile < count; tile += kTile) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t position = tile + i * kBlock + threadIdx.x;
      if (position < count) mine += steps_of(p.share[p.order.rows[position]]);
    }
  }
  mine = Sum(storage.sum).Sum(mine);
  if (threadIdx.x == 0) all = mine;
  __syncthreads();
  const Aims aims(few ? 1 : all / p.samples, p.samples);
  int64_t steps_before = 0;
  int drawn_before = 0;
  for (int64_t tile = 0; tile < p.n; tile += kTile) {
    const int64_t first = tile + threadIdx.x * kItems;
    int row[kItems];
    float share[kItems], bound2[kItems];
    int64_t tile_steps = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) row[i] = first + i < count ? p.order.rows[first + i] : -1;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      share[i] = row[i] < 0 ? 0.0f : p.share[row[i]];
      bound2[i] = row[i] < 0 ? INFINITY : p.bound2[row[i]];
      tile_steps += steps_of(share[i]);
    }
    int64_t at, in_tile;
    Steps(storage.steps).ExclusiveSum(tile_steps, at, in_tile);
    at += steps_before;
    steps_before += in_tile;
    __syncthreads();  // the storage
    int draws[kItems], drawn = 0, next = aims.before(at);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int before = next;
      at += steps_of(share[i]);
      next = aims.before(at);
      draws[i] = few ? row[i] >= 0 : next - before;
      drawn += draws[i] > 0;
    }
    int slot;
    Places(storage.places).ExclusiveSum(drawn, slot, drawn);
    slot += drawn_before;
    drawn_before += drawn;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (first + i >= p.n) break;
      p.starts[first + i] = {bound2[i], draws[i] > 0 ? slot : -1};
      if (draws[i] == 0) continue;
      p.rows[slot] = row[i];
      p.draws[slot++] = few ? 1.0f : static_cast<float>(draws[i]) / share[i];
    }
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
