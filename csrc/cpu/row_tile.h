// A stretch of one row of a block as numbers of the arithmetic type: in place where the storage is that type already,
// through a small scratch array for bf16. Both directions of the path (forward, backward) use it.
#pragma once

#include "cpu/linear_ce.h"
#include "cpu/row_ops.h"

namespace cce::cpu {

template <typename Z, typename A>
class RowTile {
 public:
  // Loads n numbers and turns the raw products into logits z.
  A* load(Z* source, const LogitTransform<A>& t, int64_t first, int64_t n) {
    source_ = source;
    n_ = n;
    if constexpr (std::is_same_v<Z, A>) {
      values_ = source;
    } else {
      widen(source, scratch_, n);
      values_ = scratch_;
    }
    const bool scaled = t.logit_scale != A(1);
    if (t.bias || scaled) affine(values_, t.bias ? t.bias + first : nullptr, t.logit_scale, n);
    if (t.softcap != A(0)) apply_softcap(values_, t.softcap, t.inv_softcap, n);
    return values_;
  }
  void store() {
    if constexpr (!std::is_same_v<Z, A>) narrow(values_, source_, n_);
  }

 private:
  Z* source_ = nullptr;
  A* values_ = nullptr;
  int64_t n_ = 0;
  A scratch_[std::is_same_v<Z, A> ? 1 : kRowTile];
};

}  // namespace cce::cpu
