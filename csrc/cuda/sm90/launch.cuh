// How the sm_90 kernels' blocks are put on the chip: in groups of four, on neighbouring row blocks of the same columns, that
// share tiles of C as clusters. Clusters of four do not fit everywhere: a processing cluster of 18 multiprocessors has room for
// four of them and two blocks more. So there are two launches: as many clusters of four as fit at once, then groups of two
// clusters of two for the rest of the chip. The second one may start while the first runs (programmatic stream
// serialization) and ends after it.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/sm90/config.h"
#include "cuda/sm90/tensor_map.h"

namespace cce::cuda::sm90 {

// Groups are as large as leaves neither multiprocessors idle nor, of the row blocks, more than one in 32 without rows.
inline int choose_group_bits(int row_blocks, int multiprocessors) {
  int bits = Config::kMostClusterBits;
  for (; bits > 0; --bits) {
    const int size = 1 << bits, missing = (size - row_blocks % size) % size;
    if (multiprocessors % size == 0 && 32 * missing <= row_blocks) break;
  }
  return bits;
}

// One of the launches of a kernel: `groups` of its groups.
struct Launch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Launch(const Work& work, int groups, int shared_bytes, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {1u << work.cluster_bits, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = work.first_group > 0;
    config.gridDim = dim3(static_cast<unsigned>(groups << work.group_bits));
    config.blockDim = dim3(Config::kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = work.first_group > 0 ? 2 : 1;
  }
};

// How many clusters of four are on the current device at once; of every kernel one block fits on a multiprocessor.
template <typename Kernel>
int most_large_clusters(Kernel kernel, int shared_bytes) {
  static PerDevice<int> found;
  return found.get([&](int, int& most) {
    Work work;
    work.group_bits = work.cluster_bits = Config::kMostClusterBits;
    const Launch one(work, 1, shared_bytes, nullptr);
    if (cudaOccupancyMaxActiveClusters(&most, kernel, &one.config) != cudaSuccess) most = 0;
  });
}

// kernel(work, maps, args...) for the head's columns and the n rows of its order. pace: (kPaceSteps,), or null.
template <typename Kernel, typename... Args>
cudaError_t launch_groups(Kernel kernel, int shared_bytes, const Head& head, int64_t n,
                          int tiles_per_split, int32_t* pace, cudaStream_t stream, Args... args) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  Work work = make_work(head, n, tiles_per_split, Config::kBlockM, Config::kBlockN);
  const int multiprocessors = current_device().multiprocessors;
  const int row_blocks = (work.n + Config::kBlockM - 1) / Config::kBlockM;
  set_group_bits(work, choose_group_bits(row_blocks, multiprocessors), Config::kBlockM);
  work.groups = groups_with_work(work, Config::kBlockM, multiprocessors >> work.group_bits);
  if (pace) {
    error = cudaMemsetAsync(pace, 0, kPaceSteps * sizeof(int32_t), stream);
    if (error != cudaSuccess) return error;
    work.pace = pace;
  }
  const bool large = work.group_bits == Config::kMostClusterBits;
  const int first_groups =
      large ? std::min(work.groups, most_large_clusters(kernel, shared_bytes)) : work.groups;
  const auto launch_some = [&](int groups, int cluster_bits) {
    if (groups == 0) return cudaSuccess;
    work.cluster_bits = cluster_bits;
    Maps maps = {};
    const cudaError_t failed =
        make_maps(head, Config::kBlockM, Config::kBlockN >> cluster_bits, &maps);
    if (failed != cudaSuccess) return failed;
    const Launch launch(work, groups, shared_bytes, stream);
    const cudaError_t launched = cudaLaunchKernelEx(&launch.config, kernel, work, maps, args...);
    work.first_group += groups;
    return launched;
  };
  error = launch_some(first_groups, work.group_bits);
  if (error != cudaSuccess) return error;
  return launch_some(work.groups - first_groups, 1);
}

}  // namespace cce::cuda::sm90
