// The CUDA path: op arguments to the launchers' parameters, workspaces from PyTorch's allocator, all work on PyTorch's
// current stream, nothing that waits for the device. The exact backward's loop over vocabulary chunks and its plain
// matmuls are in cce_ext/cuda_backward.py; here are the pieces that it calls.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <string>

#include "cuda/backend.h"
#include "cuda/common/rows.h"
#include "torch/bridge.h"
#include "torch/stream.h"

namespace cce::torch_api {
namespace {

// Columns of a vocabulary group: a split never crosses a group's end.
constexpr int64_t kGroupCols = 4096;
// Bytes of a classifier chunk that has to be copied to be readable by the kernels.
constexpr int64_t kPackBytes = int64_t{64} << 20;
// Units of work that keep a large GPU busy; fewer, and splits are made smaller.
constexpr int64_t kEnoughUnits = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

cuda::Dtype kernel_dtype(const Tensor& e) {
  const ScalarType t = e.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::BFloat16 || t == ScalarType::Half,
                  "the CUDA kernels take bfloat16 or float16, e is neither; cast e and c, or call "
                  "cce_ext.linear_cross_entropy, which has a blocked path for other dtypes");
  return t == ScalarType::BFloat16 ? cuda::Dtype::kBFloat16 : cuda::Dtype::kHalf;
}

const cuda::Backend& backend() {
  const cuda::Choice choice = cuda::choose_backend();
  STD_TORCH_CHECK(
      choice.backend != nullptr, "no compiled CUDA backend can run here:\n", choice.reasons,
      "\nUse cce_ext.linear_cross_entropy, whose blocked path runs anywhere, or move to the CPU.");
  return *choice.backend;
}

// The kernels read rows of 16-byte pieces.
bool is_readable(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// t itself where the kernels can read it in this dtype, else a copy with zeros up to the next multiple of 8 columns.
Tensor readable(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype && is_readable(t)) return t;
  const int64_t cols = t.size(1), padded = ceil_div(cols, 8) * 8;
  Tensor copy =
      padded == cols ? empty(t, {t.size(0), padded}, dtype) : zeros(t, {t.size(0), padded}, dtype);
  Tensor inside = torch::stable::narrow(copy, 1, 0, cols);
  torch::stable::copy_(inside, t);
  return inside;
}

cuda::Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.size(0), t.size(1)};
}
cuda::StridedMatrix strided(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.size(1)};
}
float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Row order and count, see cuda/common/rows.h.
struct Order {
  Tensor rows, count;

  Order(const Inputs& in, cudaStream_t stream)
      : rows(empty(in.e, {in.n}, ScalarType::Int)), count(zeros(in.e, {1}, ScalarType::Int)) {
    if (in.n == 0) return;
    const size_t bytes = cuda::order_rows_workspace(in.n);
    Tensor workspace = empty(in.e, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    check_cuda(cuda::order_rows(in.targets.const_data_ptr<int64_t>(), in.n, in.options.ignore_index,
                                rows.mutable_data_ptr<int32_t>(), count.mutable_data_ptr<int32_t>(),
                                workspace.mutable_data_ptr(), bytes, stream),
               "order_rows");
  }
  cuda::RowOrder view() const {
    return {rows.const_data_ptr<int32_t>(), count.const_data_ptr<int32_t>()};
  }
};

// Partials of all splits of a call, and which of them a launch fills.
struct PartialBuffers {
  Tensor max_sum, logit_sum, weighted, argmax;
  int64_t n = 0, splits = 0;
  int tiles_per_split = 1;

  PartialBuffers(const Inputs& in, const cuda::Backend& backend, bool with_sum, bool metrics)
      : n(in.n) {
    tiles_per_split = static_cast<int>(kGroupCols / backend.block_n);
    const int64_t row_blocks = ceil_div(in.n, backend.block_m);
    const auto count = [&] { return ceil_div(in.v, int64_t{tiles_per_split} * backend.block_n); };
    while (tiles_per_split > 1 && row_blocks * count() < kEnoughUnits) tiles_per_split /= 2;
    splits = count();
    max_sum = empty(in.e, {splits, n, 2}, ScalarType::Float);
    if (with_sum) logit_sum = empty(in.e, {splits, n}, ScalarType::Float);
    if (metrics) {
      weighted = empty(in.e, {splits, n}, ScalarType::Float);
      argmax = empty(in.e, {splits, n}, ScalarType::Int);
    }
  }
  cuda::Partials from(int64_t split) const {
    const auto at = [&](const Tensor& t) { return t.defined() ? floats(t) + split * n : nullptr; };
    cuda::Partials p;
    p.max_sum = reinterpret_cast<float2*>(floats(max_sum)) + split * n;
    p.logit_sum = at(logit_sum);
    p.weighted = at(weighted);
    p.argmax = argmax.defined() ? argmax.mutable_data_ptr<int32_t>() + split * n : nullptr;
    return p;
  }
};

// Columns of the classifier that one launch takes: all of them, unless C or B must be copied first.
int64_t launch_cols(const Inputs& in) {
  const ScalarType dtype = in.e.scalar_type();
  int64_t bytes = is_readable(in.c) ? 0 : 2 * in.d;
  if (in.lora_b && !(in.lora_b->scalar_type() == dtype && is_readable(*in.lora_b)))
    bytes += 2 * in.r;
  if (bytes == 0) return in.v;
  return std::max<int64_t>(1, kPackBytes / bytes / kGroupCols) * kGroupCols;
}

void fill_partials(const Inputs& in, const cuda::Backend& backend, const Order& order,
                   const Tensor& bias, const PartialBuffers& partials, cudaStream_t stream) {
  const ScalarType dtype = in.e.scalar_type();
  const Tensor e = readable(in.e, dtype);
  const Tensor u = in.u ? readable(*in.u, dtype) : Tensor();
  const int64_t step = launch_cols(in);
  for (int64_t first = 0; first < in.v; first += step) {
    const int64_t cols = std::min(step, in.v - first);
    const Tensor c = readable(rows(in.c, first, cols), dtype);
    const Tensor b = in.lora_b ? readable(rows(*in.lora_b, first, cols), dtype) : Tensor();
    cuda::ForwardParams p;
    p.head.dtype = kernel_dtype(in.e);
    p.head.e = matrix(e);
    p.head.c = matrix(c);
    if (in.u) p.head.u = matrix(u), p.head.lora_b = matrix(b);
    p.head.bias = bias.defined() ? floats(bias) + first : nullptr;
    p.head.first_col = first;
    p.head.order = order.view();
    p.head.options = in.options;
    p.partials = partials.from(first / (int64_t{partials.tiles_per_split} * backend.block_n));
    p.n = in.n;
    p.tiles_per_split = partials.tiles_per_split;
    check_cuda(backend.forward(p, stream), "linear_ce_forward");
  }
}

Tensor gather_target_logits(const Inputs& in, const Order& order, const Tensor& bias,
                            cudaStream_t stream) {
  Tensor result = zeros(in.e, {in.n}, ScalarType::Float);
  // The gather reads a few rows of B only, but in the head's dtype, as the mainloop does.
  const Tensor b = in.lora_b ? cast(*in.lora_b, in.e.scalar_type()) : Tensor();
  cuda::TargetLogitParams p;
  p.dtype = kernel_dtype(in.e);
  p.e = strided(in.e);
  p.c = strided(in.c);
  if (in.u) p.u = strided(*in.u), p.lora_b = strided(b);
  p.bias = bias.defined() ? floats(bias) : nullptr;
  p.targets = in.targets.const_data_ptr<int64_t>();
  p.order = order.view();
  p.n = in.n;
  p.shard_size = in.v;
  p.options = in.options;
  p.target_logit = floats(result);
  check_cuda(cuda::target_logits(p, stream), "target_logits");
  return result;
}

Tensor fp32_bias(const std::optional<Tensor>& bias) {
  return bias ? torch::stable::contiguous(cast(*bias, ScalarType::Float)) : Tensor();
}

ForwardResult forward_cuda(Tensor e, Tensor c, Tensor targets, std::optional<Tensor> bias,
                           std::optional<Tensor> u, std::optional<Tensor> lora_b,
                           int64_t ignore_index, double softcap, double logit_scale,
                           double label_smoothing, int64_t vocab_start, int64_t vocab_total,
                           bool metrics) {
  kernel_dtype(e);
  const torch::stable::accelerator::DeviceGuard guard(e.get_device_index());
  const cudaStream_t stream = current_stream(e.get_device_index());
  const cuda::Backend& chosen = backend();
  const Inputs in =
      make_inputs(e, c, targets, bias, u, lora_b,
                  {softcap, logit_scale, label_smoothing, ignore_index, vocab_start, vocab_total});
  const bool smoothing = label_smoothing != 0.0;
  const Order order(in, stream);
  const Tensor bias32 = fp32_bias(in.bias);
  const PartialBuffers partials(in, chosen, smoothing, metrics);
  fill_partials(in, chosen, order, bias32, partials, stream);

  const auto output = [&](bool wanted) {
    return empty(in.e, {wanted ? in.n : 0}, ScalarType::Float);
  };
  const Tensor nll = output(true), lse = output(true), logit_sum = output(smoothing);
  const Tensor max_logit = output(metrics), entropy = output(metrics);
  const Tensor argmax = empty(in.e, {metrics ? in.n : 0}, ScalarType::Long);
  const Tensor target_logit = gather_target_logits(in, order, bias32, stream);
  cuda::FinishParams f;
  f.partials = partials.from(0);
  f.n = in.n;
  f.splits = static_cast<int>(partials.splits);
  f.order = order.view();
  f.options = in.options;
  f.target_logit = floats(target_logit);
  f.nll = floats(nll);
  f.lse = floats(lse);
  if (smoothing) f.logit_sum = floats(logit_sum);
  if (metrics) {
    f.max_logit = floats(max_logit);
    f.argmax = argmax.mutable_data_ptr<int64_t>();
    f.entropy = floats(entropy);
  }
  check_cuda(cuda::finish_rows(f, stream), "finish_rows");
  return {nll, lse, target_logit, logit_sum, max_logit, argmax, entropy};
}

std::tuple<Tensor, Tensor> row_order_cuda(Tensor targets, int64_t ignore_index) {
  const torch::stable::accelerator::DeviceGuard guard(targets.get_device_index());
  Inputs in{targets, targets, torch::stable::contiguous(cast(targets, ScalarType::Long)), {}, {},
            {},      {}};
  in.n = targets.size(0);
  in.options.ignore_index = ignore_index;
  const Order order(in, current_stream(targets.get_device_index()));
  return {order.rows, order.count};
}

const float* fp32_vector(const std::optional<Tensor>& t, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(), name,
                  " must be float32 and contiguous");
  return static_cast<const float*>(t->const_data_ptr());
}

Tensor row_gradients_cuda(std::optional<Tensor> dnll, std::optional<Tensor> dlse, Tensor lse,
                          Tensor targets, Tensor row_order, Tensor row_count,
                          double label_smoothing, int64_t ignore_index, int64_t shard_size,
                          int64_t vocab_start, int64_t vocab_total) {
  const torch::stable::accelerator::DeviceGuard guard(lse.get_device_index());
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous(),
                  "targets must be int64 and contiguous");
  const int64_t n = lse.size(0);
  Tensor out = empty(lse, {n, static_cast<int64_t>(sizeof(cuda::RowGradient) / sizeof(int32_t))},
                     ScalarType::Int);
  cuda::RowGradientParams p;
  p.dnll = fp32_vector(dnll, "dnll");
  p.dlse = fp32_vector(dlse, "dlse");
  p.lse = fp32_vector(lse, "lse");
  p.targets = targets.const_data_ptr<int64_t>();
  p.order = {row_order.const_data_ptr<int32_t>(), row_count.const_data_ptr<int32_t>()};
  p.n = n;
  p.shard_size = shard_size;
  p.options = {0.0, 1.0, label_smoothing, ignore_index, vocab_start, vocab_total};
  p.out = static_cast<cuda::RowGradient*>(out.mutable_data_ptr());
  check_cuda(cuda::row_gradients(p, current_stream(lse.get_device_index())), "row_gradients");
  return out;
}

// See the schema: one chunk of logit gradients. All matrices readable as they are.
void dlogits_cuda(Tensor out, Tensor e, Tensor c, std::optional<Tensor> bias,
                  std::optional<Tensor> u, std::optional<Tensor> lora_b, Tensor row_order,
                  Tensor row_count, Tensor row_gradients, int64_t first_col, double softcap,
                  double logit_scale, double label_smoothing) {
  const torch::stable::accelerator::DeviceGuard guard(e.get_device_index());
  const auto check_matrix = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == e.scalar_type() && is_readable(t), name,
                    " must have e's dtype and rows that start at multiples of 16 bytes");
  };
  check_matrix(e, "e");
  check_matrix(c, "c");
  check_matrix(out, "out");
  STD_TORCH_CHECK(out.size(0) == e.size(0) && out.size(1) == c.size(0),
                  "out must have shape (N, columns)");
  STD_TORCH_CHECK(row_gradients.size(0) == e.size(0) && row_gradients.is_contiguous(),
                  "row_gradients must have a record for each row of e");
  cuda::BackwardParams p;
  p.head.dtype = kernel_dtype(e);
  p.head.e = matrix(e);
  p.head.c = matrix(c);
  if (u) {
    check_matrix(*u, "u");
    check_matrix(*lora_b, "lora_b");
    p.head.u = matrix(*u);
    p.head.lora_b = matrix(*lora_b);
  }
  p.head.bias = fp32_vector(bias, "bias");
  p.head.first_col = first_col;
  p.head.order = {row_order.const_data_ptr<int32_t>(), row_count.const_data_ptr<int32_t>()};
  p.head.options.softcap = softcap;
  p.head.options.logit_scale = logit_scale;
  p.head.options.label_smoothing = label_smoothing;
  p.rows = static_cast<const cuda::RowGradient*>(row_gradients.const_data_ptr());
  p.dlogits = out.mutable_data_ptr();
  p.ld_dlogits = out.stride(0);
  p.n = e.size(0);
  if (p.n == 0 || c.size(0) == 0) return;
  check_cuda(backend().backward(p, current_stream(e.get_device_index())), "dlogits");
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CUDA, m) {
  m.impl("linear_ce_forward", TORCH_BOX(&cce::torch_api::forward_cuda));
  m.impl("row_order", TORCH_BOX(&cce::torch_api::row_order_cuda));
  m.impl("row_gradients", TORCH_BOX(&cce::torch_api::row_gradients_cuda));
  m.impl("dlogits_", TORCH_BOX(&cce::torch_api::dlogits_cuda));
}
