// The gradient by columns in one pass, each number written once and none read back: an id's tail, by its shapes and its
// group's sums, and its kept entries, or, if it is hot, its row of the product.
//
// Tile: 32 neighbouring ids, all of one group, times one slice (gather.cuh), a block of four warps. All that the tail wants is on
// its way before anything is waited for. Then the warps take turns at the ids that have more, and leave its sum in shared
// memory (33 KB of fp32); where the next id's entries are, and what they are, is read two and one ids ahead. At last each
// warp has 64 of the columns of all ids: the tail by one step of tensor-core products, ids by classes by columns, whose
// columns are read in such an order that a thread has eight neighbouring ones (SpreadColumns of common/epilogue.cuh), to which
// it adds what was left. As many slices of an id come one after another as leave the part of `source` in use in
// three quarters of the second-level cache: memory takes long pieces of a row faster. No atomics.
#include <algorithm>

#include "cuda/device_info.h"
#include "cuda/ptx/mma.cuh"
#include "cuda/sparse/gather.cuh"
#include "cuda/sparse/tail.h"

namespace cce::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Older chips' shared memory has room for four blocks, and their code wants the registers that this leaves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksPerProcessor = 4;
#else
constexpr int kBlocksPerProcessor = 5;
#endif
constexpr int kIds = 32, kWarpCols = kSlice / kWarps, kParts = kWarpCols / 32;
static_assert(kGroupCols % kIds == 0, "a tile's ids are of one group");
static_assert(kTailClasses == 8, "two by a lane of each quad");
// Rows of shared memory four floats apart in the banks: those of eight ids are read at once.
constexpr int kListedLd = kSlice + 4;

// Lanes of `left`, one after the other; -1 after the last.
__device__ __forceinline__ int take_lane(unsigned& left) {
  const int lane = __ffs(left) - 1;
  left &= left - 1;
  return lane;
}

// Entries of an id; none where begin is not below end.
struct Span {
  int begin = 0, end = 0;
};

// What the ids of `left` have beside a tail, into `listed`; mine, slot: of this lane's id. col: the lane's first column, one
// that exists.
template <typename T, bool kVector>
__device__ __forceinline__ void sum_listed(const ColumnGradientParams& p, const Span& mine,
                                           int my_slot, unsigned left, int col,
                                           float (&listed)[kIds][kListedLd]) {
  const int lane = threadIdx.x % 32, width = p.entries.width;
  const auto span_of = [&](int i) {
    const Span span = {__shfl_sync(~0u, mine.begin, i & 31), __shfl_sync(~0u, mine.end, i & 31)};
    return i < 0 ? Span{} : span;
  };
  int at = take_lane(left), next = take_lane(left);
  Span span = span_of(at), next_span = span_of(next);
  Batch batch(p.entries, span.begin, span.end);
  int next_place = Batch::place(p.entries, next_span.begin, next_span.end);
  while (at >= 0) {
    const int after = take_lane(left);
    const Span after_span = span_of(after);
    const Batch next_batch(p.entries, next_place, next_span.begin, next_span.end);
    next_place = Batch::place(p.entries, after_span.begin, after_span.end);
    alignas(16) float sum[kPerLane] = {};
    const int slot = __shfl_sync(~0u, my_slot, at);
    if (slot >= 0) {
      Piece<float, kVector> row;
      row.load(p.product + int64_t{slot} * width, col, width);
      const float unit = p.units[0];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum[j] = row.x[j] * unit;
    } else {
      add_entries<T, kVector>(p.entries, batch, span.begin, span.end, 1, col, sum);
    }
    auto* to = reinterpret_cast<float4*>(&listed[at][lane * kPerLane]);
    to[0] = reinterpret_cast<const float4*>(sum)[0];
    to[1] = reinterpret_cast<const float4*>(sum)[1];
    at = next;
    next = after;
    span = next_span;
    next_span = after_span;
    batch = next_batch;
  }
}

// The block's tile: groups of up to `together` slices, in them tiles of ids, of those the slices.
struct Tile {
  int64_t first_id;
  int first_col;

  __device__ __forceinline__ Tile(unsigned tiles, unsigned slices, unsigned together) {
    const unsigned before = blockIdx.x / (tiles * together) * together;
    const unsigned here = min(together, slices - before), at = blockIdx.x - before * tiles;
    first_id = int64_t{at / here} * kIds;
    first_col = static_cast<int>(before + at % here) * kSlice;
  }
};

template <typename T, typename Out, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector ? kBlocksPerProcessor : 3)
    columns_kernel(const __grid_constant__ ColumnGradientParams p, unsigned tiles, unsigned slices,
                   unsigned together) {
  __shared__ alignas(16) float listed[kIds][kListedLd];
  const Tile tile(tiles, slices, together);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = p.entries.width;
  const auto id_of = [&](int i) { return min(tile.first_id + i, p.vocab - 1); };
  const T* shapes = static_cast<const T*>(p.shapes);

  // This lane's id.
  const bool exists = tile.first_id + lane < p.vocab;
  const int my_begin = p.first[id_of(lane)], next_begin = p.first[id_of(lane) + 1];
  const int my_slot = exists ? p.slots[id_of(lane)] : -1;
  // Of a product's tile the thread has ids `row` and row + 8, and column 8 quad + 2 t + {0, 1} of each 32 in the t-th.
  const int row = lane / 4, quad = lane % 4, warp_col = tile.first_col + warp * kWarpCols;
  uint32_t of_ids[kIds / 16][2];
#pragma unroll
  for (int i = 0; i < kIds / 8; ++i) {
    const T* shape = shapes + 2 * quad * p.shapes_ld + id_of(8 * i + row);
    of_ids[i / 2][i % 2] = pack<T>(widen(shape[0]), widen(shape[p.shapes_ld]));
  }
  const int kinds = kTailClasses + p.smoothing;
  const float* group_sums = p.product + (p.hot + tile.first_id / kGroupCols * kinds) * width;
  const auto group_sum = [&](int kind, int col) {
    return col < width ? group_sums[kind * width + col] : 0.0f;
  };
  const float unit = p.units[2];
  uint32_t sums[kParts][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int col = warp_col + 32 * part + row / 2 * 8 + 2 * t + row % 2;
      sums[part][t] = pack<T>(group_sum(2 * quad, col) * unit, group_sum(2 * quad + 1, col) * unit);
    }
  }

  const Span mine = {my_begin, exists && my_slot < 0 ? next_begin : my_begin};
  const bool has_more = my_slot >= 0 || mine.begin < mine.end;
  const unsigned with = __ballot_sync(~0u, has_more);  // the same in all warps
  if (with != 0) {
    const bool turn = __popc(with & ((1u << lane) - 1)) % kWarps == warp;
    const int col = tile.first_col + lane * kPerLane;
    sum_listed<T, kVector>(p, mine, my_slot, __ballot_sync(~0u, turn && has_more),
                           col < width ? col : 0, listed);
    __syncthreads();
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int col = 32 * part + quad * kPerLane;  // of the warp's
    float acc[kIds / 16][4][4] = {};
    if (p.smoothing) {  // its kind is every id's, and the same
      const float uniform = widen(shapes[kTailClasses * p.shapes_ld]) * unit;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float sum = group_sum(kTailClasses, warp_col + col + i / 4 * 2 + i % 2) * uniform;
#pragma unroll
        for (int m = 0; m < kIds / 16; ++m) acc[m][i / 4][i % 4] = sum;
      }
    }
#pragma unroll
    for (int m = 0; m < kIds / 16; ++m) {
      const uint32_t a[4] = {of_ids[m][0], of_ids[m][1], 0, 0};  // eight classes of sixteen
#pragma unroll
      for (int t = 0; t < 4; ++t) ptx::mma_m16n8k16<T>(acc[m][t], a, sums[part][t], 0);
    }
#pragma unroll
    for (int of = 0; of < kIds / 8; ++of) {
      const int i = 8 * of + row;
      float sum[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum[j] = acc[of / 2][j / 2][of % 2 * 2 + j % 2];
      if (with >> i & 1) {
        const auto* more = reinterpret_cast<const float4*>(&listed[i][warp * kWarpCols + col]);
        const float4 a = more[0], b = more[1];
        sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
        sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
      }
      if (tile.first_id + i >= p.vocab || warp_col + col >= width) continue;
      Piece<Out, kVector> piece;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) piece.x[j] = narrow<Out>(sum[j]);
      piece.store(static_cast<Out*>(p.out.data) + (tile.first_id + i) * p.out.ld, warp_col + col,
                  width);
    }
  }
}

}  // namespace

cudaError_t column_gradient(const ColumnGradientParams& params, cudaStream_t stream) {
  if (params.vocab == 0 || params.entries.width == 0) return cudaSuccess;
  const int64_t tiles = (params.vocab + kIds - 1) / kIds;
  const int64_t slices = (params.entries.width + kSlice - 1) / kSlice;
  if (tiles * slices > INT32_MAX) return cudaErrorInvalidValue;
  constexpr int64_t kBytes = 2;  // of a number of source
  const int64_t slice_bytes = std::max<int64_t>(params.source_rows, 1) * kSlice * kBytes;
  const int64_t cached = current_device().cache_bytes / 4 * 3 / slice_bytes;
  const auto together = static_cast<unsigned>(std::clamp<int64_t>(cached, 1, slices));
  return choose_types(params.entries, params.out, [&](auto types) {
    using Types = decltype(types);
    using T = typename Types::T;
    using Out = typename Types::Out;
    columns_kernel<T, Out, Types::kVector>
        <<<static_cast<unsigned>(tiles * slices), kThreads, 0, stream>>>(
            params, static_cast<unsigned>(tiles), static_cast<unsigned>(slices), together);
    return cudaGetLastError();
  });
}

}  // namespace cce::cuda
