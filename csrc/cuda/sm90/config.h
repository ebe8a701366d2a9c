// Tile shape and roles of the sm_90 kernels, as data.
#pragma once

namespace cce::cuda::sm90 {

// 128 x 192 tiles; two warpgroups that multiply take them in turn, a third one loads.
struct Config {
  static constexpr int kBlockM = 128, kBlockN = 192, kBlockK = 64, kStages = 5;
  static constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
  static constexpr int kMmaM = kBlockM / 64;         // m64 tiles of a warpgroup
  static constexpr int kAccumulators = kBlockN / 2;  // numbers a thread holds of one m64 tile
  static constexpr int kBytesA = kBlockM * kBlockK * 2, kBytesB = kBlockN * kBlockK * 2;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // Of the blocks of a cluster that share a tile of C, or as twins one of E, each loads a part of its rows for all.
  static constexpr int kMostClusterBits = 2;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  // After the barriers: how the work is dealt out, and how far it has come (sm90/groups.cuh, pace.cuh).
  static constexpr int kDealAt = kPipelineBytes + 8 * (2 * kStages + kConsumers);
  static constexpr int kBarrierBytes = kDealAt - kPipelineBytes + 32;
  static constexpr int kAlignment = 1024;  // of a stage's tiles, for the 128-byte swizzle
  static_assert(kBytesA / 2 % kAlignment == 0 && (kBytesB >> kMostClusterBits) % kAlignment == 0);
};

}  // namespace cce::cuda::sm90
