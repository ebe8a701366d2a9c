// Launches of kernels whose blocks wait for each other at barriers of the whole grid.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/device_info.h"

namespace cce::cuda {

// A block for each piece of work, one at least, but no more than `most` or than are on the device at once.
template <typename Params>
cudaError_t launch_together(void (*kernel)(Params), const Params& params, int64_t pieces, int most,
                            int threads, cudaStream_t stream) {
  most = std::min(most, current_device().multiprocessors);
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(pieces, 1, most));
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                     dim3(static_cast<unsigned>(threads)), arguments, 0, stream);
}

}  // namespace cce::cuda
