// Running statistics of the rows of a block, in shared memory: tiles are folded into them as they come, and at the end of a
// unit (one row block x one split) they become one partial a row. Columns may be dealt out to several groups of warps,
// each with states of its own; of a group, one warp owns a row, and in it one quad.
#pragma once

#include <type_traits>

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

// Lower bound of the lse, base 2, of the row at `position`; rows beyond the count have no mass.
__device__ __forceinline__ float row_bound(const Candidates& want, int position, int count) {
  return position < count ? __ldg(&want.starts[position].bound2) : INFINITY;
}

// Most that a row's sum over a tile may come to beside its reference.
constexpr float kMostSum = 0x1p100f;
// Least of a candidate, base 2: more than absent columns are.
constexpr float kLeastCut = 0.5f * kAbsentCapped;

// Folds a row of a tile (already masked) into its state. h: which row of the pair; scale: base-2 logits are scale * acc.
// In training, bound2: its row_bound; sink: where candidates go. There the reference of the exponentials is not the largest
// logit so far but the bound, so that no pass looks for the tile's maximum (but in Mode::kMetrics); nor is one needed to
// find candidates: columns behind a gate that add up to less than the threshold have none. Should a row lie so far above
// its bound that a sum leaves float's range, its reference becomes the tile's maximum, and the sums are made again.
template <Mode kMode, bool kTraining, typename Columns, int kElements, int kGroups, int kBlockM,
          typename Sink>
__device__ __forceinline__ void fold_row(const float (&acc)[kElements], int h,
                                         RowStates<kGroups, kBlockM>& s, int group, int row,
                                         float scale, int launch_col, int first_col,
                                         const LogitParams& p, const Partials& want, float bound2,
                                         float log2_eps, const Sink& sink) {
  constexpr bool kBounded = kTraining && kMode != Mode::kMetrics;
  constexpr int kGates = kTraining ? Sink::kGates : 1, kEach = kElements / 4 / kGates;
  const bool writer = threadIdx.x % 4 == 0;
  float top = 0.0f, max;
  if constexpr (kBounded) {
    max = fmaxf(s.max[group][row], bound2);
  } else {
    top = quad_max(thread_max(acc, h));
    if constexpr (kMode == Mode::kMetrics) {  // Of the columns that exist none may be a number.
      if (p.softcap != 0.0f && top == kAbsentCapped) top = -INFINITY;
    }
    max = fmaxf(s.max[group][row], top * scale);
  }
  const bool capped = kMode != Mode::kPlain && want.capped;
  const bool weighted = kMode == Mode::kMetrics && want.weighted;
  RowSums part;
  uint32_t open = 0;  // gates behind which there may be candidates
  // The state is read where it is needed: registers are for the accumulators.
  const auto rescale = [&] { return ptx::ex2(s.max[group][row] - finite_reference(max)); };
#pragma unroll 1
  for (bool again = false;; again = true) {
    const float reference = finite_reference(max);
    // What the unit has seen so far is a lower bound of the lse too.
    const float least = kBounded
                            ? fmaxf(ptx::ex2(bound2 - reference), s.sum[group][row] * rescale())
                            : ptx::ex2(fmaxf(bound2, s.max[group][row]) - reference);
    const float gate = least * ptx::ex2(log2_eps - kBoundMargin);
    part = {};
    open = 0;
    const auto look_behind = [&](int g, float sum) {
      if (kTraining && __any_sync(~0u, sum >= gate)) open |= 1u << g;
      part.sum += sum;
    };
    const auto add = [&](auto squares) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const RowSums behind = thread_sums<kMode == Mode::kMetrics, decltype(squares)::value>(
            acc, h, reference, g * kEach, (g + 1) * kEach);
        look_behind(g, behind.sum);
        part.squares += behind.squares;
        part.weighted += behind.weighted;
      }
    };
    if (capped) {
      add(std::true_type());
    } else if (weighted) {
      add(std::false_type());
    } else {
#pragma unroll
      for (int g = 0; g < kGates; ++g)
        look_behind(g, thread_sum_exp2(acc, h, scale, reference, g * kEach, (g + 1) * kEach));
    }
    part.sum = quad_sum(part.sum);
    if constexpr (!kBounded) break;
    const bool beyond = !(part.sum < kMostSum) || max == -INFINITY;  // or no number; or no bound
    if (again || !__any_sync(~0u, beyond)) break;
    const float largest = quad_max(thread_max(acc, h)) * scale;
    if (beyond) max = fmaxf(max, largest);
  }
  const float factor = rescale();
  const bool higher = max > s.max[group][row];
  __syncwarp();  // the whole quad has read the state before one lane writes it
  if (capped) {
    // Σ w softcap'(z), of 1 - (z / softcap)².
    const float slopes = fmaf(-p.inv_softcap * p.inv_softcap, quad_sum(part.squares), part.sum);
    if (writer) s.extra[group][row] = s.extra[group][row] * factor + slopes;
  } else if (kMode != Mode::kPlain && want.logit_sum) {
    const float sum = quad_sum(thread_logit_sum<Columns>(acc, h, first_col, p.cols));
    if (writer) s.extra[group][row] += sum;
  }
  if (weighted) {
    const int at = quad_min(thread_find<Columns>(acc, h, first_col, top));
    if (writer && higher) s.argmax[group][row] = at;
    const float sum = quad_sum(part.weighted);
    if (writer) s.weighted[group][row] = s.weighted[group][row] * factor + sum;
  }
  if (writer) {
    s.max[group][row] = max;
    s.sum[group][row] = s.sum[group][row] * factor + part.sum;
  }
  if constexpr (kTraining) {
    if (open == 0) return;
    __syncwarp();
    const float seen =
        kBounded ? finite_reference(max) + ptx::lg2(s.sum[group][row]) - kBoundMargin : max;
    const float cut = fmaxf(fmaxf(bound2, seen) + log2_eps, kLeastCut);
    const float to_logit = kMode == Mode::kPlain ? scale * kLn2 : 1.0f;
    emit_candidates<Columns>(acc, h, cut * ptx::rcp(scale), to_logit, launch_col + first_col, row,
                             open, sink);
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
