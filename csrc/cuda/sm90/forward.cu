#include "cuda/sm90/backend.h"
#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/launch.cuh"

namespace cce::cuda::sm90 {
namespace {

template <typename T, Mode kMode, bool kTraining>
cudaError_t run(const ForwardParams& p, cudaStream_t stream) {
  return launch_groups(forward_mainloop<T, kMode, kTraining>, forward_shared_bytes(kTraining),
                       p.head, p.n, p.tiles_per_split, p.pace, stream,
                       LogitParams(p.head.options, p.head.bias, p.head.c.rows), p.partials,
                       p.candidates, p.n, static_cast<int>(p.head.first_col));
}

template <typename T, Mode kMode>
cudaError_t choose(const ForwardParams& p, cudaStream_t stream) {
  return p.candidates.pool ? run<T, kMode, true>(p, stream) : run<T, kMode, false>(p, stream);
}

template <typename T>
cudaError_t choose(const ForwardParams& p, cudaStream_t stream) {
  switch (mode_of(p)) {
    case Mode::kPlain:
      return choose<T, Mode::kPlain>(p, stream);
    case Mode::kGeneral:
      return choose<T, Mode::kGeneral>(p, stream);
    default:
      return choose<T, Mode::kMetrics>(p, stream);
  }
}

}  // namespace

int64_t forward_rounds(int64_t n, int64_t splits) {
  GroupWork work;
  work.n = static_cast<int>(n);
  work.splits = static_cast<int>(splits);
  choose_groups(forward_mainloop<__nv_bfloat16, Mode::kPlain, true>, forward_shared_bytes(true),
                work);
  return work.deal(row_blocks_of(work, Config::kBlockM)).rounds;
}

cudaError_t forward(const ForwardParams& params, cudaStream_t stream) {
  return params.head.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(params, stream)
                                               : choose<__half>(params, stream);
}

}  // namespace cce::cuda::sm90
