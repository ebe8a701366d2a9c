// Host launchers of the small kernels between the matmuls that spread the tail; what they mean: cce_ext/sparse/tail.py.
// Nothing is added up by atomics, and every sum has a fixed order.
#pragma once

#include "cuda/common/rows.h"

namespace cce::cuda {

constexpr int kTailClasses = 8;  // as in tail.py
// Rows that drop less than this have no tail worth a sample, and 1 / mass would not be finite.
constexpr float kNothing = 1e-30f;
// What shapes are multiplied by in float16, whose numbers end at 6e-8: they are about 1 / kGroupCols.
constexpr float kShapeLift = 64.0f;

// The sampled rows as a call of their own: everything in the order of the sample.
struct TailRowsParams {
  const int64_t* rows = nullptr;  // (samples,) row numbers
  int samples = 0;
  Matrix e, u;                                      // (N, D), (N, R); no data: no low-rank head
  void *e_sampled = nullptr, *u_sampled = nullptr;  // (samples, ld), 16-bit
  int64_t e_sampled_ld = 0, u_sampled_ld = 0;       // whole 16-byte pieces
  const float* lse = nullptr;                       // (N,)
  const int64_t* targets = nullptr;                 // (N,)
  const float* weight = nullptr;                    // (N,): what a row's tail counts
  float lift = 1.0f;                                // factor of the weights
  int64_t shard_size = 0;
  core::LossOptions options;
  RowGradient* records = nullptr;  // (samples,)
  int32_t* order = nullptr;        // (samples,): 0, 1, 2, ...
  int32_t* count = nullptr;        // (1,): samples
};

cudaError_t tail_rows(const TailRowsParams& params, cudaStream_t stream);

// Each row's class, and the row's factors of the products: columns of hot ids, which entry_weights fills later, then what
// the row drops in group g if it is of class k, at g * kinds + k. With label smoothing there is one more kind, of which
// every row is.
struct TailClassesParams {
  const float* scores = nullptr;  // (N, anchors): products with the anchors
  int anchors = 0;                // at most kTailClasses
  int64_t n = 0;
  const float* a = nullptr;     // (N,)
  const float* d = nullptr;     // (N,)
  const float* mass = nullptr;  // (N, groups)
  int groups = 0;
  float scale = 1.0f;    // of mass * a: the logit scale
  float uniform = 0.0f;  // of d: what label smoothing spreads over a group, 0 without
  bool smoothing = false;
  const float* units = nullptr;  // (3,), by backward_sample
  Dtype dtype = Dtype::kBFloat16;
  void* factors = nullptr;  // (N, width): hot + groups * kinds columns, zeros up to the width
  int64_t ld = 0, hot = 0, width = 0;  // multiples of 8
  int64_t* classes = nullptr;          // (N,)
  const int64_t* rows = nullptr;       // (samples,)
  int samples = 0;
  void* member = nullptr;  // (kTailClasses, samples): 1 where a sampled row is of the class
};

cudaError_t tail_classes(const TailClassesParams& params, cudaStream_t stream);

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

// out[ids[i]] += product[i] * *unit
struct AddRowsParams {
  const float* product = nullptr;  // (count, width)
  const int64_t* ids = nullptr;    // (count,), all different
  const float* unit = nullptr;     // (1,)
  int64_t count = 0, width = 0;
  Dtype dtype = Dtype::kBFloat16;
  bool out_fp32 = false;
  void* out = nullptr;  // (rows, width)
  int64_t out_ld = 0;
};

cudaError_t add_rows(const AddRowsParams& params, cudaStream_t stream);

}  // namespace cce::cuda
