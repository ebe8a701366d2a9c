// Every schema of the namespace. What each argument means: cce_ext/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cce, m) {
  m.def(
      "linear_ce(Tensor e, Tensor c, Tensor targets, Tensor? bias=None, Tensor? u=None, "
      "Tensor? lora_b=None, *, int ignore_index=-100, float softcap=0.0, float logit_scale=1.0, "
      "float label_smoothing=0.0) -> (Tensor nll, Tensor lse)");
  m.def(
      "linear_ce_forward(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, "
      "Tensor? lora_b, int ignore_index, float softcap, float logit_scale, float label_smoothing, "
      "int vocab_start, int vocab_total, bool metrics) -> (Tensor nll, Tensor lse, "
      "Tensor target_logit, Tensor logit_sum, Tensor max_logit, Tensor argmax, Tensor entropy)");
  m.def(
      "linear_ce_backward(Tensor? dnll, Tensor? dlse, Tensor e, Tensor c, Tensor targets, "
      "Tensor lse, Tensor? bias, Tensor? u, Tensor? lora_b, int ignore_index, float softcap, "
      "float logit_scale, float label_smoothing, int vocab_start, int vocab_total, bool need_e, "
      "bool need_c, bool need_bias, bool need_u, bool need_lora_b) -> (Tensor de, Tensor dc, "
      "Tensor dbias, Tensor du, Tensor dlora_b)");
  // Pieces of the CUDA backward. row_order: row numbers, those that count first, and how many count. pick_rows_: out's first
  // rows are a's rows ids_a, then b's rows ids_b. row_gradients: one 32-byte record a row, in that order. dlogits_: writes
  // dloss/dproduct of one chunk of the vocabulary, whose first shard-local id is first_col; rows that do not count become
  // zeros. column_tile: columns of a tile of the kernels that serve this device.
  m.def("column_tile(Tensor like) -> int");
  m.def("row_order(Tensor targets, int ignore_index) -> (Tensor rows, Tensor count)");
  m.def("pick_rows_(Tensor(a!) out, Tensor a, Tensor ids_a, Tensor b, Tensor ids_b) -> ()");
  m.def(
      "row_gradients(Tensor? dnll, Tensor? dlse, Tensor lse, Tensor targets, Tensor row_order, "
      "Tensor row_count, float label_smoothing, int ignore_index, int shard_size, int vocab_start, "
      "int vocab_total) -> Tensor");
  m.def(
      "dlogits_(Tensor(a!) out, Tensor e, Tensor c, Tensor? bias, Tensor? u, Tensor? lora_b, "
      "Tensor row_order, Tensor row_count, Tensor row_gradients, int first_col, float softcap, "
      "float logit_scale, float label_smoothing) -> ()");
  // Pieces of the sparse gradient, in the order of their use; see cce_ext/sparse. Lists have a fixed capacity.
  m.def(
      "target_logits(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, Tensor? lora_b, "
      "int ignore_index, float softcap, float logit_scale, int vocab_start, int vocab_total, "
      "Tensor row_order, Tensor row_count) -> Tensor");
  m.def(
      "row_bounds(Tensor products, Tensor? bias, Tensor counts, Tensor target_logit, int strided, "
      "int vocab, float eps, float softcap, float logit_scale) -> (Tensor bound2, Tensor share, "
      "Tensor classes)");
  // draw_rows: by position, bound and place in the sample; the sampled rows, and what each stands for.
  m.def(
      "draw_rows(Tensor share, Tensor bound2, Tensor row_order, Tensor row_count, int samples) -> "
      "(Tensor starts, Tensor rows, Tensor draws)");
  m.def(
      "training_forward(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, "
      "Tensor? lora_b, int ignore_index, float softcap, float logit_scale, float label_smoothing, "
      "int vocab_start, int vocab_total, bool metrics, Tensor row_order, Tensor row_count, "
      "Tensor target_logit, Tensor starts, float eps, int capacity, int samples) -> (Tensor nll, "
      "Tensor lse, Tensor logit_sum, Tensor max_logit, Tensor argmax, Tensor entropy, "
      "Tensor max_sum, Tensor capped, Tensor pool, Tensor counts, Tensor levels)");
  // bound_columns: ids, first strided ones and whether each counts, and rows to tell classes by. select_kept: kept entries
  // with keys to sort them by, and the hot ids. sort_kept: entries sorted by row and, in it, by id, and what the others
  // weigh.
  m.def(
      "bound_columns(Tensor targets, Tensor row_order, Tensor row_count, int shard_size, "
      "int vocab_start, int strided, int frequent) -> (Tensor ids, Tensor counts, "
      "Tensor anchors)");
  m.def(
      "select_kept(Tensor pool, Tensor counts, Tensor row_order, Tensor row_count, "
      "Tensor target_logit, Tensor bound2, Tensor lse, Tensor targets, float eps, "
      "int ignore_index, int shard_size, int vocab_start, int vocab_total, int capacity, int hot) "
      "-> (Tensor keys, Tensor logits, Tensor exact, Tensor row_first, Tensor hot_ids, "
      "Tensor slots, Tensor tally)");
  m.def(
      "sort_kept(Tensor keys, Tensor logits, Tensor exact, Tensor row_first, Tensor max_sum, "
      "Tensor capped, Tensor row_order, Tensor row_count, Tensor lse, int shard_size, "
      "float softcap) -> (Tensor rows, Tensor ids, Tensor sorted_logits, Tensor row_hot, "
      "Tensor mass, Tensor exact_rows)");
  // level_sums: what the sampled rows drop, by class and id, and what each of them counts (0 of exact rows); overwrites the
  // levels of targets.
  m.def(
      "level_sums(Tensor(a!) levels, Tensor rows, Tensor draws, Tensor classes, Tensor bound2, "
      "Tensor lse, Tensor targets, Tensor exact, int shard_size, float eps, float softcap, "
      "int ignore_index, int vocab_start, int vocab_total) -> (Tensor sums, Tensor weight)");
  // dropped_share: T, the share of the probability mass that is dropped. backward_rows: upstream weights, dropped masses, T;
  // by T (all shards' if given) which rows go the exact way, whose weights are zero, and dnll as it was; the exact rows'
  // list; what float16 factors are divided by (units). exact_share may be in page-locked memory.
  m.def(
      "dropped_share(Tensor? dnll, Tensor? dlse, Tensor targets, Tensor mass, Tensor listed, "
      "int ignore_index) -> Tensor");
  m.def(
      "backward_rows(Tensor? dnll, Tensor? dlse, Tensor targets, Tensor mass, Tensor listed, "
      "Tensor? total_share, Tensor(a!) exact_share, int ignore_index, float flat, "
      "float unit_scale, float unit_uniform) -> (Tensor a, Tensor d, Tensor row_mass, "
      "Tensor share, Tensor exact, Tensor d_all, Tensor order, Tensor count, Tensor units)");
  // tail_factors: the rows' factors of the products with tilted ids (left to tilt_), hot ids (left to entry_weights) and
  // tails. tail_shapes: by id, of like's dtype; ids for the tilt by the groups' weights, and where each group's start. tilt_:
  // from products with these ids to what the gradients by rows add to the tail.
  m.def(
      "tail_factors(Tensor classes, Tensor like, Tensor a, Tensor d, Tensor mass, Tensor units, "
      "int tilt, int hot, float scale, float? uniform) -> Tensor");
  m.def(
      "tail_shapes(Tensor sums, Tensor like, float shared, bool smoothing, int tilt) -> "
      "(Tensor shapes, Tensor ids, Tensor first)");
  m.def(
      "tilt_(Tensor(a!) z, Tensor ids, Tensor first, Tensor classes, Tensor rows, Tensor weight, "
      "Tensor row_mass, Tensor mass, Tensor a, Tensor? bias, float softcap, float logit_scale, "
      "float shared, float strength, float damping, Tensor units) -> ()");
  m.def(
      "entry_weights(Tensor row_first, Tensor rows, Tensor ids, Tensor logits, Tensor a, Tensor d, "
      "Tensor lse, Tensor targets, float softcap, float logit_scale, float label_smoothing, "
      "int vocab_start, Tensor slots, Tensor(a!) dense, Tensor unit) -> Tensor");
  // sort_columns: the numbers of the entries by id, and where an id's start among them.
  m.def(
      "sort_columns(Tensor ids, Tensor row_first, int shard_size) -> (Tensor order, "
      "Tensor column_first)");
  // gather_: out += the listed rows of source. column_gradient_: out = the gradient by columns, of the product of the rows'
  // factors with source, and the list by id.
  m.def(
      "gather_(Tensor(a!) out, Tensor source, Tensor first, Tensor? last, Tensor items, "
      "Tensor weights, Tensor? order, Tensor? out_rows, Tensor(b!)? sums) -> ()");
  m.def(
      "column_gradient_(Tensor(a!) out, Tensor source, Tensor product, Tensor shapes, "
      "Tensor units, Tensor first, Tensor slots, Tensor items, Tensor weights, Tensor order) -> "
      "()");
  // The exact gradients of the rows in the order: their rows of de and du are overwritten, dc, dbias and dlora_b added to.
  m.def(
      "exact_rows_(Tensor(a!)? de, Tensor(b!)? dc, Tensor(c!)? dbias, Tensor(d!)? du, "
      "Tensor(e!)? dlora_b, Tensor e, Tensor c, Tensor? bias, Tensor? u, Tensor? lora_b, "
      "Tensor row_order, Tensor row_count, Tensor? dnll, Tensor? dlse, Tensor lse, "
      "Tensor targets, int ignore_index, float softcap, float logit_scale, "
      "float label_smoothing, int vocab_start, int vocab_total) -> ()");
}
