// The sm_80 exact gradients of a list of rows, in one launch: logit gradients of up to 2048 rows x 8192 columns, then
// their products, then the next. An empty list ends at once.
//
// Persistent and cooperative, one block a multiprocessor, eight warps. Recompute: sm80/backward (tiles 128 x 256, units dealt
// out in turn). Products: sm80/product (tiles 128 x 256 of dE, dU, dC, dB, taken from a counter, long ones first; who
// computes a tile does not matter to its sum). Shared memory: the pipeline and two sets of row records, used by both in
// turn, and a few words that thread 0 fills. Barrier protocol: a grid barrier after each of the two phases, and before them
// one after the rounding of B's rows where B is float32; the counter is cleared during the recompute. Registers: all of
// them; up to 48 bytes a thread are spilled, outside the loops over K. Numbers that another block may have written are read
// past the first-level cache.
#pragma once

#include <cooperative_groups.h>

#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/product.cuh"

namespace cce::cuda::sm80 {

// One stretch of rows and columns. In shared memory, like everything here that is the same for all threads: registers are
// for the accumulators.
struct Patch {
  int row0, rows, col0, cols;
  bool first, last;  // stretch of columns
};

template <typename T>
struct Plan {
  Patch at;
  T* g;         // (kExactRows, kExactCols)
  T* lora_b;    // (kExactCols, ld), where B is float32
  float* sums;  // (kExactRows, width) of dE, then of dU
  Work work;    // the recompute's, with the next three
  LogitParams logits;
  DlogitsOut<T> out;
  const RowGradient* records;
  ProductInputs<T> inputs;
  int taken;
};

// Row gradients are summed in fp32 over the column stretches; the last one rounds. Column gradients are added to in place.
template <typename Out>
__device__ __forceinline__ void put(float* sum, const Patch& at, Out* out, float x) {
  if (sum) {
    if (!at.first) x += __ldcg(sum);
    if (!at.last) {
      *sum = x;
      return;
    }
    *out = static_cast<Out>(x);
  } else {
    *out = static_cast<Out>(static_cast<float>(__ldcg(out)) + x);
  }
}

template <typename Config>
__device__ __forceinline__ int tiles_across(int64_t width) {
  return static_cast<int>((width + Config::kBlockN - 1) / Config::kBlockN);
}
template <typename Config>
__device__ __forceinline__ int tiles_of(const Gradient& g, int height) {
  return g.data ? (height + Config::kBlockM - 1) / Config::kBlockM * tiles_across<Config>(g.width)
                : 0;
}

// One tile of one gradient. sums: null for a column gradient.
template <typename T, typename Config, bool kColumns>
__device__ __forceinline__ void product_tile(const ProductInputs<T>& inputs, const Gradient& to,
                                             float* sums, const int32_t* out_rows, const Patch& at,
                                             int tile, uint8_t* shared) {
  const int across = tiles_across<Config>(to.width);
  const int row0 = tile / across * Config::kBlockM, col0 = tile % across * Config::kBlockN;
  Product<T, Config, kColumns> product(inputs, shared);
  typename Product<T, Config, kColumns>::Accumulators acc;
  product.multiply(acc, row0, col0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = row0 + warp % Config::kWarpsM * Config::kWarpM + lane / 4;
  const int col = col0 + warp / Config::kWarpsM * Config::kWarpN + PairedColumns::first();
#pragma unroll
  for (int i = 0; i < Config::kMmaM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * i + 8 * h;
      if (r >= inputs.m) continue;
      const int64_t out_row = kColumns ? at.col0 + r : out_rows[r];
      float* sum = kColumns ? nullptr : sums + r * to.width;
#pragma unroll
      for (int j = 0; j < Config::kAccumulators / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = col + PairedColumns::at(j) + e;
          if (c >= to.width) continue;
          const float x = acc[i][4 * j + 2 * h + e];
          const int64_t place = out_row * to.ld + c;
          if (to.fp32)
            put(sum ? sum + c : nullptr, at, static_cast<float*>(to.data) + place, x);
          else
            put(sum ? sum + c : nullptr, at, static_cast<T*>(to.data) + place, x);
        }
      }
    }
  }
}

// dbias of 256 columns: one thread a column.
template <typename T>
__device__ __forceinline__ void sum_columns(const T* g, float* dbias, const Patch& at, int tile) {
  const int col = tile * blockDim.x + threadIdx.x;
  if (col >= at.cols) return;
  float sum = 0.0f;
  for (int64_t row = 0; row < at.rows; ++row)
    sum += static_cast<float>(__ldcg(g + row * kExactCols + col));
  dbias[at.col0 + col] += sum;
}

template <typename T>
__device__ __forceinline__ const T* rows_from(const Matrix& m, int64_t row) {
  return static_cast<const T*>(m.data) + row * m.ld;
}

// Sets the inputs of one tile's gradient; thread 0.
template <typename T>
__device__ void set_inputs(const ExactRowsParams& p, Plan<T>& plan, bool rows, bool low_rank) {
  const Matrix& other =
      rows ? (low_rank ? plan.work.lora_b : plan.work.c) : (low_rank ? p.head.u : p.head.e);
  ProductInputs<T>& in = plan.inputs;
  in.a = plan.g;
  in.lda = kExactCols;
  in.b = static_cast<const T*>(other.data);
  in.ldb = other.ld;
  in.b_rows = rows ? nullptr : p.head.order.rows + plan.at.row0;
  in.m = rows ? plan.at.rows : plan.at.cols;
  in.n = static_cast<int>(other.cols);
  in.k = rows ? plan.at.cols : plan.at.rows;
}

// The products of one patch; tiles in the order dE, dU, dC, dB, dbias.
template <typename T, typename Config>
__device__ __forceinline__ void multiply_patch(const ExactRowsParams& p, Plan<T>& plan,
                                               uint8_t* shared) {
  const Patch& at = plan.at;
  while (true) {
    __syncthreads();  // the last tile's words have been read
    if (threadIdx.x == 0) plan.taken = atomicAdd(static_cast<int*>(p.workspace), 1);
    __syncthreads();
    int tile = plan.taken;
    const int of_e = tiles_of<Config>(p.de, at.rows), of_u = tiles_of<Config>(p.du, at.rows);
    const int of_c = tiles_of<Config>(p.dc, at.cols), of_b = tiles_of<Config>(p.dlora_b, at.cols);
    const bool rows = tile < of_e + of_u;
    const bool low_rank = rows ? tile >= of_e : tile >= of_e + of_u + of_c;
    if (rows) {
      tile -= low_rank ? of_e : 0;
    } else {
      tile -= of_e + of_u + (low_rank ? of_c : 0);
      if (low_rank && tile >= of_b) {
        tile -= of_b;
        if (!p.dbias || tile * Config::kThreads >= at.cols) return;
        sum_columns(plan.g, p.dbias, at, tile);
        continue;
      }
    }
    if (threadIdx.x == 0) set_inputs(p, plan, rows, low_rank);
    __syncthreads();
    const int64_t before_u = p.de.data ? rows_at_a_time(p.n) * p.de.width : 0;
    if (rows)
      product_tile<T, Config, false>(plan.inputs, low_rank ? p.du : p.de,
                                     plan.sums + (low_rank ? before_u : 0),
                                     p.head.order.rows + at.row0, at, tile, shared);
    else
      product_tile<T, Config, true>(plan.inputs, low_rank ? p.dlora_b : p.dc, nullptr, nullptr, at,
                                    tile, shared);
  }
}

// Sets the plan for a stretch of rows and columns; thread 0.
template <typename T, typename Config>
__device__ void set_plan(const ExactRowsParams& p, Plan<T>& plan, int row0, int col0) {
  const int count = *p.head.order.count, vocab = static_cast<int>(p.head.c.rows);
  const int64_t widths = (p.de.data ? p.de.width : 0) + (p.du.data ? p.du.width : 0);
  Patch& at = plan.at;
  at.row0 = row0;
  at.rows = min(kExactRows, count - row0);
  at.col0 = col0;
  at.cols = min(kExactCols, vocab - col0);
  at.first = col0 == 0;
  at.last = col0 + at.cols == vocab;
  plan.sums = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + kExactBarrierBytes);
  plan.g = reinterpret_cast<T*>(plan.sums + exact_sums(p.n, widths));
  plan.lora_b = plan.g + rows_at_a_time(p.n) * kExactCols;
  Work& work = plan.work;
  work = {};  // shared memory: whatever is not set below has its default
  work.e = p.head.e;
  work.u = p.head.u;
  work.c = p.head.c;
  work.c.data = rows_from<T>(p.head.c, col0);
  work.c.rows = at.cols;
  work.lora_b = p.head.lora_b;
  if (p.head.lora_b.data) work.lora_b.data = rows_from<T>(p.head.lora_b, col0);
  if (p.lora_b32) work.lora_b.data = plan.lora_b;
  work.lora_b.rows = at.cols;
  work.row_order = p.head.order.rows + row0;
  work.n = at.rows;
  work.column_tiles = (at.cols + Config::kBlockN - 1) / Config::kBlockN;
  work.tiles_per_split = 1;
  work.splits = work.column_tiles;
  work.superblock = kExactRows / Config::kBlockM;
  plan.logits = LogitParams(p.head.options, p.head.bias ? p.head.bias + col0 : nullptr, at.cols);
  plan.out = {plan.g, kExactCols, true};
  plan.records = p.rows + row0;
  if (blockIdx.x == 0) *static_cast<int*>(p.workspace) = 0;
}

// The stretch's rows of B in the head's dtype, with zeros up to a whole piece; all blocks.
template <typename T>
__device__ __forceinline__ void round_lora_b(const ExactRowsParams& p, const Plan<T>& plan) {
  const int64_t rank = p.head.lora_b.cols, ld = p.head.lora_b.ld;
  const float* from = p.lora_b32 + plan.at.col0 * p.lora_b32_ld;
  for (int row = blockIdx.x; row < plan.at.cols; row += gridDim.x) {
    for (int64_t i = threadIdx.x; i < ld; i += blockDim.x)
      plan.lora_b[row * ld + i] = static_cast<T>(i < rank ? from[row * p.lora_b32_ld + i] : 0.0f);
  }
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    exact_rows_kernel(const __grid_constant__ ExactRowsParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Plan<T> plan;
  __shared__ int row0, col0;
  if (*p.head.order.count == 0) return;
  if (threadIdx.x == 0) row0 = col0 = 0;
  __syncthreads();
  while (row0 < *p.head.order.count) {
    if (threadIdx.x == 0) set_plan<T, Config>(p, plan, row0, col0);
    __syncthreads();
    if (p.lora_b32) {
      round_lora_b(p, plan);
      cooperative_groups::this_grid().sync();
    }
    recompute_tiles<T, Config, Epilogue::kGeneral>(plan.work, plan.at.rows, plan.logits,
                                                   plan.records, plan.at.col0, plan.out, shared);
    cooperative_groups::this_grid().sync();
    multiply_patch<T, Config>(p, plan, shared);
    cooperative_groups::this_grid().sync();
    if (threadIdx.x == 0) {
      col0 += kExactCols;
      if (col0 >= p.head.c.rows) {
        col0 = 0;
        row0 += kExactRows;
      }
    }
    __syncthreads();
  }
}

}  // namespace cce::cuda::sm80
