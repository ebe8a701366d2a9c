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

// `count` aims, half a step and then a step apart; step > 0.
struct Aims {
  int64_t step;
  int count;
  double steps_per_one;

  __device__ __forceinline__ Aims(int64_t step_, int count_)
      : step(step_), count(count_), steps_per_one(1.0 / static_cast<double>(step_)) {}

  // How many lie before x. A quotient of 64-bit integers takes a hundred instructions; this one in floating point is
  // one too many or too few at most.
  __device__ __forceinline__ int before(int64_t x) const {
    const int64_t beyond = x - step / 2;
    if (beyond <= 0) return 0;
    const double about = fmin(static_cast<double>(beyond) * steps_per_one, count);
    int aims = static_cast<int>(about);
    if (aims * step < beyond) ++aims;
    if (aims * step < beyond) ++aims;
    if ((aims - 1) * step >= beyond) --aims;
    return min(aims, count);
  }
};

}  // namespace cce::cuda
