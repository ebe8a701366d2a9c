#include <algorithm>

#include "cpu/row_tile.h"

namespace cce::cpu {

template <typename Z, typename A>
void logits_to_gradients(const Block<Z>& block, const LogitTransform<A>& transform,
                         const int64_t* targets, const A* lse, const core::RowGrad<A>* grads,
                         int64_t begin, int64_t end) {
  RowTile<Z, A> tile;
  for (int64_t row = begin; row < end; ++row) {
    const core::RowGrad<A>& g = grads[row];
    for (int64_t first = 0; first < block.cols; first += kRowTile) {
      const int64_t n = std::min(kRowTile, block.cols - first);
      A* z = tile.load(block.z + row * block.ld + first, transform, first, n);
      const int64_t hit = targets[row] - (block.first_col + first);
      const bool has_target = hit >= 0 && hit < n;
      A slope = 1;
      if (transform.softcap != A(0)) {
        if (has_target) slope = core::softcap_grad(z[hit], transform.inv_softcap);
        gradient_softcap(z, lse[row], g.a, g.uniform, transform.logit_scale, transform.inv_softcap,
                         n);
      } else {
        gradient(z, lse[row], g.a, g.uniform, transform.logit_scale, n);
      }
      if (has_target) z[hit] -= g.target * slope * transform.logit_scale;
      tile.store();
    }
  }
}

template void logits_to_gradients(const Block<float>&, const LogitTransform<float>&, const int64_t*,
                                  const float*, const core::RowGrad<float>*, int64_t, int64_t);
template void logits_to_gradients(const Block<double>&, const LogitTransform<double>&,
                                  const int64_t*, const double*, const core::RowGrad<double>*,
                                  int64_t, int64_t);
template void logits_to_gradients(const Block<BF16>&, const LogitTransform<float>&, const int64_t*,
                                  const float*, const core::RowGrad<float>*, int64_t, int64_t);

}  // namespace cce::cpu
