// The sm_80 forward: long-K product fused with the streaming logsumexp.
//
// Tile 128 x 256 x kBlockK, kStages slices in shared memory (sm80/mainloop.cuh has the pipeline and its barriers), eight
// warps that all load, multiply and run the epilogue; persistent, one block a multiprocessor, no atomics.
// Epilogue: each warp folds its 64 x 64 part into row states in shared memory that it alone owns (4 column groups x 128
// rows); at the end of a unit (one row block x one split) the block merges the four groups in fixed order and writes one
// partial per row. Shared memory: the pipeline, then RowStates. In training, entries that the sparse gradient may keep go
// to the row block's pool in device memory: one atomic a warp, row pair and tile that has any.
#pragma once

#include <cfloat>
#include <cstddef>

#include "cuda/common/epilogue.cuh"
#include "cuda/sm80/config.h"
#include "cuda/sm80/mainloop.cuh"

namespace cce::cuda::sm80 {

// [column group of warps][row of the block]. From logit_sum on, for the general kernel only.
template <typename Config>
struct RowStates {
  float max[Config::kWarpsN][Config::kBlockM];
  float sum[Config::kWarpsN][Config::kBlockM];
  float cut[Config::kBlockM];  // base-2 logit from which an entry is a candidate
  float logit_sum[Config::kWarpsN][Config::kBlockM];
  float weighted[Config::kWarpsN][Config::kBlockM];
  int argmax[Config::kWarpsN][Config::kBlockM];
  float capped[Config::kWarpsN][Config::kBlockM];
};

template <typename Config>
constexpr int forward_shared_bytes(bool general) {
  return Config::kPipelineBytes +
         (general ? sizeof(RowStates<Config>) : offsetof(RowStates<Config>, logit_sum));
}

template <typename Config>
__device__ __forceinline__ void reset_row(RowStates<Config>& s, int row, bool general) {
#pragma unroll
  for (int g = 0; g < Config::kWarpsN; ++g) {
    s.max[g][row] = -INFINITY;
    s.sum[g][row] = 0.0f;
    if (general) {
      s.logit_sum[g][row] = 0.0f;
      s.weighted[g][row] = 0.0f;
      s.argmax[g][row] = 0;
      s.capped[g][row] = 0.0f;
    }
  }
}

// The cuts of a row block's rows, one thread a row; rows beyond the count never have a candidate.
template <typename Config>
__device__ __forceinline__ void set_cut(RowStates<Config>& s, int row, const Candidates& want,
                                        const int32_t* row_order, int position, int count) {
  s.cut[row] =
      position < count ? __ldg(want.bound2 + row_order[position]) + want.log2_eps : INFINITY;
}

// Folds one m16 tile (already masked) of a warp into the states. scale: base-2 logits are scale * acc.
template <typename Config, bool kGeneral, bool kTraining, typename Columns>
__device__ __forceinline__ void fold_rows(const float (&acc)[Config::kAccumulators],
                                          RowStates<Config>& s, int group, int row, float scale,
                                          int row_block, int launch_col, int first_col,
                                          const LogitParams& p, const Partials& want,
                                          const Candidates& candidates) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + 8 * h;
    const float old = s.max[group][r];
    __syncwarp();  // the whole quad has read it before one lane writes it
    const float top = quad_max(thread_max(acc, h));
    const RowState tile{top * scale, 0.0f};
    const float max = fmaxf(old, tile.max), reference = finite_reference(max);
    const float sum = quad_sum(thread_sum_exp2(acc, h, scale, reference));
    const float rescale = ptx::ex2(old - reference);
    const bool writer = threadIdx.x % 4 == 0;
    if constexpr (kTraining) {
      // What the unit has seen so far is a lower bound of the lse too. Never -inf: absent columns are.
      const float cut = fmaxf(fmaxf(s.cut[r], max + candidates.log2_eps), -FLT_MAX);
      emit_candidates<Columns>(acc, h, top, cut / scale, scale / kLog2E, launch_col + first_col, r,
                               candidates.pool + row_block * candidates.capacity,
                               candidates.counts + row_block, candidates.capacity);
      if constexpr (kGeneral) {
        if (want.capped) {
          const float part = quad_sum(thread_capped(acc, h, reference, p.inv_softcap));
          if (writer) s.capped[group][r] = s.capped[group][r] * rescale + part;
        }
      }
    }
    if constexpr (kGeneral) {
      if (want.logit_sum) {
        const float part = quad_sum(thread_sum<Columns>(acc, h, first_col, p.cols));
        if (writer) s.logit_sum[group][r] += part;
      }
      if (want.weighted) {
        const float part = quad_sum(thread_weighted(acc, h, reference));
        const int at = quad_min(thread_find<Columns>(acc, h, first_col, top));
        if (writer) {
          s.weighted[group][r] = s.weighted[group][r] * rescale + part;
          if (tile.max > old) s.argmax[group][r] = at;
        }
      }
    }
    if (writer) {
      s.max[group][r] = max;
      s.sum[group][r] = s.sum[group][r] * rescale + sum;
    }
  }
}

// Merges a row's column groups and writes its partial.
template <typename Config, bool kGeneral>
__device__ __forceinline__ void write_partial(RowStates<Config>& s, int row, const Partials& out,
                                              int64_t at, int first_col, bool exists) {
  RowState total{s.max[0][row], s.sum[0][row]};
  float logit_sum = 0.0f, weighted = 0.0f, capped = 0.0f;
  int argmax = 0;
  if constexpr (kGeneral) {
    capped = s.capped[0][row];
    logit_sum = s.logit_sum[0][row];
    weighted = s.weighted[0][row];
    argmax = s.argmax[0][row];
  }
#pragma unroll
  for (int g = 1; g < Config::kWarpsN; ++g) {
    const RowState next{s.max[g][row], s.sum[g][row]};
    if constexpr (kGeneral) {
      const float reference = finite_reference(fmaxf(total.max, next.max));
      const float mine = ptx::ex2(total.max - reference), theirs = ptx::ex2(next.max - reference);
      weighted = weighted * mine + s.weighted[g][row] * theirs;
      capped = capped * mine + s.capped[g][row] * theirs;
      logit_sum += s.logit_sum[g][row];
      // Column groups interleave from tile to tile, so equal maxima are decided by the smaller id.
      const int other = s.argmax[g][row];
      if (next.max > total.max || (next.max == total.max && other < argmax)) argmax = other;
    }
    total = merge(total, next);
  }
  if (!exists) return;
  out.max_sum[at] = make_float2(total.max, total.sum);
  if constexpr (kGeneral) {
    if (out.logit_sum) out.logit_sum[at] = logit_sum;
    if (out.capped) out.capped[at] = capped;
    if (out.weighted) {
      out.weighted[at] = weighted;
      out.argmax[at] = first_col + argmax;
    }
  }
}

// kTraining: look for candidates.
template <typename T, typename Config, bool kGeneral, bool kTraining>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_mainloop(const __grid_constant__ Work work, const LogitParams logits,
                     const Partials out, const Candidates candidates, int64_t ld, int first_col) {
  extern __shared__ __align__(128) uint8_t shared[];
  auto& states = *reinterpret_cast<RowStates<Config>*>(shared + Config::kPipelineBytes);
  const int count = __ldg(work.row_count);
  const int row_blocks = (count + Config::kBlockM - 1) / Config::kBlockM;
  Cursor<Config> at(work, row_blocks);
  if (at.done()) return;
  Mainloop<T, Config> mainloop(work, shared, row_blocks);
  const auto start_row = [&](int row_block) {
    reset_row(states, threadIdx.x, kGeneral);
    if constexpr (kTraining) {
      set_cut(states, threadIdx.x, candidates, work.row_order,
              row_block * Config::kBlockM + static_cast<int>(threadIdx.x), count);
    }
  };
  if (threadIdx.x < Config::kBlockM) start_row(at.row_block);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / Config::kWarpsM;
  const int warp_row = warp % Config::kWarpsM * Config::kWarpM + lane / 4;
  const float scale = kGeneral ? kLog2E : logits.logit_scale * kLog2E;
  using Columns = typename Mainloop<T, Config>::Columns;
  typename Mainloop<T, Config>::Accumulators acc;
  while (!at.done()) {
    mainloop.multiply(acc);
    const int first = at.tile * Config::kBlockN + group * Config::kWarpN + Columns::first();
    const bool ragged = (at.tile + 1) * Config::kBlockN > logits.cols;
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) {
      if constexpr (kGeneral) {
        make_logits<Columns>(acc[m], logits, first, -INFINITY);
      } else if (ragged) {
        mask_columns<Columns>(acc[m], first, logits.cols, -INFINITY);
      }
      fold_rows<Config, kGeneral, kTraining, Columns>(acc[m], states, group, warp_row + 16 * m,
                                                      scale, at.row_block, first_col, first, logits,
                                                      out, candidates);
    }
    const int row_block = at.row_block;
    const int64_t split = at.split;
    if (at.next_tile(work)) {
      __syncthreads();
      if (threadIdx.x < Config::kBlockM) {
        const int position = row_block * Config::kBlockM + threadIdx.x;
        write_partial<Config, kGeneral>(states, threadIdx.x, out, split * ld + position, first_col,
                                        position < count);
        start_row(at.row_block);
      }
      // The next tile's mainloop has a barrier before anybody folds into the cleared rows.
    }
  }
  ptx::cp_async_wait<0>();
}

}  // namespace cce::cuda::sm80
