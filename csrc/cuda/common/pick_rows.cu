// Chosen rows of two matrices brought together, as a matmul wants them; a warp a row. 16 bytes a lane at a time where all rows
// allow it; else a number at a time, rounded if it is float.
#include "cuda/common/convert.cuh"
#include "cuda/common/rows.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, bool kPieces>
__global__ void __launch_bounds__(kThreads) pick_kernel(const __grid_constant__ PickRowsParams p) {
  int64_t position = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (position >= p.from[0].count + p.from[1].count) return;
  T* to = static_cast<T*>(p.out) + position * p.cols;
  const bool second = position >= p.from[0].count;
  if (second) position -= p.from[0].count;
  const PickRowsParams::From& from = second ? p.from[1] : p.from[0];
  const int64_t start = from.ids[position] * from.matrix.row_stride;
  if constexpr (kPieces) {
    const auto* source =
        reinterpret_cast<const uint4*>(static_cast<const T*>(from.matrix.data) + start);
#pragma unroll 4
    for (int64_t i = threadIdx.x % 32; i < p.cols / 8; i += 32)
      reinterpret_cast<uint4*>(to)[i] = __ldg(source + i);
  } else {
    for (int64_t i = threadIdx.x % 32; i < p.cols; i += 32) {
      const int64_t at = start + i * from.matrix.col_stride;
      to[i] = from.fp32 ? narrow<T>(static_cast<const float*>(from.matrix.data)[at])
                        : static_cast<const T*>(from.matrix.data)[at];
    }
  }
}

template <typename T>
void launch(const PickRowsParams& p, bool pieces, unsigned blocks, cudaStream_t stream) {
  if (pieces)
    pick_kernel<T, true><<<blocks, kThreads, 0, stream>>>(p);
  else
    pick_kernel<T, false><<<blocks, kThreads, 0, stream>>>(p);
}

}  // namespace

cudaError_t pick_rows(const PickRowsParams& params, cudaStream_t stream) {
  const int64_t rows = params.from[0].count + params.from[1].count;
  if (rows == 0 || params.cols == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((rows + kThreads / 32 - 1) / (kThreads / 32));
  const auto as_they_are = [](const PickRowsParams::From& from) {
    return !from.fp32 && in_pieces(from.matrix);
  };
  const bool pieces = as_they_are(params.from[0]) && as_they_are(params.from[1]) &&
                      in_pieces({params.out, params.cols, 1, params.cols});
  if (params.dtype == Dtype::kBFloat16)
    launch<__nv_bfloat16>(params, pieces, blocks, stream);
  else
    launch<__half>(params, pieces, blocks, stream);
  return cudaGetLastError();
}

}  // namespace cce::cuda
