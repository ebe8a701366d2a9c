#include "cuda/sm90/backend.h"
#include "cuda/sm90/backward.cuh"
#include "cuda/sm90/launch.cuh"

namespace cce::cuda::sm90 {
namespace {

template <typename T, Epilogue kEpilogue>
cudaError_t run(const BackwardParams& p, cudaStream_t stream) {
  // One column tile a unit: the finest grain, so that the last wave of a chunk is as full as it can be.
  return launch_groups(backward_mainloop<T, kEpilogue>, backward_shared_bytes(), p.head, p.n, 1,
                       nullptr, stream, LogitParams(p.head.options, p.head.bias, p.head.c.rows),
                       p.rows, static_cast<int>(p.head.first_col),
                       DlogitsOut<T>{static_cast<T*>(p.dlogits), p.ld_dlogits, false});
}

template <typename T>
cudaError_t choose(const BackwardParams& p, cudaStream_t stream) {
  const bool plain = LogitParams(p.head.options, p.head.bias, p.head.c.rows).plain() &&
                     p.head.options.label_smoothing == 0.0;
  return plain ? run<T, Epilogue::kPlain>(p, stream) : run<T, Epilogue::kGeneral>(p, stream);
}

}  // namespace

cudaError_t backward(const BackwardParams& params, cudaStream_t stream) {
  return params.head.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(params, stream)
                                               : choose<__half>(params, stream);
}

}  // namespace cce::cuda::sm90
