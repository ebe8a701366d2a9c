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

// The rows of a call in the order in which they are worked on: rows that count first, ascending, ignored rows after them.
struct RowOrder {
  const int32_t* rows = nullptr;   // (N,) row numbers
  const int32_t* count = nullptr;  // (1,) how many rows count
};

// Ids of a vocabulary group, over which the sparse gradient keeps each row's mass: a whole number of column tiles of every
// architecture. A split never crosses a group's end. cce_ext/sparse/tail.py has the same number.
constexpr int kGroupCols = 4608;

// The long-K product z = [E, U] [C, B]ᵀ over one stretch of the vocabulary.
struct Head {
  Dtype dtype = Dtype::kBFloat16;
  Matrix e, c;       // (N, D), (cols, D)
  Matrix u, lora_b;  // (N, R), (cols, R); no rows without a low-rank head
  // E and U with their rows in the order, filled where not all rows count. No data: rows are gathered where they are read.
  Matrix e_compact, u_compact;
  const float* bias = nullptr;  // (cols,) or null
  int64_t first_col = 0;        // shard-local id of c's first row
  RowOrder order;
  core::LossOptions options;
};

// Per-row partial results of one vocabulary split, arrays (splits, N), indexed by position in the row order. max: of the split's
// logits the largest one, base 2, or in training another reference near the lse.
struct Partials {
  float2* max_sum = nullptr;   // lse = (max + log2(sum)) ln 2
  float* logit_sum = nullptr;  // Σ z, null unless label smoothing
  float* weighted = nullptr;   // Σ 2^(z log2(e) - max) z, null unless metrics
  int32_t* argmax = nullptr;   // shard-local id, null unless metrics
  float* capped =
      nullptr;  // Σ 2^(z log2(e) - max) softcap'(z), null unless training with a softcap
};

// What the training forward knows of a row beforehand.
struct alignas(8) RowStart {
  float bound2;  // a lower bound of the row's lse, base 2
  int32_t slot;  // of the sample, -1: not sampled
};

// Where the training forward puts entries that the sparse gradient may keep, pooled over the rows of a row block, and the
// logits of sampled rows, a byte each (cuda/common/levels.cuh).
struct Candidates {
  const RowStart* starts = nullptr;  // (N,), by position in the row order
  float log2_eps = 0.0f;             // of the threshold
  uint2* pool = nullptr;  // (row blocks, capacity): {shard-local id | row in block << 25, logit}
  int32_t* counts = nullptr;  // (row blocks,) candidates found, until they were too many
  int64_t capacity = 0;       // entries a row block
  uint8_t* levels = nullptr;  // (slots, ld_levels), see cuda/common/levels.cuh
  int64_t ld_levels = 0;      // a multiple of kLevelCols
};
// Rows of a row block: of the forward's tile on every architecture, and of what shares a pool and a list.
constexpr int kRowBlock = 128;
// Columns whose levels a quad writes together.
constexpr int kLevelCols = 32;
// Bits of the id in a candidate; the others number the rows of a block.
constexpr int kCandidateIdBits = 25;

// Steps that blocks keep account of, so that they stay together (cuda/sm90/pace.cuh).
constexpr int kPaceSteps = 64;

struct ForwardParams {
  Head head;
  Partials partials;        // of this launch: its first split is row 0
  Candidates candidates;    // no pool: none are looked for
  int64_t n = 0;            // leading dimension of the partials
  int tiles_per_split = 1;  // column tiles that share one partial
  int32_t* pace = nullptr;  // (kPaceSteps,): workspace
};

struct BackwardParams {
  Head head;
  const RowGradient* rows = nullptr;  // (N,), by position in the row order
  void* dlogits = nullptr;            // (N, ld_dlogits), the head's dtype
  int64_t ld_dlogits = 0;             // multiple of 8
  int64_t n = 0;
};

// One gradient, to which rows are added. No data: not wanted.
struct Gradient {
  void* data = nullptr;  // (N or cols, width), of the head's dtype or float
  int64_t ld = 0, width = 0;
  bool fp32 = false;
};

// The exact gradients of a list of rows whose length only the device knows. The head's row order is the list.
struct ExactRowsParams {
  Head head;
  const RowGradient* rows = nullptr;  // (N,), by position in the list
  int64_t n = 0;                      // longest possible list
  Gradient de, du;                    // rows of the list are overwritten
  Gradient dc, dlora_b;               // are added to
  float* dbias = nullptr;             // (cols,), is added to
  // B in float32, lora_b32_ld apart, or null: then the head's lora_b, which has no data, is made of it, a stretch of
  // columns at a time.
  const float* lora_b32 = nullptr;
  int64_t lora_b32_ld = 0;
  void* workspace = nullptr;  // exact_rows_workspace bytes
};

// Rows and columns of logit gradients that exist at a time.
constexpr int kExactRows = 2048, kExactCols = 8192;
constexpr int64_t kExactBarrierBytes = 256;

// The workspace: a counter, the fp32 sums of that many rows of dE, then of dU, then the logit gradients and kExactCols rows
// of B, lora_b_ld apart, both of which are copied 16 bytes at a time.
constexpr int64_t rows_at_a_time(int64_t n) { return n < kExactRows ? n : kExactRows; }
constexpr int64_t exact_sums(int64_t n, int64_t row_widths) {
  return (rows_at_a_time(n) * row_widths + 3) / 4 * 4;
}
inline int64_t exact_rows_workspace(int64_t n, int64_t row_widths, int64_t lora_b_ld) {
  return kExactBarrierBytes + 2 * (rows_at_a_time(n) + lora_b_ld) * kExactCols +
         4 * exact_sums(n, row_widths);
}

}  // namespace cce::cuda
