// Loops over a few thousand contiguous numbers, the only places where the CPU path's time goes besides the matmuls.
// fp32 versions are compiled once per instruction set (CCE_CLONES); fp64 is for checking gradients and stays plain.
#pragma once

#include <cstdint>

#include "cpu/vec_math.h"

namespace cce::cpu {

#define CCE_DECLARE_ROW_OPS(A)                                               \
  /* x = (x + bias) * scale; bias may be null */                             \
  void affine(A* x, const A* bias, A scale, int64_t n);                      \
  void apply_softcap(A* x, A cap, A inv_cap, int64_t n);                     \
  A row_max(const A* x, int64_t n);                                          \
  A row_sum(const A* x, int64_t n);                                          \
  A sum_exp(const A* x, A max, int64_t n);                                   \
  /* Σ exp(x - max) x; terms whose weight is 0 count 0, also for x = -inf */ \
  A sum_exp_x(const A* x, A max, int64_t n);                                 \
  /* g = (a exp(z - lse) - uniform) * scale, in place of z */                \
  void gradient(A* z, A lse, A a, A uniform, A scale, int64_t n);            \
  /* the same times softcap'(x) = 1 - (z inv_cap)^2 */                       \
  void gradient_softcap(A* z, A lse, A a, A uniform, A scale, A inv_cap, int64_t n);
CCE_DECLARE_ROW_OPS(float)
CCE_DECLARE_ROW_OPS(double)
#undef CCE_DECLARE_ROW_OPS

void widen(const BF16* from, float* to, int64_t n);
void narrow(const float* from, BF16* to, int64_t n);

}  // namespace cce::cpu
