// Tile shapes of the sm_80 kernels, as data.
#pragma once

#include "cuda/device_info.h"

namespace cce::cuda::sm80 {

// 128 x kBlockN tiles, eight warps of 64 x kWarpN in a 2 x 4 grid, one block a multiprocessor. AheadA, AheadB: fragments of
// a step of 16 in K that are read before they are needed, m16 tiles of A and n16 pieces of B, as registers allow. From, Before:
// compute capabilities of the chips that use the tile in forward and backward; these are compiled for no others.
template <int BlockN, int BlockK, int Stages, int AheadA, int AheadB, int From, int Before>
struct Config {
  static constexpr int kBlockM = 128, kBlockN = BlockN, kBlockK = BlockK, kStages = Stages;
  static constexpr int kWarpsM = 2, kWarpsN = 4, kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps;
  static constexpr int kWarpM = kBlockM / kWarpsM, kWarpN = kBlockN / kWarpsN;
  static constexpr int kMmaM = kWarpM / 16;             // m16 tiles of a warp
  static constexpr int kAccumulators = kWarpN / 8 * 4;  // numbers a thread holds of one m16 tile
  static constexpr int kAheadA = AheadA, kAheadB = AheadB;
#ifdef __CUDA_ARCH__
  static constexpr bool kCompiled = __CUDA_ARCH__ >= 10 * From && __CUDA_ARCH__ < 10 * Before;
#endif
  static constexpr int kFrom = From, kBefore = Before;
  static constexpr int kBytesA = kBlockM * kBlockK * 2, kBytesB = kBlockN * kBlockK * 2;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kPipelineBytes + 2 * kWarps * 16;  // and cursors
};

// Whether the current device uses this tile in a kernel of so much shared memory.
template <typename Config>
bool runs_here(int shared_bytes) {
  const DeviceInfo& device = current_device();
  return device.capability >= Config::kFrom && device.capability < Config::kBefore &&
         device.shared_bytes >= shared_bytes;
}

constexpr int kNewest = 1000;  // of no chip

// H100 and newer data-centre chips (227 KB of shared memory): 192 KB in three stages.
using Huge = Config<384, 64, 3, 0, 2, 90, kNewest>;
// A100 (163 KB): 144 KB in three stages.
using Large = Config<256, 64, 3, 4, 4, 80, 86>;
// All others, as GA10x, AD10x and consumer Blackwell (99 KB): 72 KB in three stages. Compiled for all, because code for an older
// chip runs on newer ones.
using Small = Config<256, 32, 3, 4, 4, 80, kNewest>;

}  // namespace cce::cuda::sm80
