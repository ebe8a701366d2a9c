// The long-K product of 128 x 192 tiles by wgmma, fed by the copy engine: D/64 slices from (E, C), then R/64 slices from
// (U, B), without joining them in memory.
//
// Shared memory: kStages slices, each an A tile (128, 64) and a B tile (192, 64) with the 128-byte swizzle, 40 KB; then a
// full and an empty barrier a stage, and one for each of warpgroups 0 and 1; the block's Deal, and the step that may begin.
// Persistent, one block a multiprocessor, three warpgroups:
// - Warpgroups 0 and 1 multiply: tile t of the block's stream belongs to warpgroup t % 2, all 128 rows of it (192
//   accumulators a thread). While one runs its epilogue the other has the tensor cores ("ping-pong").
// - Warpgroup 2 loads. Where every row counts, or there is a copy of E in the row order, one thread issues tensor copies for
//   both tiles, and a thread of another warp keeps it in step with other blocks (sm90/pace.cuh). Otherwise the rows of A are
//   not neighbours: its 128 threads gather them by cp.async, 16 bytes each, a sixth slower in all, and B still comes by
//   tensor copy.
// Clusters (sm90/launch.cuh): blocks on neighbouring row blocks of the same columns each load a part of the B tile, which goes
// to all of them (multicast). Of twins, two such groups in a cluster, those two blocks that have the same rows each load half of
// the A tile for both. So tiles cross the chip once for several blocks, which stay together whatever their epilogues take.
// Barrier protocol: full[s] completes when the bytes of the stage are there: one arrival (which names the bytes of the
// tensor copies, the other blocks' parts included), and in gather mode 128 more, when each thread's own cp.async have landed;
// whoever multiplies then orders them before the tensor cores' reads (fence.proxy.async). empty[s] completes by one arrival
// of each block that gets something of what this one loads, of the warpgroup that has multiplied the stage, one slice late, when
// its products have been waited for: then this block may write there. Blocks of a cluster end together. epilogue[w] completes by the 128 arrivals of
// the other warpgroup, before its first tile or after an epilogue: then warpgroup w may touch what both share. The named
// barrier kProductTurn + w lets warpgroup w issue a tile's products, which touch nothing shared; the other one gives it.
#pragma once

#include <cstdint>

#include "cuda/common/epilogue.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/config.h"
#include "cuda/sm90/groups.cuh"
#include "cuda/sm90/pace.cuh"
#include "cuda/sm90/tensor_map.h"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "csrc/cuda/sm90 is for sm_90a alone"
#endif

namespace cce::cuda::sm90 {

constexpr int kProductTurn = 1;
// A block's Deal, then the step that may begin.
static_assert(Config::kDealAt + sizeof(Deal) + 4 <= Config::kPipelineBytes + Config::kBarrierBytes);

// The stage that a thread is at, and the parity of its barriers' phase.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage == Config::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int slices) {
    const int to = stage + slices, wraps = to / Config::kStages;
    stage = to - wraps * Config::kStages;
    phase ^= wraps & 1;
  }
};

// Where things are in shared memory, and how many slices a tile has.
struct Pipeline {
  uint32_t stages, full, empty, epilogue, pace;
  int slices_main, slices;

  __device__ Pipeline(uint32_t base, const GroupWork& work)
      : stages(base),
        full(base + Config::kPipelineBytes),
        empty(full + 8 * Config::kStages),
        epilogue(empty + 8 * Config::kStages),
        pace(base + Config::kDealAt + sizeof(Deal)),
        slices_main((static_cast<int>(work.e.cols) + Config::kBlockK - 1) / Config::kBlockK),
        slices(slices_main +
               (static_cast<int>(work.u.cols) + Config::kBlockK - 1) / Config::kBlockK) {}
  __device__ __forceinline__ uint32_t a(int stage) const {
    return stages + stage * Config::kStageBytes;
  }
  __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + Config::kBytesA; }
};

// One thread, before anybody uses the barriers and the pace; the block then synchronises.
__device__ __forceinline__ void init_barriers(const Pipeline& pipe, const GroupWork& work,
                                              bool gather) {
  for (int s = 0; s < Config::kStages; ++s) {
    ptx::mbarrier_init(pipe.full + 8 * s, gather ? 129 : 1);
    // Everyone who gets something of what this block loads.
    ptx::mbarrier_init(pipe.empty + 8 * s, (1 << work.cluster_bits) + (work.is_twin && !gather));
  }
  for (int w = 0; w < Config::kConsumers; ++w) ptx::mbarrier_init(pipe.epilogue + 8 * w, 128);
  ptx::fence_mbarrier_init();
  ptx::shared_set(pipe.pace, Pace::kAhead - 1);
}

// A slice of a B tile, or, in a cluster, this block's part of it for all that have the same columns. row: the tile's first.
__device__ __forceinline__ void load_b(const GroupWork& work, const CUtensorMap* map, uint32_t to,
                                       uint32_t full, int k, int row) {
  const int bits = work.cluster_bits;
  if (bits > 0) {
    const int size = 1 << bits, rank = static_cast<int>(blockIdx.x) & (size - 1);
    ptx::tma_load_multicast<ptx::Caching::kNormal>(
        to + rank * (Config::kBytesB >> bits), map, full, k, row + rank * (Config::kBlockN >> bits),
        static_cast<uint16_t>(((1 << size) - 1) << work.side() * size));
  } else {
    ptx::tma_load<ptx::Caching::kNormal>(to, map, full, k, row);
  }
}

// A slice of an A tile, or, of twins, this block's half of it for both. row: the tile's first.
__device__ __forceinline__ void load_a(const GroupWork& work, const CUtensorMap* map, uint32_t to,
                                       uint32_t full, int k, int row) {
  if (work.is_twin) {
    const int rank = work.group_rank(), other = rank + (1 << work.group_bits);
    ptx::tma_load_multicast<ptx::Caching::kKeep>(to + work.side() * (Config::kBytesA / 2), map,
                                                 full, k, row + work.side() * (Config::kBlockM / 2),
                                                 static_cast<uint16_t>(1 << rank | 1 << other));
  } else {
    ptx::tma_load<ptx::Caching::kKeep>(to, map, full, k, row);
  }
}

// Both tiles of every slice by tensor copies; one thread. compact: A tiles from the matrices in the row order. A superblock's
// E is read again with every tile of C and is to stay in the second-level cache.
__device__ __forceinline__ void load_tiles(const GroupWork& work, const Maps& maps,
                                           const Pipeline& pipe, const Deal& deal, int row_blocks,
                                           bool compact) {
  const CUtensorMap* const e = compact ? &maps.e_compact : &maps.e;
  const CUtensorMap* const u = compact ? &maps.u_compact : &maps.u;
  Ring ring;
  Pace pace(work, pipe.slices, pipe.pace);
  for (Cursor at(work, deal); !at.done(); at.next_tile()) {
    // A group's last row blocks may not exist.
    const int row = min(at.row_block, row_blocks - 1) * Config::kBlockM;
#pragma unroll 1
    for (int s = 0; s < pipe.slices;) {
      pace.begin_step();
      const int end = min(s + pace.step_slices(), pipe.slices);
#pragma unroll 1
      for (; s < end; ++s, ring.next()) {
        const bool low_rank = s >= pipe.slices_main;
        const int k = (low_rank ? s - pipe.slices_main : s) * Config::kBlockK;
        const uint32_t full = pipe.full + 8 * ring.stage;
        ptx::mbarrier_wait(pipe.empty + 8 * ring.stage, ring.phase ^ 1);
        ptx::mbarrier_arrive_expect(full, Config::kStageBytes);
        load_a(work, low_rank ? u : e, pipe.a(ring.stage), full, k, row);
        load_b(work, low_rank ? &maps.lora_b : &maps.c, pipe.b(ring.stage), full, k,
               at.tile * Config::kBlockN);
      }
    }
    if (at.ends_unit()) pace.skip(work.tiles_per_split - at.tiles_of_unit());
  }
}

// A tiles by gathering rows, B tiles by tensor copies; all 128 threads of the warpgroup.
template <typename T>
__device__ __forceinline__ void gather_tiles(const GroupWork& work, const Maps& maps,
                                             const Pipeline& pipe, const Deal& deal, int count) {
  constexpr int kPieces = Config::kBlockK / 8, kRowStep = 128 / kPieces;
  constexpr int kCopies = Config::kBlockM / kRowStep;
  const int thread = threadIdx.x % 128, piece = thread % kPieces, row = thread / kPieces;
  const uint32_t write = row * 128 + ((piece ^ (row & 7)) << 4);  // rows 16 apart swizzle alike
  Ring ring;
  for (Cursor at(work, deal); !at.done(); at.next_tile()) {
    int rows[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int position = at.row_block * Config::kBlockM + row + i * kRowStep;
      rows[i] = __ldg(work.row_order + min(position, count - 1));
    }
#pragma unroll 1
    for (int s = 0; s < pipe.slices; ++s, ring.next()) {
      const bool low_rank = s >= pipe.slices_main;
      const Matrix& a = low_rank ? work.u : work.e;
      const int k = (low_rank ? s - pipe.slices_main : s) * Config::kBlockK;
      const uint32_t full = pipe.full + 8 * ring.stage;
      ptx::mbarrier_wait(pipe.empty + 8 * ring.stage, ring.phase ^ 1);
      if (thread == 0) {
        ptx::mbarrier_arrive_expect(full, Config::kBytesB);
        load_b(work, low_rank ? &maps.lora_b : &maps.c, pipe.b(ring.stage), full, k,
               at.tile * Config::kBlockN);
      }
      const T* from = static_cast<const T*>(a.data) + k + piece * 8;
      const bool beyond = k + piece * 8 >= a.cols;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        ptx::cp_async_16(pipe.a(ring.stage) + write + i * kRowStep * 128,
                         beyond ? a.data : from + rows[i] * a.ld, beyond);
      }
      ptx::mbarrier_arrive_after_copies(full);
    }
  }
  ptx::cp_async_wait<0>();
}

// One tile's product added to acc, from the stage at `ring` on. gather: A was written by ordinary copies. Gives the turn to
// the other warpgroup.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[Config::kMmaM][Config::kAccumulators],
                                         const GroupWork& work, const Pipeline& pipe, Ring& ring,
                                         bool gather, int other) {
  // A thread for each block that loads something for this one: those with the same columns, then the one with the same rows.
  const int mates = 1 << work.cluster_bits;
  const bool releases =
      static_cast<int>(threadIdx.x) % 128 < mates + (work.is_twin && !gather ? 1 : 0);
  const auto release = [&](int stage) {
    const uint32_t empty = pipe.empty + 8 * stage;
    if (!releases) return;
    if (work.cluster_size_bits() == 0) return ptx::mbarrier_arrive(empty);
    const int me = work.cluster_rank(), i = static_cast<int>(threadIdx.x) % 128;
    ptx::mbarrier_arrive_at(empty, i < mates ? (me & -mates) + i : me ^ mates);
  };
  int last = 0;
#pragma unroll 1
  for (int s = 0; s < pipe.slices; ++s) {
    ptx::mbarrier_wait(pipe.full + 8 * ring.stage, ring.phase);
    if (gather) ptx::fence_async_proxy();
    ptx::wgmma_fence();
    const uint64_t a = ptx::wgmma_descriptor(pipe.a(ring.stage));
    const uint64_t b = ptx::wgmma_descriptor(pipe.b(ring.stage));
#pragma unroll
    for (int k16 = 0; k16 < Config::kBlockK / 16; ++k16) {
#pragma unroll
      for (int m = 0; m < Config::kMmaM; ++m)
        ptx::wgmma_m64n192k16<T>(acc[m], a + 512 * m + 2 * k16, b + 2 * k16);
    }
    ptx::wgmma_commit();
    if (s > 0) {
      ptx::wgmma_wait<1>();
      release(last);
    }
    last = ring.stage;
    ring.next();
  }
  ptx::barrier_arrive(kProductTurn + other, 256);
  ptx::wgmma_wait<0>();
  release(last);
}

// What the accumulators of a tile start from: zero, or the bias of their columns.
__device__ __forceinline__ void start_accumulators(
    float (&acc)[Config::kMmaM][Config::kAccumulators], const float* bias, int first, int cols) {
  const float* from = bias + first;
  const int left = bias ? cols - first : 0;
#pragma unroll
  for (int j = 0; j < Config::kAccumulators / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = PairedColumns::at(j) + e;
      const float x = i < left ? __ldg(from + i) : 0.0f;
#pragma unroll
      for (int m = 0; m < Config::kMmaM; ++m) acc[m][4 * j + e] = acc[m][4 * j + 2 + e] = x;
    }
  }
}

// The stream of tiles of warpgroup 0 or 1. epilogue(acc, cursor) runs in the order of the tiles. bias: null for none.
template <typename T, typename TileEpilogue>
__device__ __forceinline__ void consume(const GroupWork& work, const Pipeline& pipe,
                                        const Deal& deal, bool gather, const float* bias,
                                        TileEpilogue&& epilogue) {
  // Known to be the same in a whole warp, so that what follows from it takes no register of a thread.
  const int mine = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0), other = mine ^ 1;
  if (mine == 1) {  // warpgroup 0 begins
    ptx::barrier_arrive(kProductTurn, 256);
    ptx::mbarrier_arrive(pipe.epilogue);
  }
  Ring ring;
  // Even: my turn; the next bit is the phase of epilogue[mine].
  int step = -mine;
  float acc[Config::kMmaM][Config::kAccumulators];
  for (Cursor at(work, deal); !at.done(); at.next_tile(), ++step) {
    if (step % 2 != 0) {
      ring.skip(pipe.slices);
      continue;
    }
    // Set rather than overwritten by the first product: their old values end here, which frees registers.
    start_accumulators(acc, bias, at.tile * Config::kBlockN + PairedColumns::first(),
                       static_cast<int>(work.c.rows));
    ptx::barrier_sync(kProductTurn + mine, 256);
    multiply<T>(acc, work, pipe, ring, gather, other);
    ptx::mbarrier_wait(pipe.epilogue + 8 * mine, step >> 1 & 1);
    epilogue(acc, at);
    ptx::mbarrier_arrive(pipe.epilogue + 8 * other);
  }
}

// The whole block: barriers, roles, streams. prepare() runs in all threads before the roles part.
template <typename T, typename Prepare, typename TileEpilogue>
__device__ __forceinline__ void run_block(const GroupWork& work, const Maps& maps, uint8_t* shared,
                                          int count, const float* bias, Prepare&& prepare,
                                          TileEpilogue&& epilogue) {
  const Pipeline pipe(ptx::shared_address(shared), work);
  const int row_blocks = (count + Config::kBlockM - 1) / Config::kBlockM;
  ptx::allow_next_grid();
  const bool all = count == work.e.rows, gather = !all && !work.compact;
  Deal& deal = *reinterpret_cast<Deal*>(shared + Config::kDealAt);
  if (threadIdx.x == 0) {
    init_barriers(pipe, work, gather);
    deal = work.deal(row_blocks);
  }
  prepare();
  if (work.cluster_size_bits() > 0)
    ptx::cluster_sync();
  else
    __syncthreads();
  if (threadIdx.x / 128 == Config::kConsumers) {
    ptx::give_registers<Config::kProducerRegisters>();
    if (gather) {
      gather_tiles<T>(work, maps, pipe, deal, count);
    } else if (threadIdx.x % 128 == 0) {
      load_tiles(work, maps, pipe, deal, row_blocks, !all);
    } else if (const Pace pace(work, pipe.slices, pipe.pace);
               threadIdx.x % 128 == 32 && pace.waits()) {
      pace.keep(Cursor(work, deal));
    }
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    consume<T>(work, pipe, deal, gather, bias, epilogue);
  }
  // Other blocks of the cluster may still arrive at barriers of this one.
  if (work.cluster_size_bits() > 0) {
    __syncwarp();
    ptx::cluster_sync();
  }
  // The second launch of two ends after the first: what comes after it in the stream waits for both.
  if (work.is_second()) ptx::wait_for_grids_before();
}

}  // namespace cce::cuda::sm90
