// The CPU path's row kernels. They see one block of raw products E Cᵀ (+ U Bᵀ), made by PyTorch's matmul, and never the
// whole N x V: the forward folds the block into per-row statistics, the backward turns it into logit gradients in place.
// Z is the block's storage type (float, double or BF16), A the arithmetic type (float, or double for double).
#pragma once

#include <cstdint>

#include "core/loss_math.h"
#include "cpu/vec_math.h"

namespace cce::cpu {

// Columns handled at a time inside a row: a scratch row of this many A stays in the first-level cache.
constexpr int64_t kRowTile = 2048;

// The numbers of LossOptions in the arithmetic type, with what the loops want precomputed.
template <typename A>
struct LogitTransform {
  const A* bias = nullptr;  // (cols,) of this block, or null
  A logit_scale = 1;
  A softcap = 0;  // 0: none
  A inv_softcap = 0;
};

// Running statistics of the valid rows; arrays are (rows,), null where not wanted.
template <typename A>
struct RowStats {
  A* max = nullptr;           // running maximum of z
  A* sum = nullptr;           // Σ exp(z - max)
  A* target_logit = nullptr;  // z at the target
  A* logit_sum = nullptr;     // Σ z, for label smoothing
  A* weighted = nullptr;      // Σ exp(z - max) z, for the entropy
  int64_t* argmax = nullptr;  // shard-local id of the maximum
};

template <typename Z>
struct Block {
  Z* z = nullptr;  // (rows, cols), row stride ld
  int64_t ld = 0;
  int64_t cols = 0;
  int64_t first_col = 0;  // shard-local id of column 0
};

// Folds rows [begin, end) of the block into stats. targets: shard-local target of each row, or -1 where not in the shard.
template <typename Z, typename A>
void update_stats(const Block<Z>& block, const LogitTransform<A>& transform, const int64_t* targets,
                  int64_t begin, int64_t end, const RowStats<A>& stats);

// Overwrites rows [begin, end) of the block with G (see loss_math.h). lse, grads: (rows,).
template <typename Z, typename A>
void logits_to_gradients(const Block<Z>& block, const LogitTransform<A>& transform,
                         const int64_t* targets, const A* lse, const core::RowGrad<A>* grads,
                         int64_t begin, int64_t end);

// acc += part, elementwise over n numbers.
void accumulate(float* acc, const BF16* part, int64_t n);

}  // namespace cce::cpu
