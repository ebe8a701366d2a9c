// The sm_90 forward: long-K product fused with the streaming logsumexp.
//
// Tile 128 x 192 x 64, 5 stages, warp roles and barriers: sm90/mainloop.cuh. Shared memory: the pipeline and its barriers,
// then RowStates of 128 rows, in training also 23 KB of candidates of four warps. Epilogue: a warp owns 32 rows of each tile, the same ones in both warpgroups, and folds them
// into the states, whose turn the named barriers pass on; so a unit's tiles are added in order, and at its end the
// warpgroup that had the last tile writes one partial a row and clears the states. The halves of the accumulators go
// through one copy of the code. In training, entries that the sparse gradient may keep go to the row block's pool in device
// memory, by way of the warp's candidates in shared memory.
#pragma once

#include "cuda/common/row_states.cuh"
#include "cuda/sm90/mainloop.cuh"

namespace cce::cuda::sm90 {

using States = RowStates<1, Config::kBlockM>;

constexpr int kBufferedCandidates = 744;  // a warp: what is left of the shared memory
using Buffers = CandidateBuffers<4, kBufferedCandidates>;

constexpr int kStatesAt = Config::kPipelineBytes + Config::kBarrierBytes;
constexpr int kBuffersAt = kStatesAt + sizeof(States);
static_assert(kStatesAt % 16 == 0 && kBuffersAt % 16 == 0);

constexpr int forward_shared_bytes(bool training) {
  return kBuffersAt + (training ? sizeof(Buffers) : 0);
}

// kGeneral: logits with bias, softcap or any scale, label smoothing, metrics. kTraining: look for candidates.
template <typename T, bool kGeneral, bool kTraining>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_mainloop(const __grid_constant__ Work work, const __grid_constant__ Maps maps,
                     const __grid_constant__ LogitParams logits,
                     const __grid_constant__ Partials out,
                     const __grid_constant__ Candidates candidates, int64_t ld, int first_col) {
  extern __shared__ __align__(Config::kAlignment) uint8_t shared[];
  auto& states = *reinterpret_cast<States*>(shared + kStatesAt);
  auto& buffers = *reinterpret_cast<Buffers*>(shared + kBuffersAt);  // training alone
  const int count = __ldg(work.row_count);
  const auto start_row = [&](int row, int row_block) {
    reset_row(states, row, kGeneral);
    if constexpr (kTraining) {
      set_cut(states, row, candidates, work.row_order, row_block * Config::kBlockM + row, count);
    }
  };
  const auto prepare = [&] {
    const Cursor at(work, (count + Config::kBlockM - 1) / Config::kBlockM);
    if (threadIdx.x < Config::kBlockM) start_row(threadIdx.x, at.row_block);
    if (kTraining && threadIdx.x < 4) buffers.count[threadIdx.x] = 0;
  };
  const float scale = kGeneral ? kLog2E : logits.logit_scale * kLog2E;
  const int warp_row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;

  const auto epilogue = [&](float (&acc)[Config::kMmaM][Config::kAccumulators], const Cursor& at) {
    const int first = at.tile * Config::kBlockN + PairedColumns::first();
    const bool ragged = (at.tile + 1) * Config::kBlockN > logits.cols;
    const CandidateSink<4, kBufferedCandidates, 2> sink{
        buffers, static_cast<int>(threadIdx.x) % 128 / 32, candidates, at.row_block};
#pragma unroll 1
    for (int m = 0; m < Config::kMmaM; ++m) {
      if constexpr (kGeneral) {
        make_logits<PairedColumns, false>(acc[0], logits, first, -INFINITY);
      } else if (ragged) {
        mask_columns<PairedColumns>(acc[0], first, logits.cols, -INFINITY);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        fold_row<kGeneral, kTraining, PairedColumns>(acc[0], h, states, 0,
                                                     warp_row + 64 * m + 8 * h, scale, first_col,
                                                     first, logits, out, candidates.log2_eps, sink);
      }
#pragma unroll
      for (int i = 0; i < Config::kAccumulators; ++i) acc[0][i] = acc[1][i];
    }
    if (!at.last_of_unit()) return;
    if constexpr (kTraining) sink.flush();
    // Each row's quad has just written its state: its first lane goes on with it.
    __syncwarp();
    if (threadIdx.x % 4 != 0) return;
    const int next_block = at.next_row_block();
#pragma unroll 1
    for (int i = 0; i < 2 * Config::kMmaM; ++i) {
      const int row = warp_row + 64 * (i / 2) + 8 * (i % 2);
      const int position = at.row_block * Config::kBlockM + row;
      write_partial<kGeneral>(states, row, out, int64_t{at.split()} * ld + position, first_col,
                              position < count);
      start_row(row, next_block);
    }
  };
  run_block<T>(work, maps, shared, count, kGeneral ? logits.bias : nullptr, prepare, epilogue);
}

}  // namespace cce::cuda::sm90
