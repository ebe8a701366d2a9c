// Running statistics of the rows of a block, in shared memory: tiles are folded into them as they come, and at the end of a
// unit (one row block x one split) they become one partial a row. Columns may be dealt out to several groups of warps,
// each with states of its own; of a group, one warp owns a row, and in it one quad.
#pragma once

#include <cfloat>

#include "cuda/common/candidates.cuh"
#include "cuda/common/epilogue.cuh"

namespace cce::cuda {

// [column group of warps][row of the block]. From extra on, used beyond Mode::kPlain alone.
template <int kGroups, int kBlockM>
struct RowStates {
  float max[kGroups][kBlockM];
  float sum[kGroups][kBlockM];
  float extra[kGroups][kBlockM];  // Partials::capped or logit_sum: no call wants both
  float weighted[kGroups][kBlockM];
  int argmax[kGroups][kBlockM];
};

template <int kGroups, int kBlockM>
__device__ __forceinline__ void reset_row(RowStates<kGroups, kBlockM>& s, int row) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    s.max[g][row] = -INFINITY;
    s.sum[g][row] = 0.0f;
    s.extra[g][row] = 0.0f;
    s.weighted[g][row] = 0.0f;
    s.argmax[g][row] = 0;
  }
}

// Base-2 logit from which an entry of the row at `position` is a candidate; rows beyond the count have none.
__device__ __forceinline__ float row_cut(const Candidates& want, const int32_t* row_order,
                                         int position, int count) {
  return position < count ? __ldg(want.bound2 + __ldg(row_order + position)) + want.log2_eps
                          : INFINITY;
}

// Folds a row of a tile (already masked) into its state. h: which row of the pair; scale: base-2 logits are scale * acc;
// bound_cut: its row_cut in training; sink: where candidates go.
template <Mode kMode, bool kTraining, typename Columns, int kElements, int kGroups, int kBlockM,
          typename Sink>
__device__ __forceinline__ void fold_row(const float (&acc)[kElements], int h,
                                         RowStates<kGroups, kBlockM>& s, int group, int row,
                                         float scale, int launch_col, int first_col,
                                         const LogitParams& p, const Partials& want,
                                         float bound_cut, float log2_eps, const Sink& sink) {
  const float old = s.max[group][row];
  __syncwarp();  // the whole quad has read it before one lane writes it
  const float top = quad_max(thread_max(acc, h));
  const RowState tile{top * scale, 0.0f};
  const float max = fmaxf(old, tile.max), reference = finite_reference(max);
  const bool writer = threadIdx.x % 4 == 0;
  const auto note_argmax = [&] {
    if (kMode != Mode::kMetrics || !want.weighted) return;
    const int at = quad_min(thread_find<Columns>(acc, h, first_col, top));
    if (writer && tile.max > old) s.argmax[group][row] = at;
  };
  // Here or below: where it costs the kernel no spilled register.
  if constexpr (kTraining) note_argmax();
  RowSums part;
  bool more = false;
  if constexpr (kMode != Mode::kPlain)
    more = want.logit_sum || want.capped || (kMode == Mode::kMetrics && want.weighted);
  if (more)
    part = thread_sums<Columns, kMode == Mode::kMetrics>(acc, h, reference, want.capped,
                                                         p.inv_softcap, first_col, p.cols);
  else
    part.sum = thread_sum_exp2(acc, h, scale, reference);
  const float sum = quad_sum(part.sum), rescale = ptx::ex2(old - reference);
  if (more) {
    const float extra = quad_sum(part.extra);
    if (writer) s.extra[group][row] = s.extra[group][row] * (want.capped ? rescale : 1.0f) + extra;
  }
  if constexpr (!kTraining) note_argmax();
  if (kMode == Mode::kMetrics && want.weighted) {
    const float weighted = quad_sum(part.weighted);
    if (writer) s.weighted[group][row] = s.weighted[group][row] * rescale + weighted;
  }
  if (writer) {
    s.max[group][row] = max;
    s.sum[group][row] = s.sum[group][row] * rescale + sum;
  }
  if constexpr (kTraining) {
    // What the unit has seen so far is a lower bound of the lse too. Never -inf: absent columns are.
    const float cut = fmaxf(fmaxf(bound_cut, max + log2_eps), -FLT_MAX);
    emit_candidates<Columns>(acc, h, top, cut / scale, scale / kLog2E, launch_col + first_col, row,
                             sink);
  }
}

// Merges a row's column groups and writes its partial.
template <Mode kMode, int kGroups, int kBlockM>
__device__ __forceinline__ void write_partial(RowStates<kGroups, kBlockM>& s, int row,
                                              const Partials& out, int64_t at, int first_col,
                                              bool exists) {
  RowState total{s.max[0][row], s.sum[0][row]};
  float extra = s.extra[0][row], weighted = s.weighted[0][row];
  int argmax = s.argmax[0][row];
#pragma unroll
  for (int g = 1; g < kGroups; ++g) {
    const RowState next{s.max[g][row], s.sum[g][row]};
    if constexpr (kMode != Mode::kPlain) {
      const float reference = finite_reference(fmaxf(total.max, next.max));
      const float mine = ptx::ex2(total.max - reference), theirs = ptx::ex2(next.max - reference);
      weighted = weighted * mine + s.weighted[g][row] * theirs;
      extra = out.capped ? extra * mine + s.extra[g][row] * theirs : extra + s.extra[g][row];
      // Column groups interleave from tile to tile, so equal maxima are decided by the smaller id.
      const int other = s.argmax[g][row];
      if (next.max > total.max || (next.max == total.max && other < argmax)) argmax = other;
    }
    total = merge(total, next);
  }
  if (!exists) return;
  out.max_sum[at] = make_float2(total.max, total.sum);
  if constexpr (kMode != Mode::kPlain) {
    if (out.logit_sum) out.logit_sum[at] = extra;
    if (out.capped) out.capped[at] = extra;
    if (kMode == Mode::kMetrics && out.weighted) {
      out.weighted[at] = weighted;
      out.argmax[at] = first_col + argmax;
    }
  }
}

}  // namespace cce::cuda
