// Rows added up by a list: out[s] += Σ_i weights[i] source[items[i]], fp32 in registers, one rounding, no atomics.
//
// Work item: one segment times one slice (gather.cuh). Slices are the outer loop, so that the part of `source` in use stays in
// the second-level cache. Light segments (up to 64 entries): one warp an item. Heavy ones: the eight warps of a block take
// every eighth batch of entries, and warp 0 adds up their sums, in order, from shared memory. Segments without entries are
// not visited. Persistent blocks; lists of both kinds are made by CUB.
#include <thrust/iterator/counting_iterator.h>

#include <cub/device/device_partition.cuh>

#include "cuda/common/warp.cuh"
#include "cuda/device_info.h"
#include "cuda/sparse/gather.cuh"

namespace cce::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kHeavy = 64;  // entries of a light segment at most
constexpr int kBlocksPerProcessor = 4;

// Where a segment's entries end: at `last`, or where the next one's start.
struct Segments {
  const int32_t *first, *last;

  __host__ __device__ explicit Segments(const GatherParams& p) : first(p.first), last(p.last) {}
  __device__ __forceinline__ int begin(int32_t s) const { return first[s]; }
  __device__ __forceinline__ int end(int32_t s) const { return last ? last[s] : first[s + 1]; }
};

struct IsHeavy {
  Segments segments;
  __device__ bool operator()(int32_t s) const {
    return segments.end(s) - segments.begin(s) > kHeavy;
  }
};
struct IsLight {
  Segments segments;
  __device__ bool operator()(int32_t s) const { return segments.end(s) > segments.begin(s); }
};

// A lane's columns of a slice; those beyond the last are read as the first ones.
struct LaneColumns {
  int col, from;
  bool there;

  __device__ __forceinline__ LaneColumns(int slice, int width)
      : col(slice * kSlice + static_cast<int>(threadIdx.x % 32) * kPerLane),
        from(col < width ? col : 0),
        there(col < width) {}
};

// Adds a finished sum to the output, once. total: of this lane's weights.
template <typename Out, bool kVector>
__device__ __forceinline__ void add_to_output(const GatherParams& p, int segment,
                                              const LaneColumns& columns,
                                              const float (&sum)[kPerLane], float total) {
  if (p.sums) {
    total = warp_sum(total);
    if (columns.col == 0) p.sums[segment] += total;
  }
  if (!columns.there) return;
  const int64_t row = p.out_rows ? p.out_rows[segment] : segment;
  Out* out = static_cast<Out*>(p.out.data) + row * p.out.ld;
  Piece<Out, kVector> piece;
  piece.load(out, columns.col, p.entries.width);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) piece.x[j] = narrow<Out>(widen(piece.x[j]) + sum[j]);
  piece.store(out, columns.col, p.entries.width);
}

template <typename T, typename Out, bool kVector>
__global__ void __launch_bounds__(kThreads) light_kernel(const __grid_constant__ GatherParams p) {
  const Segments spans(p);
  const int segments = p.work_counts[1], slices = (p.entries.width + kSlice - 1) / kSlice;
  const int32_t* list = p.work + p.segments;
  const int64_t items = static_cast<int64_t>(segments) * slices;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < items;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int segment = list[i % segments];
    const LaneColumns columns(static_cast<int>(i / segments), p.entries.width);
    const int begin = spans.begin(segment), end = spans.end(segment);
    float sum[kPerLane] = {};
    const float total = add_entries<T, kVector>(p.entries, Batch(p.entries, begin, end), begin, end,
                                                1, columns.from, sum);
    add_to_output<Out, kVector>(p, segment, columns, sum, total);
  }
}

template <typename T, typename Out, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    heavy_kernel(const __grid_constant__ GatherParams p) {
  __shared__ float sums[kWarps][kSlice];
  __shared__ float totals[kWarps][32];
  const Segments spans(p);
  const int segments = p.work_counts[0], slices = (p.entries.width + kSlice - 1) / kSlice;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t items = static_cast<int64_t>(segments) * slices;
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    const int segment = p.work[i % segments];
    const LaneColumns columns(static_cast<int>(i / segments), p.entries.width);
    const int begin = spans.begin(segment) + 32 * warp, end = spans.end(segment);
    float sum[kPerLane] = {};
    const float total = add_entries<T, kVector>(p.entries, Batch(p.entries, begin, end), begin, end,
                                                kWarps, columns.from, sum);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sums[warp][j * 32 + lane] = sum[j];
    totals[warp][lane] = total;
    __syncthreads();
    if (warp == 0) {
      float all = total;
      for (int w = 1; w < kWarps; ++w) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) sum[j] += sums[w][j * 32 + lane];
        all += totals[w][lane];
      }
      add_to_output<Out, kVector>(p, segment, columns, sum, all);
    }
    __syncthreads();
  }
}

// Heavy segments into the first third of `work`, light ones into the second, empty ones (nobody reads them) into the last.
cudaError_t partition(const GatherParams& p, void* workspace, size_t& bytes, cudaStream_t stream) {
  return cub::DevicePartition::If(workspace, bytes, thrust::counting_iterator<int32_t>(0), p.work,
                                  p.work + p.segments, p.work + 2 * p.segments, p.work_counts,
                                  static_cast<int>(p.segments), IsHeavy{Segments(p)},
                                  IsLight{Segments(p)}, stream);
}

}  // namespace

size_t gather_workspace(int64_t segments) {
  size_t bytes = 0;
  GatherParams p;
  p.segments = segments;
  partition(p, nullptr, bytes, nullptr);
  return bytes;
}

cudaError_t gather_rows(const GatherParams& params, cudaStream_t stream) {
  if (params.segments == 0 || params.entries.width == 0) return cudaSuccess;
  size_t bytes = params.partition_bytes;
  const cudaError_t error = partition(params, params.partition, bytes, stream);
  if (error != cudaSuccess) return error;
  const int blocks = current_device().multiprocessors * kBlocksPerProcessor;
  return choose_types(params.entries, params.out, [&](auto types) {
    using Types = decltype(types);
    using T = typename Types::T;
    using Out = typename Types::Out;
    heavy_kernel<T, Out, Types::kVector><<<blocks, kThreads, 0, stream>>>(params);
    light_kernel<T, Out, Types::kVector><<<blocks, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace cce::cuda
