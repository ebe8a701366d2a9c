#include <algorithm>
#include <limits>

#include "cpu/row_tile.h"

namespace cce::cpu {
namespace {

// Streaming logsumexp: folds n logits into (max, sum) and, where wanted, Σ exp(z - max) z.
template <typename A>
void fold(const A* z, int64_t n, A& max, A& sum, A* weighted) {
  const A tile_max = row_max(z, n);
  const A new_max = std::max(max, tile_max);
  // All -inf so far, or only NaN: exp(-inf - -inf) would be NaN for numbers that simply weigh nothing. A NaN among
  // them must still reach the sum, which sum_exp against 0 does.
  const A reference = new_max == -std::numeric_limits<A>::infinity() ? A(0) : new_max;
  const A rescale = max == -std::numeric_limits<A>::infinity() ? A(0) : exp(max - reference);
  sum =
      (max == -std::numeric_limits<A>::infinity() ? sum : sum * rescale) + sum_exp(z, reference, n);
  if (weighted) *weighted = *weighted * rescale + sum_exp_x(z, reference, n);
  max = new_max;
}

}  // namespace

template <typename Z, typename A>
void update_stats(const Block<Z>& block, const LogitTransform<A>& transform, const int64_t* targets,
                  int64_t begin, int64_t end, const RowStats<A>& stats) {
  RowTile<Z, A> tile;
  for (int64_t row = begin; row < end; ++row) {
    A max = stats.max[row], sum = stats.sum[row];
    for (int64_t first = 0; first < block.cols; first += kRowTile) {
      const int64_t n = std::min(kRowTile, block.cols - first);
      const A* z = tile.load(block.z + row * block.ld + first, transform, first, n);
      const A before = max;
      fold(z, n, max, sum, stats.weighted ? stats.weighted + row : nullptr);
      const int64_t id = block.first_col + first;
      if (stats.logit_sum) stats.logit_sum[row] += row_sum(z, n);
      if (stats.argmax && max > before) stats.argmax[row] = id + (std::find(z, z + n, max) - z);
      const int64_t hit = targets[row] - id;
      if (hit >= 0 && hit < n) stats.target_logit[row] = z[hit];
    }
    stats.max[row] = max;
    stats.sum[row] = sum;
  }
}

template void update_stats(const Block<float>&, const LogitTransform<float>&, const int64_t*,
                           int64_t, int64_t, const RowStats<float>&);
template void update_stats(const Block<double>&, const LogitTransform<double>&, const int64_t*,
                           int64_t, int64_t, const RowStats<double>&);
template void update_stats(const Block<BF16>&, const LogitTransform<float>&, const int64_t*,
                           int64_t, int64_t, const RowStats<float>&);

}  // namespace cce::cpu
