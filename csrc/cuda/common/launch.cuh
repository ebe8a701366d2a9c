// From plain parameters to the kernels' view of the work, and the launch itself; every architecture and kernel shares it.
#pragma once

#include <algorithm>

#include "cuda/common/epilogue.cuh"
#include "cuda/common/work.cuh"
#include "cuda/device_info.h"

namespace cce::cuda {

// Groups of so many blocks.
inline void set_group_bits(Work& w, int bits, int block_m) {
  const int rows = block_m << bits;
  w.group_bits = bits;
  w.superblock =
      superblock_height((w.n + rows - 1) / rows, 2 * (w.e.cols + w.u.cols) * int64_t{rows});
}

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
  set_group_bits(w, 0, block_m);
  return w;
}

// How much the forward's epilogue has to do.
inline Mode mode_of(const ForwardParams& p) {
  if (p.partials.weighted) return Mode::kMetrics;
  const bool plain = LogitParams(p.head.options, p.head.bias, p.head.c.rows).plain();
  return plain && !p.partials.logit_sum ? Mode::kPlain : Mode::kGeneral;
}

// The groups that can have work, of as many as the device has room for: at least one.
inline int groups_with_work(const Work& work, int block_m, int most) {
  const int64_t size = int64_t{block_m} << work.group_bits;
  const int64_t units = (work.n + size - 1) / size * work.splits;
  return static_cast<int>(std::clamp<int64_t>(units, 1, most));
}

// One persistent block on each multiprocessor that can have work.
template <typename Config, typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, int shared_bytes, Work work, cudaStream_t stream, Args... args) {
  work.groups = groups_with_work(work, Config::kBlockM, current_device().multiprocessors);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<work.groups, Config::kThreads, shared_bytes, stream>>>(work, args...);
  return cudaGetLastError();
}

}  // namespace cce::cuda
