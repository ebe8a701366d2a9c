// The CPU forward: statistics of every valid row, block by block, then the outputs. Workspace: one block of logits and a few
// numbers a row.
#include <algorithm>
#include <cmath>
#include <limits>

#include "torch/cpu_blocks.h"

namespace cce::torch_api {
namespace {

constexpr int64_t kForwardRows = 1024, kForwardCols = 2048;

// Row statistics of the valid rows, and their way into full-size outputs with zeros (or -1) at ignored rows.
template <typename A>
struct Statistics {
  std::vector<A> max, sum, target_logit, logit_sum, weighted;
  std::vector<int64_t> argmax;

  Statistics(int64_t count, bool with_sum, bool metrics)
      : max(count, -std::numeric_limits<A>::infinity()), sum(count), target_logit(count) {
    if (with_sum) logit_sum.resize(count);
    if (metrics) weighted.resize(count), argmax.resize(count);
  }
  cpu::RowStats<A> at(int64_t begin) {
    const auto offset = [begin](auto& v) { return v.empty() ? nullptr : v.data() + begin; };
    return {max.data() + begin, sum.data() + begin, target_logit.data() + begin,
            offset(logit_sum),  offset(weighted),   offset(argmax)};
  }
};

template <typename Z, typename A>
void gather_statistics(const Inputs& in, const ValidRows& valid, Statistics<A>& stats) {
  const ScalarType dtype = compute_type(in);
  const Transform<A> transform(in);
  const int64_t block_rows = std::min(kForwardRows, valid.count);
  LogitsBuffer<Z> logits(in, block_rows, std::min(kForwardCols, in.v), dtype);
  for (int64_t begin = 0; begin < valid.count; begin += block_rows) {
    const int64_t count = std::min(block_rows, valid.count - begin);
    const Tensor e = valid_block(in.e, valid, begin, count, dtype);
    const auto u = valid_u(in, valid, begin, count, dtype);
    const auto block_stats = stats.at(begin);
    for (int64_t first = 0; first < in.v; first += kForwardCols) {
      const Chunk chunk(in, first, kForwardCols, dtype);
      const auto block = logits.multiply(e, u, chunk);
      const auto t = transform.at(first);
      torch::stable::parallel_for(0, count, 1, [&](int64_t row_begin, int64_t row_end) {
        cpu::update_stats(block, t, valid.local_target.data() + begin, row_begin, row_end,
                          block_stats);
      });
    }
  }
}

template <typename Z, typename A>
ForwardResult forward_typed(const Inputs& in, bool metrics) {
  const ValidRows valid = find_valid_rows(in);
  const bool smoothing = in.options.label_smoothing != 0.0;
  Statistics<A> stats(valid.count, smoothing, metrics);
  gather_statistics<Z, A>(in, valid, stats);

  const ScalarType acc = accumulate_type(in.e);
  const int64_t metric_size = metrics ? in.n : 0;
  Tensor nll = zeros(in.e, {in.n}, acc), lse = zeros(in.e, {in.n}, acc);
  Tensor target_logit = zeros(in.e, {in.n}, acc);
  Tensor logit_sum = zeros(in.e, {smoothing ? in.n : 0}, acc);
  Tensor max_logit = zeros(in.e, {metric_size}, acc), entropy = zeros(in.e, {metric_size}, acc);
  Tensor argmax = empty(in.e, {metric_size}, ScalarType::Long);
  A* nll_data = nll.mutable_data_ptr<A>();
  A* lse_data = lse.mutable_data_ptr<A>();
  A* target_data = target_logit.mutable_data_ptr<A>();
  A* sum_data = smoothing ? logit_sum.mutable_data_ptr<A>() : nullptr;
  A* max_data = metrics ? max_logit.mutable_data_ptr<A>() : nullptr;
  A* entropy_data = metrics ? entropy.mutable_data_ptr<A>() : nullptr;
  int64_t* argmax_data = metrics ? argmax.mutable_data_ptr<int64_t>() : nullptr;
  if (metrics) std::fill(argmax_data, argmax_data + in.n, int64_t{-1});

  const int64_t* index = valid.index.const_data_ptr<int64_t>();
  const A eps = static_cast<A>(in.options.label_smoothing);
  const A inv_vocab = A(1) / static_cast<A>(in.options.vocab_total);
  for (int64_t i = 0; i < valid.count; ++i) {
    const int64_t row = index[i];
    const A row_lse = stats.max[i] + std::log(stats.sum[i]);
    lse_data[row] = row_lse;
    target_data[row] = stats.target_logit[i];
    if (smoothing) sum_data[row] = stats.logit_sum[i];
    nll_data[row] = core::nll(row_lse, stats.target_logit[i], smoothing ? stats.logit_sum[i] : A(0),
                              eps, inv_vocab);
    if (metrics) {
      max_data[row] = stats.max[i];
      argmax_data[row] = in.options.vocab_start + stats.argmax[i];
      entropy_data[row] = row_lse - stats.weighted[i] / stats.sum[i];
    }
  }
  return {nll, lse, target_logit, logit_sum, max_logit, argmax, entropy};
}

ForwardResult forward_cpu(Tensor e, Tensor c, Tensor targets, std::optional<Tensor> bias,
                          std::optional<Tensor> u, std::optional<Tensor> lora_b,
                          int64_t ignore_index, double softcap, double logit_scale,
                          double label_smoothing, int64_t vocab_start, int64_t vocab_total,
                          bool metrics) {
  const Inputs in =
      make_inputs(e, c, targets, bias, u, lora_b,
                  {softcap, logit_scale, label_smoothing, ignore_index, vocab_start, vocab_total});
  return dispatch(
      in, [&](auto z, auto a) { return forward_typed<decltype(z), decltype(a)>(in, metrics); });
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CPU, m) {
  m.impl("linear_ce_forward", TORCH_BOX(&cce::torch_api::forward_cpu));
}
