// Binary search in ascending values.
#pragma once

#include <cstdint>

namespace cce::cuda {

// The first of `count` ascending values that is not below `bound`.
template <typename T>
__device__ int64_t first_not_below(const T* values, int64_t count, T bound) {
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

}  // namespace cce::cuda
