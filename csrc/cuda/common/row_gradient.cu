// One thread a row: upstream gradients, lse and target gathered into the record that the backward's epilogue reads.
#include "cuda/common/row_gradient.cuh"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128;

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
