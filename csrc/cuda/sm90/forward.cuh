// The sm_90 forward: long-K product fused with the streaming logsumexp.
//
// Tile 128 x 192 x 64, 5 stages, warp roles and barriers: sm90/mainloop.cuh. Shared memory: the pipeline and its barriers,
// then RowStates of 128 rows, in training also 24 KB of candidates of four warps. Epilogue: a warp owns 32 rows of each
// tile, the same ones in both warpgroups, and folds them into the states, whose turn the memory barriers pass on; so a
// unit's tiles are added in order, and at its end the warpgroup that had the last tile writes one partial a row and clears
// the states. The halves of the accumulators go through one copy of the code. In training, entries that the sparse gradient
// may keep go to the row block's pool in device memory, by way of the warp's candidates in shared memory, and the logits of
// sampled rows straight to theirs, a byte each.
#pragma once

#include "cuda/common/levels.cuh"
#include "cuda/common/row_states.cuh"
#include "cuda/ptx/special.cuh"
#include "cuda/sm90/mainloop.cuh"

namespace cce::cuda::sm90 {

using States = RowStates<1, Config::kBlockM>;

constexpr int kBufferedCandidates = 768;  // a warp
constexpr int kGates = 4;                 // a vote passes over a quarter of a thread's columns
using Buffers = CandidateBuffers<4, kBufferedCandidates>;

constexpr int kStatesAt = Config::kPipelineBytes + Config::kBarrierBytes;
constexpr int kBuffersAt = kStatesAt + sizeof(States);
static_assert(Config::kBlockM == kRowBlock);
static_assert(kStatesAt % 16 == 0 && kBuffersAt % 16 == 0);

constexpr int forward_shared_bytes(bool training) {
  return kBuffersAt + (training ? sizeof(Buffers) : 0);
}

// kTraining: look for candidates.
template <typename T, Mode kMode, bool kTraining>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_mainloop(const __grid_constant__ GroupWork work, const __grid_constant__ Maps maps,
                     const __grid_constant__ LogitParams logits,
                     const __grid_constant__ Partials out,
                     const __grid_constant__ Candidates candidates, int64_t ld, int first_col) {
  extern __shared__ __align__(Config::kAlignment) uint8_t shared[];
  auto& states = *reinterpret_cast<States*>(shared + kStatesAt);
  auto& buffers = *reinterpret_cast<Buffers*>(shared + kBuffersAt);  // training alone
  const int count = __ldg(work.row_count);
  const auto prepare = [&] {
    if (threadIdx.x < Config::kBlockM) reset_row(states, threadIdx.x);
    if (kTraining && threadIdx.x < 4) buffers.count[threadIdx.x] = 0;
  };
  const float scale = kMode != Mode::kPlain ? kLog2E : logits.logit_scale * kLog2E;
  using Sink = CandidateSink<4, kBufferedCandidates, kGates, Config::kAccumulators / 4 / kGates>;

  const auto epilogue = [&](float (&acc)[Config::kMmaM][Config::kAccumulators], const Cursor& at) {
    if (!at.tile_exists()) return;
    const int first = at.tile * Config::kBlockN + PairedColumns::first();
    const bool ragged = (at.tile + 1) * Config::kBlockN > logits.cols;
    // What follows from the thread's number is made anew where it is used, so that it takes no register in between.
    const auto first_row = [] {
      const int thread = ptx::thread_again() % 128;
      return thread / 32 * 16 + thread % 32 / 4;
    };
    const auto sink = [&]() -> Sink {
      const int thread = ptx::thread_again() % 128;
      return {buffers, thread / 32, thread % 32, candidates, at.row_block};
    };
    const float log2_eps = kTraining ? least_share(candidates, at.row_block, count) : 0.0f;
#pragma unroll 1
    for (int m = 0; m < Config::kMmaM; ++m) {
      if constexpr (kMode != Mode::kPlain) {
        make_logits<PairedColumns, false>(acc[0], logits, first, absent_logit(logits));
      } else if (ragged) {
        mask_columns<PairedColumns>(acc[0], first, logits.cols, -INFINITY);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row() + 64 * m + 8 * h;
        float bound = 0.0f;
        if constexpr (kTraining)
          bound = row_bound(candidates, at.row_block * Config::kBlockM + row, count);
        fold_row<kMode, kTraining, PairedColumns>(acc[0], h, states, 0, row, scale, first_col,
                                                  first, logits, out, bound, log2_eps, sink());
        if constexpr (kTraining)
          write_levels<PairedColumns>(acc[0], h, candidates,
                                      at.row_block * Config::kBlockM + first_row() + 64 * m + 8 * h,
                                      count, scale, first_col + at.tile * Config::kBlockN);
      }
#pragma unroll
      for (int i = 0; i < Config::kAccumulators; ++i) acc[0][i] = acc[1][i];
    }
    if (!at.last_of_unit()) return;
    if constexpr (kTraining) sink().flush();
    // Each row's quad has just written its state: its first lane goes on with it.
    __syncwarp();
    if (threadIdx.x % 4 != 0) return;
#pragma unroll 1
    for (int i = 0; i < 2 * Config::kMmaM; ++i) {
      const int row = first_row() + 64 * (i / 2) + 8 * (i % 2);
      const int position = at.row_block * Config::kBlockM + row;
      write_partial<kMode>(states, row, out, int64_t{at.split()} * ld + position, first_col,
                           position < count);
      reset_row(states, row);
    }
  };
  run_block<T>(work, maps, shared, count, kMode != Mode::kPlain ? logits.bias : nullptr, prepare,
               epilogue);
}

}  // namespace cce::cuda::sm90
