// What the loss is: soft capping, smoothing, which rows count, and the gradient by a logit. Host and device share these
// lines, so that the CPU tests prove what the GPU runs. `Math` supplies tanh (exact on the host, fast on the device).
// Formulas: with a = dnll + dlse and d = dnll,
//   G[n,j] = (a p[n,j] - d ((1 - eps) [j = t] + eps / V)) * softcap'(x) * logit_scale.
#pragma once

#include "core/params.h"

#if defined(__CUDACC__)
#define CCE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CCE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace cce::core {

// cap * tanh(x / cap)
template <typename Math, typename T>
CCE_HOST_DEVICE T softcap(T x, T cap, T inv_cap) {
  return cap * Math::tanh(x * inv_cap);
}

// The derivative of softcap at x, from its value z = softcap(x).
template <typename T>
CCE_HOST_DEVICE T softcap_grad(T z, T inv_cap) {
  const T r = z * inv_cap;
  return (T(1) - r) * (T(1) + r);  // near saturation 1 - r * r would round the difference away
}

CCE_HOST_DEVICE TargetKind classify_target(int64_t target, int64_t shard_size,
                                           const LossOptions& options) {
  if (target == options.ignore_index) return TargetKind::kIgnored;
  if (target < 0 || target >= options.vocab_total) return TargetKind::kInvalid;
  const int64_t local = target - options.vocab_start;
  return local >= 0 && local < shard_size ? TargetKind::kHere : TargetKind::kElsewhere;
}

// Negative log-likelihood of a row against the smoothed target; inv_vocab = 1 / vocab_total.
template <typename T>
CCE_HOST_DEVICE T nll(T lse, T target_logit, T logit_sum, T eps, T inv_vocab) {
  // Without smoothing the logit sum is not gathered (and could be inf - inf): leave it out altogether.
  if (eps == T(0)) return lse - target_logit;
  return (T(1) - eps) * (lse - target_logit) + eps * (lse - logit_sum * inv_vocab);
}

// The three numbers that turn a row's probabilities into its logit gradients.
template <typename T>
struct RowGrad {
  T a = 0;        // weight of p
  T uniform = 0;  // subtracted from every entry: d eps / V
  T target = 0;   // subtracted from the target's entry: d (1 - eps)
};

template <typename T>
CCE_HOST_DEVICE RowGrad<T> row_grad(T dnll, T dlse, T eps, T inv_vocab) {
  RowGrad<T> g;
  g.a = dnll + dlse;
  g.uniform = dnll * eps * inv_vocab;
  g.target = dnll * (T(1) - eps);
  return g;
}

}  // namespace cce::core
