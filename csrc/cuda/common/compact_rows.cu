// Rows of a matrix brought together in the row order, so that blocks of them can be copied as tiles. A warp a row, 16 bytes a
// lane at a time; zeros after the last one up to the end of its row block, which is multiplied too. Where every row counts
// nothing is done: the matrix itself is in that order.
#include "cuda/common/rows.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    compact_kernel(Matrix from, RowOrder order, int64_t n, Matrix to) {
  const int64_t count = *order.count;
  if (count == n) return;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (position >= (count + kRowBlock - 1) / kRowBlock * kRowBlock || position >= n) return;
  const bool exists = position < count;
  const auto* source =
      static_cast<const uint16_t*>(from.data) + (exists ? order.rows[position] * from.ld : 0);
  auto* target = const_cast<uint16_t*>(static_cast<const uint16_t*>(to.data)) + position * to.ld;
  const int64_t pieces = (from.cols + 7) / 8;
  for (int64_t i = threadIdx.x % 32; i < pieces; i += 32)
    reinterpret_cast<uint4*>(target)[i] =
        exists ? reinterpret_cast<const uint4*>(source)[i] : make_uint4(0, 0, 0, 0);
}

}  // namespace

cudaError_t compact_rows(const Matrix& from, const RowOrder& order, int64_t n, const Matrix& to,
                         cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int blocks = static_cast<int>((n + kThreads / 32 - 1) / (kThreads / 32));
  compact_kernel<<<blocks, kThreads, 0, stream>>>(from, order, n, to);
  return cudaGetLastError();
}

}  // namespace cce::cuda
