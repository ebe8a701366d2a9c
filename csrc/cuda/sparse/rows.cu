// What the sparse backward needs to know of the rows before it starts: upstream weights, and which rows go the exact way.
// Sums are made in a fixed order.
#include <cooperative_groups.h>

#include <cfloat>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/common/warp.cuh"
#include "cuda/sparse/lists.h"
#include "cuda/sparse/tail.h"
#include "cuda/sparse/together.cuh"

namespace cce::cuda {
namespace {

constexpr int kBlock = 1024, kThreads = 128, kListThreads = 256;
static_assert(kRowsBlocks <= kListThreads, "a thread reads what a block found");

// Upstream weights by row (nothing of ignored rows is used: it may be NaN) and dropped masses over all groups; a warp a row.
__global__ void __launch_bounds__(kThreads)
    row_kernel(const __grid_constant__ BackwardRowsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.n) return;
  const int lane = threadIdx.x % 32;
  float mass = 0.0f;
  for (int g = lane; g < p.groups; g += 32) mass += p.mass[row * p.groups + g];
  mass = warp_sum(mass);
  if (lane != 0) return;
  const bool counts = p.targets[row] != p.ignore_index;
  const float d = counts && p.dnll ? p.dnll[row * p.dnll_stride] : 0.0f;
  p.d[row] = d;
  p.a[row] = d + (counts && p.dlse ? p.dlse[row] : 0.0f);
  p.row_mass[row] = mass;
}

// T = Σ|a| m / Σ|a| over the rows that are not on the list already; 0 / 0 is 0, a NaN stays.
__global__ void __launch_bounds__(kBlock)
    share_kernel(const __grid_constant__ BackwardRowsParams p) {
  using Sum = cub::BlockReduce<double, kBlock>;
  __shared__ typename Sum::TempStorage storage;
  double weighted = 0.0, total = 0.0;
  for (int64_t row = threadIdx.x; row < p.n; row += kBlock) {
    if (p.listed[row]) continue;
    const double a = fabs(static_cast<double>(p.a[row]));
    weighted += a * p.row_mass[row];
    total += a;
  }
  weighted = Sum(storage).Sum(weighted);
  __syncthreads();
  total = Sum(storage).Sum(total);
  if (threadIdx.x == 0) *p.share = total == 0.0 ? 0.0f : static_cast<float>(weighted / total);
}

// What 16-bit factors are divided by: in float16 by about the largest, in bfloat16 by nothing.
__device__ void write_units(const BackwardRowsParams& p, float a, float d, float mass) {
  const bool wanted = p.unit_scale != 0.0f;
  p.units[0] = wanted ? (a + d) * p.unit_scale + 1e-30f : 1.0f;
  p.units[1] = wanted ? fmaxf(fmaxf(mass * p.unit_scale, d * p.unit_uniform), FLT_MIN) : 1.0f;
  p.units[2] = wanted ? p.units[1] / kShapeLift : 1.0f;
}

// Of several rows, or of several blocks.
struct Merge {
  __device__ RowsFound operator()(RowsFound a, RowsFound b) const {
    return {fmaxf(a.tail, b.tail), fmaxf(a.a, b.a), fmaxf(a.d, b.d), a.valid + b.valid,
            a.exact + b.exact};
  }
};

// By the final T: exact rows, whose weights become zero here, their share and list. A cooperative grid: each block has a
// stretch of rows and goes through it in tiles of neighbouring rows, a thread a row. What the blocks found goes through
// memory at a barrier.
__global__ void __launch_bounds__(kListThreads)
    list_kernel(const __grid_constant__ BackwardRowsParams p) {
  using Reduce = cub::BlockReduce<RowsFound, kListThreads>;
  using Scan = cub::BlockScan<int, kListThreads>;
  __shared__ union {
    typename Reduce::TempStorage reduce;
    typename Scan::TempStorage scan;
  } storage;
  __shared__ RowsFound found_by_all;
  __shared__ int exact_in_others;  // in the stretches before this one
  const auto grid = cooperative_groups::this_grid();
  const auto tiles = static_cast<unsigned>((p.n + kListThreads - 1) / kListThreads);
  const int64_t stretch = int64_t{(tiles + gridDim.x - 1) / gridDim.x} * kListThreads;
  const int64_t begin = min(blockIdx.x * stretch, p.n), end = min(begin + stretch, p.n);

  // A NaN goes the exact way, which carries it to where eager's would be.
  const bool flat = !(*p.total_share <= p.flat);
  RowsFound found{};
  for (int64_t row = begin + threadIdx.x; row < end; row += kListThreads) {
    float a = p.a[row], d = p.d[row];
    const float mass = p.row_mass[row];
    const bool counts = p.targets[row] != p.ignore_index, listed = p.listed[row] != 0;
    const bool is_exact = counts && (flat || listed);
    p.exact[row] = is_exact;
    p.d_all[row] = d;
    if (is_exact) p.a[row] = p.d[row] = a = d = 0.0f;
    const float tail = mass > kNothing ? fabsf(a) * mass : 0.0f;
    found = Merge()(found, {tail, fabsf(a), fabsf(d), counts, is_exact});
  }
  found = Reduce(storage.reduce).Reduce(found, Merge());
  if (threadIdx.x == 0) p.found[blockIdx.x] = found;
  grid.sync();

  const bool has_block = threadIdx.x < gridDim.x;  // reads what the block of this number found
  found = has_block ? p.found[threadIdx.x] : RowsFound{};
  const RowsFound all = Reduce(storage.reduce).Reduce(found, Merge());
  __syncthreads();
  int before, sum;
  Scan(storage.scan).ExclusiveSum(found.exact, before, sum);
  if (threadIdx.x == 0) found_by_all = all;
  if (threadIdx.x == blockIdx.x) exact_in_others = before;
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    write_units(p, all.a, all.d, all.tail);
    *p.exact_share = static_cast<float>(all.exact) / (all.valid > 0 ? all.valid : 1);
    *p.count = all.exact;
  }
  int exact_before = exact_in_others;
  for (int64_t tile = begin; tile < end; tile += kListThreads) {
    const int64_t row = tile + threadIdx.x;
    const int mine = row < end && p.exact[row] != 0;
    int place, in_tile;
    Scan(storage.scan).ExclusiveSum(mine, place, in_tile);
    __syncthreads();  // the storage
    place += exact_before;
    exact_before += in_tile;
    if (row < end)
      p.order[mine ? place : found_by_all.exact + row - place] = static_cast<int32_t>(row);
  }
}

}  // namespace

cudaError_t dropped_share(const BackwardRowsParams& params, cudaStream_t stream) {
  const int blocks = static_cast<int>((params.n + kThreads / 32 - 1) / (kThreads / 32));
  row_kernel<<<blocks, kThreads, 0, stream>>>(params);
  share_kernel<<<1, kBlock, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t choose_exact_rows(const BackwardRowsParams& params, cudaStream_t stream) {
  if (params.n > INT32_MAX) return cudaErrorInvalidValue;  // numbers of rows are 32-bit
  const int64_t tiles = (params.n + kListThreads - 1) / kListThreads;
  return launch_together(list_kernel, params, tiles, kRowsBlocks, kListThreads, stream);
}

}  // namespace cce::cuda
