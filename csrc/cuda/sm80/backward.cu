#include "cuda/common/launch.cuh"
#include "cuda/sm80/backend.h"
#include "cuda/sm80/backward.cuh"

namespace cce::cuda::sm80 {
namespace {

template <typename T, typename Config, Epilogue kEpilogue>
cudaError_t launch_as(const BackwardParams& p, cudaStream_t stream) {
  // One column tile a unit: the finest grain, so that the last wave of a chunk is as full as it can be.
  const Work work = make_work(p.head, p.n, 1, Config::kBlockN);
  return launch<Config>(backward_mainloop<T, Config, kEpilogue>, backward_shared_bytes<Config>(),
                        work, stream, LogitParams(p.head.options, p.head.bias, p.head.c.rows),
                        p.rows, static_cast<int>(p.head.first_col),
                        DlogitsOut<T>{static_cast<T*>(p.dlogits), p.ld_dlogits, false});
}

template <typename T, typename Config, bool kHasPlain>
cudaError_t run(const BackwardParams& p, cudaStream_t stream) {
  const bool plain = LogitParams(p.head.options, p.head.bias, p.head.c.rows).plain() &&
                     p.head.options.label_smoothing == 0.0;
  if constexpr (kHasPlain) {
    if (plain) return launch_as<T, Config, Epilogue::kPlain>(p, stream);
  }
  return launch_as<T, Config, Epilogue::kGeneral>(p, stream);
}

template <typename Config>
bool fits() {
  return runs_here<Config>(backward_shared_bytes<Config>());
}

template <typename T>
cudaError_t choose(const BackwardParams& p, cudaStream_t stream) {
  if (fits<Huge>()) return run<T, Huge, true>(p, stream);
  if (fits<Large>()) return run<T, Large, true>(p, stream);
  return run<T, Small, false>(p, stream);
}

}  // namespace

cudaError_t backward(const BackwardParams& params, cudaStream_t stream) {
  return params.head.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(params, stream)
                                               : choose<__half>(params, stream);
}

}  // namespace cce::cuda::sm80
