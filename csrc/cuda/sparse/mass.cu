// What was dropped, and what is kept in numbers: the dropped mass of each row and vocabulary group (one warp a row), and
// the weight of each kept entry in the gradient (one thread an entry).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/epilogue.cuh"
#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ float capped(const core::LossOptions& options, float z) {
  const float cap = static_cast<float>(options.softcap);
  return cap == 0.0f ? 1.0f : core::softcap_grad(z, 1.0f / cap);
}

// Σ p softcap' of one group, kept entries included, from the forward's partials.
__device__ __forceinline__ float group_mass(const MassParams& p, int64_t position, int group,
                                            float lse2) {
  const int end = min((group + 1) * p.splits_per_group, p.splits);
  float mass = 0.0f;
  for (int64_t s = group * p.splits_per_group; s < end; ++s) {
    const int64_t at = s * p.n + position;
    const float2 part = p.partials.max_sum[at];
    if (part.x == -INFINITY) continue;
    mass += (p.partials.capped ? p.partials.capped[at] : part.y) * ptx::ex2(part.x - lse2);
  }
  return mass;
}

// Entries begin to end are sorted by id, so groups come one after another: lane l takes entry 32 i + l, a segmented scan
// adds what belongs to one group, and its last lane takes that from the group's mass.
__device__ void subtract_kept(const MassParams& p, int begin, int end, float* mass, float lse2) {
  const int lane = threadIdx.x % 32;
  for (int base = begin; base < end; base += 32) {
    const int i = base + lane;
    int group = -1;
    float kept = 0.0f;
    if (i < end) {
      const float z = p.logits[i];
      group = p.ids[i] / kGroupCols;
      kept = ptx::ex2(fmaf(z, kLog2E, -lse2)) * capped(p.options, z);
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float before = __shfl_up_sync(~0u, kept, d);
      const int other = __shfl_up_sync(~0u, group, d);
      if (lane >= d && other == group) kept += before;
    }
    const int next = __shfl_down_sync(~0u, group, 1);
    if (group >= 0 && (lane == 31 || next != group)) mass[group] -= kept;
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kThreads) mass_kernel(const __grid_constant__ MassParams p) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (position >= p.n) return;
  const int64_t row = p.order.rows[position];
  const float lse2 = p.lse[row] * kLog2E;
  float* mass = p.mass + row * p.groups;
  const int lane = threadIdx.x % 32;
  if (position >= *p.order.count) {  // does not count
    for (int g = lane; g < p.groups; g += 32) mass[g] = 0.0f;
    return;
  }
  for (int g = lane; g < p.groups; g += 32) mass[g] = group_mass(p, position, g, lse2);
  __syncwarp();
  subtract_kept(p, p.first[position], p.hot[position], mass, lse2);
  subtract_kept(p, p.hot[position], p.first[position + 1], mass, lse2);
  for (int g = lane; g < p.groups; g += 32) {
    if (mass[g] < 0.0f) mass[g] = 0.0f;  // rounding; a NaN stays
  }
}

__global__ void __launch_bounds__(kThreads) weight_kernel(const __grid_constant__ WeightParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= *p.count) return;
  const int64_t row = p.rows[i];
  const float z = p.logits[i], a = p.a[row], d = p.d[row];
  float g = 0.0f;
  if (a != 0.0f || d != 0.0f) {
    g = a * ptx::ex2((z - p.lse[row]) * kLog2E);
    if (p.targets[row] - p.options.vocab_start == p.ids[i])
      g -= d * (1.0f - static_cast<float>(p.options.label_smoothing));
    g *= capped(p.options, z) * static_cast<float>(p.options.logit_scale);
  }
  p.weights[i] = g;
  const int slot = p.slots[p.ids[i]];
  if (slot < 0) return;
  const int64_t at = row * p.ld + slot;
  const float share = g / *p.unit;
  if (p.dtype == Dtype::kBFloat16)
    static_cast<__nv_bfloat16*>(p.dense)[at] = __float2bfloat16_rn(share);
  else
    static_cast<__half*>(p.dense)[at] = __float2half_rn(share);
}

}  // namespace

cudaError_t dropped_mass(const MassParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  const int blocks = static_cast<int>((params.n + kThreads / 32 - 1) / (kThreads / 32));
  mass_kernel<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t entry_weights(const WeightParams& params, cudaStream_t stream) {
  if (params.capacity == 0) return cudaSuccess;
  const int blocks = static_cast<int>((params.capacity + kThreads - 1) / kThreads);
  weight_kernel<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
