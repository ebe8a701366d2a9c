// Host launchers of the small kernels around the mainloop: the row order before it, target logits and the merge of the
// partials after it. A thread, eight or a warp a row; no atomics; fixed summation order.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/params.h"

namespace cce::cuda {

// Bytes of workspace that order_rows wants for n rows.
size_t order_rows_workspace(int64_t n);

// rows: (n,) row numbers, those whose target counts first; count: (1,). targets: (n,) int64.
cudaError_t order_rows(const int64_t* targets, int64_t n, int64_t ignore_index, int32_t* rows,
                       int32_t* count, void* workspace, size_t workspace_bytes,
                       cudaStream_t stream);

// to (n, from.cols rounded up to whole pieces) = the rows of `from` that count, in the order, and zeros up to the end of the
// last one's row block; nothing where all count. 16-bit elements.
cudaError_t compact_rows(const Matrix& from, const RowOrder& order, int64_t n, const Matrix& to,
                         cudaStream_t stream);

// What turns a row's probabilities into its logit gradients (core::RowGrad), and where the row and its target are.
struct alignas(16) RowGradient {
  float a = 0.0f, uniform = 0.0f, target_weight = 0.0f;
  float lse2 = 0.0f;    // lse in base 2
  int32_t row = -1;     // row number, -1: does not count
  int32_t target = -1;  // shard-local id, -1: not in this shard
  int32_t unused[2] = {0, 0};
};
static_assert(sizeof(RowGradient) == 32, "two 16-byte copies");

struct RowGradientParams {
  const float* dnll = nullptr;  // (N,) or null: 0
  const float* dlse = nullptr;  // (N,) or null: 0
  const float* lse = nullptr;   // (N,)
  const int64_t* targets = nullptr;
  RowOrder order;
  int64_t n = 0, shard_size = 0;
  core::LossOptions options;
  RowGradient* out = nullptr;  // (N,), by position in the row order
};

cudaError_t row_gradients(const RowGradientParams& params, cudaStream_t stream);

// A matrix with any strides, for the gather.
struct StridedMatrix {
  const void* data = nullptr;
  int64_t row_stride = 0, col_stride = 0, cols = 0;
};

// Whether all rows are whole pieces of 16 bytes, of 16-bit numbers.
inline bool in_pieces(const StridedMatrix& m) {
  return m.cols == 0 || (m.col_stride == 1 && m.cols % 8 == 0 && m.row_stride % 8 == 0 &&
                         reinterpret_cast<uintptr_t>(m.data) % 16 == 0);
}

// Rows of two matrices, one after the other, in 16 bits.
struct PickRowsParams {
  struct From {
    StridedMatrix matrix;
    bool fp32 = false;             // else of the dtype
    const int64_t* ids = nullptr;  // (count,)
    int64_t count = 0;
  };
  Dtype dtype = Dtype::kBFloat16;
  From from[2];
  void* out = nullptr;  // (counts, cols)
  int64_t cols = 0;
};

cudaError_t pick_rows(const PickRowsParams& params, cudaStream_t stream);

struct TargetLogitParams {
  Dtype dtype = Dtype::kBFloat16;
  StridedMatrix e, c, u, lora_b;
  bool lora_b_fp32 = false;     // rounded to the head's dtype, as the mainloop's is
  const float* bias = nullptr;  // (V,) or null
  const int64_t* targets = nullptr;
  RowOrder order;
  int64_t n = 0, shard_size = 0;
  core::LossOptions options;
  float* target_logit = nullptr;  // (N,), indexed by row
};

// The logit at each row's target, an fp32 dot product of two gathered rows; 0 where another shard holds the target, NaN
// where no shard does.
cudaError_t target_logits(const TargetLogitParams& params, cudaStream_t stream);

struct FinishParams {
  Partials partials;  // (splits, N)
  int64_t n = 0;
  int splits = 0;
  RowOrder order;
  core::LossOptions options;
  const float* target_logit = nullptr;  // (N,)
  // Outputs (N,), indexed by row; the last four may be null.
  float* nll = nullptr;
  float* lse = nullptr;
  float* logit_sum = nullptr;
  float* max_logit = nullptr;
  int64_t* argmax = nullptr;
  float* entropy = nullptr;
};

// Merges the partials in the order of their splits; ignored rows get zeros, argmax -1.
cudaError_t finish_rows(const FinishParams& params, cudaStream_t stream);

}  // namespace cce::cuda
