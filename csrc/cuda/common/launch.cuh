// From plain parameters to the kernels' view of the work, and the launch itself; every architecture and kernel shares it.
#pragma once

#include <algorithm>

#include "cuda/common/epilogue.cuh"
#include "cuda/common/work.cuh"
#include "cuda/device_info.h"

namespace cce::cuda {

// Blocks of so many rows, and how many of them are a superblock.
inline int row_blocks_of(const Work& w, int rows) {
  return static_cast<int>((int64_t{w.n} + rows - 1) / rows);
}
inline int superblock_of(const Work& w, int rows) {
  return superblock_height(row_blocks_of(w, rows), 2 * (w.e.cols + w.u.cols) * int64_t{rows});
}

// All but the superblock, which whoever deals the work out chooses.
inline Work make_work(const Head& head, int64_t n, int tiles_per_split, int block_n) {
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
  return w;
}

// How much the forward's epilogue has to do.
inline Mode mode_of(const ForwardParams& p) {
  if (p.partials.weighted) return Mode::kMetrics;
  const bool plain = LogitParams(p.head.options, p.head.bias, p.head.c.rows).plain();
  return plain && !p.partials.logit_sum ? Mode::kPlain : Mode::kGeneral;
}

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// One persistent block on each multiprocessor that can have work.
template <typename Config, typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, int shared_bytes, Work work, cudaStream_t stream, Args... args) {
  const cudaError_t error = allow_shared_memory(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  work.superblock = superblock_of(work, Config::kBlockM);
  const int64_t units = int64_t{row_blocks_of(work, Config::kBlockM)} * work.splits;
  const auto blocks = std::clamp<int64_t>(units, 1, current_device().multiprocessors);
  kernel<<<static_cast<unsigned>(blocks), Config::kThreads, shared_bytes, stream>>>(work, args...);
  return cudaGetLastError();
}

}  // namespace cce::cuda
