// What happens to a tile of raw products in registers: logits, masks, streaming logsumexp, gradients by the logits. The
// accumulator layout is the one that mma.sync m16n8 and wgmma share, so every architecture uses these lines: of a row pair
// (r, r + 8) a thread holds kElements numbers; element 4 j + 2 h + e is row r + 8 h, column first + Columns::at(j) + e. The
// four lanes of a quad share the rows. `first_col` below is always this thread's first column.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/loss_math.h"
#include "cuda/common/rows.h"
#include "cuda/params.h"
#include "cuda/ptx/math.cuh"

namespace cce::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct DeviceMath {
  // 1 - 2 / (e^2x + 1): absolute error about 1e-7, at both ends the exact limits.
  static __device__ __forceinline__ float tanh(float x) {
    return fmaf(-2.0f, ptx::rcp(ptx::ex2(x * (2.0f * kLog2E)) + 1.0f), 1.0f);
  }
};

// The columns that the instructions give to a thread: pairs, 8 apart.
struct PairedColumns {
  static __device__ __forceinline__ int first() { return threadIdx.x % 4 * 2; }
  static __device__ __forceinline__ int at(int j) { return 8 * j; }
};

// The columns after the B tile's rows were read in another order: eight consecutive ones of every 32, so that a thread can
// store 16 bytes at once.
struct SpreadColumns {
  static __device__ __forceinline__ int first(int thread) { return thread % 4 * 8; }
  static __device__ __forceinline__ int at(int j) { return j / 4 * 32 + j % 4 * 2; }
};

// LossOptions in fp32, with what the loops want precomputed.
struct LogitParams {
  float logit_scale = 1.0f;
  float softcap = 0.0f, inv_softcap = 0.0f;
  const float* bias = nullptr;
  int cols = 0;  // columns from here on do not exist

  LogitParams() = default;
  __host__ __device__ LogitParams(const core::LossOptions& options, const float* bias_of_launch,
                                  int64_t columns)
      : logit_scale(static_cast<float>(options.logit_scale)),
        softcap(static_cast<float>(options.softcap)),
        inv_softcap(options.softcap == 0.0 ? 0.0f : static_cast<float>(1.0 / options.softcap)),
        bias(bias_of_launch),
        cols(static_cast<int>(columns)) {}
  // Nothing between the product and the logit but a positive factor.
  __host__ __device__ bool plain() const { return !bias && softcap == 0.0f && logit_scale > 0.0f; }
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ int quad_min(int x) {
  x = min(x, __shfl_xor_sync(~0u, x, 1));
  return min(x, __shfl_xor_sync(~0u, x, 2));
}

// Only the mask, for tiles that reach beyond the last column.
template <typename Columns, int kElements>
__device__ __forceinline__ void mask_columns(float (&acc)[kElements], int first_col, int cols,
                                             float absent) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (first_col + Columns::at(i / 4) + (i & 1) >= cols) acc[i] = absent;
  }
}

// Turns raw products into logits z in place; columns that do not exist become `absent`. kBias: the bias is not in them yet.
// One pass a step, so that what is in flight stays in registers.
template <typename Columns, bool kBias, int kElements>
__device__ __forceinline__ void make_logits(float (&acc)[kElements], const LogitParams& p,
                                            int first_col, float absent) {
  if (kBias && p.bias) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int col = first_col + Columns::at(i / 4) + (i & 1);
      if (col < p.cols) acc[i] += __ldg(p.bias + col);
    }
  }
  if (p.softcap != 0.0f) {
    // DeviceMath's tanh with all factors in two: cap - 2 cap / (e^(2 x / cap) + 1).
    const float rate = p.logit_scale * p.inv_softcap * (2.0f * kLog2E), twice = -2.0f * p.softcap;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      acc[i] = fmaf(twice, ptx::rcp(ptx::ex2(acc[i] * rate) + 1.0f), p.softcap);
  } else if (p.logit_scale != 1.0f) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) acc[i] *= p.logit_scale;
  }
  if (first_col + Columns::at(kElements / 4 - 1) + 1 >= p.cols)
    mask_columns<Columns>(acc, first_col, p.cols, absent);
}

// Running statistics of a row, base 2.
struct RowState {
  float max = -INFINITY;
  float sum = 0.0f;
};

// Lower bounds of the lse made of sums stay this far below, base 2, so that rounding never lifts them above it.
constexpr float kBoundMargin = 0.01f;

__device__ __forceinline__ float finite_reference(float max) {
  return max == -INFINITY ? 0.0f : max;
}

__device__ __forceinline__ RowState merge(RowState a, RowState b) {
  const float max = fmaxf(a.max, b.max), reference = finite_reference(max);
  return {max, a.sum * ptx::ex2(a.max - reference) + b.sum * ptx::ex2(b.max - reference)};
}

// Largest of a row's elements that this thread holds (h: 0 for row r, 1 for row r + 8).
template <int kElements>
__device__ __forceinline__ float thread_max(const float (&acc)[kElements], int h) {
  float m0 = -INFINITY, m1 = -INFINITY;
#pragma unroll
  for (int j = 0; j < kElements / 4; ++j) {
    m0 = fmaxf(m0, acc[4 * j + 2 * h]);
    m1 = fmaxf(m1, acc[4 * j + 2 * h + 1]);
  }
  return fmaxf(m0, m1);
}

// Σ 2^(scale acc - reference) over this thread's elements of a row, or over some of their pairs.
template <int kElements>
__device__ __forceinline__ float thread_sum_exp2(const float (&acc)[kElements], int h, float scale,
                                                 float reference, int first = 0,
                                                 int end = kElements / 4) {
  float s0 = 0.0f, s1 = 0.0f;
#pragma unroll
  for (int j = first; j < end; ++j) {
    s0 += ptx::ex2(fmaf(acc[4 * j + 2 * h], scale, -reference));
    s1 += ptx::ex2(fmaf(acc[4 * j + 2 * h + 1], scale, -reference));
  }
  return s0 + s1;
}

// What the forward puts for columns that do not exist: they weigh nothing. Of capped logits the squares are to be finite too.
constexpr float kAbsentCapped = -0x1p40f;
__device__ __forceinline__ float absent_logit(const LogitParams& p) {
  return p.softcap != 0.0f ? kAbsentCapped : -INFINITY;
}

// How much an epilogue does: the streaming logsumexp of raw products with a positive factor; any logits, and what options
// want; metrics too.
enum class Mode { kPlain, kGeneral, kMetrics };

// What a row's exponentials add up to, over this thread's elements; with w = 2^(log2(e) z - reference).
struct RowSums {
  float sum = 0.0f;       // Σ w
  float weighted = 0.0f;  // Σ w z, for metrics
  float squares = 0.0f;   // Σ w z² of capped logits
};

// All of them in one pass: apart, the compiler would keep every w for the next one. Over all pairs of this thread's elements,
// or some.
template <bool kWeighted, bool kCapped, int kElements>
__device__ __forceinline__ RowSums thread_sums(const float (&z)[kElements], int h, float reference,
                                               int first = 0, int end = kElements / 4) {
  RowSums s;
#pragma unroll
  for (int j = first; j < end; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float x = z[4 * j + 2 * h + e];
      const float w = ptx::ex2(fmaf(x, kLog2E, -reference));
      s.sum += w;
      if constexpr (kCapped) {
        const float product = w * x;
        if (kWeighted) s.weighted += product;
        s.squares = fmaf(product, x, s.squares);
      } else {
        s.weighted += w == 0.0f ? 0.0f : w * x;
      }
    }
  }
  return s;
}

// Σ z of the columns that exist.
template <typename Columns, int kElements>
__device__ __forceinline__ float thread_logit_sum(const float (&z)[kElements], int h, int first_col,
                                                  int cols) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kElements / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e)
      sum += first_col + Columns::at(j) + e < cols ? z[4 * j + 2 * h + e] : 0.0f;
  }
  return sum;
}

// Offers the entries of one row of the pair that are at least `cut` to the sink. All lanes of the warp take part; open: bits of
// the gates behind which any lane's may be, the same in all lanes. to_logit: factor from acc to z.
template <typename Columns, typename Sink, int kElements>
__device__ __forceinline__ void emit_candidates(const float (&acc)[kElements], int h, float cut,
                                                float to_logit, int first_col, int row,
                                                uint32_t open, const Sink& sink) {
  constexpr int kEach = kElements / 4 / Sink::kGates, kPairs = Sink::kPairs;
  static_assert(kElements % (4 * Sink::kGates) == 0 && kEach % kPairs == 0);
  const uint32_t key =
      static_cast<uint32_t>(row) << kCandidateIdBits | static_cast<uint32_t>(first_col);
#pragma unroll
  for (int g = 0; g < Sink::kGates; ++g) {
    if (!(open >> g & 1)) continue;
#pragma unroll
    for (int first = g * kEach; first < (g + 1) * kEach; first += kPairs) {
      int mine = 0;
#pragma unroll
      for (int j = first; j < first + kPairs; ++j)
        mine += (acc[4 * j + 2 * h] >= cut ? 1 : 0) + (acc[4 * j + 2 * h + 1] >= cut ? 1 : 0);
      if (kPairs < kEach && !__any_sync(~0u, mine > 0)) continue;
      uint2* place = sink.reserve(mine);
      if (mine == 0) continue;
#pragma unroll
      for (int j = first; j < first + kPairs; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = acc[4 * j + 2 * h + e];
          if (x >= cut)
            *place++ = make_uint2(key + Columns::at(j) + e, __float_as_uint(x * to_logit));
        }
      }
    }
  }
}

// Lowest column at which this thread's row equals `value`, or INT_MAX.
template <typename Columns, int kElements>
__device__ __forceinline__ int thread_find(const float (&z)[kElements], int h, int first_col,
                                           float value) {
  int found = 0x7fffffff;
#pragma unroll
  for (int j = kElements / 4 - 1; j >= 0; --j) {
#pragma unroll
    for (int e = 1; e >= 0; --e) {
      if (z[4 * j + 2 * h + e] == value) found = first_col + Columns::at(j) + e;
    }
  }
  return found;
}

// z (already a logit) -> dloss/dproduct, for one row of the pair, in place. target: the row's target as a column of this
// launch.
template <typename Columns, int kElements>
__device__ __forceinline__ void logits_to_gradients(float (&z)[kElements], int h,
                                                    const RowGradient& row, int target,
                                                    const LogitParams& p, int first_col) {
  const int at = target - first_col;  // among this thread's columns, if it is one of them
  const float a = row.a * p.logit_scale, uniform = row.uniform * p.logit_scale;
  const float target_weight = row.target_weight * p.logit_scale;
  const auto gradient = [&](int i, float x) {
    const float g = fmaf(a, ptx::ex2(fmaf(x, kLog2E, -row.lse2)), -uniform);
    return Columns::at(i / 4) + (i & 1) == at ? g - target_weight : g;
  };
  if (p.softcap != 0.0f) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if ((i >> 1 & 1) == h) z[i] = gradient(i, z[i]) * core::softcap_grad(z[i], p.inv_softcap);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if ((i >> 1 & 1) == h) z[i] = gradient(i, z[i]);
    }
  }
}

// Gradients from raw products, where only a positive factor lies between them and the logits and nothing is smoothed.
// a and target_weight: already times that factor.
template <typename Columns, int kElements>
__device__ __forceinline__ void products_to_gradients(float (&acc)[kElements], int h, float a,
                                                      float target_weight, float lse2, float scale,
                                                      int target, int first_col) {
#pragma unroll
  for (int j = 0; j < kElements / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& x = acc[4 * j + 2 * h + e];
      x = a * ptx::ex2(fmaf(x, scale, -lse2));
    }
  }
  // Few rows have their target among a thread's columns: one test instead of one a column.
  if (target < first_col || target > first_col + Columns::at(kElements / 4 - 1) + 1) return;
#pragma unroll
  for (int j = 0; j < kElements / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (first_col + Columns::at(j) + e == target) acc[4 * j + 2 * h + e] -= target_weight;
    }
  }
}

}  // namespace cce::cuda
