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
  // Pieces of the CUDA backward. row_order: row numbers, those that count first, and how many count. row_gradients: one
  // 32-byte record a row, in that order. dlogits_: writes dloss/dproduct of one chunk of the vocabulary, whose first
  // shard-local id is first_col; rows that do not count become zeros. tail_eps: instead of gradients, a p softcap' of
  // entries below that probability. column_tile: columns of a tile of the kernels that serve this device.
  m.def("column_tile(Tensor like) -> int");
  m.def("row_order(Tensor targets, int ignore_index) -> (Tensor rows, Tensor count)");
  m.def(
      "row_gradients(Tensor? dnll, Tensor? dlse, Tensor lse, Tensor targets, Tensor row_order, "
      "Tensor row_count, float label_smoothing, int ignore_index, int shard_size, int vocab_start, "
      "int vocab_total) -> Tensor");
  m.def(
      "dlogits_(Tensor(a!) out, Tensor e, Tensor c, Tensor? bias, Tensor? u, Tensor? lora_b, "
      "Tensor row_order, Tensor row_count, Tensor row_gradients, int first_col, float softcap, "
      "float logit_scale, float label_smoothing, float? tail_eps=None) -> ()");
  // Pieces of the sparse gradient, in the order of their use; see cce_ext/sparse. Lists have a fixed capacity.
  m.def(
      "target_logits(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, Tensor? lora_b, "
      "int ignore_index, float softcap, float logit_scale, int vocab_start, int vocab_total, "
      "Tensor row_order, Tensor row_count) -> Tensor");
  m.def(
      "row_bounds(Tensor products, Tensor? bias, Tensor counts, Tensor target_logit, int strided, "
      "int vocab, float softcap, float logit_scale) -> Tensor");
  m.def(
      "training_forward(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, "
      "Tensor? lora_b, int ignore_index, float softcap, float logit_scale, float label_smoothing, "
      "int vocab_start, int vocab_total, bool metrics, Tensor row_order, Tensor row_count, "
      "Tensor target_logit, Tensor bound2, float eps, int capacity) -> (Tensor nll, Tensor lse, "
      "Tensor logit_sum, Tensor max_logit, Tensor argmax, Tensor entropy, Tensor max_sum, "
      "Tensor capped, Tensor pool, Tensor counts)");
  // bound_columns: ids and whether each counts. select_kept: kept entries with keys to sort them by, and the hot ids.
  // sort_kept: entries sorted by row and by id, and what the others weigh; the keys are lost.
  m.def(
      "bound_columns(Tensor targets, Tensor row_order, Tensor row_count, int shard_size, "
      "int vocab_start, int strided, int sampled) -> (Tensor ids, Tensor counts)");
  m.def(
      "select_kept(Tensor pool, Tensor counts, Tensor row_order, Tensor row_count, "
      "Tensor target_logit, Tensor bound2, Tensor lse, Tensor targets, float eps, "
      "int ignore_index, int shard_size, int vocab_start, int vocab_total, int capacity, int hot) "
      "-> (Tensor keys, Tensor logits, Tensor exact, Tensor hot_ids, Tensor slots, Tensor tally)");
  m.def(
      "sort_kept(Tensor(a!) keys, Tensor logits, Tensor exact, Tensor max_sum, Tensor capped, "
      "Tensor row_order, Tensor row_count, Tensor lse, int shard_size, float softcap) -> "
      "(Tensor rows, Tensor ids, Tensor sorted_logits, Tensor order, Tensor row_first, "
      "Tensor row_hot, Tensor column_first, Tensor mass, Tensor exact_rows)");
  // backward_shares: upstream weights, dropped masses, T. backward_sample_: by T, which rows go the exact way (their weights
  // become zero), their share, dnll as it was, and the rows whose tails stand for all, with weights.
  m.def(
      "backward_shares(Tensor? dnll, Tensor? dlse, Tensor targets, Tensor mass, Tensor listed, "
      "int ignore_index) -> (Tensor a, Tensor d, Tensor row_mass, Tensor share)");
  m.def(
      "backward_sample_(Tensor(a!) a, Tensor(b!) d, Tensor row_mass, Tensor share, Tensor targets, "
      "Tensor listed, int ignore_index, float flat, int sample) -> (Tensor exact, "
      "Tensor exact_share, Tensor d_all, Tensor rows, Tensor weight)");
  m.def(
      "entry_weights(Tensor count, Tensor rows, Tensor ids, Tensor logits, Tensor a, Tensor d, "
      "Tensor lse, Tensor targets, float softcap, float logit_scale, float label_smoothing, "
      "int vocab_start, Tensor slots, Tensor(a!) dense, Tensor unit) -> Tensor");
  m.def(
      "gather_(Tensor(a!) out, Tensor source, Tensor first, Tensor last, Tensor items, "
      "Tensor weights, "
      "Tensor? order, Tensor? out_rows, Tensor(b!)? sums) -> ()");
  // The exact gradients of the rows in the order: their rows of de and du are overwritten, dc, dbias and dlora_b added to.
  m.def(
      "exact_rows_(Tensor(a!)? de, Tensor(b!)? dc, Tensor(c!)? dbias, Tensor(d!)? du, "
      "Tensor(e!)? dlora_b, Tensor e, Tensor c, Tensor? bias, Tensor? u, Tensor? lora_b, "
      "Tensor row_order, Tensor row_count, Tensor row_gradients, float softcap, "
      "float logit_scale, float label_smoothing) -> ()");
}
