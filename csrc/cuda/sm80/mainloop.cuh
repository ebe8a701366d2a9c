// The long-K product of one 128 x 256 tile by mma.sync, fed by cp.async: D/kBlockK slices from (E, C), then R/kBlockK
// slices from (U, B), without joining them in memory.
//
// Shared memory: kStages slices, each an A tile (128, kBlockK) and a B tile (256, kBlockK), swizzled (common/swizzle).
// Warps: all eight load and multiply; warp (m, n) of the 2 x 4 grid owns 64 rows x 64 columns.
// Barrier protocol: slices are numbered in one stream over all tiles and units of a block. Before reading slice s a thread
// waits for its own copies of slice s (cp.async.wait_group), then __syncthreads makes everybody's copies visible and says
// that everybody has read slice s - 1, whose buffer the copies of slice s + kStages - 1 then overwrite, a part at each
// step of 16 in K so that they do not hold up the products. The stream does not stop at a tile's end: while the epilogue
// runs, the next tile's first slices are on their way.
#pragma once

#include <cstdint>

#include "cuda/common/epilogue.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/common/work.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"

namespace cce::cuda::sm80 {

template <typename T, typename Config>
class Mainloop {
 public:
  using LayoutA = Swizzle<Config::kBlockK, ConsecutiveRows>;
  using LayoutB = Swizzle<Config::kBlockK, PairsOfEights>;
  using Columns = SpreadColumns;
  using Accumulators = float[Config::kMmaM][Config::kAccumulators];

  // A block without any unit must not get here.
  __device__ Mainloop(const Work& work, uint8_t* shared, int row_blocks)
      : work_(work),
        base_(ptx::shared_address(shared)),
        slices_main_((static_cast<int>(work.e.cols) + Config::kBlockK - 1) / Config::kBlockK),
        slices_(slices_main_ +
                (static_cast<int>(work.u.cols) + Config::kBlockK - 1) / Config::kBlockK),
        loader_(work, row_blocks) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_a = warp % Config::kWarpsM * Config::kWarpM + lane % 16;
    // Row i of n8 tile t holds the column that SpreadColumns gives it: 32 (t / 4) + 8 (i / 2) + 2 (t % 4) + i % 2.
    const int row_b =
        warp / Config::kWarpsM * Config::kWarpN + lane % 8 / 2 * 8 + lane % 2 + lane / 16 * 2;
    read_a_ = row_a * LayoutA::kRowBytes;
    read_b_ = Config::kBytesA + row_b * LayoutB::kRowBytes;
    mask_a_ = (lane / 16) ^ LayoutA::mask(row_a);
    mask_b_ = (lane / 8 % 2) ^ LayoutB::mask(row_b);
    write_a_ = LayoutA::offset(copy_row(), copy_piece());
    write_b_ = Config::kBytesA + LayoutB::offset(copy_row(), copy_piece());
    aim();
#pragma unroll
    for (int s = 0; s < Config::kStages - 1; ++s) {
#pragma unroll
      for (int part = 0; part < kSteps; ++part) load_part(part);
      finish_load();
    }
  }

  // Waits for every copy of this thread that was started before the last kStages - 1 slices of the tile just multiplied;
  // needed only for tiles so short in K that multiply() has not done it.
  __device__ __forceinline__ void settle() {
    if (slices_ >= Config::kStages) return;
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // The product of the next tile of the stream.
  __device__ void multiply(Accumulators& acc) {
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) {
#pragma unroll
      for (int i = 0; i < Config::kAccumulators; ++i) acc[m][i] = 0.0f;
    }
    Fragments f[2];
    acquire_slice();
    read_fragments(f[0], 0);
    for (int slice = 0; slice < slices_; ++slice) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        load_part(k);
        if (k + 1 < kSteps) {
          read_fragments(f[(k + 1) & 1], k + 1);
        } else {
          // The next slice's first fragments come while this slice's last products run.
          finish_load();
          if (++read_stage_ == Config::kStages) read_stage_ = 0;
          if (slice + 1 < slices_) {
            acquire_slice();
            read_fragments(f[0], 0);
          }
        }
        multiply_fragments(acc, f[k & 1]);
      }
    }
  }

 private:
  static constexpr int kNothingLeft = -(1 << 30);
  static constexpr int kSteps = Config::kBlockK / 16;
  static_assert(kSteps % 2 == 0,
                "the two fragment buffers must keep their order from slice to slice");

  // Pieces of 16 bytes: a thread copies the same piece column of every kRowStep-th row, spread over the steps of a slice.
  static constexpr int kRowStep = Config::kThreads / LayoutA::kPieces;
  static constexpr int kCopiesA = Config::kBlockM / kRowStep, kCopiesB = Config::kBlockN / kRowStep;
  static_assert(kCopiesA % kSteps == 0 && kCopiesB % kSteps == 0);

  static __device__ __forceinline__ int copy_piece() { return threadIdx.x % LayoutA::kPieces; }
  static __device__ __forceinline__ int copy_row() { return threadIdx.x / LayoutA::kPieces; }

  // Sets the copies' addresses to the loader's unit, tile and half of K. Rows beyond the last are read from the last (what
  // they produce is never used), columns beyond the last become zeros.
  __device__ __forceinline__ void aim() {
    const bool low_rank = loader_.slice >= slices_main_;
    const Matrix& a = low_rank ? work_.u : work_.e;
    const Matrix& b = low_rank ? work_.lora_b : work_.c;
    const T* from_a = static_cast<const T*>(a.data) + copy_piece() * 8;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      const int position = loader_.row_block * Config::kBlockM + copy_row() + i * kRowStep;
      a_[i] = from_a + __ldg(work_.row_order + min(position, work_.n - 1)) * a.ld;
    }
    const int64_t col = static_cast<int64_t>(loader_.tile) * Config::kBlockN + copy_row();
    b_ = static_cast<const T*>(b.data) + copy_piece() * 8 + col * b.ld;
    b_step_ = static_cast<uint32_t>(kRowStep * b.ld * sizeof(T));
    absent_ = 0;
#pragma unroll
    for (int i = 0; i < kCopiesB; ++i) absent_ |= (col + i * kRowStep >= b.rows ? 1u : 0u) << i;
    k_left_ = static_cast<int>(a.cols) - copy_piece() * 8;
  }

  // One of kSteps parts of the copies of the loader's slice. No branches, so that the copies mix with the products.
  __device__ __forceinline__ void load_part(int part) {
    const uint32_t to = base_ + load_stage_ * Config::kStageBytes;
    const bool beyond_k = k_left_ <= 0;
#pragma unroll
    for (int i = part * kCopiesA / kSteps; i < (part + 1) * kCopiesA / kSteps; ++i) {
      ptx::cp_async_16(to + write_a_ + i * kRowStep * LayoutA::kRowBytes, a_[i], beyond_k);
    }
    const uint32_t zero = beyond_k ? ~0u : absent_;
#pragma unroll
    for (int i = part * kCopiesB / kSteps; i < (part + 1) * kCopiesB / kSteps; ++i) {
      const char* from = reinterpret_cast<const char*>(b_) + static_cast<uint64_t>(b_step_) * i;
      ptx::cp_async_16(to + write_b_ + i * kRowStep * LayoutB::kRowBytes, from, zero & (1u << i));
    }
  }

  // Closes the slice's group of copies and moves the loader on. After its last tile the loader goes on with zeros, which
  // nobody reads: the count of groups stays in step.
  __device__ __forceinline__ void finish_load() {
    ptx::cp_async_commit();
    if (++load_stage_ == Config::kStages) load_stage_ = 0;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) a_[i] += Config::kBlockK;
    b_ += Config::kBlockK;
    k_left_ -= Config::kBlockK;
    const int slice = ++loader_.slice;
    if (slice == slices_main_ || slice == slices_) {
      if (slice == slices_) loader_.next_tile();
      if (loader_.done())
        k_left_ = kNothingLeft;
      else
        aim();
    }
  }

  struct Fragments {
    uint32_t a[Config::kMmaM][4];
    uint32_t b[Config::kWarpN / 16][4];
  };

  __device__ __forceinline__ void read_fragments(Fragments& f, int k16) {
    const uint32_t stage = base_ + read_stage_ * Config::kStageBytes;
    const uint32_t a = stage + read_a_ + (((2 * k16) ^ mask_a_) << 4);
    const uint32_t b = stage + read_b_ + (((2 * k16) ^ mask_b_) << 4);
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m)
      ptx::ldmatrix_x4(f.a[m], a + m * 16 * LayoutA::kRowBytes);
#pragma unroll
    for (int n = 0; n < Config::kWarpN / 16; ++n) {
      ptx::ldmatrix_x4(f.b[n], b + (n / 2 * 32 + n % 2 * 4) * LayoutB::kRowBytes);
    }
  }

  // The slice at read_stage_ is complete for every thread, and everybody has read the slice before it.
  __device__ __forceinline__ void acquire_slice() {
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();
  }

  __device__ __forceinline__ void multiply_fragments(Accumulators& acc, const Fragments& f) {
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kWarpN / 8; ++n) {
        const uint32_t* b = f.b[n / 2] + n % 2 * 2;
        ptx::mma_m16n8k16<T>(acc[m] + 4 * n, f.a[m], b[0], b[1]);
      }
    }
  }

  const Work& work_;
  uint32_t base_, read_a_, read_b_, write_a_, write_b_;
  int mask_a_, mask_b_;
  int slices_main_, slices_;
  int load_stage_ = 0, read_stage_ = 0;
  const T* a_[kCopiesA];
  const T* b_;
  uint32_t b_step_;
  int k_left_;       // columns of K from this thread's piece on; none: zeros
  uint32_t absent_;  // bit i: B copy i lies beyond the last column
  Cursor loader_;
};

}  // namespace cce::cuda::sm80
