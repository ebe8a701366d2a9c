// The slope of the softcap at a logit, where there may be none.
#pragma once

#include "core/loss_math.h"

namespace cce::cuda {

__device__ __forceinline__ float capped(const core::LossOptions& options, float z) {
  const float cap = static_cast<float>(options.softcap);
  return cap == 0.0f ? 1.0f : core::softcap_grad(z, 1.0f / cap);
}

}  // namespace cce::cuda
