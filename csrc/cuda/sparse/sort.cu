// Kept entries by id, for the gradients by columns: their ids and numbers sorted by CUB, over a fixed capacity whose unused
// end has ids beyond all; then where each id's entries start, a thread an id.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 256;

// The first of `count` ascending values that is not below `bound`.
__device__ int64_t first_not_below(const int32_t* values, int64_t count, int32_t bound) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] < bound)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads)
    number_kernel(const __grid_constant__ SortColumnsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.capacity) return;
  p.keys[0][i] = i < *p.count ? p.ids[i] : static_cast<int32_t>(p.vocab);
  p.orders[0][i] = static_cast<int32_t>(i);
}

__global__ void __launch_bounds__(kThreads)
    starts_kernel(const int32_t* sorted, const __grid_constant__ SortColumnsParams p) {
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id > p.vocab) return;
  const int64_t place = first_not_below(sorted, *p.count, static_cast<int32_t>(id));
  p.column_first[id] = static_cast<int32_t>(place);
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

cudaError_t sort(void* workspace, size_t& bytes, cub::DoubleBuffer<int32_t>& keys,
                 cub::DoubleBuffer<int32_t>& orders, int64_t count, int bits, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(workspace, bytes, keys, orders, static_cast<int>(count), 0,
                                         bits, stream);
}

}  // namespace

size_t sort_columns_workspace(int64_t capacity) {
  size_t bytes = 0;
  cub::DoubleBuffer<int32_t> keys, orders;
  sort(nullptr, bytes, keys, orders, capacity, 31, nullptr);
  return bytes;
}

cudaError_t sort_columns(const SortColumnsParams& params, int* result, cudaStream_t stream) {
  cub::DoubleBuffer<int32_t> keys(params.keys[0], params.keys[1]);
  cub::DoubleBuffer<int32_t> orders(params.orders[0], params.orders[1]);
  if (params.capacity > 0) {
    number_kernel<<<blocks_for(params.capacity), kThreads, 0, stream>>>(params);
    size_t bytes = params.workspace_bytes;
    const cudaError_t error =
        sort(params.workspace, bytes, keys, orders, params.capacity, id_bits(params.vocab), stream);
    if (error != cudaSuccess) return error;
  }
  *result = orders.selector;
  starts_kernel<<<blocks_for(params.vocab + 1), kThreads, 0, stream>>>(keys.Current(), params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
