// The record of one row that the backward's epilogue reads.
#pragma once

#include "core/loss_math.h"
#include "cuda/common/epilogue.cuh"
#include "cuda/common/rows.h"

namespace cce::cuda {

// place: where the epilogue finds the row; target: the row's target id, of the whole vocabulary.
__device__ __forceinline__ RowGradient make_row_gradient(int64_t place, float dnll, float dlse,
                                                         float lse, int64_t target,
                                                         int64_t shard_size,
                                                         const core::LossOptions& options) {
  const auto grad =
      core::row_grad(dnll, dlse, static_cast<float>(options.label_smoothing),
                     static_cast<float>(1.0 / static_cast<double>(options.vocab_total)));
  RowGradient out;
  out.a = grad.a;
  out.uniform = grad.uniform;
  out.target_weight = grad.target;
  out.lse2 = lse * kLog2E;
  out.row = static_cast<int32_t>(place);
  if (core::classify_target(target, shard_size, options) == core::TargetKind::kHere)
    out.target = static_cast<int32_t>(target - options.vocab_start);
  return out;
}

}  // namespace cce::cuda
