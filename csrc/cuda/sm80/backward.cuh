// The sm_80 exact backward's recompute: the forward's long-K product again, its epilogue writing G = dloss/dproduct of one
// stretch of the vocabulary, 16 bit, row-major, rows at their original places or by position. Matmuls turn G into
// gradients.
//
// Tile, stages, warps and barriers: sm80/mainloop.cuh. Shared memory: the pipeline, then two sets of the rows' gradient
// records (128 x 32 bytes): while a tile's epilogue works with one, the next unit's records are copied into the other, as
// part of the mainloop's next group of copies. That its last readers are done follows from the mainloop's barriers.
// Ignored rows are not multiplied; their rows of G are cleared.
#pragma once

#include "cuda/common/dlogits.cuh"
#include "cuda/sm80/config.h"
#include "cuda/sm80/mainloop.cuh"

namespace cce::cuda::sm80 {

template <typename Config>
constexpr int backward_shared_bytes() {
  return Config::kSharedBytes + 2 * Config::kBlockM * sizeof(RowGradient);
}

// Writes this thread's columns of one row half: eight consecutive columns (SpreadColumns) in one store.
template <typename T, int kElements>
__device__ __forceinline__ void store_row(const float (&acc)[kElements], int h, T* row,
                                          int first_col, int64_t ld) {
#pragma unroll
  for (int j = 0; j < kElements / 4; j += 4) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r[i] = pack<T>(acc[4 * (j + i) + 2 * h], acc[4 * (j + i) + 2 * h + 1]);
    const int col = first_col + SpreadColumns::at(j);
    if (col < ld) *reinterpret_cast<uint4*>(row + col) = make_uint4(r[0], r[1], r[2], r[3]);
  }
}

// Starts copying the records of a row block; threads of the first 256 take 16 bytes each.
template <typename Config>
__device__ __forceinline__ void copy_records(RowGradient* to, const RowGradient* from,
                                             int row_block, int n) {
  static_assert(Config::kThreads * 16 == Config::kBlockM * sizeof(RowGradient));
  const int thread = ptx::thread_again();
  const int position = row_block * Config::kBlockM + thread / 2;
  const char* source = reinterpret_cast<const char*>(from + min(position, n - 1)) + thread % 2 * 16;
  ptx::cp_async_16(ptx::shared_address(to) + thread * 16, source, false);
}

// All of this block's tiles of `work`, of whose rows `count` count.
template <typename T, typename Config, Epilogue kEpilogue>
__device__ __forceinline__ void recompute_tiles(const Work& work, int count,
                                                const LogitParams& logits,
                                                const RowGradient* records, int first_col,
                                                const DlogitsOut<T>& out, uint8_t* shared) {
  auto* sets = reinterpret_cast<RowGradient*>(shared + Config::kSharedBytes);
  const int row_blocks = (count + Config::kBlockM - 1) / Config::kBlockM;
  using Places = Parking<Config>;
  {
    const Cursor start(work, row_blocks);
    if (start.done()) return;
    copy_records<Config>(sets, records, start.row_block, work.n);
    Places::put(shared, Places::kEpilogue, start);
  }
  Mainloop<T, Config> mainloop(work, shared, row_blocks);

  using Columns = typename Mainloop<T, Config>::Columns;
  const float scale = logits.logit_scale * kLog2E;
  int set = 0;
  typename Mainloop<T, Config>::Accumulators acc;
  while (true) {
    mainloop.multiply(acc);
    mainloop.settle();
    Cursor at = Places::get(shared, Places::kEpilogue, work, row_blocks);
    // Every warp has left the last tile's epilogue, in which the other set may have been used.
    copy_records<Config>(sets + (set ^ 1) * Config::kBlockM, records, at.next_row_block(), work.n);
    const int thread = ptx::thread_again(), warp = thread / 32;
    const int warp_row = warp % Config::kWarpsM * Config::kWarpM + thread % 32 / 4;
    const int first = at.tile * Config::kBlockN + warp / Config::kWarpsM * Config::kWarpN +
                      Columns::first(thread);
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) {
      if constexpr (kEpilogue != Epilogue::kPlain)
        make_logits<Columns, true>(acc[m], logits, first, kAbsentLogit);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = warp_row + 16 * m + 8 * h;
        const RowGradient row = sets[set * Config::kBlockM + r];
        logits_to_output<kEpilogue, Columns>(acc[m], h, row, logits, scale, first_col, first);
        const int64_t position = at.row_block * Config::kBlockM + r;
        if (position < count)
          store_row<T>(acc[m], h, out.dlogits + (out.compact ? position : row.row) * out.ld, first,
                       out.ld);
      }
    }
    if (at.next_tile()) set ^= 1;
    if (at.done()) break;
    Places::put(shared, Places::kEpilogue, at);
  }
  mainloop.finish();
}

template <typename T, typename Config, Epilogue kEpilogue>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_mainloop(const __grid_constant__ Work work, const LogitParams logits,
                      const RowGradient* records, int first_col, const DlogitsOut<T> out) {
  if constexpr (!Config::kCompiled) return;
  extern __shared__ __align__(128) uint8_t shared[];
  const int count = __ldg(work.row_count);
  clear_ignored_rows(work, count, out.dlogits, out.ld);
  recompute_tiles<T, Config, kEpilogue>(work, count, logits, records, first_col, out, shared);
}

}  // namespace cce::cuda::sm80
