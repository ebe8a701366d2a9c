// The CUDA path: op arguments to the launchers' parameters, workspaces from PyTorch's allocator, all work on PyTorch's
// current stream, nothing that waits for the device. The exact backward's loop over vocabulary chunks and its plain
// matmuls are in cce_ext/cuda_backward.py; here are the pieces that it calls.
#include "torch/cuda_call.h"

namespace cce::torch_api {
namespace {

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
  const Order order(in, stream);
  const Tensor bias32 = fp32_bias(in.bias);
  const PartialBuffers partials(in, chosen, metrics, false);
  fill_partials(in, chosen, order, bias32, partials, {}, false, stream);
  const Tensor target_logit = gather_target_logits(in, order, bias32, stream);
  return finish(in, order, partials, target_logit, metrics, stream);
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

Tensor row_gradients_cuda(std::optional<Tensor> dnll, std::optional<Tensor> dlse, Tensor lse,
                          Tensor targets, Tensor row_order, Tensor row_count,
                          double label_smoothing, int64_t ignore_index, int64_t shard_size,
                          int64_t vocab_start, int64_t vocab_total) {
  const torch::stable::accelerator::DeviceGuard guard(lse.get_device_index());
  return row_records(dnll, dlse, lse, targets, row_order, row_count, shard_size,
                     {0.0, 1.0, label_smoothing, ignore_index, vocab_start, vocab_total});
}

int64_t column_tile_cuda(Tensor like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  return backend().block_n();
}

// See the schema: one chunk of logit gradients. All matrices readable as they are.
void dlogits_cuda(Tensor out, Tensor e, Tensor c, std::optional<Tensor> bias,
                  std::optional<Tensor> u, std::optional<Tensor> lora_b, Tensor row_order,
                  Tensor row_count, Tensor row_gradients, int64_t first_col, double softcap,
                  double logit_scale, double label_smoothing) {
  const torch::stable::accelerator::DeviceGuard guard(e.get_device_index());
  check_readable(out, e, "out");
  STD_TORCH_CHECK(out.size(0) == row_order.size(0) && out.size(1) == c.size(0),
                  "out must have shape (rows in the order, columns)");
  STD_TORCH_CHECK(row_gradients.size(0) == row_order.size(0) && row_gradients.is_contiguous(),
                  "row_gradients must have a record for each row in the order");
  cuda::BackwardParams p;
  p.head = readable_head(e, c, bias, u, lora_b, row_order, row_count, softcap, logit_scale,
                         label_smoothing);
  p.head.first_col = first_col;
  p.rows = static_cast<const cuda::RowGradient*>(row_gradients.const_data_ptr());
  p.dlogits = out.mutable_data_ptr();
  p.ld_dlogits = out.stride(0);
  p.n = row_order.size(0);
  if (p.n == 0 || c.size(0) == 0) return;
  check_cuda(backend().backward(p, current_stream(e.get_device_index())), "dlogits");
}

// A matrix whose rows are picked by pick_rows: of `like`'s dtype or float.
cuda::StridedMatrix pick_from(const Tensor& t, const Tensor& like, bool* fp32, Tensor* keeps) {
  *fp32 = t.scalar_type() == ScalarType::Float;
  *keeps = *fp32 ? t : cast(t, like.scalar_type());
  return strided(*keeps);
}

void pick_rows_cuda(Tensor out, Tensor a, Tensor ids_a, Tensor b, Tensor ids_b) {
  const Guard guard(out.get_device_index());
  STD_TORCH_CHECK(out.is_contiguous() && out.size(0) >= ids_a.size(0) + ids_b.size(0) &&
                      out.size(1) == a.size(1) && out.size(1) == b.size(1),
                  "out must be contiguous, with a row for each id and the columns of a and b");
  Tensor keeps[2];
  cuda::PickRowsParams p;
  p.dtype = kernel_dtype(out);
  p.from[0].matrix = pick_from(a, out, &p.from[0].fp32, &keeps[0]);
  p.from[1].matrix = pick_from(b, out, &p.from[1].fp32, &keeps[1]);
  p.from[0].ids = i64(ids_a, "ids_a");
  p.from[1].ids = i64(ids_b, "ids_b");
  p.from[0].count = ids_a.size(0);
  p.from[1].count = ids_b.size(0);
  p.out = out.mutable_data_ptr();
  p.cols = out.size(1);
  check_cuda(cuda::pick_rows(p, stream_of(out)), "pick_rows_");
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CUDA, m) {
  m.impl("pick_rows_", TORCH_BOX(&cce::torch_api::pick_rows_cuda));
  m.impl("linear_ce_forward", TORCH_BOX(&cce::torch_api::forward_cuda));
  m.impl("row_order", TORCH_BOX(&cce::torch_api::row_order_cuda));
  m.impl("row_gradients", TORCH_BOX(&cce::torch_api::row_gradients_cuda));
  m.impl("column_tile", TORCH_BOX(&cce::torch_api::column_tile_cuda));
  m.impl("dlogits_", TORCH_BOX(&cce::torch_api::dlogits_cuda));
}
