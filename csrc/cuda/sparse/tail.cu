// The tail between the matmuls: the rows' factors (a warp a row), and shapes of the classes' tails (a block a group of ids,
// which it reads once and holds in registers). cce_ext/sparse/tail.py has the same steps in PyTorch. No atomics; sums in a
// fixed order.
#include <cfloat>
#include <cub/block/block_reduce.cuh>

#include "cuda/common/convert.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/sparse/tail.h"
#include "cuda/sparse/tail_steps.cuh"

namespace cce::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kShapeThreads = 512, kShapeCols = kGroupCols / kShapeThreads;
static_assert(kShapeCols * kShapeThreads == kGroupCols, "whole columns a thread");

template <typename T>
__global__ void __launch_bounds__(kThreads)
    factors_kernel(const __grid_constant__ TailFactorsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.n) return;
  const int lane = threadIdx.x % 32, chosen = static_cast<int>(p.classes[row]);
  T* factors = static_cast<T*>(p.factors) + row * p.ld;
  for (int64_t i = lane; i < p.hot / 8; i += 32)
    reinterpret_cast<uint4*>(factors)[i] = make_uint4(0, 0, 0, 0);
  const int kinds = kTailClasses + p.smoothing;
  const float a = p.a[row] * p.scale, unit = p.units[1];
  const float uniform = p.d[row] * p.uniform / unit;
  const float* mass = p.mass + row * p.groups;
  for (int i = lane; i < p.width - p.hot; i += 32) {
    const int kind = i % kinds, group = i / kinds;
    float value = 0.0f;  // of other classes, and beyond the last group
    if (group < p.groups && kind == kTailClasses) value = uniform;
    if (group < p.groups && kind == chosen) value = mass[group] * a / unit;
    factors[p.hot + i] = narrow<T>(value);
  }
}

template <typename T>
__global__ void __launch_bounds__(kShapeThreads)
    shapes_kernel(const __grid_constant__ TailShapesParams p, float lift) {
  __shared__ float partial[kTailClasses][kShapeThreads / 32];
  __shared__ float totals[kTailClasses];
  const int64_t first = int64_t{blockIdx.x} * kGroupCols;
  const int width = static_cast<int>(min(p.vocab - first, int64_t{kGroupCols}));
  float mixed[kTailClasses][kShapeCols];
  int64_t steps = 0;
#pragma unroll
  for (int i = 0; i < kShapeCols; ++i) {
    const int col = i * kShapeThreads + threadIdx.x;
    float all = 0.0f;
#pragma unroll
    for (int k = 0; k < kTailClasses; ++k) {
      mixed[k][i] = col < width ? p.sums[k * p.vocab + first + col] : 0.0f;
      all += mixed[k][i];
    }
    steps += tail_steps(all);
#pragma unroll
    for (int k = 0; k < kTailClasses; ++k) mixed[k][i] = fmaf(p.shared, all, mixed[k][i]);
  }
  using Sum = cub::BlockReduce<int64_t, kShapeThreads>;
  __shared__ typename Sum::TempStorage storage;
  steps = Sum(storage).Sum(steps);
  if (threadIdx.x == 0) p.totals[blockIdx.x] = steps;
#pragma unroll
  for (int k = 0; k < kTailClasses; ++k) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kShapeCols; ++i) sum += mixed[k][i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) partial[k][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kTailClasses) {
    float sum = 0.0f;
    for (int warp = 0; warp < kShapeThreads / 32; ++warp) sum += partial[threadIdx.x][warp];
    totals[threadIdx.x] = sum;
  }
  __syncthreads();
  T* shapes = static_cast<T*>(p.shapes) + first;
#pragma unroll
  for (int k = 0; k < kTailClasses; ++k) {
    const float total = totals[k];
#pragma unroll
    for (int i = 0; i < kShapeCols; ++i) {
      const int col = i * kShapeThreads + threadIdx.x;
      // A group in which nobody has any mass is uniform.
      const float share = total > 0.0f ? mixed[k][i] / total : 1.0f / static_cast<float>(width);
      if (col < width) shapes[k * p.ld + col] = narrow<T>(share * lift);
    }
  }
  const int64_t gap = p.ld - p.vocab;  // between two rows
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < gap) {
    for (int k = 0; k < kTailClasses + p.smoothing; ++k)
      shapes[k * p.ld + width + threadIdx.x] = narrow<T>(0.0f);
  }
  if (!p.smoothing) return;
  for (int col = threadIdx.x; col < width; col += kShapeThreads)
    shapes[kTailClasses * p.ld + col] = narrow<T>(lift / kGroupCols);
}

}  // namespace

cudaError_t tail_factors(const TailFactorsParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  const int64_t blocks = (params.n + kWarps - 1) / kWarps;
  const auto kernel =
      params.dtype == Dtype::kBFloat16 ? factors_kernel<__nv_bfloat16> : factors_kernel<__half>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t tail_shapes(const TailShapesParams& params, cudaStream_t stream) {
  if (params.vocab == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((params.vocab + kGroupCols - 1) / kGroupCols);
  if (params.dtype == TailShapesParams::Out::kBFloat16)
    shapes_kernel<__nv_bfloat16><<<blocks, kShapeThreads, 0, stream>>>(params, 1.0f);
  else if (params.dtype == TailShapesParams::Out::kHalf)
    shapes_kernel<__half><<<blocks, kShapeThreads, 0, stream>>>(params, kShapeLift);
  else
    shapes_kernel<float><<<blocks, kShapeThreads, 0, stream>>>(params, 1.0f);
  return cudaGetLastError();
}

}  // namespace cce::cuda
