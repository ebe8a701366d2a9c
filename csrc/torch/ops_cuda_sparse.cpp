// The pieces of the sparse gradient as ops; the steps between them are in cce_ext/sparse.
#include <cmath>

#include "cuda/sparse/lists.h"
#include "torch/cuda_call.h"

namespace cce::torch_api {
namespace {

constexpr int64_t kBlockRows = 128;

using Guard = torch::stable::accelerator::DeviceGuard;

cudaStream_t stream_of(const Tensor& t) { return current_stream(t.get_device_index()); }

// The data of a contiguous tensor of a known dtype.
template <typename T>
T* data(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), name,
                  " has another dtype than expected or is not contiguous");
  return static_cast<T*>(t.mutable_data_ptr());
}
float* f32(const Tensor& t, const char* name) { return data<float>(t, ScalarType::Float, name); }
int32_t* i32(const Tensor& t, const char* name) { return data<int32_t>(t, ScalarType::Int, name); }
int64_t* i64(const Tensor& t, const char* name) { return data<int64_t>(t, ScalarType::Long, name); }
uint8_t* u8(const Tensor& t, const char* name) { return data<uint8_t>(t, ScalarType::Byte, name); }

Tensor target_logits_cuda(Tensor e, Tensor c, Tensor targets, std::optional<Tensor> bias,
                          std::optional<Tensor> u, std::optional<Tensor> lora_b,
                          int64_t ignore_index, double softcap, double logit_scale,
                          int64_t vocab_start, int64_t vocab_total, Tensor row_order,
                          Tensor row_count) {
  const Guard guard(e.get_device_index());
  const Inputs in =
      make_inputs(e, c, targets, bias, u, lora_b,
                  {softcap, logit_scale, 0.0, ignore_index, vocab_start, vocab_total});
  return gather_target_logits(in, Order(row_order, row_count), fp32_bias(in.bias), stream_of(e));
}

Tensor row_bounds_cuda(Tensor products, std::optional<Tensor> bias, Tensor counts,
                       Tensor target_logit, int64_t strided, int64_t vocab, double softcap,
                       double logit_scale) {
  const Guard guard(products.get_device_index());
  cuda::BoundParams p;
  p.products = f32(products, "products");
  p.bias = fp32_vector(bias, "bias");
  p.counts = u8(counts, "counts");
  p.target_logit = f32(target_logit, "target_logit");
  p.rows = products.size(0);
  p.columns = static_cast<int>(products.size(1));
  p.strided = static_cast<int>(strided);
  p.vocab = vocab;
  p.options.softcap = softcap;
  p.options.logit_scale = logit_scale;
  Tensor bound2 = empty(products, {p.rows}, ScalarType::Float);
  p.bound2 = floats(bound2);
  check_cuda(cuda::row_bounds(p, stream_of(products)), "row_bounds");
  return bound2;
}

using TrainingResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TrainingResult training_forward_cuda(Tensor e, Tensor c, Tensor targets, std::optional<Tensor> bias,
                                     std::optional<Tensor> u, std::optional<Tensor> lora_b,
                                     int64_t ignore_index, double softcap, double logit_scale,
                                     double label_smoothing, int64_t vocab_start,
                                     int64_t vocab_total, bool metrics, Tensor row_order,
                                     Tensor row_count, Tensor target_logit, Tensor bound2,
                                     double eps, int64_t capacity) {
  const Guard guard(e.get_device_index());
  const cudaStream_t stream = stream_of(e);
  const cuda::Backend& chosen = backend();
  const Inputs in =
      make_inputs(e, c, targets, bias, u, lora_b,
                  {softcap, logit_scale, label_smoothing, ignore_index, vocab_start, vocab_total});
  STD_TORCH_CHECK(in.v < int64_t{1} << cuda::kCandidateIdBits,
                  "the sparse gradient takes a vocabulary of less than 2^25 ids");
  const Order order(row_order, row_count);
  const Tensor bias32 = fp32_bias(in.bias);
  const PartialBuffers partials(in, chosen, metrics, true);
  const int64_t blocks = ceil_div(in.n, kBlockRows);
  const Tensor pool = empty(in.e, {blocks, capacity, 2}, ScalarType::Int);
  const Tensor counts = zeros(in.e, {blocks}, ScalarType::Int);
  cuda::Candidates candidates;
  candidates.bound2 = f32(bound2, "bound2");
  candidates.log2_eps = static_cast<float>(std::log2(eps));
  candidates.pool = static_cast<uint2*>(pool.mutable_data_ptr());
  candidates.counts = i32(counts, "counts");
  candidates.capacity = capacity;
  fill_partials(in, chosen, order, bias32, partials, candidates, stream);
  const auto [nll, lse, same, logit_sum, max_logit, argmax, entropy] =
      finish(in, order, partials, target_logit, metrics, stream);
  const Tensor capped =
      partials.capped.defined() ? partials.capped : empty(in.e, {0}, ScalarType::Float);
  return {nll, lse, logit_sum, max_logit, argmax, entropy, partials.max_sum, capped, pool, counts};
}

cuda::KeepParams keep_params(const Tensor& pool, const Tensor& counts, const Tensor& bound2,
                             const Tensor& row_order, const Tensor& row_count, const Tensor& lse,
                             const Tensor& target_logit, const Tensor& targets, double eps,
                             int64_t ignore_index, int64_t shard_size, int64_t vocab_start,
                             int64_t vocab_total) {
  cuda::KeepParams p;
  p.candidates.bound2 = f32(bound2, "bound2");
  p.candidates.pool = static_cast<uint2*>(pool.mutable_data_ptr());
  p.candidates.counts = i32(counts, "counts");
  p.candidates.capacity = pool.size(1);
  p.order = Order(row_order, row_count).view();
  p.lse = f32(lse, "lse");
  p.target_logit = f32(target_logit, "target_logit");
  p.targets = i64(targets, "targets");
  p.n = lse.size(0);
  p.shard_size = shard_size;
  p.eps = static_cast<float>(eps);
  p.options.ignore_index = ignore_index;
  p.options.vocab_start = vocab_start;
  p.options.vocab_total = vocab_total;
  return p;
}

std::tuple<Tensor, Tensor, Tensor> count_kept_cuda(Tensor pool, Tensor counts, Tensor bound2,
                                                   Tensor row_order, Tensor row_count, Tensor lse,
                                                   Tensor target_logit, Tensor targets, double eps,
                                                   int64_t ignore_index, int64_t shard_size,
                                                   int64_t vocab_start, int64_t vocab_total) {
  const Guard guard(lse.get_device_index());
  cuda::KeepParams p =
      keep_params(pool, counts, bound2, row_order, row_count, lse, target_logit, targets, eps,
                  ignore_index, shard_size, vocab_start, vocab_total);
  Tensor kept = empty(lse, {pool.size(0), cuda::kKeepParts}, ScalarType::Int);
  Tensor exact = empty(lse, {pool.size(0)}, ScalarType::Byte);
  p.kept = i32(kept, "kept");
  Tensor column_counts = zeros(lse, {shard_size}, ScalarType::Int);
  p.exact = u8(exact, "exact");
  p.column_counts = i32(column_counts, "column_counts");
  check_cuda(cuda::count_kept(p, stream_of(lse)), "count_kept");
  return {kept, exact, column_counts};
}

void write_kept_cuda(Tensor pool, Tensor counts, Tensor bound2, Tensor row_order, Tensor row_count,
                     Tensor lse, Tensor target_logit, Tensor targets, double eps,
                     int64_t ignore_index, int64_t shard_size, int64_t vocab_start,
                     int64_t vocab_total, Tensor exact, Tensor first, Tensor slots, int64_t id_bits,
                     Tensor keys, Tensor logits) {
  const Guard guard(lse.get_device_index());
  cuda::KeepParams p =
      keep_params(pool, counts, bound2, row_order, row_count, lse, target_logit, targets, eps,
                  ignore_index, shard_size, vocab_start, vocab_total);
  p.exact = u8(exact, "exact");
  p.first = i64(first, "first");
  p.slots = i32(slots, "slots");
  p.id_bits = static_cast<int>(id_bits);
  p.keys = i64(keys, "keys");
  p.logits = f32(logits, "logits");
  check_cuda(cuda::write_kept(p, stream_of(lse)), "write_kept");
}

std::tuple<Tensor, Tensor> sort_pairs_cuda(Tensor keys, Tensor values, int64_t bits) {
  const Guard guard(keys.get_device_index());
  const bool wide = keys.scalar_type() == ScalarType::Long;
  const int64_t count = keys.size(0);
  Tensor keys_out = empty(keys, {count}, keys.scalar_type());
  Tensor values_out = empty(keys, {count}, values.scalar_type());
  const size_t bytes = cuda::sort_pairs_workspace(count, wide);
  Tensor workspace = empty(keys, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  void* space = workspace.mutable_data_ptr();
  const cudaStream_t stream = stream_of(keys);
  const int low = static_cast<int>(bits);
  const cudaError_t error =
      wide ? cuda::sort_wide(i64(keys, "keys"), f32(values, "values"), i64(keys_out, "keys"),
                             f32(values_out, "values"), count, low, space, bytes, stream)
           : cuda::sort_narrow(i32(keys, "keys"), i32(values, "values"), i32(keys_out, "keys"),
                               i32(values_out, "values"), count, low, space, bytes, stream);
  check_cuda(error, "sort_pairs");
  return {keys_out, values_out};
}

Tensor dropped_mass_cuda(Tensor max_sum, Tensor capped, Tensor first, Tensor hot, Tensor ids,
                         Tensor logits, Tensor row_order, Tensor row_count, Tensor lse,
                         int64_t shard_size, double softcap) {
  const Guard guard(lse.get_device_index());
  cuda::MassParams p;
  p.n = lse.size(0);
  p.splits = static_cast<int>(max_sum.size(0));
  p.groups = static_cast<int>(ceil_div(shard_size, kGroupCols));
  // Splits are groups, or groups cut into equal parts.
  const auto fits = [&](int parts) {
    return kGroupCols % parts == 0 && ceil_div(shard_size, kGroupCols / parts) == p.splits;
  };
  while (!fits(p.splits_per_group)) {
    STD_TORCH_CHECK(++p.splits_per_group <= kGroupCols,
                    "max_sum does not belong to this vocabulary");
  }
  Tensor mass = zeros(lse, {p.n, p.groups}, ScalarType::Float);
  p.partials.max_sum = reinterpret_cast<float2*>(f32(max_sum, "max_sum"));
  if (capped.size(0) > 0) p.partials.capped = f32(capped, "capped");
  p.first = i32(first, "first");
  p.hot = i32(hot, "hot");
  p.ids = i32(ids, "ids");
  p.logits = f32(logits, "logits");
  p.order = Order(row_order, row_count).view();
  p.lse = f32(lse, "lse");
  p.options.softcap = softcap;
  p.mass = floats(mass);
  check_cuda(cuda::dropped_mass(p, stream_of(lse)), "dropped_mass");
  return mass;
}

Tensor entry_weights_cuda(Tensor count, Tensor rows, Tensor ids, Tensor logits, Tensor a, Tensor d,
                          Tensor lse, Tensor targets, double softcap, double logit_scale,
                          double label_smoothing, int64_t vocab_start, Tensor slots, Tensor dense,
                          Tensor unit) {
  const Guard guard(lse.get_device_index());
  cuda::WeightParams p;
  p.count = i32(count, "count");
  p.rows = i32(rows, "rows");
  p.ids = i32(ids, "ids");
  p.logits = f32(logits, "logits");
  p.a = f32(a, "a");
  p.d = f32(d, "d");
  p.lse = f32(lse, "lse");
  p.targets = i64(targets, "targets");
  p.capacity = ids.size(0);
  p.options.softcap = softcap;
  p.options.logit_scale = logit_scale;
  p.options.label_smoothing = label_smoothing;
  p.options.vocab_start = vocab_start;
  p.slots = i32(slots, "slots");
  p.dtype = kernel_dtype(dense);
  p.dense = dense.mutable_data_ptr();
  p.hot = dense.size(1);
  p.unit = f32(unit, "unit");
  Tensor weights = empty(lse, {p.capacity}, ScalarType::Float);
  p.weights = floats(weights);
  check_cuda(cuda::entry_weights(p, stream_of(lse)), "entry_weights");
  return weights;
}

// Whether out is float beside a 16-bit other.
bool is_fp32_beside(const Tensor& out, const Tensor& other, const char* name) {
  if (out.scalar_type() == ScalarType::Float) return true;
  STD_TORCH_CHECK(out.scalar_type() == other.scalar_type(), name,
                  " must be float32 or of the inputs' dtype");
  return false;
}

void gather_cuda(Tensor out, Tensor source, Tensor first, Tensor last, Tensor items, Tensor weights,
                 std::optional<Tensor> order, std::optional<Tensor> out_rows,
                 std::optional<Tensor> sums) {
  const Guard guard(out.get_device_index());
  STD_TORCH_CHECK(out.size(1) == source.size(1) && out.stride(1) == 1 && source.stride(1) == 1,
                  "out and source must have the same columns, one beside the other");
  cuda::GatherParams p;
  p.dtype = kernel_dtype(source);
  p.source = source.const_data_ptr();
  p.source_ld = source.stride(0);
  p.out = out.mutable_data_ptr();
  p.out_ld = out.stride(0);
  p.out_fp32 = is_fp32_beside(out, source, "out");
  p.width = static_cast<int>(source.size(1));
  p.first = i32(first, "first");
  p.last = i32(last, "last");
  p.items = i32(items, "items");
  p.weights = f32(weights, "weights");
  if (order) p.order = i32(*order, "order");
  if (out_rows) p.out_rows = i32(*out_rows, "out_rows");
  if (sums) p.sums = f32(*sums, "sums");
  p.segments = first.size(0);
  p.partition_bytes = cuda::gather_workspace(p.segments);
  Tensor work = empty(out, {3, p.segments}, ScalarType::Int);
  Tensor work_counts = empty(out, {2}, ScalarType::Int);
  Tensor partition = empty(out, {static_cast<int64_t>(p.partition_bytes)}, ScalarType::Byte);
  p.work = i32(work, "work");
  p.work_counts = i32(work_counts, "work_counts");
  p.partition = partition.mutable_data_ptr();
  check_cuda(cuda::gather_rows(p, stream_of(out)), "gather");
}

cuda::Gradient gradient(const std::optional<Tensor>& t, const Tensor& e, const char* name) {
  cuda::Gradient g;
  if (!t) return g;
  STD_TORCH_CHECK(t->stride(1) == 1, name, " must be stored row by row");
  g.data = t->mutable_data_ptr();
  g.ld = t->stride(0);
  g.width = t->size(1);
  g.fp32 = is_fp32_beside(*t, e, name);
  return g;
}

// See the schema. All matrices readable as they are.
void exact_rows_cuda(std::optional<Tensor> de, std::optional<Tensor> dc,
                     std::optional<Tensor> dbias, std::optional<Tensor> du,
                     std::optional<Tensor> dlora_b, Tensor e, Tensor c, std::optional<Tensor> bias,
                     std::optional<Tensor> u, std::optional<Tensor> lora_b, Tensor row_order,
                     Tensor row_count, Tensor row_gradients, double softcap, double logit_scale,
                     double label_smoothing) {
  const Guard guard(e.get_device_index());
  cuda::ExactRowsParams p;
  p.head = readable_head(e, c, bias, u, lora_b, row_order, row_count, softcap, logit_scale,
                         label_smoothing);
  p.rows = static_cast<const cuda::RowGradient*>(row_gradients.const_data_ptr());
  p.n = row_order.size(0);
  p.de = gradient(de, e, "de");
  p.dc = gradient(dc, e, "dc");
  p.du = gradient(du, e, "du");
  p.dlora_b = gradient(dlora_b, e, "dlora_b");
  if (dbias) p.dbias = f32(*dbias, "dbias");
  Tensor workspace =
      empty(e, {cuda::exact_rows_workspace(p.n, p.de.width + p.du.width)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_cuda(backend().exact_rows(p, stream_of(e)), "exact_rows");
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CUDA, m) {
  m.impl("target_logits", TORCH_BOX(&cce::torch_api::target_logits_cuda));
  m.impl("row_bounds", TORCH_BOX(&cce::torch_api::row_bounds_cuda));
  m.impl("training_forward", TORCH_BOX(&cce::torch_api::training_forward_cuda));
  m.impl("count_kept", TORCH_BOX(&cce::torch_api::count_kept_cuda));
  m.impl("write_kept", TORCH_BOX(&cce::torch_api::write_kept_cuda));
  m.impl("sort_pairs", TORCH_BOX(&cce::torch_api::sort_pairs_cuda));
  m.impl("dropped_mass", TORCH_BOX(&cce::torch_api::dropped_mass_cuda));
  m.impl("entry_weights", TORCH_BOX(&cce::torch_api::entry_weights_cuda));
  m.impl("gather_", TORCH_BOX(&cce::torch_api::gather_cuda));
  m.impl("exact_rows_", TORCH_BOX(&cce::torch_api::exact_rows_cuda));
}
