// The sm_90 recompute of the exact backward: the forward's long-K product again, its epilogue writing G = dloss/dproduct of
// one stretch of the vocabulary, 16 bit, row-major, rows at their original places. Matmuls turn G into gradients.
//
// Tile 128 x 192 x 64, 5 stages, warp roles and barriers: sm90/mainloop.cuh; shared memory: the pipeline and its barriers.
// Epilogue: a warp owns 32 rows of each tile; the lanes of a quad trade columns so that each stores 16 bytes at a time.
// Records of rows are read from the second-level cache. Ignored rows are not multiplied; their rows of G are cleared.
#pragma once

#include "cuda/common/dlogits.cuh"
#include "cuda/sm90/mainloop.cuh"

namespace cce::cuda::sm90 {

constexpr int backward_shared_bytes() { return Config::kPipelineBytes + Config::kBarrierBytes; }

// Lane q of a quad gives column pair q of four groups of eight columns, and gets all pairs of group q.
__device__ __forceinline__ uint4 trade_columns(const uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  // Among neighbours: lane q keeps groups q % 2 and 2 + q % 2, two pairs of each.
  const uint32_t from_a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  const uint32_t from_b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  const uint32_t a0 = odd ? from_a : x[0], a1 = odd ? x[1] : from_a;
  const uint32_t b0 = odd ? from_b : x[2], b1 = odd ? x[3] : from_b;
  // Between the halves of the quad: one of the two groups, four pairs.
  const uint32_t from_0 = __shfl_xor_sync(~0u, upper ? a0 : b0, 2);
  const uint32_t from_1 = __shfl_xor_sync(~0u, upper ? a1 : b1, 2);
  return upper ? make_uint4(from_0, from_1, b0, b1) : make_uint4(a0, a1, from_0, from_1);
}

// Writes a quad's row of the tile. first: the tile's first column.
template <typename T, int kElements>
__device__ __forceinline__ void store_row(const float (&acc)[kElements], int h, T* row, bool exists,
                                          int first, int64_t ld) {
#pragma unroll
  for (int j = 0; j < kElements / 4; j += 4) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = pack<T>(acc[4 * (j + i) + 2 * h], acc[4 * (j + i) + 2 * h + 1]);
    const uint4 eight = trade_columns(x);
    const int col = first + 8 * (j + static_cast<int>(threadIdx.x % 4));
    if (exists && col < ld) *reinterpret_cast<uint4*>(row + col) = eight;
  }
}

__device__ __forceinline__ RowGradient read_record(const RowGradient* at) {
  RowGradient record;
  auto* to = reinterpret_cast<uint4*>(&record);
  to[0] = __ldg(reinterpret_cast<const uint4*>(at));
  to[1] = __ldg(reinterpret_cast<const uint4*>(at) + 1);
  return record;
}

template <typename T, Epilogue kEpilogue>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_mainloop(const __grid_constant__ GroupWork work, const __grid_constant__ Maps maps,
                      const __grid_constant__ LogitParams logits, const RowGradient* records,
                      int first_col, const __grid_constant__ DlogitsOut<T> out) {
  extern __shared__ __align__(Config::kAlignment) uint8_t shared[];
  const int count = __ldg(work.row_count);
  clear_ignored_rows(work, count, out.dlogits, out.ld);
  const float scale = logits.logit_scale * kLog2E;
  const int warp_row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;

  const auto epilogue = [&](float (&acc)[Config::kMmaM][Config::kAccumulators], const Cursor& at) {
    const int first = at.tile * Config::kBlockN;
    const int mine = first + PairedColumns::first();
#pragma unroll 1
    for (int m = 0; m < Config::kMmaM; ++m) {
      if constexpr (kEpilogue != Epilogue::kPlain)
        make_logits<PairedColumns, false>(acc[0], logits, mine, kAbsentLogit);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int position = at.row_block * Config::kBlockM + warp_row + 64 * m + 8 * h;
        const bool exists = position < count;
        const RowGradient row = read_record(records + (exists ? position : count - 1));
        logits_to_output<kEpilogue, PairedColumns>(acc[0], h, row, logits, scale, first_col, mine);
        // The record is read again: registers are short in the loops above.
        const int64_t to = !exists ? position : __ldg(&records[position].row);
        store_row<T>(acc[0], h, out.dlogits + to * out.ld, exists, first, out.ld);
      }
#pragma unroll
      for (int i = 0; i < Config::kAccumulators; ++i) acc[0][i] = acc[1][i];
    }
  };
  run_block<T>(
      work, maps, shared, count, kEpilogue == Epilogue::kPlain ? nullptr : logits.bias, [] {},
      epilogue);
}

}  // namespace cce::cuda::sm90
