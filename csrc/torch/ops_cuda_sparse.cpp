// The sparse gradient's forward as ops; what lies between them is in cce_ext/sparse.
#include <cuda_runtime_api.h>

#include <cmath>

#include "cuda/sparse/lists.h"
#include "cuda/sparse/tail.h"
#include "torch/cuda_call.h"

namespace cce::torch_api {
namespace {

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

// Counts of ids, zeros at first, and what choosing the largest of them works with; room for more zeros after them.
struct Tallies {
  int64_t vocab, padded;  // counts are read four at a time
  Tensor all;

  Tallies(const Tensor& like, int64_t size, int64_t more = 0)
      : vocab(size),
        padded(ceil_div(size, 4) * 4),
        all(zeroed(like, padded + cuda::kHotBins + 2 * cuda::kHotBlocks + more, ScalarType::Int)) {}
  int32_t* counts() const { return i32(all, "tallies"); }
  int32_t* bins() const { return counts() + padded; }
  int32_t* places() const { return bins() + cuda::kHotBins; }
  int32_t* more() const { return places() + 2 * cuda::kHotBlocks; }
};

// Writes the `hot` ids with the largest counts; returns their places by id (V,).
Tensor choose_ids(const Tallies& tallies, int64_t* ids, int64_t hot) {
  const Tensor slots = empty(tallies.all, {tallies.vocab}, ScalarType::Int);
  cuda::HotIdsParams p;
  p.counts = tallies.counts();
  p.vocab = tallies.vocab;
  p.hot = static_cast<int>(hot);
  p.bins = tallies.bins();
  p.places = tallies.places();
  p.ids = ids;
  p.slots = i32(slots, "slots");
  check_cuda(cuda::hot_ids(p, stream_of(slots)), "hot_ids");
  return slots;
}

std::tuple<Tensor, Tensor, Tensor> bound_columns_cuda(Tensor targets, Tensor row_order,
                                                      Tensor row_count, int64_t shard_size,
                                                      int64_t vocab_start, int64_t strided,
                                                      int64_t frequent) {
  const Guard guard(targets.get_device_index());
  const cudaStream_t stream = stream_of(targets);
  const Tensor ids = empty(targets, {strided + frequent}, ScalarType::Long);
  const Tensor counts = empty(targets, {strided}, ScalarType::Byte);
  const Tensor anchors = empty(targets, {cuda::kTailClasses}, ScalarType::Long);
  const Tallies tallies(targets, shard_size);
  cuda::BoundColumnsParams p;
  p.targets = i64(targets, "targets");
  p.order = Order(row_order, row_count).view();
  p.n = targets.size(0);
  p.vocab = shard_size;
  p.vocab_start = vocab_start;
  p.target_counts = tallies.counts();
  check_cuda(cuda::count_targets(p, stream), "count_targets");
  const Tensor slots = choose_ids(tallies, i64(ids, "ids") + strided, frequent);
  p.slots = i32(slots, "slots");
  p.strided = static_cast<int>(strided);
  p.classes = cuda::kTailClasses;
  p.ids = i64(ids, "ids");
  p.counts = u8(counts, "counts");
  p.anchors = i64(anchors, "anchors");
  check_cuda(cuda::bound_columns(p, stream), "bound_columns");
  return {ids, counts, anchors};
}

std::tuple<Tensor, Tensor, Tensor> row_bounds_cuda(Tensor products, std::optional<Tensor> bias,
                                                   Tensor counts, Tensor target_logit,
                                                   int64_t strided, int64_t vocab, double eps,
                                                   double softcap, double logit_scale) {
  const Guard guard(products.get_device_index());
  STD_TORCH_CHECK(
      counts.size(0) == strided && products.size(1) >= strided + cuda::kTailClasses,
      "products must have the strided columns and one for each class, counts a flag for "
      "each strided one");
  cuda::BoundParams p;
  p.products = f32(products, "products");
  p.bias = fp32_vector(bias, "bias");
  p.counts = u8(counts, "counts");
  p.target_logit = f32(target_logit, "target_logit");
  p.rows = products.size(0);
  p.columns = static_cast<int>(products.size(1)) - cuda::kTailClasses;
  p.classes = cuda::kTailClasses;
  p.strided = static_cast<int>(strided);
  p.vocab = vocab;
  p.options.softcap = softcap;
  p.options.logit_scale = logit_scale;
  p.eps = static_cast<float>(eps);
  const Tensor bound2 = empty(products, {p.rows}, ScalarType::Float);
  const Tensor share = empty(products, {p.rows}, ScalarType::Float);
  p.bound2 = floats(bound2);
  p.share = floats(share);
  const Tensor classes = empty(products, {p.rows}, ScalarType::Long);
  p.row_class = i64(classes, "classes");
  check_cuda(cuda::row_bounds(p, stream_of(products)), "row_bounds");
  return {bound2, share, classes};
}

std::tuple<Tensor, Tensor, Tensor> draw_rows_cuda(Tensor share, Tensor bound2, Tensor row_order,
                                                  Tensor row_count, int64_t samples) {
  const Guard guard(share.get_device_index());
  cuda::DrawRowsParams p;
  p.share = f32(share, "share");
  p.bound2 = f32(bound2, "bound2");
  p.order = Order(row_order, row_count).view();
  p.n = share.size(0);
  p.samples = static_cast<int>(samples);
  const Tensor starts = empty_records<cuda::RowStart>(share, p.n);
  const Tensor rows = empty(share, {samples}, ScalarType::Long);
  const Tensor draws = empty(share, {samples}, ScalarType::Float);
  const Tensor steps = empty(share, {cuda::kDrawBlocks}, ScalarType::Long);
  p.starts = static_cast<cuda::RowStart*>(starts.mutable_data_ptr());
  p.rows = i64(rows, "rows");
  p.draws = f32(draws, "draws");
  p.steps = i64(steps, "steps");
  check_cuda(cuda::draw_rows(p, stream_of(share)), "draw_rows");
  return {starts, rows, draws};
}

using TrainingResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor>;

TrainingResult training_forward_cuda(Tensor e, Tensor c, Tensor targets, std::optional<Tensor> bias,
                                     std::optional<Tensor> u, std::optional<Tensor> lora_b,
                                     int64_t ignore_index, double softcap, double logit_scale,
                                     double label_smoothing, int64_t vocab_start,
                                     int64_t vocab_total, bool metrics, Tensor row_order,
                                     Tensor row_count, Tensor target_logit, Tensor starts,
                                     double eps, int64_t capacity, int64_t samples) {
  const Guard guard(e.get_device_index());
  const cudaStream_t stream = stream_of(e);
  const cuda::Backend& chosen = backend();
  const Inputs in =
      make_inputs(e, c, targets, bias, u, lora_b,
                  {softcap, logit_scale, label_smoothing, ignore_index, vocab_start, vocab_total});
  STD_TORCH_CHECK(in.v < int64_t{1} << cuda::kCandidateIdBits,
                  "the sparse gradient takes a vocabulary of less than 2^25 ids");
  STD_TORCH_CHECK(softcap == 0.0 || label_smoothing == 0.0,
                  "label smoothing under a softcap has no sparse gradient");
  const Order order(row_order, row_count);
  const Tensor bias32 = fp32_bias(in.bias);
  const PartialBuffers partials(in, chosen, metrics, true);
  const int64_t blocks = ceil_div(in.n, cuda::kRowBlock);
  const Tensor pool = empty(in.e, {blocks, capacity, 2}, ScalarType::Int);
  const Tensor counts = zeroed(in.e, blocks, ScalarType::Int);
  const Tensor levels =
      empty(in.e, {samples, ceil_div(in.v, cuda::kLevelCols) * cuda::kLevelCols}, ScalarType::Byte);
  cuda::Candidates candidates;
  candidates.starts = reinterpret_cast<const cuda::RowStart*>(i32(starts, "starts"));
  candidates.log2_eps = static_cast<float>(std::log2(eps));
  candidates.pool = static_cast<uint2*>(pool.mutable_data_ptr());
  candidates.counts = i32(counts, "counts");
  candidates.capacity = capacity;
  candidates.levels = u8(levels, "levels");
  candidates.ld_levels = levels.size(1);
  fill_partials(in, chosen, order, bias32, partials, candidates, true, stream);
  const auto [nll, lse, same, logit_sum, max_logit, argmax, entropy] =
      finish(in, order, partials, target_logit, metrics, stream);
  const Tensor capped =
      partials.capped.defined() ? partials.capped : empty(in.e, {0}, ScalarType::Float);
  return {nll,    lse,  logit_sum, max_logit, argmax, entropy, partials.max_sum,
          capped, pool, counts,    levels};
}

cuda::KeepParams keep_params(const Tensor& pool, const Tensor& counts, const Tensor& bound2,
                             const Tensor& row_order, const Tensor& row_count, const Tensor& lse,
                             const Tensor& target_logit, const Tensor& targets, double eps,
                             int64_t ignore_index, int64_t shard_size, int64_t vocab_start,
                             int64_t vocab_total) {
  cuda::KeepParams p;
  p.bound2 = f32(bound2, "bound2");
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

// How the forward's splits make groups: they are groups, or groups cut into equal parts.
int splits_of_a_group(int64_t splits, int64_t vocab) {
  int parts = 1;
  const auto fits = [&] {
    return kGroupCols % parts == 0 && ceil_div(vocab, kGroupCols / parts) == splits;
  };
  while (!fits())
    STD_TORCH_CHECK(++parts <= kGroupCols, "max_sum does not belong to this vocabulary");
  return parts;
}

// See the schemas and cce_ext/sparse/forward.py. Two ops, because the caller can let go of the pool between them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_kept_cuda(
    Tensor pool, Tensor counts, Tensor row_order, Tensor row_count, Tensor target_logit,
    Tensor bound2, Tensor lse, Tensor targets, double eps, int64_t ignore_index, int64_t shard_size,
    int64_t vocab_start, int64_t vocab_total, int64_t capacity, int64_t hot) {
  const Guard guard(lse.get_device_index());
  const cudaStream_t stream = stream_of(lse);
  const int64_t n = lse.size(0), blocks = pool.size(0);
  const auto ints = [&](int64_t size) { return empty(lse, {size}, ScalarType::Int); };
  cuda::KeepParams keep =
      keep_params(pool, counts, bound2, row_order, row_count, lse, target_logit, targets, eps,
                  ignore_index, shard_size, vocab_start, vocab_total);
  const Tallies tallies(lse, shard_size, blocks);
  keep.column_counts = tallies.counts();
  keep.kept = tallies.more();
  // Kept entries of rows, and where those of the row blocks start.
  const int64_t row_counts = blocks * cuda::kKeepParts * cuda::kRowBlock;
  const Tensor workspace = ints(row_counts + blocks);
  keep.row_counts = i32(workspace, "workspace");
  const Tensor exact = empty(lse, {blocks}, ScalarType::Byte);
  keep.exact = u8(exact, "exact");
  check_cuda(cuda::count_kept(keep, stream), "count_kept");

  const Tensor row_first = ints(n + 1);
  const Tensor tally = empty(lse, {5}, ScalarType::Long);
  cuda::PlaceParams place;
  place.kept = keep.kept;
  place.found = i32(counts, "counts");
  place.row_count = i32(row_count, "row_count");
  place.blocks = blocks;
  place.pool_capacity = pool.size(1);
  place.capacity = capacity;
  place.first = keep.row_counts + row_counts;
  place.end = i32(row_first, "row_first") + n;
  place.exact = keep.exact;
  place.tally = i64(tally, "tally");
  check_cuda(cuda::place_kept(place, stream), "place_kept");

  const Tensor hot_ids = empty(lse, {hot}, ScalarType::Long);
  const Tensor slots = choose_ids(tallies, i64(hot_ids, "hot_ids"), hot);

  // A key: one bit for hot ids, id.
  const Tensor keys = ints(capacity);
  const Tensor logits = empty(lse, {capacity}, ScalarType::Float);
  keep.first = place.first;
  keep.row_first = i32(row_first, "row_first");
  keep.slots = i32(slots, "slots");
  keep.id_bits = cuda::id_bits(shard_size);
  keep.keys = i32(keys, "keys");
  keep.logits = f32(logits, "logits");
  check_cuda(cuda::write_kept(keep, stream), "write_kept");
  return {keys, logits, exact, row_first, hot_ids, slots, tally};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sort_kept_cuda(
    Tensor keys, Tensor logits, Tensor exact, Tensor row_first, Tensor max_sum, Tensor capped,
    Tensor row_order, Tensor row_count, Tensor lse, int64_t shard_size, double softcap) {
  const Guard guard(lse.get_device_index());
  const cudaStream_t stream = stream_of(lse);
  const int64_t n = lse.size(0), capacity = keys.size(0);
  const auto ints = [&](int64_t size) { return empty(lse, {size}, ScalarType::Int); };
  const Tensor rows = ints(capacity), ids = ints(capacity);
  const Tensor sorted_logits = empty(lse, {capacity}, ScalarType::Float);
  const Tensor row_hot = ints(n);
  const Tensor exact_rows = empty(lse, {n}, ScalarType::Bool);
  cuda::SortRowsParams sort;
  sort.keys = i32(keys, "keys");
  sort.logits = f32(logits, "logits");
  sort.row_first = i32(row_first, "row_first");
  sort.id_bits = cuda::id_bits(shard_size);
  sort.n = n;
  sort.order = Order(row_order, row_count).view();
  sort.exact = u8(exact, "exact");
  sort.ids = i32(ids, "ids");
  sort.rows = i32(rows, "rows");
  sort.sorted_logits = f32(sorted_logits, "logits");
  sort.row_hot = i32(row_hot, "row_hot");
  sort.exact_rows = static_cast<uint8_t*>(exact_rows.mutable_data_ptr());
  sort.splits = static_cast<int>(max_sum.size(0));
  sort.splits_per_group = splits_of_a_group(sort.splits, shard_size);
  sort.groups = static_cast<int>(ceil_div(shard_size, kGroupCols));
  sort.partials.max_sum = reinterpret_cast<float2*>(f32(max_sum, "max_sum"));
  if (capped.size(0) > 0) sort.partials.capped = f32(capped, "capped");
  sort.lse = f32(lse, "lse");
  sort.options.softcap = softcap;
  const Tensor mass = empty(lse, {n, sort.groups}, ScalarType::Float);
  sort.mass = floats(mass);
  check_cuda(cuda::sort_rows(sort, stream), "sort_rows");
  return {rows, ids, sorted_logits, row_hot, mass, exact_rows};
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CUDA, m) {
  m.impl("target_logits", TORCH_BOX(&cce::torch_api::target_logits_cuda));
  m.impl("bound_columns", TORCH_BOX(&cce::torch_api::bound_columns_cuda));
  m.impl("row_bounds", TORCH_BOX(&cce::torch_api::row_bounds_cuda));
  m.impl("draw_rows", TORCH_BOX(&cce::torch_api::draw_rows_cuda));
  m.impl("training_forward", TORCH_BOX(&cce::torch_api::training_forward_cuda));
  m.impl("select_kept", TORCH_BOX(&cce::torch_api::select_kept_cuda));
  m.impl("sort_kept", TORCH_BOX(&cce::torch_api::sort_kept_cuda));
}
