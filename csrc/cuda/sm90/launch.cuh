// How the sm_90 kernels' blocks are put on the chip: in groups of four, on neighbouring row blocks of the same columns, that
// share tiles of C, and most groups as twins, which share tiles of E: clusters of eight. Those do not fit everywhere: a
// processing cluster of 18 multiprocessors has room for two of them and two blocks more. So there are two launches: as many
// twins as fit at once, then single groups, of two clusters of two, for the rest of the chip. The second one may start while
// the first runs (programmatic stream serialization) and ends after it.
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

// One of the launches of a kernel.
struct Launch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Launch(const GroupWork& work, int shared_bytes, cudaStream_t stream) {
    const int clusters =
        work.is_twin ? work.twins : work.singles << (work.group_bits - work.cluster_bits);
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {1u << work.cluster_size_bits(), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = true;
    config.gridDim = dim3(static_cast<unsigned>(clusters << work.cluster_size_bits()));
    config.blockDim = dim3(Config::kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = work.is_second() ? 2 : 1;
  }
};

// How many twins are on the current device at once; of every kernel one block fits on a multiprocessor.
template <typename Kernel>
int most_twins(Kernel kernel, int shared_bytes) {
  static PerDevice<int> found;
  return found.get([&](int, int& most) {
    GroupWork work;
    work.group_bits = work.cluster_bits = Config::kMostClusterBits;
    work.is_twin = true;
    work.twins = 1;
    const Launch one(work, shared_bytes, nullptr);
    if (allow_shared_memory(kernel, shared_bytes) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&most, kernel, &one.config) != cudaSuccess)
      most = 0;
  });
}

// Which groups share the work, of which the rows and splits are known.
template <typename Kernel>
void choose_groups(Kernel kernel, int shared_bytes, GroupWork& work) {
  const int multiprocessors = current_device().multiprocessors;
  work.group_bits = choose_group_bits(row_blocks_of(work, Config::kBlockM), multiprocessors);
  work.superblock = superblock_of(work, Config::kBlockM << work.group_bits);
  const int groups = multiprocessors >> work.group_bits;
  const int most =
      work.group_bits == Config::kMostClusterBits ? most_twins(kernel, shared_bytes) : 0;
  work.pair_bits = most > 0;
  const int64_t pairs =
      int64_t{row_blocks_of(work, Config::kBlockM << work.group_bits)} * work.paired_splits();
  work.twins = static_cast<int>(std::min<int64_t>(most, pairs));
  work.singles =
      most > 0 ? groups - 2 * work.twins : static_cast<int>(std::clamp<int64_t>(pairs, 1, groups));
}

// kernel(work, maps, args...) for the head's columns and the n rows of its order. pace: (kPaceSteps,), or null.
template <typename Kernel, typename... Args>
cudaError_t launch_groups(Kernel kernel, int shared_bytes, const Head& head, int64_t n,
                          int tiles_per_split, int32_t* pace, cudaStream_t stream, Args... args) {
  cudaError_t error = allow_shared_memory(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  GroupWork work{make_work(head, n, tiles_per_split, Config::kBlockN)};
  choose_groups(kernel, shared_bytes, work);
  if (pace) {
    error = cudaMemsetAsync(pace, 0, kPaceSteps * sizeof(int32_t), stream);
    if (error != cudaSuccess) return error;
    work.pace = pace;
  }
  const auto launch_some = [&](bool twins, int cluster_bits) {
    work.is_twin = twins;
    work.cluster_bits = cluster_bits;
    Maps maps = {};
    const cudaError_t failed =
        make_maps(head, Config::kBlockM >> twins, Config::kBlockN >> cluster_bits, &maps);
    if (failed != cudaSuccess) return failed;
    const Launch launch(work, shared_bytes, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, work, maps, args...);
  };
  if (work.twins == 0) return launch_some(false, work.group_bits);
  error = launch_some(true, work.group_bits);
  if (error != cudaSuccess || work.singles == 0) return error;
  return launch_some(false, 1);
}

}  // namespace cce::cuda::sm90
