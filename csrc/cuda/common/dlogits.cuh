// The epilogue of the backward's recompute: logits become what the matmuls over them want, 16 bit, in device memory.
#pragma once

#include "cuda/common/convert.cuh"
#include "cuda/common/epilogue.cuh"
#include "cuda/common/work.cuh"

namespace cce::cuda {

// What the epilogue serves: calls where only a positive factor lies between product and logit; bias, softcap, label
// smoothing and any scale.
enum class Epilogue { kPlain, kGeneral };

// Stands for the logit of a column that does not exist: its output is never used, but may be multiplied by zero, so it must
// be finite; softcap' of -inf is not.
constexpr float kAbsentLogit = 0.0f;

// Where the epilogue writes.
template <typename T>
struct DlogitsOut {
  T* dlogits;
  int64_t ld;
  bool compact;  // rows by position in the order; else at their original places
};

// Rows that do not count: zeros, so that the matmuls over G can take all rows.
template <typename T>
__device__ __forceinline__ void clear_ignored_rows(const Work& work, int count, T* dlogits,
                                                   int64_t ld) {
  const int64_t pieces = ld / 8;
  for (int position = count + blockIdx.x; position < work.n; position += gridDim.x) {
    uint4* row = reinterpret_cast<uint4*>(dlogits + work.row_order[position] * ld);
    for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x) row[i] = make_uint4(0, 0, 0, 0);
  }
}

// One row of the pair, in place: raw products (kPlain) or logits become the output. first_col: shard-local id of the
// launch's first column; first: this thread's first column in the launch; scale: base-2 logits are scale * acc (kPlain).
template <Epilogue kEpilogue, typename Columns, int kElements>
__device__ __forceinline__ void logits_to_output(float (&acc)[kElements], int h,
                                                 const RowGradient& row, const LogitParams& logits,
                                                 float scale, int first_col, int first) {
  const int target = row.target < 0 ? -1 : row.target - first_col;
  if constexpr (kEpilogue == Epilogue::kGeneral) {
    logits_to_gradients<Columns>(acc, h, row, target, logits, first);
  } else {
    products_to_gradients<Columns>(acc, h, row.a * logits.logit_scale,
                                   row.target_weight * logits.logit_scale, row.lse2, scale, target,
                                   first);
  }
}

}  // namespace cce::cuda
