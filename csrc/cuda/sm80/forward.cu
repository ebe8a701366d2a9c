#include "cuda/common/launch.cuh"
#include "cuda/sm80/backend.h"
#include "cuda/sm80/forward.cuh"

namespace cce::cuda::sm80 {
namespace {

template <typename T, typename Config, bool kGeneral, bool kTraining>
cudaError_t launch_mode(const ForwardParams& p, cudaStream_t stream) {
  const Work work = make_work(p.head, p.n, p.tiles_per_split, Config::kBlockM, Config::kBlockN);
  const LogitParams logits(p.head.options, p.head.bias, p.head.c.rows);
  return launch<Config>(forward_mainloop<T, Config, kGeneral, kTraining>,
                        forward_shared_bytes<Config>(kTraining), work, stream, logits, p.partials,
                        p.candidates, p.n, static_cast<int>(p.head.first_col));
}

template <typename T, typename Config, bool kGeneral>
cudaError_t run(const ForwardParams& p, cudaStream_t stream) {
  return p.candidates.pool ? launch_mode<T, Config, kGeneral, true>(p, stream)
                           : launch_mode<T, Config, kGeneral, false>(p, stream);
}

template <typename Config>
bool fits() {
  return current_device().shared_bytes >= forward_shared_bytes<Config>(true);
}

template <typename T>
cudaError_t choose(const ForwardParams& p, cudaStream_t stream) {
  const bool plain = LogitParams(p.head.options, p.head.bias, p.head.c.rows).plain() &&
                     !p.partials.logit_sum && !p.partials.weighted;
  if (fits<Huge>()) return plain ? run<T, Huge, false>(p, stream) : run<T, Huge, true>(p, stream);
  if (fits<Large>())
    return plain ? run<T, Large, false>(p, stream) : run<T, Large, true>(p, stream);
  return run<T, Small, true>(p, stream);
}

}  // namespace

cudaError_t forward(const ForwardParams& params, cudaStream_t stream) {
  return params.head.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(params, stream)
                                               : choose<__half>(params, stream);
}

std::string unsupported() {
  const int capability = current_device().capability;
  if (capability >= 80) return "";
  return "sm80: needs compute capability 8.0 (Ampere) or newer, this GPU has " +
         std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

}  // namespace cce::cuda::sm80
