// Rows added up by a list: out[s] += Σ_i weights[i] source[items[i]], fp32 in registers, one rounding, no atomics.
//
// Work item: one segment times one slice of 256 columns; a lane holds eight neighbouring columns. Slices are the outer
// loop, so that the part of `source` in use stays in the second-level cache. Light segments (up to 64 entries): one warp
// an item. Heavy ones: the eight warps of a block take every eighth batch of eight entries, and warp 0 adds up their sums, in order, from
// shared memory. Segments without entries are not visited. Persistent blocks; lists of both kinds are made by CUB.
#include <thrust/iterator/counting_iterator.h>

#include <algorithm>
#include <cub/device/device_partition.cuh>

#include "cuda/common/convert.cuh"
#include "cuda/device_info.h"
#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kPerLane = 8, kSlice = 32 * kPerLane;
constexpr int kHeavy = 64;    // entries of a light segment at most
constexpr int kInFlight = 8;  // rows under way at a time
constexpr int kBlocksPerProcessor = 4;

// Where a segment's entries end: at `last`, or where the next one's start; hot ids have none.
struct Segments {
  const int32_t *first, *last, *slots;

  __host__ __device__ explicit Segments(const GatherParams& p)
      : first(p.first), last(p.last), slots(p.slots) {}
  __device__ __forceinline__ int begin(int32_t s) const { return first[s]; }
  __device__ __forceinline__ int end(int32_t s) const {
    if (last) return last[s];
    return slots && slots[s] >= 0 ? first[s] : first[s + 1];
  }
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

// Eight neighbouring columns of a row; kVector: by 16-byte accesses.
template <typename T, bool kVector>
struct Piece {
  alignas(16) T x[kPerLane];

  __device__ __forceinline__ void load(const T* row, int col, int width) {
    if constexpr (kVector) {
      constexpr int kAccesses = kPerLane * sizeof(T) / 16, kPerAccess = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        const int at = col + i * kPerAccess;
        reinterpret_cast<uint4*>(x)[i] =
            at < width ? *reinterpret_cast<const uint4*>(row + at) : make_uint4(0, 0, 0, 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) x[i] = col + i < width ? row[col + i] : T(0.0f);
    }
  }
  __device__ __forceinline__ void store(T* row, int col, int width) const {
    if constexpr (kVector) {
      constexpr int kAccesses = kPerLane * sizeof(T) / 16, kPerAccess = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        const int at = col + i * kPerAccess;
        if (at < width) *reinterpret_cast<uint4*>(row + at) = reinterpret_cast<const uint4*>(x)[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (col + i < width) row[col + i] = x[i];
      }
    }
  }
};

// A batch of a segment's entries: lane i < kInFlight holds entry begin + i.
struct Batch {
  int item = -1;  // none: beyond the segment's end
  float weight = 0.0f;

  __device__ __forceinline__ void load(const GatherParams& p, int begin, int end) {
    const int at = begin + static_cast<int>(threadIdx.x % 32);
    item = -1;
    weight = 0.0f;
    if (threadIdx.x % 32 < kInFlight && at < end) {
      const int entry = p.order ? __ldg(p.order + at) : at;
      item = __ldg(p.items + entry);
      weight = __ldg(p.weights + entry);
    }
  }
};

// Every step-th batch of a segment from `begin` on, added to sum; returns what their weights add up to. The next batch's
// numbers are read while this one's rows are on their way.
template <typename T, bool kVector>
__device__ __forceinline__ float add_entries(const GatherParams& p, int begin, int end, int step,
                                             int col, float (&sum)[kPerLane]) {
  const T* source = static_cast<const T*>(p.source);
  float total = 0.0f;
  Batch batch;
  batch.load(p, begin, end);
  for (int at = begin; at < end; at += kInFlight * step) {
    Piece<T, kVector> piece[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t item = __shfl_sync(~0u, batch.item, k);
      // Without an item: nothing is read, zeros.
      piece[k].load(source + (item < 0 ? 0 : item * p.source_ld), item < 0 ? p.width : col,
                    p.width);
    }
    const float weight = batch.weight;
    batch.load(p, at + kInFlight * step, end);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const float w = __shfl_sync(~0u, weight, k);
      total += w;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum[j] = fmaf(w, widen(piece[k].x[j]), sum[j]);
    }
  }
  return total;
}

// Adds a finished sum to the output, once.
template <typename Out, bool kVector>
__device__ __forceinline__ void add_to_output(const GatherParams& p, int segment, int col,
                                              const float (&sum)[kPerLane], float total) {
  const int64_t row = p.out_rows ? p.out_rows[segment] : segment;
  Out* out = static_cast<Out*>(p.out) + row * p.out_ld;
  Piece<Out, kVector> piece;
  piece.load(out, col, p.width);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) piece.x[j] = narrow<Out>(widen(piece.x[j]) + sum[j]);
  piece.store(out, col, p.width);
  if (p.sums && col == 0) p.sums[segment] += total;
}

template <typename T, typename Out, bool kVector>
__global__ void __launch_bounds__(kThreads) light_kernel(const __grid_constant__ GatherParams p) {
  const Segments spans(p);
  const int segments = p.work_counts[1], slices = (p.width + kSlice - 1) / kSlice;
  const int32_t* list = p.work + p.segments;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t items = static_cast<int64_t>(segments) * slices;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp; i < items;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int slice = static_cast<int>(i / segments), segment = list[i % segments];
    const int col = slice * kSlice + lane * kPerLane;
    float sum[kPerLane] = {};
    const float total =
        add_entries<T, kVector>(p, spans.begin(segment), spans.end(segment), 1, col, sum);
    add_to_output<Out, kVector>(p, segment, col, sum, total);
  }
}

template <typename T, typename Out, bool kVector>
__global__ void __launch_bounds__(kThreads) heavy_kernel(const __grid_constant__ GatherParams p) {
  __shared__ float sums[kWarps][kSlice];
  __shared__ float totals[kWarps];
  const Segments spans(p);
  const int segments = p.work_counts[0], slices = (p.width + kSlice - 1) / kSlice;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t items = static_cast<int64_t>(segments) * slices;
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    const int slice = static_cast<int>(i / segments), segment = p.work[i % segments];
    const int col = slice * kSlice + lane * kPerLane;
    float sum[kPerLane] = {};
    const float total = add_entries<T, kVector>(p, spans.begin(segment) + warp * kInFlight,
                                                spans.end(segment), kWarps, col, sum);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sums[warp][j * 32 + lane] = sum[j];
    if (lane == 0) totals[warp] = total;
    __syncthreads();
    if (warp == 0) {
      float all = total;
      for (int w = 1; w < kWarps; ++w) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) sum[j] += sums[w][j * 32 + lane];
        all += totals[w];
      }
      add_to_output<Out, kVector>(p, segment, col, sum, all);
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

template <typename T, typename Out, bool kVector>
cudaError_t launch(const GatherParams& p, cudaStream_t stream) {
  const int blocks = current_device().multiprocessors * kBlocksPerProcessor;
  heavy_kernel<T, Out, kVector><<<blocks, kThreads, 0, stream>>>(p);
  light_kernel<T, Out, kVector><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

bool vector_access(const GatherParams& p) {
  return p.width % 8 == 0 && p.source_ld % 8 == 0 && p.out_ld % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.source) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

template <typename T, typename Out>
cudaError_t choose(const GatherParams& p, cudaStream_t stream) {
  return vector_access(p) ? launch<T, Out, true>(p, stream) : launch<T, Out, false>(p, stream);
}

template <typename T>
cudaError_t choose(const GatherParams& p, cudaStream_t stream) {
  return p.out_fp32 ? choose<T, float>(p, stream) : choose<T, T>(p, stream);
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
  if (params.segments == 0 || params.width == 0) return cudaSuccess;
  size_t bytes = params.partition_bytes;
  const cudaError_t error = partition(params, params.partition, bytes, stream);
  if (error != cudaSuccess) return error;
  return params.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(params, stream)
                                          : choose<__half>(params, stream);
}

}  // namespace cce::cuda
