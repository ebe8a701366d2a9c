// A lower bound of each row's lse from some hundreds of its logits, about what the row will drop, and its class. One warp a
// row, no shared memory.
#include "cuda/common/epilogue.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTop = 8;  // the largest strided logits stand for themselves alone

// A row's logits, base 2, in columns first to end, 32 kPerLane at most, a lane's 32 apart and all on their way at once; -inf
// for those that do not count. flags: whether they do, of the first column on, or null: all do.
template <int kPerLane>
__device__ __forceinline__ void load_logits(const BoundParams& p, const float* products, int first,
                                            int end, const uint8_t* flags, float (&x)[kPerLane]) {
  const float scale = static_cast<float>(p.options.logit_scale),
              cap = static_cast<float>(p.options.softcap), inv_cap = 1.0f / cap;
  const auto column = [&](int i) { return first + 32 * i + static_cast<int>(threadIdx.x % 32); };
  const auto there = [&](int i) { return min(column(i), end - 1); };
  bool counts[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = products[there(i)];
    counts[i] = column(i) < end && (!flags || flags[there(i) - first] != 0);
  }
  if (p.bias) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] += p.bias[there(i)];
  }
  if (cap != 0.0f) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = core::softcap<DeviceMath>(x[i] * scale, cap, inv_cap);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] *= scale;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = counts[i] ? x[i] * kLog2E : -INFINITY;
}

// What the strided columns say, in units of 2^reference: the eight largest, and of the others sum and sum of squares.
struct Estimate {
  float reference = -INFINITY, largest = 0.0f, rest = 0.0f, squares = 0.0f;
};

constexpr int kStridedPerLane = kMaxStrided / 32;
__device__ Estimate estimate_strided(const float (&x)[kStridedPerLane]) {
  Estimate e;
  float below = INFINITY;
  // The next smaller value each time; equal values are taken together and count as one, which only lowers the result.
  for (int k = 0; k < kTop; ++k) {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kStridedPerLane; ++i) top = fmaxf(top, x[i] < below ? x[i] : -INFINITY);
    top = warp_max(top);
    if (top == -INFINITY) break;
    if (k == 0) e.reference = top;
    e.largest += ptx::ex2(top - e.reference);
    below = top;
  }
  const float reference = finite_reference(e.reference);
#pragma unroll
  for (int i = 0; i < kStridedPerLane; ++i) {
    const float weight = x[i] < below ? ptx::ex2(x[i] - reference) : 0.0f;
    e.rest += weight;
    e.squares = fmaf(weight, weight, e.squares);
  }
  e.rest = warp_sum(e.rest);
  e.squares = warp_sum(e.squares);
  return e;
}

// Σ over the other columns.
__device__ RowState add_sampled(const BoundParams& p, const float* products) {
  constexpr int kPerLane = 8, kAtOnce = 32 * kPerLane;
  RowState state;
  for (int first = p.strided; first < p.columns; first += kAtOnce) {
    float x[kPerLane];
    load_logits(p, products, first, min(first + kAtOnce, p.columns), nullptr, x);
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, x[i]);
    top = warp_max(top);
    const float reference = finite_reference(top);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += ptx::ex2(x[i] - reference);
    state = merge(state, {top, warp_sum(sum)});
  }
  return state;
}

// log2 of what the row's mass comes to at least: the frequent ids and the largest strided columns count for themselves,
// the other strided ones for the columns between them, of that four standard errors less; but three quarters less than
// the estimate at most.
__device__ float least_mass(const Estimate& strided, const RowState& sampled, float stride) {
  const float reference = finite_reference(fmaxf(strided.reference, sampled.max));
  const float unit = ptx::ex2(strided.reference - reference);
  const float seen = sampled.sum * ptx::ex2(sampled.max - reference) + strided.largest * unit;
  const float all = seen + strided.rest * unit * stride;
  const float error = sqrtf(strided.squares) * unit * stride;
  return reference + log2f(fmaxf(seen, fmaxf(all - 4.0f * error, 0.25f * all)));
}

__global__ void __launch_bounds__(kThreads) bound_kernel(const __grid_constant__ BoundParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.rows) return;
  const float* products = p.products + row * (p.columns + p.classes);
  const float stride = static_cast<float>(p.vocab) / static_cast<float>(p.strided);
  float strided[kStridedPerLane];
  load_logits(p, products, 0, p.strided, p.counts, strided);
  float bound = least_mass(estimate_strided(strided), add_sampled(p, products), stride);
  bound = fmaxf(bound, p.target_logit[row] * kLog2E) - kBoundMargin;
  // Of entries below the threshold; nothing jumps where one crosses it, so that rounding draws no other rows.
  float dropped = 0.0f;
#pragma unroll
  for (int i = 0; i < kStridedPerLane; ++i) {
    const float w = ptx::ex2(strided[i] - bound);
    dropped += fmaxf(fminf(w, p.eps - w), 0.0f);
  }
  dropped = warp_sum(dropped) * stride;
  const int lane = threadIdx.x % 32;
  const bool scores = lane < p.classes;
  const float score = scores ? products[p.columns + lane] : -INFINITY, top = warp_max(score);
  const uint32_t best = __ballot_sync(~0u, scores && score == top);
  if (lane != 0) return;
  p.bound2[row] = bound;
  p.share[row] = fminf(fmaxf(dropped, kLeastShare), 1.0f);
  p.row_class[row] = max(__ffs(best) - 1, 0);  // there is none where all are NaN
}

}  // namespace

cudaError_t row_bounds(const BoundParams& params, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;
  if (params.strided > kMaxStrided || params.classes > 32) return cudaErrorInvalidValue;
  const int blocks = static_cast<int>((params.rows + kThreads / 32 - 1) / (kThreads / 32));
  bound_kernel<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
