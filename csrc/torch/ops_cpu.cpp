// The CPU path: PyTorch's matmul makes a block of logits, the row kernels of csrc/cpu fold it away. Rows whose target is
// ignored are left out before any matmul. Workspace: one block of logits (kForwardBlock or kBackwardBlock numbers), and
// for 16-bit inputs an fp32 dE; never N x V.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/linear_ce.h"
#include "torch/bridge.h"

namespace cce::torch_api {
namespace {

constexpr int64_t kForwardRows = 1024, kForwardCols = 2048;
constexpr int64_t kBackwardRows = 2048, kBackwardCols = 1024;

// Without 512-bit bf16 instructions PyTorch's bf16 matmul is slower than converting a block and using fp32; its fp16
// matmul always is.
bool has_native_bf16() {
#if defined(__x86_64__)
  static const bool native = __builtin_cpu_supports("avx512bf16");
  return native;
#else
  return true;
#endif
}

// Logits up to which bf16 inputs are computed in fp32: it costs nothing there, and spares the rounding of partial sums.
constexpr int64_t kSmallCall = int64_t{1} << 20;

// The dtype that the matmuls run in.
ScalarType compute_type(const Inputs& in) {
  const ScalarType input = in.e.scalar_type();
  if (input == ScalarType::Half) return ScalarType::Float;
  if (input == ScalarType::BFloat16 && (!has_native_bf16() || in.n * in.v <= kSmallCall))
    return ScalarType::Float;
  return input;
}

// The valid rows of a call.
struct ValidRows {
  std::vector<int64_t> local_target;  // shard-local, -1 where another shard holds it
  Tensor index;                       // (count,) int64 row numbers
  int64_t count = 0;
  bool all = false;
};

ValidRows find_valid_rows(const Inputs& in) {
  ValidRows valid;
  const int64_t* targets = in.targets.const_data_ptr<int64_t>();
  std::vector<int64_t> index;
  for (int64_t row = 0; row < in.n; ++row) {
    const auto kind = core::classify_target(targets[row], in.v, in.options);
    STD_TORCH_CHECK(kind != core::TargetKind::kInvalid, "targets[", row, "] = ", targets[row],
                    " is out of range: expected [0, ", in.options.vocab_total,
                    ") or ignore_index = ", in.options.ignore_index);
    if (kind == core::TargetKind::kIgnored) continue;
    const int64_t local = targets[row] - in.options.vocab_start;
    valid.local_target.push_back(kind == core::TargetKind::kHere ? local : -1);
    index.push_back(row);
  }
  valid.count = static_cast<int64_t>(index.size());
  valid.all = valid.count == in.n;
  valid.index = empty(in.e, {valid.count}, ScalarType::Long);
  std::copy(index.begin(), index.end(), valid.index.mutable_data_ptr<int64_t>());
  return valid;
}

// Rows [begin, begin + count) of the valid rows of t, in the compute dtype.
Tensor valid_block(const Tensor& t, const ValidRows& valid, int64_t begin, int64_t count,
                   ScalarType dtype) {
  return cast(valid.all ? rows(t, begin, count) : index_rows(t, rows(valid.index, begin, count)),
              dtype);
}

template <typename A>
struct Transform {
  Tensor bias;  // keeps the converted bias alive
  cpu::LogitTransform<A> value;

  explicit Transform(const Inputs& in) {
    if (in.bias) {
      bias = torch::stable::contiguous(cast(*in.bias, accumulate_type(in.e)));
      value.bias = bias.template const_data_ptr<A>();
    }
    value.logit_scale = static_cast<A>(in.options.logit_scale);
    value.softcap = static_cast<A>(in.options.softcap);
    value.inv_softcap = value.softcap == A(0) ? A(0) : A(1) / value.softcap;
  }
  cpu::LogitTransform<A> at(int64_t first_col) const {
    auto t = value;
    if (t.bias) t.bias += first_col;
    return t;
  }
};

// One vocabulary chunk of the classifier, in the compute dtype.
struct Chunk {
  Tensor c, lora_b;
  int64_t first = 0, cols = 0;

  Chunk(const Inputs& in, int64_t first_col, int64_t max_cols, ScalarType dtype)
      : first(first_col), cols(std::min(max_cols, in.v - first_col)) {
    c = cast(rows(in.c, first, cols), dtype);
    if (in.lora_b) lora_b = cast(rows(*in.lora_b, first, cols), dtype);
  }
};

// A logits buffer that is reused for every block, and its view as the row kernels want it.
template <typename Z>
struct LogitsBuffer {
  Tensor storage;
  Tensor view;  // (rows, cols) of the current block

  LogitsBuffer(const Inputs& in, int64_t max_rows, int64_t max_cols, ScalarType dtype)
      : storage(empty(in.e, {max_rows * max_cols}, dtype)) {}

  // view = E_block C_chunkᵀ + U_block B_chunkᵀ
  cpu::Block<Z> multiply(const Tensor& e, const std::optional<Tensor>& u, const Chunk& chunk) {
    const int64_t count = e.size(0);
    view = torch::stable::view(rows(storage, 0, count * chunk.cols), {count, chunk.cols});
    mm_out(view, e, transposed(chunk.c));
    if (u) cpu_addmm_out(view, *u, transposed(chunk.lora_b));
    return {static_cast<Z*>(view.mutable_data_ptr()), chunk.cols, chunk.cols, chunk.first};
  }
};

std::optional<Tensor> valid_u(const Inputs& in, const ValidRows& valid, int64_t begin,
                              int64_t count, ScalarType dtype) {
  if (!in.u) return std::nullopt;
  return valid_block(*in.u, valid, begin, count, dtype);
}

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

// A gradient over the valid rows (dE, dU) or over one vocabulary chunk (dC, dB), summed over blocks. It is fp32 (fp64
// for fp64) whatever the matmul's dtype: a bf16 matmul goes through `part`.
class Accumulator {
 public:
  Accumulator() = default;
  Accumulator(const Tensor& sum, ScalarType matmul_dtype)
      : sum_(sum), direct_(sum.scalar_type() == matmul_dtype), dtype_(matmul_dtype) {}

  // rows [begin, begin + a.size(0)) of the sum: += a b, or = a b on the first visit
  void add(int64_t begin, const Tensor& a, const Tensor& b, bool first_visit) {
    const Tensor target = rows(sum_, begin, a.size(0));
    if (direct_) {
      if (first_visit)
        mm_out(target, a, b);
      else
        cpu_addmm_out(target, a, b);
      return;
    }
    const int64_t size = a.size(0) * b.size(1);
    if (part_size_ < size) part_ = empty(sum_, {size}, dtype_), part_size_ = size;
    Tensor part = torch::stable::view(rows(part_, 0, size), {a.size(0), b.size(1)});
    mm_out(part, a, b);
    if (first_visit) {
      torch::stable::copy_(const_cast<Tensor&>(target), part);
      return;
    }
    float* acc = static_cast<float*>(target.mutable_data_ptr());
    const auto* from = static_cast<const cpu::BF16*>(part.const_data_ptr());
    torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin_i, int64_t end_i) {
      cpu::accumulate(acc + begin_i, from + begin_i, end_i - begin_i);
    });
  }
  const Tensor& sum() const { return sum_; }

 private:
  Tensor sum_, part_;
  int64_t part_size_ = 0;
  bool direct_ = true;
  ScalarType dtype_ = ScalarType::Float;
};

// dE or dU: (count, width) over the valid rows, then spread over all rows with exact zeros at ignored ones.
Tensor spread_rows(const Tensor& sum, const ValidRows& valid, int64_t n, ScalarType dtype) {
  const Tensor result = cast(sum, dtype);
  if (valid.all) return result;
  Tensor full = zeros(sum, {n, sum.size(1)}, dtype);
  index_copy_rows(full, valid.index, result);
  return full;
}

struct Needs {
  bool e, c, bias, u, lora_b;
};

// Everything the loop over vocabulary chunks adds to.
struct Gradients {
  Accumulator e, u;        // over valid rows
  Tensor c, lora_b, bias;  // final dtype, written chunk by chunk
};

// dC or dB of one chunk: summed over the row blocks, then written once in the final dtype.
class ChunkGradient {
 public:
  ChunkGradient(const Tensor& final, const Chunk& chunk, int64_t row_blocks, ScalarType acc,
                ScalarType compute)
      : target_(rows(final, chunk.first, chunk.cols)) {
    // Summing in place is exact enough where the output has the precision of the sum, or is written only once.
    const bool in_place =
        final.scalar_type() == acc || (final.scalar_type() == compute && row_blocks == 1);
    sum_ = in_place ? target_ : empty(final, {chunk.cols, final.size(1)}, acc);
    in_place_ = in_place;
    accumulator_ = Accumulator(sum_, compute);
  }
  void add(const Tensor& g, const Tensor& rows_of, bool first_visit) {
    accumulator_.add(0, transposed(g), rows_of, first_visit);
  }
  void finish() {
    if (!in_place_) torch::stable::copy_(target_, sum_);
  }

 private:
  Tensor target_, sum_;
  bool in_place_ = true;
  Accumulator accumulator_;
};

template <typename A>
std::vector<core::RowGrad<A>> row_gradients(const Inputs& in, const ValidRows& valid,
                                            const std::optional<Tensor>& dnll,
                                            const std::optional<Tensor>& dlse) {
  const ScalarType acc = accumulate_type(in.e);
  const auto read = [&](const std::optional<Tensor>& t) {
    return t ? torch::stable::contiguous(cast(*t, acc)) : zeros(in.e, {in.n}, acc);
  };
  const Tensor dnll_t = read(dnll), dlse_t = read(dlse);
  const A* dnll_data = dnll_t.const_data_ptr<A>();
  const A* dlse_data = dlse_t.const_data_ptr<A>();
  const int64_t* index = valid.index.const_data_ptr<int64_t>();
  const A eps = static_cast<A>(in.options.label_smoothing);
  const A inv_vocab = A(1) / static_cast<A>(in.options.vocab_total);
  std::vector<core::RowGrad<A>> grads(valid.count);
  for (int64_t i = 0; i < valid.count; ++i) {
    grads[i] = core::row_grad(dnll_data[index[i]], dlse_data[index[i]], eps, inv_vocab);
  }
  return grads;
}

template <typename Z, typename A>
void backward_loop(const Inputs& in, const ValidRows& valid, const Tensor& lse_all,
                   const std::vector<core::RowGrad<A>>& grads, const Needs& need, Gradients& out) {
  const ScalarType acc = accumulate_type(in.e), compute = compute_type(in);
  const Transform<A> transform(in);
  const Tensor lse = torch::stable::contiguous(valid_block(lse_all, valid, 0, valid.count, acc));
  const A* lse_data = lse.const_data_ptr<A>();
  const int64_t block_rows = std::min(kBackwardRows, valid.count);
  const int64_t row_blocks = (valid.count + block_rows - 1) / block_rows;
  LogitsBuffer<Z> logits(in, block_rows, std::min(kBackwardCols, in.v), compute);

  for (int64_t first = 0; first < in.v; first += kBackwardCols) {
    const Chunk chunk(in, first, kBackwardCols, compute);
    std::optional<ChunkGradient> dc, db;
    if (need.c) dc.emplace(out.c, chunk, row_blocks, acc, compute);
    if (need.lora_b) db.emplace(out.lora_b, chunk, row_blocks, acc, compute);
    Tensor dbias = need.bias ? zeros(in.e, {chunk.cols}, acc) : Tensor();
    for (int64_t begin = 0; begin < valid.count; begin += block_rows) {
      const int64_t count = std::min(block_rows, valid.count - begin);
      const Tensor e = valid_block(in.e, valid, begin, count, compute);
      const auto u = valid_u(in, valid, begin, count, compute);
      const auto block = logits.multiply(e, u, chunk);
      const auto t = transform.at(first);
      torch::stable::parallel_for(0, count, 1, [&](int64_t row_begin, int64_t row_end) {
        cpu::logits_to_gradients(block, t, valid.local_target.data() + begin, lse_data + begin,
                                 grads.data() + begin, row_begin, row_end);
      });
      const Tensor& g = logits.view;
      if (need.e) out.e.add(begin, g, chunk.c, first == 0);
      if (need.u) out.u.add(begin, g, chunk.lora_b, first == 0);
      if (dc) dc->add(g, e, begin == 0);
      if (db) db->add(g, *u, begin == 0);
      if (need.bias) {
        const Tensor part =
            call("aten::sum", "dim_IntList", g, std::make_optional(std::vector<int64_t>{0}), false,
                 std::make_optional(acc));
        A* sum = dbias.mutable_data_ptr<A>();
        const A* from = part.const_data_ptr<A>();
        for (int64_t j = 0; j < chunk.cols; ++j) sum[j] += from[j];
      }
    }
    if (dc) dc->finish();
    if (db) db->finish();
    if (need.bias) {
      Tensor target = rows(out.bias, first, chunk.cols);
      torch::stable::copy_(target, dbias);
    }
  }
}

template <typename Z, typename A>
BackwardResult backward_typed(const Inputs& in, const std::optional<Tensor>& dnll,
                              const std::optional<Tensor>& dlse, const Tensor& lse, Needs need) {
  const ScalarType acc = accumulate_type(in.e), input = in.e.scalar_type();
  const ScalarType compute = compute_type(in);
  const ValidRows valid = find_valid_rows(in);
  // With nothing to sum over, every gradient is zero and no block is ever visited.
  const bool empty_call = valid.count == 0 || in.v == 0;
  const auto make = [&](std::vector<int64_t> sizes, ScalarType dtype) {
    return empty_call ? zeros(in.e, sizes, dtype) : empty(in.e, sizes, dtype);
  };
  Gradients out;
  if (need.e) out.e = Accumulator(make({valid.count, in.d}, acc), compute);
  if (need.u) out.u = Accumulator(make({valid.count, in.r}, acc), compute);
  if (need.c) out.c = make({in.v, in.d}, input);
  if (need.lora_b) out.lora_b = make({in.v, in.r}, in.lora_b->scalar_type());
  if (need.bias) out.bias = make({in.v}, in.bias->scalar_type());
  if (!empty_call) {
    backward_loop<Z, A>(in, valid, lse, row_gradients<A>(in, valid, dnll, dlse), need, out);
  }
  const auto absent = [&](const std::optional<Tensor>& t) {
    return no_gradient(in.e, t ? t->scalar_type() : ScalarType::Float);
  };
  return {need.e ? spread_rows(out.e.sum(), valid, in.n, input) : no_gradient(in.e, input),
          need.c ? out.c : no_gradient(in.e, input), need.bias ? out.bias : absent(in.bias),
          need.u ? spread_rows(out.u.sum(), valid, in.n, input) : absent(in.u),
          need.lora_b ? out.lora_b : absent(in.lora_b)};
}

// Calls body(Z{}, A{}) with the logits' storage type and the arithmetic type that the inputs ask for.
template <typename Body>
auto dispatch(const Inputs& in, Body&& body) {
  switch (compute_type(in)) {
    case ScalarType::Double:
      return body(double{}, double{});
    case ScalarType::Float:
      return body(float{}, float{});
    case ScalarType::BFloat16:
      return body(cpu::BF16{}, float{});
    default:
      STD_TORCH_CHECK(false, "e must be float64, float32, bfloat16 or float16 on a CPU");
  }
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

BackwardResult backward_cpu(std::optional<Tensor> dnll, std::optional<Tensor> dlse, Tensor e,
                            Tensor c, Tensor targets, Tensor lse, std::optional<Tensor> bias,
                            std::optional<Tensor> u, std::optional<Tensor> lora_b,
                            int64_t ignore_index, double softcap, double logit_scale,
                            double label_smoothing, int64_t vocab_start, int64_t vocab_total,
                            bool need_e, bool need_c, bool need_bias, bool need_u,
                            bool need_lora_b) {
  const Inputs in =
      make_inputs(e, c, targets, bias, u, lora_b,
                  {softcap, logit_scale, label_smoothing, ignore_index, vocab_start, vocab_total});
  const Needs need{need_e, need_c, need_bias && bias, need_u && u, need_lora_b && lora_b};
  return dispatch(in, [&](auto z, auto a) {
    return backward_typed<decltype(z), decltype(a)>(in, dnll, dlse, lse, need);
  });
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CPU, m) {
  m.impl("linear_ce_forward", TORCH_BOX(&cce::torch_api::forward_cpu));
  m.impl("linear_ce_backward", TORCH_BOX(&cce::torch_api::backward_cpu));
}
