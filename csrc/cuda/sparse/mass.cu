// What was dropped, and what is kept in numbers: the dropped mass of each row and vocabulary group (one warp a row), and
// the weight of each kept entry in the gradient (one thread an entry).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/epilogue.cuh"
#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kNearGroups = 128;  // groups whose masses a warp has in shared memory

__device__ __forceinline__ float capped(const core::LossOptions& options, float z) {
  const float cap = static_cast<float>(options.softcap);
  return cap == 0.0f ? 1.0f : core::softcap_grad(z, 1.0f / cap);
}

// Σ p softcap' of one group, kept entries included, from the forward's partials.
__device__ __forceinline__ float group_mass(const MassParams& p, int64_t position, int group,
                                            float lse2) {
  const int end = min((group + 1) * p.splits_per_group, p.splits);
  constexpr int kInFlight = 4;
  float mass = 0.0f;
  for (int64_t s = group * p.splits_per_group; s < end; s += kInFlight) {
    float2 part[kInFlight];
    float sum[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = min(s + i, int64_t{end} - 1) * p.n + position;
      part[i] = p.partials.max_sum[at];
      sum[i] = p.partials.capped ? p.partials.capped[at] : part[i].y;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (s + i < end && part[i].x != -INFINITY) mass += sum[i] * ptx::ex2(part[i].x - lse2);
    }
  }
  return mass;
}

// Entries begin to end are sorted by id, so groups come one after another: lane l takes entry 32 i + l, a segmented scan
// adds what belongs to one group, and its last lane takes that from the group's mass.
__device__ void subtract_kept(const MassParams& p, int begin, int end, float* mass, float lse2) {
  const int lane = threadIdx.x % 32;
  // The next entry is on its way while this one is worked on.
  float next_z = begin + lane < end ? p.logits[begin + lane] : 0.0f;
  int next_id = begin + lane < end ? p.ids[begin + lane] : -1;
  for (int base = begin; base < end; base += 32) {
    const float z = next_z;
    const int id = next_id, i = base + 32 + lane;
    next_z = i < end ? p.logits[i] : 0.0f;
    next_id = i < end ? p.ids[i] : -1;
    const int group = id < 0 ? -1 : id / kGroupCols;
    float kept = id < 0 ? 0.0f : ptx::ex2(fmaf(z, kLog2E, -lse2)) * capped(p.options, z);
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
  __shared__ float near[kThreads / 32][kNearGroups];
  const int64_t position = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (position >= p.n) return;
  const int64_t row = p.order.rows[position];
  const float lse2 = p.lse[row] * kLog2E;
  float* const out = p.mass + row * p.groups;
  const int lane = threadIdx.x % 32;
  if (position >= *p.order.count) {  // does not count
    for (int g = lane; g < p.groups; g += 32) out[g] = 0.0f;
    return;
  }
  float* const mass = p.groups <= kNearGroups ? near[threadIdx.x / 32] : out;
  for (int g = lane; g < p.groups; g += 32) mass[g] = group_mass(p, position, g, lse2);
  __syncwarp();
  subtract_kept(p, p.first[position], p.hot[position], mass, lse2);
  subtract_kept(p, p.hot[position], p.first[position + 1], mass, lse2);
  for (int g = lane; g < p.groups; g += 32) {
    const float left = mass[g];
    out[g] = left < 0.0f ? 0.0f : left;  // rounding; a NaN stays
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
