// Sorting by CUB over a fixed capacity, whose unused end holds the largest keys.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

template <typename Key, typename Value>
cudaError_t sort(void* workspace, size_t& bytes, const Key* keys, Key* keys_out,
                 const Value* values, Value* values_out, int64_t count, int bits,
                 cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(workspace, bytes, keys, keys_out, values, values_out,
                                         static_cast<int>(count), 0, bits, stream);
}

}  // namespace

size_t sort_pairs_workspace(int64_t count, bool wide_keys) {
  size_t bytes = 0;
  if (wide_keys)
    sort<int64_t, float>(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, count, 63, nullptr);
  else
    sort<int32_t, int32_t>(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, count, 31, nullptr);
  return bytes;
}

cudaError_t sort_pairs(const int64_t* keys, const float* values, int64_t* keys_out,
                       float* values_out, int64_t count, int bits, void* workspace, size_t bytes,
                       cudaStream_t stream) {
  return sort(workspace, bytes, keys, keys_out, values, values_out, count, bits, stream);
}

cudaError_t sort_pairs(const int32_t* keys, const int32_t* values, int32_t* keys_out,
                       int32_t* values_out, int64_t count, int bits, void* workspace, size_t bytes,
                       cudaStream_t stream) {
  return sort(workspace, bytes, keys, keys_out, values, values_out, count, bits, stream);
}

}  // namespace cce::cuda
