// The weight of each kept entry in the gradient, one thread an entry.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/epilogue.cuh"
#include "cuda/sparse/capped.cuh"
#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128;

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

cudaError_t entry_weights(const WeightParams& params, cudaStream_t stream) {
  if (params.capacity == 0) return cudaSuccess;
  const int blocks = static_cast<int>((params.capacity + kThreads - 1) / kThreads);
  weight_kernel<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
