#include "cpu/row_ops.h"

#include <limits>

#include "core/loss_math.h"
#include "cpu/linear_ce.h"

namespace cce::cpu {
namespace {

// The bodies, once for both types; always inlined into the clones below so that each gets its instruction set.
template <typename A>
struct Body {
  static CCE_INLINE void affine(A* x, const A* bias, A scale, int64_t n) {
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] = (x[i] + bias[i]) * scale;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] *= scale;
    }
  }
  static CCE_INLINE void apply_softcap(A* x, A cap, A inv_cap, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = core::softcap<HostMath>(x[i], cap, inv_cap);
  }
  static CCE_INLINE A row_max(const A* x, int64_t n) {
    A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
    return m;
  }
  static CCE_INLINE A row_sum(const A* x, int64_t n) {
    A s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; ++i) s += x[i];
    return s;
  }
  static CCE_INLINE A sum_exp(const A* x, A max, int64_t n) {
    A s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; ++i) s += exp(x[i] - max);
    return s;
  }
  static CCE_INLINE A sum_exp_x(const A* x, A max, int64_t n) {
    A s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; ++i) {
      const A w = exp(x[i] - max);
      s += w == A(0) ? A(0) : w * x[i];
    }
    return s;
  }
  static CCE_INLINE void gradient(A* z, A lse, A a, A uniform, A scale, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = (a * exp(z[i] - lse) - uniform) * scale;
  }
  static CCE_INLINE void gradient_softcap(A* z, A lse, A a, A uniform, A scale, A inv_cap,
                                          int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A slope = core::softcap_grad(z[i], inv_cap);
      z[i] = (a * exp(z[i] - lse) - uniform) * scale * slope;
    }
  }
};

}  // namespace

#define CCE_DEFINE_ROW_OPS(A, CLONES)                                                        \
  CLONES void affine(A* x, const A* bias, A scale, int64_t n) {                              \
    Body<A>::affine(x, bias, scale, n);                                                      \
  }                                                                                          \
  CLONES void apply_softcap(A* x, A cap, A inv_cap, int64_t n) {                             \
    Body<A>::apply_softcap(x, cap, inv_cap, n);                                              \
  }                                                                                          \
  CLONES A row_max(const A* x, int64_t n) { return Body<A>::row_max(x, n); }                 \
  CLONES A row_sum(const A* x, int64_t n) { return Body<A>::row_sum(x, n); }                 \
  CLONES A sum_exp(const A* x, A max, int64_t n) { return Body<A>::sum_exp(x, max, n); }     \
  CLONES A sum_exp_x(const A* x, A max, int64_t n) { return Body<A>::sum_exp_x(x, max, n); } \
  CLONES void gradient(A* z, A lse, A a, A uniform, A scale, int64_t n) {                    \
    Body<A>::gradient(z, lse, a, uniform, scale, n);                                         \
  }                                                                                          \
  CLONES void gradient_softcap(A* z, A lse, A a, A uniform, A scale, A inv_cap, int64_t n) { \
    Body<A>::gradient_softcap(z, lse, a, uniform, scale, inv_cap, n);                        \
  }
CCE_DEFINE_ROW_OPS(float, CCE_CLONES)
CCE_DEFINE_ROW_OPS(double, )
#undef CCE_DEFINE_ROW_OPS

CCE_CLONES void widen(const BF16* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

CCE_CLONES void narrow(const float* from, BF16* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

CCE_CLONES void accumulate(float* acc, const BF16* part, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) acc[i] += to_float(part[i]);
}

}  // namespace cce::cpu
