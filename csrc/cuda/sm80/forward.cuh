// The sm_80 forward: long-K product fused with the streaming logsumexp.
//
// Tile 128 x kBlockN x kBlockK, kStages slices in shared memory (sm80/mainloop.cuh has the pipeline and its barriers), eight
// warps that all load, multiply and run the epilogue; persistent, one block a multiprocessor, no atomics.
// Epilogue: each warp folds its 64 x kWarpN part into row states in shared memory that it alone owns (4 column groups x 128
// rows); at the end of a unit (one row block x one split) the block merges the four groups in fixed order and writes one
// partial per row. Shared memory: the pipeline, then RowStates, in training also 6 KB of candidates. In training, entries
// that the sparse gradient may keep go to the row block's pool in device memory, by way of the warp's candidates in
// shared memory, and the logits of sampled rows straight to theirs, a byte each.
#pragma once

#include "cuda/common/levels.cuh"
#include "cuda/common/row_states.cuh"
#include "cuda/sm80/config.h"
#include "cuda/sm80/mainloop.cuh"

namespace cce::cuda::sm80 {

template <typename Config>
using States = RowStates<Config::kWarpsN, Config::kBlockM>;

constexpr int kBufferedCandidates = 96;  // a warp: what is left on an A100
constexpr int kGates = 4;                // a vote passes over a quarter of a thread's columns
template <typename Config>
using Buffers = CandidateBuffers<Config::kWarps, kBufferedCandidates>;

template <typename Config>
constexpr int forward_shared_bytes(bool training) {
  return Config::kSharedBytes + sizeof(States<Config>) + (training ? sizeof(Buffers<Config>) : 0);
}

// kTraining: look for candidates.
template <typename T, typename Config, Mode kMode, bool kTraining>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_mainloop(const __grid_constant__ Work work, const LogitParams logits,
                     const Partials out, const Candidates candidates, int64_t ld, int first_col) {
  static_assert(Config::kBlockM == kRowBlock);
  if constexpr (!Config::kCompiled) return;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& states = *reinterpret_cast<States<Config>*>(shared + Config::kSharedBytes);
  auto& buffers = *reinterpret_cast<Buffers<Config>*>(&states + 1);  // training alone
  if (kTraining && threadIdx.x < Config::kWarps) buffers.count[threadIdx.x] = 0;
  const int count = __ldg(work.row_count);
  const int row_blocks = (count + Config::kBlockM - 1) / Config::kBlockM;
  using Places = Parking<Config>;
  {
    const Cursor start(work, row_blocks);
    if (start.done()) return;
    Places::put(shared, Places::kEpilogue, start);
  }
  Mainloop<T, Config> mainloop(work, shared, row_blocks);
  if (threadIdx.x < Config::kBlockM) reset_row(states, threadIdx.x);

  const float scale = kMode != Mode::kPlain ? kLog2E : logits.logit_scale * kLog2E;
  using Columns = typename Mainloop<T, Config>::Columns;
  typename Mainloop<T, Config>::Accumulators acc;
  while (true) {
    mainloop.multiply(acc);
    const int thread = ptx::thread_again(), warp = thread / 32;
    const int group = warp / Config::kWarpsM;
    const int warp_row = warp % Config::kWarpsM * Config::kWarpM + thread % 32 / 4;
    const Cursor here = Places::get(shared, Places::kEpilogue, work, row_blocks);
    const int first = here.tile * Config::kBlockN + group * Config::kWarpN + Columns::first(thread);
    const bool ragged = (here.tile + 1) * Config::kBlockN > logits.cols;
    const CandidateSink<Config::kWarps, kBufferedCandidates, kGates, 1> sink{
        buffers, warp, thread % 32, candidates, here.row_block};
    const float log2_eps = kTraining ? least_share(candidates, here.row_block, count) : 0.0f;
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) {
      if constexpr (kMode != Mode::kPlain) {
        make_logits<Columns, true>(acc[m], logits, first, absent_logit(logits));
      } else if (ragged) {
        mask_columns<Columns>(acc[m], first, logits.cols, -INFINITY);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 16 * m + 8 * h;
        float bound = 0.0f;
        if constexpr (kTraining)
          bound = row_bound(candidates, here.row_block * Config::kBlockM + row, count);
        fold_row<kMode, kTraining, Columns>(acc[m], h, states, group, row, scale, first_col, first,
                                            logits, out, bound, log2_eps, sink);
        if constexpr (kTraining)
          write_levels<Columns>(acc[m], h, candidates, here.row_block * Config::kBlockM + row,
                                count, scale,
                                first_col + here.tile * Config::kBlockN + group * Config::kWarpN);
      }
    }
    // Read again: registers are short in the loops above.
    Cursor at = Places::get(shared, Places::kEpilogue, work, row_blocks);
    const int row_block = at.row_block;
    const int64_t split = at.split();
    const bool ends = at.next_tile();
    Places::put(shared, Places::kEpilogue, at);
    if (ends) {
      if constexpr (kTraining) sink.flush();
      __syncthreads();
      if (thread < Config::kBlockM) {
        const int position = row_block * Config::kBlockM + thread;
        write_partial<kMode>(states, thread, out, split * ld + position, first_col,
                             position < count);
        reset_row(states, thread);
      }
      // The next tile's mainloop has a barrier before anybody folds into the cleared rows.
    }
    if (at.done()) break;
  }
  mainloop.finish();
}

}  // namespace cce::cuda::sm80
