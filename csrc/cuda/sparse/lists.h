// Host launchers of the sparse gradient's small kernels: bounds before the forward, lists of kept entries after it, and
// the backward's weights and gathers. No count crosses to the host: lists have a fixed capacity and their length is on
// the device. Everything that is added up is added in a fixed order.
#pragma once

#include <cstddef>

#include "cuda/params.h"

namespace cce::cuda {

// Bits of an id, and of a number beyond all ids.
inline int id_bits(int64_t vocab) {
  int bits = 0;
  for (; vocab > 0; vocab >>= 1) ++bits;
  return bits;
}

// ---- before the forward ----

// Strided columns at most: a warp holds them in registers.
constexpr int kMaxStrided = 384;

struct BoundParams {
  const float* products =
      nullptr;  // (rows, columns + classes): raw products with the sampled columns and the anchors
  const float* bias = nullptr;          // (columns,) or null
  const uint8_t* counts = nullptr;      // (strided,): 0 for columns that are among the others too
  const float* target_logit = nullptr;  // (rows,)
  int64_t rows = 0;
  int columns = 0, classes = 0;
  int strided = 0;  // the first ones lie at equal distances in the vocabulary
  int64_t vocab = 0;
  core::LossOptions options;
  float eps = 0.0f;         // the threshold
  float* bound2 = nullptr;  // (rows,), base 2
  float* share = nullptr;   // (rows,): about what the row will drop, from kLeastShare to 1
  int64_t* row_class =
      nullptr;  // (rows,): the anchor with the largest product, the first of equal ones
};

// No row is thought to drop less: what a row weighs in the sample is the inverse.
constexpr float kLeastShare = 0x1p-8f;

struct BoundColumnsParams {
  const int64_t* targets = nullptr;  // (N,)
  RowOrder order;
  int64_t n = 0;
  int64_t vocab = 0, vocab_start = 0;  // this shard's
  int strided = 0;                     // columns at equal distances
  const int32_t* slots = nullptr;  // (V,): -1 for ids that are not among the most frequent targets
  int classes = 0;                 // as many anchors
  int64_t* ids = nullptr;          // (strided,)
  uint8_t* counts = nullptr;       // likewise: 0 for ids that are among the most frequent targets
  int64_t* anchors = nullptr;      // (classes,): rows at equal distances; 0 if none count
  int32_t* target_counts = nullptr;  // (V,), must be zero
};

// How often each id of the shard is a target.
cudaError_t count_targets(const BoundColumnsParams& params, cudaStream_t stream);
// The columns at equal distances whose logits bound the lse from below, and the rows that tell the classes of tails.
cudaError_t bound_columns(const BoundColumnsParams& params, cudaStream_t stream);

// A lower bound of each row's lse, from above by at most a factor for odd rows; see cce_ext/sparse/reference.py. And its class.
cudaError_t row_bounds(const BoundParams& params, cudaStream_t stream);

// What blocks have in their stretches goes through as many numbers.
constexpr int kDrawBlocks = 64;

struct DrawRowsParams {
  const float* share = nullptr;   // (N,) by row
  const float* bound2 = nullptr;  // (N,) by row
  RowOrder order;
  int64_t n = 0;
  int samples = 0;
  int64_t* steps = nullptr;    // (kDrawBlocks,): workspace
  RowStart* starts = nullptr;  // (N,) by position
  int64_t* rows = nullptr;     // (samples,): a row for each slot, ascending
  // (samples,): how often it was drawn, over its share; 0 in its further slots, and in those that nobody has
  float* draws = nullptr;
};

// The rows whose tails stand for all: at equal steps of the cumulated share of those that count; all, if they are few.
cudaError_t draw_rows(const DrawRowsParams& params, cudaStream_t stream);

constexpr int kHotBins = 4096, kHotBlocks = 64;

struct HotIdsParams {
  const int32_t* counts = nullptr;  // (V, and zeros up to a multiple of four)
  int64_t vocab = 0;
  int hot = 0;
  int32_t* bins = nullptr;    // (kHotBins,): workspace, must be zero
  int32_t* places = nullptr;  // (2, kHotBlocks): workspace
  int64_t* ids = nullptr;     // (hot,)
  int32_t* slots = nullptr;   // (V,)
};

// The `hot` ids with the largest counts, the smaller id first, ascending, and their places, -1 for the others. Counts of
// kHotBins - 1 and more are equal.
cudaError_t hot_ids(const HotIdsParams& params, cudaStream_t stream);

// ---- after the forward ----

// Parts of a row block that are worked on at once.
constexpr int kKeepParts = 8;

struct KeepParams {
  Candidates candidates;
  RowOrder order;
  const float* bound2 = nullptr;        // (N,) by row
  const float* lse = nullptr;           // (N,) by row
  const float* target_logit = nullptr;  // (N,) by row
  const int64_t* targets = nullptr;     // (N,) by row
  int64_t n = 0, shard_size = 0;
  float eps = 0.0f;
  int id_bits = 0;  // bits of an id in a key; one more says that it is a hot one
  core::LossOptions options;
  // By count_kept:
  int32_t* row_counts =
      nullptr;  // (row blocks, parts, kRowBlock): kept entries, 0 in blocks that go the exact way
  int32_t* kept = nullptr;  // (row blocks,), must be zero: their sums
  int32_t* column_counts =
      nullptr;  // (V,), must be zero: kept entries of each id in some row blocks
  uint8_t* exact =
      nullptr;  // (row blocks,): 1 where candidates overflowed or a bound lies above its lse
  // For write_kept:
  const int32_t* slots = nullptr;  // (V,): number of a hot id, -1 for the others
  const int32_t* first = nullptr;  // (row blocks,): where a block's entries start
  int32_t* row_first =
      nullptr;              // (N + 1,): where a position's entries start; the last by place_kept
  int32_t* keys = nullptr;  // (capacity,): (hot, id)
  float* logits = nullptr;  // (capacity,)
};

cudaError_t count_kept(const KeepParams& params, cudaStream_t stream);
cudaError_t write_kept(const KeepParams& params, cudaStream_t stream);

struct PlaceParams {
  const int32_t* kept = nullptr;       // (blocks,), by count_kept
  const int32_t* found = nullptr;      // (blocks,) candidates
  const int32_t* row_count = nullptr;  // (1,)
  int64_t blocks = 0, pool_capacity = 0, capacity = 0;
  int32_t* first = nullptr;  // (blocks,): where a block's entries start
  int32_t* end = nullptr;    // (1,): where the last one's end
  uint8_t* exact = nullptr;  // (blocks,), set where a block's entries do not fit
  // (5,): candidates, kept entries, row blocks that overflowed, row blocks, rows that count (at least 1)
  int64_t* tally = nullptr;
};

// Where count_kept's entries go.
cudaError_t place_kept(const PlaceParams& params, cudaStream_t stream);

struct SortRowsParams {
  const int32_t* keys = nullptr;       // (capacity,), by write_kept
  const float* logits = nullptr;       // (capacity,)
  const int32_t* row_first = nullptr;  // (N + 1,)
  int id_bits = 0;
  int64_t n = 0;
  RowOrder order;
  const uint8_t* exact = nullptr;  // (row blocks,)
  Partials partials;               // (splits, N) by position
  int splits_per_group = 1, splits = 0, groups = 0;
  const float* lse = nullptr;  // (N,) by row
  core::LossOptions options;
  // Results, places that no entry has being left as they are:
  int32_t* ids = nullptr;          // (capacity,)
  int32_t* rows = nullptr;         // (capacity,)
  float* sorted_logits = nullptr;  // (capacity,)
  int32_t* row_hot = nullptr;      // (N,): where those of hot ids start
  uint8_t* exact_rows = nullptr;   // (N,) by row
  float* mass = nullptr;  // (N, groups) by row: Σ p softcap' of the group's dropped entries
};

// The entries of each row in the order of their keys, and what the row drops.
cudaError_t sort_rows(const SortRowsParams& params, cudaStream_t stream);

// ---- backward ----

struct SortColumnsParams {
  const int32_t* ids = nullptr;    // (capacity,), by row
  const int32_t* count = nullptr;  // (1,): how many there are
  int64_t capacity = 0, vocab = 0;
  int32_t* keys[2] = {};            // (capacity,) each: workspace
  int32_t* orders[2] = {};          // (capacity,) each: workspace, one of them the result
  int32_t* column_first = nullptr;  // (V + 1,): where each id's entries start in the order
  void* workspace = nullptr;        // of sort_columns_workspace bytes
  size_t workspace_bytes = 0;
};

size_t sort_columns_workspace(int64_t capacity);
// Entries by id, those of one id as they were: their numbers are orders[*result].
cudaError_t sort_columns(const SortColumnsParams& params, int* result, cudaStream_t stream);

// What a block of choose_exact_rows finds in its rows, for the others.
constexpr int kRowsBlocks = 64;
struct alignas(16) RowsFound {
  float tail, a, d;  // largest |a| mass, |a|, |d| of rows that are not exact
  int valid, exact;  // rows that count, rows that go the exact way
};

struct BackwardRowsParams {
  const float* dnll = nullptr;  // (N,), dnll_stride apart, or null: 0
  int64_t dnll_stride = 1;
  const float* dlse = nullptr;  // (N,) or null: 0
  const int64_t* targets = nullptr;
  const float* mass = nullptr;      // (N, groups)
  const uint8_t* listed = nullptr;  // (N,): rows that go the exact way whatever T is
  int64_t n = 0, ignore_index = 0;
  int groups = 0;
  float flat = 0.0f;  // T from which all rows go the exact way
  // By dropped_share:
  float* a = nullptr;         // (N,): dnll + dlse
  float* d = nullptr;         // (N,): dnll
  float* row_mass = nullptr;  // (N,)
  float* share = nullptr;  // (1,): T; shards of a vocabulary add theirs up before choose_exact_rows
  // By choose_exact_rows, which clears a and d of those:
  const float* total_share = nullptr;  // (1,): T of all shards
  float* d_all = nullptr;              // (N,): d as it was
  uint8_t* exact = nullptr;            // (N,)
  float* exact_share = nullptr;        // (1,): of the rows that count
  RowsFound* found = nullptr;          // (kRowsBlocks,): workspace
  int32_t* order = nullptr;            // (N,): exact rows first, ascending, the others after them
  int32_t* count = nullptr;            // (1,): exact rows
  // Units of 16-bit factors (3,): of weights of kept entries, of mass * a, of products with shapes.
  float* units = nullptr;
  float unit_scale = 0.0f;    // |logit scale|; 0: bf16, all units are 1
  float unit_uniform = 0.0f;  // what a group's share of label smoothing is to |d|
};

cudaError_t dropped_share(const BackwardRowsParams& params, cudaStream_t stream);
cudaError_t choose_exact_rows(const BackwardRowsParams& params, cudaStream_t stream);

struct WeightParams {
  const int32_t* count = nullptr;  // (1,): entries
  const int32_t* rows = nullptr;   // (capacity,)
  const int32_t* ids = nullptr;    // (capacity,)
  const float* logits = nullptr;   // (capacity,)
  const float* a = nullptr;  // (N,): dnll + dlse, 0 for rows that do not count or go the exact way
  const float* d = nullptr;  // (N,): dnll, likewise
  const float* lse = nullptr;  // (N,)
  const int64_t* targets = nullptr;
  int64_t capacity = 0;
  core::LossOptions options;
  float* weights =
      nullptr;  // (capacity,): dloss/dproduct without the uniform part of label smoothing
  // Weights of hot ids, divided by *unit, go into a dense matrix too; it must be zero there.
  Dtype dtype = Dtype::kBFloat16;
  const int32_t* slots = nullptr;  // (V,)
  void* dense = nullptr;           // (N, ld), of the dtype: a column for each slot
  int64_t ld = 0;
  const float* unit = nullptr;  // (1,)
};

cudaError_t entry_weights(const WeightParams& params, cudaStream_t stream);

// A list of rows to add up: row items[i] of source, weights[i] times.
struct Entries {
  Dtype dtype = Dtype::kBFloat16;  // of source
  const void* source = nullptr;    // (items, width)
  uint32_t source_ld = 0;
  int width = 0;
  const int32_t* items = nullptr;  // (capacity,)
  const float* weights = nullptr;  // (capacity,)
  const int32_t* order =
      nullptr;  // (capacity,): entry i is items[order[i]], weights[order[i]]; null: i
};

// out[s] += Σ_i weights[i] source[items[i]] over the entries i of segment s; see gather.cu.
struct GatherParams {
  Entries entries;
  Gradient out;                    // (segments, width)
  const int32_t* first = nullptr;  // (segments + 1,): where a segment's entries start
  const int32_t* last = nullptr;   // (segments,): where they end; null: where the next one's start
  const int32_t* out_rows = nullptr;  // (segments,): row of out; null: s
  int64_t segments = 0;
  float* sums = nullptr;           // (segments,) += Σ weights, or null
  int32_t* work = nullptr;         // (3, segments): workspace
  int32_t* work_counts = nullptr;  // (2,): workspace
  void* partition = nullptr;       // workspace of gather_workspace bytes
  size_t partition_bytes = 0;
};

size_t gather_workspace(int64_t segments);
cudaError_t gather_rows(const GatherParams& params, cudaStream_t stream);

// The gradient by columns, each number written once. Of id j in group g: Σ_k shapes[k, j] product[hot + g kinds + k] units[2],
// and if j is the i-th hot id product[i] units[0], else its entries.
struct ColumnGradientParams {
  Entries entries;
  int64_t source_rows = 0;
  const int32_t* first = nullptr;  // (V + 1,): where an id's entries start
  const int32_t* slots = nullptr;  // (V,): place among the hot ids, -1 for the others
  int64_t vocab = 0, hot = 0;
  const float* product = nullptr;  // (hot + groups * kinds, width)
  const void* shapes = nullptr;    // (kinds, shapes_ld), of the entries' dtype
  int64_t shapes_ld = 0;
  bool smoothing = false;        // one kind more than classes
  const float* units = nullptr;  // (3,), by choose_exact_rows
  Gradient out;                  // (V, width)
};

cudaError_t column_gradient(const ColumnGradientParams& params, cudaStream_t stream);

}  // namespace cce::cuda
