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
#include "cuda/ptx/special.cuh"

namespace cce::cuda::sm80 {

// Cursors at rest, in shared memory behind the pipeline, each warp's own: registers are for the accumulators.
template <typename Config>
struct Parking {
  static constexpr int kLoader = 0, kEpilogue = 1;
  static __device__ __forceinline__ int4* slot(uint8_t* shared, int which, int thread) {
    return reinterpret_cast<int4*>(shared + Config::kPipelineBytes) + 2 * (thread / 32) + which;
  }
  static __device__ __forceinline__ void put(uint8_t* shared, int which, const Cursor& cursor) {
    const int thread = ptx::thread_again();
    __syncwarp();
    if (thread % 32 == 0) *slot(shared, which, thread) = cursor.place();
    __syncwarp();
  }
  static __device__ __forceinline__ Cursor get(uint8_t* shared, int which, const Work& work,
                                               int row_blocks) {
    return {work, row_blocks, *slot(shared, which, ptx::thread_again())};
  }
};

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
        shared_(shared),
        row_blocks_(row_blocks),
        slices_main_((static_cast<int>(work.e.cols) + Config::kBlockK - 1) / Config::kBlockK),
        slices_(slices_main_ +
                (static_cast<int>(work.u.cols) + Config::kBlockK - 1) / Config::kBlockK) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_a = warp % Config::kWarpsM * Config::kWarpM + lane % 16;
    // Row i of n8 tile t holds the column that SpreadColumns gives it: 32 (t / 4) + 8 (i / 2) + 2 (t % 4) + i % 2.
    const int row_b =
        warp / Config::kWarpsM * Config::kWarpN + lane % 8 / 2 * 8 + lane % 2 + lane / 16 * 2;
    const int row = copy_row(threadIdx.x), piece = copy_piece(threadIdx.x);
    const uint32_t at_a = ptx::shared_address(shared), at_b = at_a + Config::kBytesA;
    read_a_ = at_a + LayoutA::offset(row_a, lane / 16);
    read_b_ = at_b + LayoutB::offset(row_b, lane / 8 % 2);
    write_a_ = at_a + LayoutA::offset(row, piece);
    write_b_ = at_b + LayoutB::offset(row, piece);
    const Cursor loader(work, row_blocks);
    Parking<Config>::put(shared, Parking<Config>::kLoader, loader);
    aim(loader);
#pragma unroll
    for (int s = 0; s < Config::kStages - 1; ++s) {
#pragma unroll
      for (int part = 0; part < kSteps; ++part) load_part(part);
      finish_load();
    }
    acquire_slice();
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
    Fragments f;
    read_b(f, 0, 0);
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) read_a(f, 0, m);
    for (int slice = 0; slice < slices_; ++slice) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const bool slice_ends = k + 1 == kSteps;
        const int next = slice_ends ? 0 : k + 1;
#pragma unroll
        for (int n = 0; n < kPiecesN; ++n) {
          const bool step_ends = n + 1 == kPiecesN;
          if (n == 0) load_part(k);
          if (slice_ends && step_ends) {
            finish_load();
            next_slice();
          }
          if (step_ends)
            read_b(f, next, 0);
          else
            read_b(f, k, n + 1);
#pragma unroll
          for (int m = 0; m < Config::kMmaM; ++m) {
            const bool ahead = m < Config::kAhead && !slice_ends;
            if (ahead && n == max(0, kPiecesN - 1 - Config::kAhead + m)) read_a(f, next, m);
            multiply_piece(acc[m] + 8 * n, f.a_of(k, m), f.b[n % 2]);
            if (!ahead && step_ends) read_a(f, next, m);
          }
        }
      }
    }
  }

 private:
  static constexpr int kNothingLeft = -(1 << 30);
  static constexpr int kSteps = Config::kBlockK / 16;
  static_assert(kSteps % 2 == 0,
                "the two fragment buffers must keep their order from slice to slice");

  // Pieces of 16 bytes: a thread copies the same piece column of every kRowStep-th row, spread over the slice's products.
  static constexpr int kRowStep = Config::kThreads / LayoutA::kPieces;
  static constexpr int kCopiesA = Config::kBlockM / kRowStep, kCopiesB = Config::kBlockN / kRowStep;
  static constexpr int kPiecesN = Config::kWarpN / 16;  // of a warp's B fragments of one step
  static_assert(kCopiesA % kSteps == 0 && kCopiesB % kSteps == 0);
  static_assert(kPiecesN % 2 == 0, "the two B fragments must keep their order from step to step");

  // The piece column and first row that a thread copies.
  static __device__ __forceinline__ int copy_piece(int thread) { return thread % LayoutA::kPieces; }
  static __device__ __forceinline__ int copy_row(int thread) { return thread / LayoutA::kPieces; }

  // Sets the copies' addresses to the loader's unit, tile and half of K. Rows beyond the last are read from the last (what
  // they produce is never used), columns beyond the last become zeros.
  __device__ __forceinline__ void aim(const Cursor& loader) {
    const int thread = ptx::thread_again(), row = copy_row(thread), piece = copy_piece(thread);
    const bool low_rank = load_slice_ >= slices_main_;
    const Matrix& a = low_rank ? work_.u : work_.e;
    const Matrix& b = low_rank ? work_.lora_b : work_.c;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      const int position = loader.row_block * Config::kBlockM + row + i * kRowStep;
      a_[i] = static_cast<uint32_t>(
          (__ldg(work_.row_order + min(position, work_.n - 1)) * a.ld + piece * 8) / 8);
    }
    const int64_t col = static_cast<int64_t>(loader.tile) * Config::kBlockN;
    from_a_ = static_cast<const uint4*>(a.data);
    from_b_ =
        reinterpret_cast<const uint4*>(static_cast<const T*>(b.data) + (col + row) * b.ld) + piece;
    b_step_ = static_cast<uint32_t>(kRowStep / 8 * b.ld);
    b_left_ = static_cast<int>(min(b.rows - col, int64_t{Config::kBlockN})) - row;
    k_left_ = static_cast<int>(a.cols) - piece * 8;
  }

  // One of kSteps parts of the copies of the loader's slice. No branches, so that the copies mix with the products.
  __device__ __forceinline__ void load_part(int part) {
    const bool beyond_k = k_left_ <= 0;
#pragma unroll
    for (int i = part * kCopiesA / kSteps; i < (part + 1) * kCopiesA / kSteps; ++i) {
      ptx::cp_async_16(load_stage_ + write_a_ + i * kRowStep * LayoutA::kRowBytes, from_a_ + a_[i],
                       beyond_k);
    }
    const int left = beyond_k ? 0 : b_left_;
#pragma unroll
    for (int i = part * kCopiesB / kSteps; i < (part + 1) * kCopiesB / kSteps; ++i) {
      ptx::cp_async_16(load_stage_ + write_b_ + i * kRowStep * LayoutB::kRowBytes,
                       ptx::advance(from_b_, b_step_, i), i * kRowStep >= left);
    }
  }

  // Closes the slice's group of copies and moves the loader on. After its last tile the loader goes on with zeros, which
  // nobody reads: the count of groups stays in step.
  __device__ __forceinline__ void finish_load() {
    ptx::cp_async_commit();
    load_stage_ = stage_after(load_stage_);
    from_a_ += Config::kBlockK / 8;
    from_b_ += Config::kBlockK / 8;
    k_left_ -= Config::kBlockK;
    if (++load_slice_ == slices_) load_slice_ = 0;
    if (load_slice_ == slices_main_ || load_slice_ == 0) {
      Cursor loader = Parking<Config>::get(shared_, Parking<Config>::kLoader, work_, row_blocks_);
      if (load_slice_ == 0) {
        loader.next_tile();
        Parking<Config>::put(shared_, Parking<Config>::kLoader, loader);
      }
      if (loader.done())
        k_left_ = kNothingLeft;
      else
        aim(loader);
    }
  }

  // Of one step: all of A, and two pieces of B: one that is multiplied, one on its way. The first kAhead of A are there
  // twice, to be read before the step ends; registers for all of them are not there.
  struct Fragments {
    uint32_t a[2][Config::kMmaM][4];
    uint32_t b[2][4];
    __device__ __forceinline__ uint32_t (&a_of(int k16, int m))[4] {
      return a[m < Config::kAhead ? k16 % 2 : 0][m];
    }
  };

  __device__ __forceinline__ void read_a(Fragments& f, int k16, int m) {
    const uint32_t from = (read_stage_ + read_a_) ^ (k16 << 5);
    ptx::ldmatrix_x4(f.a_of(k16, m), from + m * 16 * LayoutA::kRowBytes);
  }
  __device__ __forceinline__ void read_b(Fragments& f, int k16, int n) {
    const uint32_t from = (read_stage_ + read_b_) ^ (k16 << 5);
    ptx::ldmatrix_x4(f.b[n % 2], from + (n / 2 * 32 + n % 2 * 4) * LayoutB::kRowBytes);
  }

  static __device__ __forceinline__ uint32_t stage_after(uint32_t stage) {
    stage += Config::kStageBytes;
    return stage == Config::kPipelineBytes ? 0 : stage;
  }

  // The slice at read_stage_ is complete for every thread, and everybody has read the slice before it.
  __device__ __forceinline__ void acquire_slice() {
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();
  }
  __device__ __forceinline__ void next_slice() {
    read_stage_ = stage_after(read_stage_);
    acquire_slice();
  }

  // 16 rows x 16 columns.
  __device__ __forceinline__ void multiply_piece(float* acc, const uint32_t (&a)[4],
                                                 const uint32_t (&b)[4]) {
    ptx::mma_m16n8k16<T>(acc, a, b[0], b[1]);
    ptx::mma_m16n8k16<T>(acc + 4, a, b[2], b[3]);
  }

  const Work& work_;
  uint8_t* shared_;
  int row_blocks_;
  uint32_t read_a_, read_b_, write_a_, write_b_;  // this thread's first places in the first stage
  uint32_t load_stage_ = 0, read_stage_ = 0;      // bytes from the first stage
  int slices_main_, slices_;
  int load_slice_ = 0;  // of the loader's tile
  const uint4*
      from_a_;  // where the loader's slice begins; this thread's rows from there, in pieces of 16 bytes:
  uint32_t a_[kCopiesA];
  const uint4* from_b_;  // this thread's first piece
  uint32_t b_step_;
  int k_left_;  // columns of K from this thread's piece on; none: zeros
  int b_left_;  // rows of B from this thread's first on; beyond: zeros
};

}  // namespace cce::cuda::sm80
