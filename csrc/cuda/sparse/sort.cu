// Sorting by CUB over a fixed capacity, whose unused end holds the largest keys.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

cudaError_t sort(void* workspace, size_t& bytes, const int32_t* keys, int32_t* keys_out,
                 const int32_t* values, int32_t* values_out, int64_t count, int bits,
                 cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(workspace, bytes, keys, keys_out, values, values_out,
                                         static_cast<int>(count), 0, bits, stream);
}

}  // namespace

size_t sort_pairs_workspace(int64_t count) {
  size_t bytes = 0;
  sort(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, count, 31, nullptr);
  return bytes;
}

cudaError_t sort_pairs(const int32_t* keys, const int32_t* values, int32_t* keys_out,
                       int32_t* values_out, int64_t count, int bits, void* workspace, size_t bytes,
                       cudaStream_t stream) {
  return sort(workspace, bytes, keys, keys_out, values, values_out, count, bits, stream);
}

}  // namespace cce::cuda
