#include "cuda/common/launch.cuh"
#include "cuda/sm80/backend.h"
#include "cuda/sm80/forward.cuh"

namespace cce::cuda::sm80 {
namespace {

template <typename T, typename Config, Mode kMode, bool kTraining>
cudaError_t launch_mode(const ForwardParams& p, cudaStream_t stream) {
  const Work work = make_work(p.head, p.n, p.tiles_per_split, Config::kBlockN);
  const LogitParams logits(p.head.options, p.head.bias, p.head.c.rows);
  return launch<Config>(forward_mainloop<T, Config, kMode, kTraining>,
                        forward_shared_bytes<Config>(kTraining), work, stream, logits, p.partials,
                        p.candidates, p.n, static_cast<int>(p.head.first_col));
}

template <typename T, typename Config, Mode kMode>
cudaError_t run(const ForwardParams& p, cudaStream_t stream) {
  return p.candidates.pool ? launch_mode<T, Config, kMode, true>(p, stream)
                           : launch_mode<T, Config, kMode, false>(p, stream);
}

template <typename T, typename Config>
cudaError_t run(const ForwardParams& p, cudaStream_t stream) {
  return mode_of(p) == Mode::kPlain ? run<T, Config, Mode::kPlain>(p, stream)
                                    : run<T, Config, Mode::kMetrics>(p, stream);
}

template <typename Config>
bool fits() {
  return runs_here<Config>(forward_shared_bytes<Config>(true));
}

template <typename T>
cudaError_t choose(const ForwardParams& p, cudaStream_t stream) {
  if (fits<Huge>()) return run<T, Huge>(p, stream);
  if (fits<Large>()) return run<T, Large>(p, stream);
  return run<T, Small, Mode::kMetrics>(p, stream);
}

}  // namespace

int64_t forward_rounds(int64_t n, int64_t splits) {
  const int64_t units = (n + kRowBlock - 1) / kRowBlock * splits;
  const int64_t blocks = current_device().multiprocessors;
  return (units + blocks - 1) / blocks;
}

cudaError_t forward(const ForwardParams& params, cudaStream_t stream) {
  return params.head.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(params, stream)
                                               : choose<__half>(params, stream);
}

int block_n() { return fits<Huge>() ? Huge::kBlockN : Large::kBlockN; }
static_assert(Small::kBlockN == Large::kBlockN);
static_assert(kGroupCols % Huge::kBlockN == 0 && kGroupCols % Large::kBlockN == 0);

std::string unsupported() {
  const int capability = current_device().capability;
  if (capability >= 80) return "";
  return "sm80: needs compute capability 8.0 (Ampere) or newer, this GPU has " +
         std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

}  // namespace cce::cuda::sm80
