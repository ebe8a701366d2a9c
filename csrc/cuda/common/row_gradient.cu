// One thread a row: upstream gradients, lse and target gathered into the record that the backward's epilogue reads.
#include "core/loss_math.h"
#include "cuda/common/epilogue.cuh"
#include "cuda/common/rows.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128;

// place: where the epilogue finds the row; target: the row's target id, of the whole vocabulary.
__device__ __forceinline__ RowGradient make_row_gradient(int64_t place, float dnll, float dlse,
                                                         float lse, int64_t target,
                                                         int64_t shard_size,
                                                         const core::LossOptions& options) {
  const auto grad =
      core::row_grad(dnll, dlse, static_cast<float>(options.label_smoothing),
                     static_cast<float>(1.0 / static_cast<double>(options.vocab_total)));
  RowGradient out;
  out.a = grad.a;
  out.uniform = grad.uniform;
  out.target_weight = grad.target;
  out.lse2 = lse * kLog2E;
  out.row = static_cast<int32_t>(place);
  if (core::classify_target(target, shard_size, options) == core::TargetKind::kHere)
    out.target = static_cast<int32_t>(target - options.vocab_start);
  return out;
}

__global__ void __launch_bounds__(kThreads)
    row_gradient_kernel(const __grid_constant__ RowGradientParams p) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (position >= p.n) return;
  RowGradient out;
  if (position < *p.order.count) {
    const int64_t row = p.order.rows[position];
    out = make_row_gradient(row, p.dnll ? p.dnll[row] : 0.0f, p.dlse ? p.dlse[row] : 0.0f,
                            p.lse[row], p.targets[row], p.shard_size, p.options);
  }
  p.out[position] = out;
}

}  // namespace

cudaError_t row_gradients(const RowGradientParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  const int blocks = static_cast<int>((params.n + kThreads - 1) / kThreads);
  row_gradient_kernel<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
