// The sparse gradient's backward as ops; what lies between them is in cce_ext/sparse.
#include "cuda/sparse/lists.h"
#include "cuda/sparse/tail.h"
#include "torch/cuda_call.h"

namespace cce::torch_api {
namespace {

// What both ops of the rows need: upstream gradients, masses, rows that are exact already; room for a, d and row_mass.
struct Rows {
  cuda::BackwardRowsParams p;
  Tensor a, d, row_mass, share;

  Rows(const std::optional<Tensor>& dnll, const std::optional<Tensor>& dlse, const Tensor& targets,
       const Tensor& mass, const Tensor& listed, int64_t ignore_index) {
    p.targets = i64(targets, "targets");
    p.listed = data<uint8_t>(listed, ScalarType::Bool, "listed");
    p.n = targets.size(0);
    p.ignore_index = ignore_index;
    if (dnll) {  // of a mean: one number for all rows
      STD_TORCH_CHECK(dnll->scalar_type() == ScalarType::Float, "dnll must be float32");
      p.dnll = static_cast<const float*>(dnll->const_data_ptr());
      p.dnll_stride = dnll->stride(0);
    }
    p.dlse = fp32_vector(dlse, "dlse");
    p.mass = f32(mass, "mass");
    p.groups = static_cast<int>(mass.size(1));
    const auto room = [&](int64_t size) { return empty(targets, {size}, ScalarType::Float); };
    a = room(p.n), d = room(p.n), row_mass = room(p.n), share = room(1);
    p.a = floats(a);
    p.d = floats(d);
    p.row_mass = floats(row_mass);
    p.share = floats(share);
  }
};

Tensor dropped_share_cuda(std::optional<Tensor> dnll, std::optional<Tensor> dlse, Tensor targets,
                          Tensor mass, Tensor listed, int64_t ignore_index) {
  const Guard guard(targets.get_device_index());
  const Rows rows(dnll, dlse, targets, mass, listed, ignore_index);
  check_cuda(cuda::dropped_share(rows.p, stream_of(targets)), "dropped_share");
  return rows.share;
}

// The device's address of a tensor (1,) that may lie in page-locked memory of the host.
float* device_address(const Tensor& t, const char* name) {
  float* const here = f32(t, name);
  if (t.is_cuda()) return here;
  cudaPointerAttributes found{};
  check_cuda(cudaPointerGetAttributes(&found, here), name);
  STD_TORCH_CHECK(found.type == cudaMemoryTypeHost, name,
                  " must be on the device or in page-locked memory");
  return static_cast<float*>(found.devicePointer);
}

using BackwardRows =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardRows backward_rows_cuda(std::optional<Tensor> dnll, std::optional<Tensor> dlse,
                                Tensor targets, Tensor mass, Tensor listed,
                                std::optional<Tensor> total_share, Tensor exact_share,
                                int64_t ignore_index, double flat, double unit_scale,
                                double unit_uniform) {
  const Guard guard(targets.get_device_index());
  const cudaStream_t stream = stream_of(targets);
  Rows rows(dnll, dlse, targets, mass, listed, ignore_index);
  cuda::BackwardRowsParams& p = rows.p;
  p.total_share = total_share ? f32(*total_share, "total_share") : p.share;
  p.flat = static_cast<float>(flat);
  p.unit_scale = static_cast<float>(unit_scale);
  p.unit_uniform = static_cast<float>(unit_uniform);
  const Tensor exact = empty(targets, {p.n}, ScalarType::Bool);
  const Tensor d_all = empty(targets, {p.n}, ScalarType::Float);
  const Tensor found = empty_records<cuda::RowsFound>(targets, cuda::kRowsBlocks);
  const Tensor order = empty(targets, {p.n}, ScalarType::Int);
  const Tensor count = empty(targets, {1}, ScalarType::Int);
  const Tensor units = empty(targets, {3}, ScalarType::Float);
  p.exact = static_cast<uint8_t*>(exact.mutable_data_ptr());
  p.exact_share = device_address(exact_share, "exact_share");
  p.d_all = floats(d_all);
  p.found = static_cast<cuda::RowsFound*>(found.mutable_data_ptr());
  p.order = i32(order, "order");
  p.count = i32(count, "count");
  p.units = floats(units);
  check_cuda(cuda::dropped_share(p, stream), "dropped_share");
  check_cuda(cuda::choose_exact_rows(p, stream), "choose_exact_rows");
  return {rows.a, rows.d, rows.row_mass, rows.share, exact, d_all, order, count, units};
}

// See the schema. Only one of the two buffers of a sort lives on.
std::tuple<Tensor, Tensor> sort_columns_cuda(Tensor ids, Tensor row_first, int64_t shard_size) {
  const Guard guard(ids.get_device_index());
  cuda::SortColumnsParams p;
  p.ids = i32(ids, "ids");
  p.count = i32(row_first, "row_first") + row_first.size(0) - 1;
  p.capacity = ids.size(0);
  p.vocab = shard_size;
  const auto ints = [&](int64_t size) { return empty(ids, {size}, ScalarType::Int); };
  const Tensor orders[2] = {ints(p.capacity), ints(p.capacity)};
  const Tensor column_first = ints(shard_size + 1);
  // One piece of memory: two lists of keys, CUB's.
  p.workspace_bytes = cuda::sort_columns_workspace(p.capacity);
  const int64_t keys = ceil_div(2 * p.capacity, 64) * 64;
  const Tensor workspace = ints(keys + ceil_div(static_cast<int64_t>(p.workspace_bytes), 4));
  for (int i = 0; i < 2; ++i) {
    p.keys[i] = i32(workspace, "workspace") + i * p.capacity;
    p.orders[i] = i32(orders[i], "order");
  }
  p.column_first = i32(column_first, "column_first");
  p.workspace = i32(workspace, "workspace") + keys;
  int result = 0;
  check_cuda(cuda::sort_columns(p, &result, stream_of(ids)), "sort_columns");
  return {orders[result], column_first};
}

Tensor entry_weights_cuda(Tensor row_first, Tensor rows, Tensor ids, Tensor logits, Tensor a,
                          Tensor d, Tensor lse, Tensor targets, double softcap, double logit_scale,
                          double label_smoothing, int64_t vocab_start, Tensor slots, Tensor dense,
                          Tensor unit) {
  const Guard guard(lse.get_device_index());
  cuda::WeightParams p;
  p.count = i32(row_first, "row_first") + row_first.size(0) - 1;
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
  p.ld = dense.stride(0);
  p.unit = f32(unit, "unit");
  Tensor weights = empty(lse, {p.capacity}, ScalarType::Float);
  p.weights = floats(weights);
  check_cuda(cuda::entry_weights(p, stream_of(lse)), "entry_weights");
  return weights;
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

// Rows of source (items, width), as a list says.
cuda::Entries entries_of(const Tensor& source, const Tensor& items, const Tensor& weights,
                         const std::optional<Tensor>& order) {
  STD_TORCH_CHECK(source.stride(1) == 1 && source.stride(0) <= UINT32_MAX,
                  "source must be stored row by row, and no row start 2^32 numbers after another");
  cuda::Entries entries;
  entries.dtype = kernel_dtype(source);
  entries.source = source.const_data_ptr();
  entries.source_ld = static_cast<uint32_t>(source.stride(0));
  entries.width = static_cast<int>(source.size(1));
  entries.items = i32(items, "items");
  entries.weights = f32(weights, "weights");
  if (order) entries.order = i32(*order, "order");
  return entries;
}

void gather_cuda(Tensor out, Tensor source, Tensor first, std::optional<Tensor> last, Tensor items,
                 Tensor weights, std::optional<Tensor> order, std::optional<Tensor> out_rows,
                 std::optional<Tensor> sums) {
  const Guard guard(out.get_device_index());
  STD_TORCH_CHECK(out.size(1) == source.size(1), "out and source must have the same columns");
  cuda::GatherParams p;
  p.entries = entries_of(source, items, weights, order);
  p.out = gradient(out, source, "out");
  p.first = i32(first, "first");
  if (last) p.last = i32(*last, "last");
  if (out_rows) p.out_rows = i32(*out_rows, "out_rows");
  if (sums) p.sums = f32(*sums, "sums");
  p.segments = first.size(0) - 1;
  p.partition_bytes = cuda::gather_workspace(p.segments);
  // One piece of memory: two counts, three lists, CUB's.
  const int64_t counts = 64, lists = ceil_div(3 * p.segments, 64) * 64;
  const auto partition = ceil_div(static_cast<int64_t>(p.partition_bytes), 4);
  const Tensor workspace = empty(out, {counts + lists + partition}, ScalarType::Int);
  p.work_counts = i32(workspace, "workspace");
  p.work = p.work_counts + counts;
  p.partition = p.work + lists;
  check_cuda(cuda::gather_rows(p, stream_of(out)), "gather");
}

void column_gradient_cuda(Tensor out, Tensor source, Tensor product, Tensor shapes, Tensor units,
                          Tensor first, Tensor slots, Tensor items, Tensor weights, Tensor order) {
  const Guard guard(out.get_device_index());
  const int64_t vocab = slots.size(0), kinds = shapes.size(0);
  const int64_t hot = product.size(0) - ceil_div(vocab, kGroupCols) * kinds;
  STD_TORCH_CHECK(out.size(1) == source.size(1) && out.size(0) == vocab,
                  "out must have a row for each id, and source's columns");
  STD_TORCH_CHECK(kinds == cuda::kTailClasses || kinds == cuda::kTailClasses + 1,
                  "shapes must have a row for each class, and one more with label smoothing");
  STD_TORCH_CHECK(hot >= 0 && product.size(1) == source.size(1) && shapes.size(1) == vocab &&
                      shapes.stride(1) == 1 && units.size(0) == 3 &&
                      shapes.scalar_type() == source.scalar_type() && first.size(0) == vocab + 1,
                  "product must have a row for each hot id and each group's kinds, shapes a column "
                  "and first a place for each id (and one more), units three numbers");
  cuda::ColumnGradientParams p;
  p.entries = entries_of(source, items, weights, order);
  p.source_rows = source.size(0);
  p.first = i32(first, "first");
  p.slots = i32(slots, "slots");
  p.vocab = vocab;
  p.hot = hot;
  p.product = f32(product, "product");
  p.shapes = shapes.const_data_ptr();
  p.shapes_ld = shapes.stride(0);
  p.smoothing = kinds > cuda::kTailClasses;
  p.units = f32(units, "units");
  p.out = gradient(out, source, "out");
  check_cuda(cuda::column_gradient(p, stream_of(out)), "column_gradient_");
}

// See the schema. All matrices readable as they are, but lora_b may be float32, its rows of any length.
void exact_rows_cuda(std::optional<Tensor> de, std::optional<Tensor> dc,
                     std::optional<Tensor> dbias, std::optional<Tensor> du,
                     std::optional<Tensor> dlora_b, Tensor e, Tensor c, std::optional<Tensor> bias,
                     std::optional<Tensor> u, std::optional<Tensor> lora_b, Tensor row_order,
                     Tensor row_count, std::optional<Tensor> dnll, std::optional<Tensor> dlse,
                     Tensor lse, Tensor targets, int64_t ignore_index, double softcap,
                     double logit_scale, double label_smoothing, int64_t vocab_start,
                     int64_t vocab_total) {
  const Guard guard(e.get_device_index());
  cuda::ExactRowsParams p;
  const bool wide_b = lora_b && lora_b->scalar_type() == ScalarType::Float;
  p.head = readable_head(e, c, bias, u, wide_b ? std::nullopt : lora_b, row_order, row_count,
                         softcap, logit_scale, label_smoothing);
  if (wide_b) {
    STD_TORCH_CHECK(lora_b->stride(1) == 1, "lora_b must be stored row by row");
    p.lora_b32 = static_cast<const float*>(lora_b->const_data_ptr());
    p.lora_b32_ld = lora_b->stride(0);
    p.head.lora_b.rows = lora_b->size(0);
    p.head.lora_b.cols = lora_b->size(1);
    p.head.lora_b.ld = ceil_div(lora_b->size(1), 8) * 8;
  }
  const Tensor records =
      row_records(dnll, dlse, lse, targets, row_order, row_count, c.size(0),
                  {softcap, logit_scale, label_smoothing, ignore_index, vocab_start, vocab_total});
  p.rows = static_cast<const cuda::RowGradient*>(records.const_data_ptr());
  p.n = row_order.size(0);
  p.de = gradient(de, e, "de");
  p.dc = gradient(dc, e, "dc");
  p.du = gradient(du, e, "du");
  p.dlora_b = gradient(dlora_b, e, "dlora_b");
  if (dbias) p.dbias = f32(*dbias, "dbias");
  Tensor workspace =
      empty(e, {cuda::exact_rows_workspace(p.n, p.de.width + p.du.width, p.head.lora_b.ld)},
            ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_cuda(backend().exact_rows(p, stream_of(e)), "exact_rows");
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CUDA, m) {
  m.impl("dropped_share", TORCH_BOX(&cce::torch_api::dropped_share_cuda));
  m.impl("backward_rows", TORCH_BOX(&cce::torch_api::backward_rows_cuda));
  m.impl("entry_weights", TORCH_BOX(&cce::torch_api::entry_weights_cuda));
  m.impl("sort_columns", TORCH_BOX(&cce::torch_api::sort_columns_cuda));
  m.impl("gather_", TORCH_BOX(&cce::torch_api::gather_cuda));
  m.impl("column_gradient_", TORCH_BOX(&cce::torch_api::column_gradient_cuda));
  m.impl("exact_rows_", TORCH_BOX(&cce::torch_api::exact_rows_cuda));
}
