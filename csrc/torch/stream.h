// PyTorch's current stream, without linking to any CUDA library of PyTorch's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cce::torch_api {

// The stream that PyTorch would launch on for this device. Throws on a PyTorch that was built without CUDA.
cudaStream_t current_stream(int32_t device_index);

// Throws with the error's text when a launch failed; `what` names the kernel.
void check_cuda(cudaError_t error, const char* what);

}  // namespace cce::torch_api
