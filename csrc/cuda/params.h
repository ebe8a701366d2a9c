// One call on a GPU in plain numbers: what the host launchers take. Pointers are device memory; strides are in elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/params.h"

namespace cce::cuda {

struct RowGradient;  // cuda/common/rows.h

enum class Dtype { kBFloat16, kHalf };

// A row-major matrix whose rows start at multiples of 16 bytes. Columns beyond `cols` (to the next multiple of 8) are
// never read as data.
struct Matrix {
  const void* data = nullptr;  // (rows, cols)
  int64_t ld = 0;              // distance of two rows
  int64_t rows = 0, cols = 0;
};

// The rows of a call in the order in which they are worked on: rows that count first, ignored rows after them.
struct RowOrder {
  const int32_t* rows = nullptr;   // (N,) row numbers
  const int32_t* count = nullptr;  // (1,) how many rows count
};

// The long-K product z = [E, U] [C, B]ᵀ over one stretch of the vocabulary.
struct Head {
  Dtype dtype = Dtype::kBFloat16;
  Matrix e, c;                  // (N, D), (cols, D)
  Matrix u, lora_b;             // (N, R), (cols, R); no rows without a low-rank head
  const float* bias = nullptr;  // (cols,) or null
  int64_t first_col = 0;        // shard-local id of c's first row
  RowOrder order;
  core::LossOptions options;
};

// Per-row partial results of one vocabulary split, arrays (splits, N), indexed by position in the row order.
struct Partials {
  float2* max_sum = nullptr;   // base 2: lse = (max + log2(sum)) ln 2
  float* logit_sum = nullptr;  // Σ z, null unless label smoothing
  float* weighted = nullptr;   // Σ 2^(z log2(e) - max) z, null unless metrics
  int32_t* argmax = nullptr;   // shard-local id, null unless metrics
};

struct ForwardParams {
  Head head;
  Partials partials;        // of this launch: its first split is row 0
  int64_t n = 0;            // leading dimension of the partials
  int tiles_per_split = 1;  // column tiles that share one partial
};

struct BackwardParams {
  Head head;
  const RowGradient* rows = nullptr;  // (N,), by position in the row order
  void* dlogits = nullptr;            // (N, ld_dlogits), the head's dtype
  int64_t ld_dlogits = 0;             // multiple of 8
  int64_t n = 0;
};

}  // namespace cce::cuda
