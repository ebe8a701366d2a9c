// The integers that ids are sampled by for the tail's tilt.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cce::cuda {

// One unit of a tail's weight in the integers that ids are sampled by, and the most that counts; as in tail.py.
constexpr float kTailSteps = 1048576.0f, kTailMost = 262144.0f;  // 2^20, 2^18

// An id's steps, from its sum over the classes; none if that is not a number.
__device__ __forceinline__ int64_t tail_steps(float sum) {
  return static_cast<int64_t>(static_cast<double>(fminf(fmaxf(sum, 0.0f), kTailMost)) * kTailSteps);
}

}  // namespace cce::cuda
