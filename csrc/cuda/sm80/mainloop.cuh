// The long-K product of one 128 x kBlockN tile by mma.sync, fed by cp.async: D/kBlockK slices from (E, C), then R/kBlockK
// slices from (U, B), without joining them in memory.
//
// Shared memory: kStages slices, each an A tile (128, kBlockK) and a B tile (kBlockN, kBlockK), swizzled (common/swizzle);
// then cursors.
// Warps: all eight load and multiply; warp (m, n) of the 2 x 4 grid owns 64 rows x kWarpN columns. A step of 16 in K is
// multiplied in pieces of 16 columns, so that few fragments of B are in registers.
// Barrier protocol: slices are numbered in one stream over all tiles and units of a block. Near the end of slice s, when
// all its fragments have been read, a thread waits for its own copies of slice s + 1 (cp.async.wait_group); __syncthreads
// makes everybody's copies visible and says that everybody has read slice s, whose buffer the copies of slice s + kStages
// then overwrite, a part at each step of 16 in K so that they do not hold up the products. The stream does not stop at a
// tile's end: while the epilogue runs, the next tile's first slices are on their way, the first of them complete.
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

// Cursors at rest, in shared memory behind the pipeline, each warp's own: registers are for the accumulators. All lanes of
// a warp take part.
template <typename Config>
struct Parking {
  enum Which { kLoader, kEpilogue };
  static __device__ __forceinline__ int4* slot(uint8_t* shared, int which, int thread) {
    return reinterpret_cast<int4*>(shared + Config::kPipelineBytes) + 2 * (thread / 32) + which;
  }
  static __device__ __forceinline__ void put(uint8_t* shared, Which which, const Cursor& cursor) {
    const int thread = ptx::thread_again();
    __syncwarp();
    if (thread % 32 == 0) *slot(shared, which, thread) = cursor.place();
    __syncwarp();
  }
  static __device__ __forceinline__ Cursor get(uint8_t* shared, Which which, const Work& work,
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
  using Places = Parking<Config>;
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
    Places::put(shared, Places::kLoader, loader);
    aim(loader);
    for (int s = 0; s < Config::kStages - 1; ++s) {
#pragma unroll
      for (int part = 0; part < kSteps; ++part) load_part(part);
      ptx::cp_async_commit();
      next_load();
    }
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();
  }

  // Everybody's copies that were started before the tile just multiplied are complete; needed only for tiles so short in K
  // that multiply() has not seen to it.
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
#pragma unroll
    for (int p = 0; p < Config::kAheadB; ++p) read_b(f, read_stage_, p);
#pragma unroll
    for (int m = 0; m < Config::kMmaM; ++m) read_a(f, read_stage_, 0, m);
    for (int slice = 0; slice < slices_; ++slice) {
      uint32_t stage = read_stage_;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int k = p / kPiecesN, n = p % kPiecesN;
        if (n == 0) load_part(k);
        if (p == kPieces - Config::kAheadB) {
          ptx::cp_async_commit();
          next_load();
          ptx::cp_async_wait<Config::kStages - 2>();
          __syncthreads();
          stage = read_stage_ = stage_after(read_stage_);
        }
        // Behind the slice's last step comes the next slice's first one.
        read_b(f, stage, (p + Config::kAheadB) % kPieces);
        const int next = (k + 1) % kSteps;
        const bool early = p - n >= kPieces - Config::kAheadB || k + 1 < kSteps;
#pragma unroll
        for (int m = 0; m < Config::kMmaM; ++m) {
          const bool ahead = m < Config::kAheadA && early;
          if (ahead && n == max(0, kPiecesN - 1 - Config::kAheadA + m)) read_a(f, stage, next, m);
          multiply_piece(acc[m] + 8 * n, f.a_of(k, m), f.b_of(p));
          if (!ahead && n + 1 == kPiecesN) read_a(f, stage, next, m);
        }
      }
    }
  }

  // Before the memory is used for something else, or the block ends.
  __device__ __forceinline__ void finish() {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
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
  static constexpr int kPieces = kSteps * kPiecesN;
  static_assert(kCopiesA % kSteps == 0 && kCopiesB % kSteps == 0);
  static_assert(kPieces % (2 * Config::kAheadB) == 0,
                "the buffers of the pieces must keep their order from slice to slice");

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

  // Moves the loader on. After its last tile it goes on with zeros, which nobody reads: the count of groups stays in step.
  __device__ __forceinline__ void next_load() {
    load_stage_ = stage_after(load_stage_);
    from_a_ += Config::kBlockK / 8;
    from_b_ += Config::kBlockK / 8;
    k_left_ -= Config::kBlockK;
    if (++load_slice_ == slices_) load_slice_ = 0;
    if (load_slice_ == slices_main_ || load_slice_ == 0) {
      Cursor loader = Places::get(shared_, Places::kLoader, work_, row_blocks_);
      if (load_slice_ == 0) {
        loader.next_tile();
        Places::put(shared_, Places::kLoader, loader);
      }
      if (loader.done())
        k_left_ = kNothingLeft;
      else
        aim(loader);
    }
  }

  // A of one step, and pieces of B: those that are multiplied and those on their way. The first kAheadA of A are there
  // twice, to be read before the step ends.
  struct Fragments {
    uint32_t a[2][Config::kMmaM][4];
    uint32_t b[2 * Config::kAheadB][4];
    __device__ __forceinline__ uint32_t (&a_of(int k16, int m))[4] {
      return a[m < Config::kAheadA ? k16 % 2 : 0][m];
    }
    __device__ __forceinline__ uint32_t (&b_of(int piece))[4] {
      return b[piece % (2 * Config::kAheadB)];
    }
  };

  __device__ __forceinline__ void read_a(Fragments& f, uint32_t stage, int k16, int m) {
    ptx::ldmatrix_x4(f.a_of(k16, m),
                     ((stage + read_a_) ^ (k16 << 5)) + m * 16 * LayoutA::kRowBytes);
  }
  __device__ __forceinline__ void read_b(Fragments& f, uint32_t stage, int piece) {
    const int k16 = piece / kPiecesN, n = piece % kPiecesN;
    ptx::ldmatrix_x4(f.b_of(piece), ((stage + read_b_) ^ (k16 << 5)) +
                                        (n / 2 * 32 + n % 2 * 4) * LayoutB::kRowBytes);
  }

  static __device__ __forceinline__ uint32_t stage_after(uint32_t stage) {
    stage += Config::kStageBytes;
    return stage == Config::kPipelineBytes ? 0 : stage;
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
