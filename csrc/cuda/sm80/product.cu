#include <algorithm>

#include "cuda/device_info.h"
#include "cuda/sm80/backend.h"
#include "cuda/sm80/product.cuh"

namespace cce::cuda::sm80 {
namespace {

template <typename T, typename Out, typename Config, bool kTransposed>
cudaError_t launch_as(const ProductParams& p, cudaStream_t stream) {
  const auto kernel = product_mainloop<T, Out, Config, kTransposed>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kPipelineBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (p.m + Config::kBlockM - 1) / Config::kBlockM *
                        ((p.n + Config::kBlockN - 1) / Config::kBlockN);
  const int blocks = static_cast<int>(std::min<int64_t>(tiles, current_device().multiprocessors));
  kernel<<<blocks, Config::kThreads, Config::kPipelineBytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, typename Out, typename Config>
cudaError_t run(const ProductParams& p, cudaStream_t stream) {
  return p.transposed ? launch_as<T, Out, Config, true>(p, stream)
                      : launch_as<T, Out, Config, false>(p, stream);
}

template <typename T, typename Out>
cudaError_t choose(const ProductParams& p, cudaStream_t stream) {
  return current_device().shared_bytes >= Large::kPipelineBytes ? run<T, Out, Large>(p, stream)
                                                                : run<T, Out, Small>(p, stream);
}

template <typename T>
cudaError_t choose(const ProductParams& p, cudaStream_t stream) {
  return p.out_fp32 ? choose<T, float>(p, stream) : choose<T, T>(p, stream);
}

}  // namespace

cudaError_t product(const ProductParams& params, cudaStream_t stream) {
  if (params.m == 0 || params.n == 0 || params.k == 0) return cudaSuccess;
  return params.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(params, stream)
                                          : choose<__half>(params, stream);
}

}  // namespace cce::cuda::sm80
