// From plain parameters to the kernels' view of the work, and the launch itself; every architecture and kernel shares it.
#pragma once

#include <algorithm>

#include "cuda/common/epilogue.cuh"
#include "cuda/common/work.cuh"
#include "cuda/device_info.h"

namespace cce::cuda {

inline Work make_work(const Head& head, int64_t n, int tiles_per_split, int block_m, int block_n) {
  Work w;
  w.e = head.e;
  w.c = head.c;
  w.u = head.u;
  w.lora_b = head.lora_b;
  w.row_order = head.order.rows;
  w.row_count = head.order.count;
  w.compact = head.e_compact.data != nullptr;
  w.n = static_cast<int>(n);
  w.column_tiles = static_cast<int>((head.c.rows + block_n - 1) / block_n);
  w.tiles_per_split = tiles_per_split;
  w.splits = (w.column_tiles + tiles_per_split - 1) / tiles_per_split;
  w.superblock = superblock_rows(head.e.cols + head.u.cols, block_m);
  return w;
}

// Blocks work in pairs, on neighbouring row blocks, unless that would leave one block in many without rows.
inline void pair_blocks(Work& w, int block_m) {
  const int row_blocks = (w.n + block_m - 1) / block_m;
  if (row_blocks % 2 != 0 && row_blocks < 32) return;
  w.cluster_bits = 1;
  w.superblock = std::max(1, w.superblock / 2);
}

// How much the forward's epilogue has to do.
inline Mode mode_of(const ForwardParams& p) {
  if (p.partials.weighted) return Mode::kMetrics;
  const bool plain = LogitParams(p.head.options, p.head.bias, p.head.c.rows).plain();
  return plain && !p.partials.logit_sum ? Mode::kPlain : Mode::kGeneral;
}

// One persistent block on each multiprocessor that can have work, in clusters if the work says so.
template <typename Config, typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, int shared_bytes, const Work& work, cudaStream_t stream,
                   Args... args) {
  const int size = 1 << work.cluster_bits;
  const int64_t row_blocks = (work.n + Config::kBlockM - 1) / Config::kBlockM;
  const int64_t units = std::max<int64_t>(1, (row_blocks + size - 1) / size * work.splits);
  const int64_t clusters = std::min<int64_t>(units, current_device().multiprocessors / size);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * size));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = size > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, work, args...);
}

}  // namespace cce::cuda
