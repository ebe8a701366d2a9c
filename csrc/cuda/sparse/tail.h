// Host launchers of the small kernels between the matmuls that spread the tail; what they mean: cce_ext/sparse/tail.py.
// Nothing is added up by atomics, and every sum has a fixed order.
#pragma once

#include "cuda/common/rows.h"

namespace cce::cuda {

constexpr int kTailClasses = 8;  // as in tail.py
// Rows that drop less than this have no tail, and 1 / mass would not be finite.
constexpr float kNothing = 1e-30f;
// What shapes are multiplied by in float16, whose numbers end at 6e-8: they are about 1 / kGroupCols.
constexpr float kShapeLift = 64.0f;

// What the sampled rows drop, summed by class, from the forward's levels.
constexpr int kMaxSamples = 256;
struct alignas(16) LevelRow {
  int16_t slot, of;      // its class
  int32_t limit;         // the largest level that is dropped
  float offset, origin;  // log2 of what level 0 adds to the sum; its base-2 logit
};
struct LevelSumsParams {
  uint8_t* levels = nullptr;  // (samples, ld), see Candidates; those of targets are cleared
  int64_t ld = 0;
  bool paired = false;               // how the kernel that wrote them holds its columns
  const int64_t* rows = nullptr;     // (samples,)
  const float* draws = nullptr;      // (samples,)
  int samples = 0;                   // kMaxSamples at most
  const int64_t* classes = nullptr;  // (N,)
  const float* bound2 = nullptr;     // (N,)
  const float* lse = nullptr;        // (N,)
  const int64_t* targets = nullptr;  // (N,)
  const uint8_t* exact = nullptr;    // (N,): rows that stand for none
  int64_t vocab = 0;
  core::LossOptions options;
  float log2_eps = 0.0f;
  float* weight = nullptr;     // (samples,): what a row's tail counts: draws, 0 of exact rows
  LevelRow* sorted = nullptr;  // (samples,): workspace, by class
  float* sums = nullptr;       // (kTailClasses, vocab)
};

cudaError_t level_sums(const LevelSumsParams& params, cudaStream_t stream);

// The row's factors of the products: columns of hot ids, which entry_weights fills later, then what the row drops in group g
// if it is of class k, at g * kinds + k. With label smoothing there is one more kind, of which every row is.
struct TailFactorsParams {
  const int64_t* classes = nullptr;  // (N,)
  int64_t n = 0;
  const float* a = nullptr;     // (N,)
  const float* d = nullptr;     // (N,)
  const float* mass = nullptr;  // (N, groups)
  int groups = 0;
  float scale = 1.0f;    // of mass * a: the logit scale
  float uniform = 0.0f;  // of d: what label smoothing spreads over a group, 0 without
  bool smoothing = false;
  const float* units = nullptr;  // (3,), by choose_exact_rows
  Dtype dtype = Dtype::kBFloat16;
  void* factors = nullptr;  // (N, width): hot + groups * kinds columns, zeros up to the width
  int64_t ld = 0, hot = 0, width = 0;  // multiples of 8
};

cudaError_t tail_factors(const TailFactorsParams& params, cudaStream_t stream);

// The shapes of the classes' tails, from their sums: each mixed with a little of all, then normal in every group.
struct TailShapesParams {
  const float* sums = nullptr;  // (kTailClasses, vocab)
  int64_t vocab = 0;
  float shared = 0.0f;  // share of all classes' sum
  bool smoothing = false;
  enum class Out { kBFloat16, kHalf, kFloat } dtype = Out::kBFloat16;
  void* shapes = nullptr;  // (kTailClasses (+ 1), ld); times kShapeLift if half
  int64_t ld = 0;
  int64_t* totals = nullptr;  // (groups,): the ids' steps
};

cudaError_t tail_shapes(const TailShapesParams& params, cudaStream_t stream);

}  // namespace cce::cuda
