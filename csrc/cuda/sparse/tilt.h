// Host launchers of the tail's tilt: how far a row's tail leans from its class's towards ids of larger logits, by a sample
// of ids. What it means: cce_ext/sparse/tail.py.
#pragma once

#include "cuda/sparse/tail.h"

namespace cce::cuda {

constexpr int kMaxTiltIds = 1024;  // of which a warp has a copy in shared memory

// Ids at equal steps of the cumulated tail.
struct TiltIdsParams {
  const float* sums = nullptr;      // (kTailClasses, vocab)
  const int64_t* totals = nullptr;  // (groups,): steps of each group's ids, by tail_shapes
  int64_t vocab = 0;
  int groups = 0, count = 0;  // count: ids to be found
  int64_t* ids = nullptr;     // (count,), ascending
  int32_t* first = nullptr;   // (groups + 1,): where those of each group start
};

cudaError_t tilt_ids(const TiltIdsParams& params, cudaStream_t stream);

// Products with the sampled ids become what the gradients by rows add to the tail.
struct TiltParams {
  Dtype dtype = Dtype::kBFloat16;
  void* z =
      nullptr;  // (N, ld): products, then the tilt times a scale, in units[1], times kShapeLift if half
  int64_t ld = 0, n = 0;
  int count = 0;                     // ids, an even number
  const int64_t* ids = nullptr;      // (count,)
  const int32_t* first = nullptr;    // (groups + 1,)
  const int64_t* classes = nullptr;  // (N,)
  const int64_t* rows = nullptr;     // (samples,)
  int samples = 0;
  const float* weight = nullptr;    // (samples,), as LevelSumsParams'
  const float* row_mass = nullptr;  // (N,)
  const float* mass = nullptr;      // (N, groups)
  int groups = 0;
  const float* a = nullptr;     // (N,)
  const float* bias = nullptr;  // (vocab,) or null
  core::LossOptions options;
  float shared = 0.0f;                    // share of all classes' mean in each class's
  float strength = 0.0f, damping = 0.0f;  // β = strength / (1 + damping v)
  const float* units = nullptr;           // (3,), by choose_exact_rows
  float* means = nullptr;                 // (kTailClasses, count): scratch
};

cudaError_t tilt_rows(const TiltParams& params, cudaStream_t stream);

}  // namespace cce::cuda
