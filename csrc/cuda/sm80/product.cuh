// A tile of op(A) B, with B (K, N) as it lies in memory and A (M, K) or (K, M): the products of the exact rows
// (sm80/exact_rows), whose number only the device knows. Where it is all rows, PyTorch's own matmul does them.
//
// Tile 128 x 256 x kBlockK, kStages slices in shared memory, each an A tile and a B tile in 16-byte pieces: A (128, kBlockK)
// swizzled as in the mainloop, or (kBlockK, 128) and B (kBlockK, 256) with pieces xor-ed by the low bits of k; ldmatrix
// transposes what does not lie along K. Warps: eight of 64 x 64 in a 2 x 4 grid, all load and multiply. Barrier protocol:
// as sm80/mainloop.cuh, but the stream of slices ends with the tile.
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

template <typename T>
struct ProductInputs {
  const T* a;  // (m, k), or transposed: (k, m)
  int64_t lda;
  const T* b;  // (k, n)
  int64_t ldb;
  const int32_t* b_rows;  // row i of b is row b_rows[i]; null: i
  int m, n, k;
};

template <typename T, typename Config, bool kTransposed>
class Product {
 public:
  using Accumulators = float[Config::kMmaM][Config::kAccumulators];

  __device__ Product(const ProductInputs<T>& inputs, uint8_t* shared)
      : p_(inputs), base_(ptx::shared_address(shared)) {}

  // acc = the tile of rows from row0 and columns from col0.
  __device__ void multiply(Accumulators& acc, int row0, int col0) {
#pragma unroll
    for (int i = 0; i < Config::kMmaM; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kAccumulators; ++j) acc[i][j] = 0.0f;
    }
    const int slices = (p_.k + Config::kBlockK - 1) / Config::kBlockK;
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
    if constexpr (kTransposed) {
      for (int i = threadIdx.x; i < Config::kBlockK * LayoutAT::kPieces; i += Config::kThreads) {
        const int k = i / LayoutAT::kPieces, piece = i % LayoutAT::kPieces;
        const int col = row0 + piece * 8;
        const bool absent = k0 + k >= p_.k || col >= p_.m;
        const T* from = absent ? p_.a : p_.a + int64_t{1} * (k0 + k) * p_.lda + col;
        ptx::cp_async_16(stage + LayoutAT::offset(k, piece), from, absent);
      }
    } else {
      for (int i = threadIdx.x; i < Config::kBlockM * LayoutA::kPieces; i += Config::kThreads) {
        const int row = i / LayoutA::kPieces, piece = i % LayoutA::kPieces;
        const int k = k0 + piece * 8;
        const bool absent = k >= p_.k || row0 + row >= p_.m;
        const T* from = absent ? p_.a : p_.a + int64_t{1} * (row0 + row) * p_.lda + k;
        ptx::cp_async_16(stage + LayoutA::offset(row, piece), from, absent);
      }
    }
    // Two at a time: more of the 64-bit addresses at once do not fit into the registers.
#pragma unroll 2
    for (int i = threadIdx.x; i < Config::kBlockK * LayoutB::kPieces; i += Config::kThreads) {
      const int k = i / LayoutB::kPieces, piece = i % LayoutB::kPieces;
      const int col = col0 + piece * 8;
      const bool absent = k0 + k >= p_.k || col >= p_.n;
      const T* from = p_.b;
      if (!absent) {
        const int64_t row = p_.b_rows ? __ldg(p_.b_rows + k0 + k) : k0 + k;
        from = p_.b + row * p_.ldb + col;
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
      ptx::ldmatrix_x4_trans(
          b[n], stage + Config::kBytesA + LayoutB::offset(at_k, (col + n * 16) / 8 + lane / 16));
    }
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kWarpN / 8; ++n) {
        ptx::mma_m16n8k16<T>(acc[m] + 4 * n, a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

  const ProductInputs<T>& p_;
  uint32_t base_;
};

}  // namespace cce::cuda::sm80
