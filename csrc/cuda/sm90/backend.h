// The sm_90 backend's entry points, as dispatch.cpp calls them.
#pragma once

#include <string>

#include "cuda/params.h"

namespace cce::cuda::sm90 {

int block_n();

// Why this backend cannot run on the current device, or empty.
std::string unsupported();
int64_t forward_rounds(int64_t n, int64_t splits);
cudaError_t forward(const ForwardParams& params, cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace cce::cuda::sm90
