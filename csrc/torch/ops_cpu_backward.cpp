// The exact CPU backward: the forward's blocks again, turned into logit gradients in place, then the plain products. Workspace:
// one block of logits, and for 16-bit inputs fp32 sums of dE (N, D), dU (N, R) and of one chunk of dC and dB.
#include <algorithm>

#include "torch/cpu_blocks.h"

namespace cce::torch_api {
namespace {

constexpr int64_t kBackwardRows = 2048, kBackwardCols = 1024;

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
  m.impl("linear_ce_backward", TORCH_BOX(&cce::torch_api::backward_cpu));
}
