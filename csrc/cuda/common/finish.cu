// Merges the per-split partials of each row and makes the outputs. A block has 32 rows, a lane each, and a warp for each of
// eight stretches of the splits, so that few rows with many splits are on many multiprocessors, too. A thread takes its
// stretch in ascending order, eight loads at a time so that they overlap; the first warp merges the stretches, ascending.
#include "cuda/common/epilogue.cuh"
#include "cuda/common/rows.h"

namespace cce::cuda {
namespace {

constexpr int kRows = 32, kParts = 8;

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

// What a stretch of splits gives of a row, or several of them. Without initial values, as shared memory wants it.
struct Part {
  float max, sum;
  float weighted;  // Σ 2^(z2 - max) z
  int32_t argmax;
  double logit_sum;

  __device__ RowState state() const { return {max, sum}; }
};

// max and Σ 2^(z2 - max) over some splits.
__device__ RowState merge_splits(const FinishParams& p, int64_t position, int first, int end) {
  constexpr int kBatch = 8;
  RowState total;
  for (; first < end; first += kBatch) {
    float2 part[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      part[i] = first + i < end ? p.partials.max_sum[(first + i) * p.n + position]
                                : make_float2(-INFINITY, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) total = merge(total, {part[i].x, part[i].y});
  }
  return total;
}

// Of equal maxima the first.
__device__ void add_metrics(const FinishParams& p, int64_t position, int first, int end,
                            Part& part) {
  const float reference = finite_reference(part.max);
  float best = -INFINITY;
  if (first < end) part.argmax = p.partials.argmax[first * p.n + position];
  for (int64_t s = first; s < end; ++s) {
    const float max = p.partials.max_sum[s * p.n + position].x;
    part.weighted += p.partials.weighted[s * p.n + position] * ptx::ex2(max - reference);
    if (max > best) {
      best = max;
      part.argmax = p.partials.argmax[s * p.n + position];
    }
  }
}

__device__ Part read_part(const FinishParams& p, int64_t position, int first, int end) {
  const RowState state = merge_splits(p, position, first, end);
  Part part{state.max, state.sum, 0.0f, 0, 0.0};
  if (p.logit_sum) {
    for (int64_t s = first; s < end; ++s)
      part.logit_sum += p.partials.logit_sum[s * p.n + position];
  }
  if (p.max_logit) add_metrics(p, position, first, end, part);
  return part;
}

// b: of the stretch after a's.
__device__ Part merge_parts(const Part& a, const Part& b) {
  const RowState state = merge(a.state(), b.state());
  const float reference = finite_reference(state.max);
  const float weighted =
      a.weighted * ptx::ex2(a.max - reference) + b.weighted * ptx::ex2(b.max - reference);
  return {state.max, state.sum, weighted, b.max > a.max ? b.argmax : a.argmax,
          a.logit_sum + b.logit_sum};
}

__device__ void write_row(const FinishParams& p, int64_t row, const Part& all) {
  const float lse = (all.max + log2f(all.sum)) * kLn2;
  const auto logit_sum = static_cast<float>(all.logit_sum);
  if (p.logit_sum) p.logit_sum[row] = logit_sum;
  p.lse[row] = lse;
  p.nll[row] =
      core::nll(lse, p.target_logit[row], logit_sum, static_cast<float>(p.options.label_smoothing),
                static_cast<float>(1.0 / static_cast<double>(p.options.vocab_total)));
  if (!p.max_logit) return;
  p.max_logit[row] = all.max * kLn2;
  p.argmax[row] = p.options.vocab_start + all.argmax;
  p.entropy[row] = lse - all.weighted / all.sum;
}

__global__ void __launch_bounds__(kRows* kParts)
    finish_kernel(const __grid_constant__ FinishParams p) {
  __shared__ Part parts[kParts][kRows];
  const int lane = threadIdx.x % kRows, mine = threadIdx.x / kRows;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kRows + lane;
  const int64_t row = position < p.n ? p.order.rows[position] : -1;
  const bool counts = position < *p.order.count;
  if (counts) {
    const int each = (p.splits + kParts - 1) / kParts, first = mine * each;
    parts[mine][lane] = read_part(p, position, first, min(first + each, p.splits));
  }
  __syncthreads();
  if (mine != 0 || row < 0) return;
  if (!counts) return write_ignored(p, row);
  Part all = parts[0][lane];
#pragma unroll
  for (int i = 1; i < kParts; ++i) all = merge_parts(all, parts[i][lane]);
  write_row(p, row, all);
}

}  // namespace

cudaError_t finish_rows(const FinishParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  const int blocks = static_cast<int>((params.n + kRows - 1) / kRows);
  finish_kernel<<<blocks, kRows * kParts, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
