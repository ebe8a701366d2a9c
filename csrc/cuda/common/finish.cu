// Merges the per-split partials of each row and makes the outputs. One thread a row; splits in ascending order, read
// eight at a time so that the loads overlap.
#include "cuda/common/epilogue.cuh"
#include "cuda/common/rows.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kLn2 = 0.6931471805599453f;

__device__ void write_ignored(const FinishParams& p, int64_t row) {
  p.nll[row] = 0.0f;
  p.lse[row] = 0.0f;
  if (p.logit_sum) p.logit_sum[row] = 0.0f;
  if (p.max_logit) {
    p.max_logit[row] = 0.0f;
    p.argmax[row] = -1;
    p.entropy[row] = 0.0f;
  }
}

// max and Σ 2^(z2 - max) over all splits.
__device__ RowState merge_splits(const FinishParams& p, int64_t position) {
  constexpr int kBatch = 8;
  RowState total;
  for (int first = 0; first < p.splits; first += kBatch) {
    float2 part[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      part[i] = first + i < p.splits ? p.partials.max_sum[(first + i) * p.n + position]
                                     : make_float2(-INFINITY, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) total = merge(total, {part[i].x, part[i].y});
  }
  return total;
}

__device__ void write_metrics(const FinishParams& p, int64_t position, int64_t row, RowState total,
                              float lse) {
  const float reference = finite_reference(total.max);
  float weighted = 0.0f, best = -INFINITY;
  int32_t argmax = p.splits > 0 ? p.partials.argmax[position] : 0;
  for (int64_t s = 0; s < p.splits; ++s) {
    const float max = p.partials.max_sum[s * p.n + position].x;
    weighted += p.partials.weighted[s * p.n + position] * ptx::ex2(max - reference);
    if (max > best) {
      best = max;
      argmax = p.partials.argmax[s * p.n + position];
    }
  }
  p.max_logit[row] = total.max * kLn2;
  p.argmax[row] = p.options.vocab_start + argmax;
  p.entropy[row] = lse - weighted / total.sum;
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishParams p) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (position >= p.n) return;
  const int64_t row = p.order.rows[position];
  if (position >= *p.order.count) return write_ignored(p, row);
  const RowState total = merge_splits(p, position);
  const float lse = (total.max + log2f(total.sum)) * kLn2;
  float logit_sum = 0.0f;
  if (p.logit_sum) {
    double sum = 0.0;
    for (int64_t s = 0; s < p.splits; ++s) sum += p.partials.logit_sum[s * p.n + position];
    logit_sum = static_cast<float>(sum);
    p.logit_sum[row] = logit_sum;
  }
  p.lse[row] = lse;
  p.nll[row] =
      core::nll(lse, p.target_logit[row], logit_sum, static_cast<float>(p.options.label_smoothing),
                static_cast<float>(1.0 / static_cast<double>(p.options.vocab_total)));
  if (p.max_logit) write_metrics(p, position, row, total, lse);
}

}  // namespace

cudaError_t finish_rows(const FinishParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  const int blocks = static_cast<int>((params.n + kThreads - 1) / kThreads);
  finish_kernel<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
