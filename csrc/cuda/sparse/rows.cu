// What the sparse backward needs to know of the rows before it starts: upstream weights, which rows go the exact way, and the
// rows that stand for all when the tail's shape is learnt. Sums are made in a fixed order; cce_ext/sparse/tail.py has the
// same steps in PyTorch.
#include <cooperative_groups.h>

#include <algorithm>
#include <cfloat>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/device_info.h"
#include "cuda/sparse/lists.h"
#include "cuda/sparse/tail.h"

namespace cce::cuda {
namespace {

constexpr int kBlock = 1024, kThreads = 128, kSampleThreads = 256;
static_assert(kSampleBlocks <= kSampleThreads, "a thread reads what a block found");
// Steps of the largest row's share; a million rows of them still fit into 64 bits.
constexpr double kSteps = 1099511627776.0;  // 2^40

// Upstream weights by row (nothing of ignored rows is used: it may be NaN) and dropped masses over all groups; a warp a row.
__global__ void __launch_bounds__(kThreads)
    row_kernel(const __grid_constant__ BackwardRowsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.n) return;
  const int lane = threadIdx.x % 32;
  float mass = 0.0f;
  for (int g = lane; g < p.groups; g += 32) mass += p.mass[row * p.groups + g];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) mass += __shfl_xor_sync(~0u, mass, d);
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

// What a row's tail weighs.
__device__ __forceinline__ float tail_share(float a, float mass) {
  return mass > kNothing ? fabsf(a) * mass : 0.0f;
}

// Steps that a row takes in the systematic sample.
__device__ __forceinline__ int64_t steps_of(float a, float mass, float top) {
  if (!(top > 0.0f)) return 0;
  const double share = static_cast<double>(tail_share(a, mass)) / static_cast<double>(top);
  return static_cast<int64_t>(ceil(share * kSteps));
}

// The first sample, they being `step` apart from zero on, that is not before so many steps.
__device__ __forceinline__ int64_t first_sample(int64_t steps, int64_t step) {
  return steps > 0 ? static_cast<int64_t>((static_cast<uint64_t>(steps) - 1) / step + 1) : 0;
}

// What 16-bit factors are divided by: in float16 by about the largest, in bfloat16 by nothing.
__device__ void write_units(const BackwardRowsParams& p, float a, float d, float mass) {
  const bool wanted = p.unit_scale != 0.0f;
  p.units[0] = wanted ? (a + d) * p.unit_scale + 1e-30f : 1.0f;
  p.units[1] = wanted ? fmaxf(fmaxf(mass * p.unit_scale, d * p.unit_uniform), FLT_MIN) : 1.0f;
  p.units[2] = wanted ? p.units[1] / kShapeLift : 1.0f;
}

// Of several rows, or of several blocks.
struct MergeLargest {
  __device__ SampleLargest operator()(SampleLargest a, SampleLargest b) const {
    return {fmaxf(a.tail, b.tail), fmaxf(a.a, b.a), fmaxf(a.d, b.d), a.valid + b.valid};
  }
};
struct AddSums {
  __device__ SampleSums operator()(SampleSums a, SampleSums b) const {
    return {a.steps + b.steps, a.some + b.some, a.exact + b.exact};
  }
};

// By the final T: exact rows, whose weights become zero here, their share and list; then the sample. A cooperative grid: each
// block has a stretch of rows and goes through it in tiles of neighbouring rows, a thread a row and always the same one. What
// the blocks found goes through memory at two barriers: the largest numbers, by which rows get steps, then the sums.
__global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(const __grid_constant__ BackwardRowsParams p) {
  using Max = cub::BlockReduce<SampleLargest, kSampleThreads>;
  using Sum = cub::BlockReduce<SampleSums, kSampleThreads>;
  using Scan = cub::BlockScan<SampleSums, kSampleThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ union {
    typename Max::TempStorage max;
    typename Sum::TempStorage sum;
    typename Scan::TempStorage scan;
  } storage;
  __shared__ SampleLargest largest_of_all;
  __shared__ SampleSums sums_before;  // of the blocks before this one
  const auto grid = cooperative_groups::this_grid();
  const auto tiles = static_cast<unsigned>((p.n + kSampleThreads - 1) / kSampleThreads);
  const int64_t stretch = int64_t{(tiles + gridDim.x - 1) / gridDim.x} * kSampleThreads;
  const int64_t begin = min(blockIdx.x * stretch, p.n), end = min(begin + stretch, p.n);
  const int64_t first = begin + threadIdx.x;       // this thread's first row
  const bool has_block = threadIdx.x < gridDim.x;  // reads what the block of this number found

  // Every sample has a row, even if so many have the most steps that 64 bits do not hold their sum.
  for (int i = blockIdx.x * kSampleThreads + threadIdx.x; i < p.sample;
       i += gridDim.x * kSampleThreads)
    p.rows[i] = p.n - 1;
  // A NaN goes the exact way, which carries it to where eager's would be.
  const bool flat = !(*p.share <= p.flat);
  SampleLargest largest{};
  for (int64_t row = first; row < end; row += kSampleThreads) {
    float a = p.a[row], d = p.d[row];
    const float mass = p.row_mass[row];
    const bool counts = p.targets[row] != p.ignore_index, listed = p.listed[row] != 0;
    const bool is_exact = counts && (flat || listed);
    p.exact[row] = is_exact;
    p.d_all[row] = d;
    if (is_exact) p.a[row] = p.d[row] = a = d = 0.0f;
    largest = MergeLargest()(largest, {tail_share(a, mass), fabsf(a), fabsf(d), counts});
  }
  largest = Max(storage.max).Reduce(largest, MergeLargest());
  if (threadIdx.x == 0) p.blocks[blockIdx.x].largest = largest;
  grid.sync();

  largest = has_block ? p.blocks[threadIdx.x].largest : SampleLargest{};
  largest = Max(storage.max).Reduce(largest, MergeLargest());
  if (threadIdx.x == 0) {
    largest_of_all = largest;
    if (blockIdx.x == 0) write_units(p, largest.a, largest.d, largest.tail);
  }
  __syncthreads();
  const float top = largest_of_all.tail;
  const auto sums_of = [&](float a, float mass, bool is_exact) -> SampleSums {
    const int64_t steps = steps_of(a, mass, top);
    return {steps, steps > 0, is_exact};
  };
  SampleSums sums{};
  for (int64_t row = first; row < end; row += kSampleThreads)
    sums = AddSums()(sums, sums_of(p.a[row], p.row_mass[row], p.exact[row] != 0));
  sums = Sum(storage.sum).Reduce(sums, AddSums());
  if (threadIdx.x == 0) p.blocks[blockIdx.x].sums = sums;
  grid.sync();

  sums = has_block ? p.blocks[threadIdx.x].sums : SampleSums{};
  SampleSums all;
  Scan(storage.scan).ExclusiveScan(sums, sums, SampleSums{}, AddSums(), all);
  if (threadIdx.x == blockIdx.x) sums_before = sums;
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const int valid = largest_of_all.valid;
    *p.exact_share = static_cast<float>(all.exact) / (valid > 0 ? valid : 1);
    *p.count = all.exact;
  }
  const bool few = all.some <= p.sample;
  // Sample i is the first row whose cumulated steps are beyond half + i * step.
  const int64_t step = few ? 0 : all.steps / p.sample, half = step / 2;
  SampleSums before_tile = sums_before;
  for (int64_t tile = begin; tile < end; tile += kSampleThreads) {
    const int64_t row = tile + threadIdx.x;
    const bool is_row = row < end;
    const float a = is_row ? p.a[row] : 0.0f, mass = is_row ? p.row_mass[row] : 0.0f;
    const SampleSums mine = sums_of(a, mass, is_row && p.exact[row] != 0);
    SampleSums before, in_tile;
    Scan(storage.scan).ExclusiveScan(mine, before, SampleSums{}, AddSums(), in_tile);
    __syncthreads();  // the storage
    before = AddSums()(before_tile, before);
    before_tile = AddSums()(before_tile, in_tile);
    if (!is_row) continue;
    const int64_t place = mine.exact ? before.exact : all.exact + row - before.exact;
    p.order[place] = static_cast<int32_t>(row);
    float weight = 0.0f;
    if (mine.some) weight = few ? fabsf(a) / top : 1.0f / mass;
    p.weight[row] = weight;
    if (few) {  // all rows with steps, then rows that weigh nothing
      const int64_t at = mine.some ? before.some : all.some + row - before.some;
      if (at < p.sample) p.rows[at] = row;
    } else if (mine.some) {
      const int64_t reached = before.steps + mine.steps;
      for (int64_t i = first_sample(before.steps - half, step);
           i < p.sample && half + i * step < reached; ++i)
        p.rows[i] = row;
    }
  }
}

}  // namespace

cudaError_t backward_shares(const BackwardRowsParams& params, cudaStream_t stream) {
  const int blocks = static_cast<int>((params.n + kThreads / 32 - 1) / (kThreads / 32));
  row_kernel<<<blocks, kThreads, 0, stream>>>(params);
  share_kernel<<<1, kBlock, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t backward_sample(const BackwardRowsParams& params, cudaStream_t stream) {
  if (params.n > INT32_MAX) return cudaErrorInvalidValue;  // numbers of rows are 32-bit
  // All blocks must be on the device at once; one is there for no rows, too.
  const int64_t tiles = (params.n + kSampleThreads - 1) / kSampleThreads;
  const int most = std::min(kSampleBlocks, current_device().multiprocessors);
  const auto blocks = static_cast<int>(std::clamp<int64_t>(tiles, 1, most));
  void* arguments[] = {const_cast<BackwardRowsParams*>(&params)};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(sample_kernel), dim3(blocks),
                                     dim3(kSampleThreads), arguments, 0, stream);
}

}  // namespace cce::cuda
