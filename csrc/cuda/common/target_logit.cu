// The logit at each row's target. One warp a row: lanes stride over K, fp32 products and sums, a butterfly at the end.
// No shared memory. Rows may have any strides; 16-byte loads where all rows allow them.
#include "cuda/common/convert.cuh"
#include "cuda/common/epilogue.cuh"
#include "cuda/common/rows.h"
#include "cuda/common/warp.cuh"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__device__ __forceinline__ T narrowed(T x) {
  return x;
}
template <typename T>
__device__ __forceinline__ T narrowed(float x) {
  return narrow<T>(x);
}

// Eight neighbouring numbers.
template <typename T>
struct Piece {
  alignas(16) T x[8];

  __device__ __forceinline__ explicit Piece(const T* from) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x) / 16); ++i)
      reinterpret_cast<uint4*>(x)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
};

// This lane's part of the dot product of row `a_row` of a and row `b_row` of b, whose numbers are rounded to T.
template <typename T, typename Other, int kVector>
__device__ __forceinline__ float lane_dot(const StridedMatrix& a, int64_t a_row,
                                          const StridedMatrix& b, int64_t b_row) {
  const T* x = static_cast<const T*>(a.data) + a_row * a.row_stride;
  const Other* y = static_cast<const Other*>(b.data) + b_row * b.row_stride;
  float sum = 0.0f;
  if constexpr (kVector == 8) {
    for (int64_t k = threadIdx.x % 32 * 8; k < a.cols; k += 256) {
      const Piece<T> p(x + k);
      const Piece<Other> q(y + k);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(widen(p.x[i]), widen(narrowed<T>(q.x[i])), sum);
    }
  } else {
    for (int64_t k = threadIdx.x % 32; k < a.cols; k += 32) {
      sum = fmaf(widen(x[k * a.col_stride]), widen(narrowed<T>(y[k * b.col_stride])), sum);
    }
  }
  return sum;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    target_logit_kernel(const __grid_constant__ TargetLogitParams p) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (position >= p.n) return;
  const int64_t row = p.order.rows[position];
  const int64_t target = p.targets[row];
  const core::TargetKind kind = core::classify_target(target, p.shard_size, p.options);
  float z = kind == core::TargetKind::kInvalid ? NAN : 0.0f;
  if (kind == core::TargetKind::kHere) {
    const int64_t local = target - p.options.vocab_start;
    float x = lane_dot<T, T, kVector>(p.e, row, p.c, local);
    if (p.u.cols > 0) {
      x += p.lora_b_fp32 ? lane_dot<T, float, kVector>(p.u, row, p.lora_b, local)
                         : lane_dot<T, T, kVector>(p.u, row, p.lora_b, local);
    }
    x = warp_sum(x);
    if (p.bias) x += p.bias[local];
    x *= static_cast<float>(p.options.logit_scale);
    const float cap = static_cast<float>(p.options.softcap);
    z = cap == 0.0f ? x : core::softcap<DeviceMath>(x, cap, 1.0f / cap);
  }
  if (threadIdx.x % 32 == 0) p.target_logit[row] = z;
}

template <typename T>
cudaError_t launch(const TargetLogitParams& p, cudaStream_t stream) {
  const int blocks = static_cast<int>((p.n + kThreads / 32 - 1) / (kThreads / 32));
  const bool vector = in_pieces(p.e) && in_pieces(p.c) && in_pieces(p.u) && in_pieces(p.lora_b);
  if (vector)
    target_logit_kernel<T, 8><<<blocks, kThreads, 0, stream>>>(p);
  else
    target_logit_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t target_logits(const TargetLogitParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  return params.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(params, stream)
                                          : launch<__half>(params, stream);
}

}  // namespace cce::cuda
