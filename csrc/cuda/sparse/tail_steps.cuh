// The integers that rows are sampled by, and ids for the tail's tilt: at equal steps of a cumulated sum.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cce::cuda {

// One unit of a tail's weight in the integers that ids are sampled by, and the most that counts; as in tail.py.
constexpr float kTailSteps = 0x1p25f, kTailMost = 0x1p18f;

// An id's steps, from its sum over the classes; none if that is not a number.
__device__ __forceinline__ int64_t tail_steps(float sum) {
  return static_cast<int64_t>(static_cast<double>(fminf(fmaxf(sum, 0.0f), kTailMost)) * kTailSteps);
}

// How many of `count` aims, half a step and then a step apart, lie before x.
__device__ __forceinline__ int aims_before(int64_t x, int64_t step, int count) {
  const int64_t beyond = x - step / 2;
  if (beyond <= 0) return 0;
  return static_cast<int>(min((beyond + step - 1) / step, int64_t{count}));
}

}  // namespace cce::cuda
