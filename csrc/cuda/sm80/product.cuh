// The sm_80 products of the exact backward over a list of rows whose length only the device knows: out += op(A) B, with B
// (K, N) as it lies in memory and A (M, K) or (K, M). PyTorch's own matmul takes over where the list is all rows.
//
// Tile 128 x 256 x kBlockK, kStages slices in shared memory, each an A tile and a B tile in 16-byte pieces: A (128, kBlockK)
// swizzled as in the mainloop, or (kBlockK, 128) and B (kBlockK, 256) with pieces xor-ed by the low bits of k; ldmatrix
// transposes what does not lie along K. Warps: eight of 64 x 64 in a 2 x 4 grid, all load and multiply; persistent, one
// block a multiprocessor; an empty list ends at once. Barrier protocol: as sm80/mainloop.cuh, but the stream of slices ends
// with the tile.
#pragma once

#include "cuda/common/epilogue.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/params.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm80/config.h"

namespace cce::cuda::sm80 {

// Pieces of a tile whose rows run along k and hold kWidth elements.
template <int kWidth>
struct AlongWidth {
  static constexpr int kPieces = kWidth / 8, kRowBytes = kWidth * 2;
  static __device__ __forceinline__ uint32_t offset(int k, int piece) {
    return k * kRowBytes + ((piece ^ (k & 7)) << 4);
  }
};

template <typename T, typename Config, bool kTransposed>
class Product {
 public:
  using Accumulators = float[Config::kMmaM][Config::kAccumulators];

  __device__ Product(const ProductParams& p, uint8_t* shared, int m, int k)
      : p_(p), base_(ptx::shared_address(shared)), m_(m), k_(k) {}

  // acc = the tile of rows from row0 and columns from col0.
  __device__ void multiply(Accumulators& acc, int row0, int col0) {
#pragma unroll
    for (int i = 0; i < Config::kMmaM; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kAccumulators; ++j) acc[i][j] = 0.0f;
    }
    const int slices = (k_ + Config::kBlockK - 1) / Config::kBlockK;
    __syncthreads();  // the last tile has been read
    for (int s = 0; s < Config::kStages - 1; ++s) {
      if (s < slices) load(s, s, row0, col0);
      ptx::cp_async_commit();
    }
    for (int s = 0; s < slices; ++s) {
      ptx::cp_async_wait<Config::kStages - 2>();
      __syncthreads();
      const int next = s + Config::kStages - 1;
      if (next < slices) load(next, next % Config::kStages, row0, col0);
      ptx::cp_async_commit();
      const uint32_t stage = base_ + s % Config::kStages * Config::kStageBytes;
#pragma unroll
      for (int step = 0; step < Config::kBlockK / 16; ++step) multiply_step(acc, stage, step * 16);
    }
    ptx::cp_async_wait<0>();
  }

 private:
  using LayoutA = Swizzle<Config::kBlockK, ConsecutiveRows>;
  using LayoutAT = AlongWidth<Config::kBlockM>;
  using LayoutB = AlongWidth<Config::kBlockN>;

  __device__ __forceinline__ void load(int slice, int to_stage, int row0, int col0) {
    const uint32_t stage = base_ + to_stage * Config::kStageBytes;
    const int k0 = slice * Config::kBlockK;
    const T* a = static_cast<const T*>(p_.a);
    const T* b = static_cast<const T*>(p_.b);
    if constexpr (kTransposed) {
      for (int i = threadIdx.x; i < Config::kBlockK * LayoutAT::kPieces; i += Config::kThreads) {
        const int k = i / LayoutAT::kPieces, piece = i % LayoutAT::kPieces;
        const int col = row0 + piece * 8;
        const bool absent = k0 + k >= k_ || col >= m_;
        const T* from = absent ? a : a + int64_t{1} * (k0 + k) * p_.lda + col;
        ptx::cp_async_16(stage + LayoutAT::offset(k, piece), from, absent);
      }
    } else {
      for (int i = threadIdx.x; i < Config::kBlockM * LayoutA::kPieces; i += Config::kThreads) {
        const int row = i / LayoutA::kPieces, piece = i % LayoutA::kPieces;
        const int k = k0 + piece * 8;
        const bool absent = k >= k_ || row0 + row >= m_;
        const T* from = absent ? a : a + int64_t{1} * (row0 + row) * p_.lda + k;
        ptx::cp_async_16(stage + LayoutA::offset(row, piece), from, absent);
      }
    }
    for (int i = threadIdx.x; i < Config::kBlockK * LayoutB::kPieces; i += Config::kThreads) {
      const int k = i / LayoutB::kPieces, piece = i % LayoutB::kPieces;
      const int col = col0 + piece * 8;
      const bool absent = k0 + k >= k_ || col >= p_.n;
      const T* from = b;
      if (!absent) {
        const int64_t row = p_.b_rows ? __ldg(p_.b_rows + k0 + k) : k0 + k;
        from = b + row * p_.ldb + col;
      }
      ptx::cp_async_16(stage + Config::kBytesA + LayoutB::offset(k, piece), from, absent);
    }
  }

  // One step of 16 in K.
  __device__ __forceinline__ void multiply_step(Accumulators& acc, uint32_t stage, int k) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp % Config::kWarpsM * Config::kWarpM;
    const int col = warp / Config::kWarpsM * Config::kWarpN;
    uint32_t a[Config::kMmaM][4], b[Config::kWarpN / 16][4];
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) {
      if constexpr (kTransposed) {
        // Matrices (k, m), (k, m + 8), (k + 8, m), (k + 8, m + 8).
        const int at_k = k + lane / 16 * 8 + lane % 8;
        const int piece = (row + m * 16) / 8 + lane / 8 % 2;
        ptx::ldmatrix_x4_trans(a[m], stage + LayoutAT::offset(at_k, piece));
      } else {
        ptx::ldmatrix_x4(a[m],
                         stage + LayoutA::offset(row + m * 16 + lane % 16, k / 8 + lane / 16));
      }
    }
#pragma unroll
    for (int n = 0; n < Config::kWarpN / 16; ++n) {
      // Matrices (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8).
      const int at_k = k + lane / 8 % 2 * 8 + lane % 8;
      ptx::ldmatrix_x4_trans(b[n], stage + Config::kBytesA +
                                       LayoutB::offset(at_k, (col + n * 16) / 8 + lane / 16));
    }
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kWarpN / 8; ++n) {
        ptx::mma_m16n8k16<T>(acc[m] + 4 * n, a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

  const ProductParams& p_;
  uint32_t base_;
  int m_, k_;
};

// One number of the result to where it belongs.
template <typename Out>
__device__ __forceinline__ void put(const ProductParams& p, int64_t row, int col, float x) {
  if (p.sums) {
    float* sum = p.sums + row * p.n + col;
    if (!p.first) x += *sum;
    if (!p.out) {
      *sum = x;
      return;
    }
  }
  Out* out = static_cast<Out*>(p.out) + (p.out_rows ? p.out_rows[row] : row) * p.ld_out + col;
  if (!p.sums) x += static_cast<float>(*out);
  *out = static_cast<Out>(x);
}

template <typename T, typename Out, typename Config, bool kTransposed>
__global__ void __launch_bounds__(Config::kThreads, 1)
    product_mainloop(const __grid_constant__ ProductParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int count = __ldg(p.count);
  const int m = kTransposed ? static_cast<int>(p.m) : count;
  const int k = kTransposed ? count : static_cast<int>(p.k);
  if (count == 0) return;
  Product<T, Config, kTransposed> product(p, shared, m, k);
  const int tiles_n = (static_cast<int>(p.n) + Config::kBlockN - 1) / Config::kBlockN;
  const int tiles = (m + Config::kBlockM - 1) / Config::kBlockM * tiles_n;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  typename Product<T, Config, kTransposed>::Accumulators acc;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int row0 = tile / tiles_n * Config::kBlockM, col0 = tile % tiles_n * Config::kBlockN;
    product.multiply(acc, row0, col0);
    const int row = row0 + warp % Config::kWarpsM * Config::kWarpM + lane / 4;
    const int col = col0 + warp / Config::kWarpsM * Config::kWarpN + PairedColumns::first();
#pragma unroll
    for (int i = 0; i < Config::kMmaM; ++i) {
#pragma unroll
      for (int x = 0; x < Config::kAccumulators; ++x) {
        const int r = row + 16 * i + (x & 2) * 4, c = col + PairedColumns::at(x / 4) + (x & 1);
        if (r < m && c < p.n) put<Out>(p, r, c, acc[i][x]);
      }
    }
  }
}

}  // namespace cce::cuda::sm80
