#include "cuda/common/launch.cuh"
#include "cuda/device_info.h"
#include "cuda/sm80/backend.h"
#include "cuda/sm80/exact_rows.cuh"

namespace cce::cuda::sm80 {
namespace {

template <typename T, typename Config>
cudaError_t run(ExactRowsParams p, cudaStream_t stream) {
  const auto kernel = exact_rows_kernel<T, Config>;
  constexpr int kBytes = backward_shared_bytes<Config>();
  const cudaError_t error = allow_shared_memory(kernel, kBytes);
  if (error != cudaSuccess) return error;
  void* args[] = {&p};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(current_device().multiprocessors), dim3(Config::kThreads),
                                     args, kBytes, stream);
}

template <typename T>
cudaError_t choose(const ExactRowsParams& p, cudaStream_t stream) {
  const bool large = current_device().shared_bytes >= backward_shared_bytes<Large>() + 1024;
  return large ? run<T, Large>(p, stream) : run<T, Small>(p, stream);
}

}  // namespace

cudaError_t exact_rows(const ExactRowsParams& params, cudaStream_t stream) {
  if (params.n == 0 || params.head.c.rows == 0) return cudaSuccess;
  return params.head.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(params, stream)
                                               : choose<__half>(params, stream);
}

}  // namespace cce::cuda::sm80
