#include "torch/stream.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

// Weak: the symbol is there only when PyTorch itself was built with CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace cce::torch_api {

cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr,
      "cce_ext was given a CUDA tensor, but this PyTorch was built without CUDA. Install a "
      "PyTorch with CUDA, or move the tensors to the CPU.");
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device_index, &stream);
  STD_TORCH_CHECK(error == 0, "cannot read PyTorch's current CUDA stream of device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace cce::torch_api
