// What every kernel that adds up listed rows is made of: a warp has a slice of 256 columns, a lane eight neighbouring ones of
// them; it reads 32 entries of a list at a time, a lane an entry, and has up to eight of their rows on their way at once.
// fp32 in registers, in the order of the list. These kernels are bound by how many instructions a row takes: no row, and
// none of a lane's columns, is asked for whether it is there.
#pragma once

#include "cuda/common/convert.cuh"
#include "cuda/sparse/lists.h"

namespace cce::cuda {

constexpr int kPerLane = 8, kSlice = 32 * kPerLane;

// Eight neighbouring columns of a row, the first of which exists; kVector: all do, and 16 bytes are read at once.
template <typename T, bool kVector>
struct Piece {
  alignas(16) T x[kPerLane];
  static constexpr int kAccesses = kPerLane * sizeof(T) / 16;

  __device__ __forceinline__ void load(const T* row, int col, int width) {
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i)
        reinterpret_cast<uint4*>(x)[i] = reinterpret_cast<const uint4*>(row + col)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) x[i] = col + i < width ? row[col + i] : T(0.0f);
    }
  }
  __device__ __forceinline__ void store(T* row, int col, int width) const {
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i)
        reinterpret_cast<uint4*>(row + col)[i] = reinterpret_cast<const uint4*>(x)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (col + i < width) row[col + i] = x[i];
      }
    }
  }
};

// Entries begin to begin + 31 of a list, a lane an entry; beyond its end the last one, with no weight.
struct Batch {
  int item = 0;
  float weight = 0.0f;

  // Where this lane's entry is, if there are any.
  static __device__ __forceinline__ int place(const Entries& entries, int begin, int end) {
    const int at = min(begin + static_cast<int>(threadIdx.x % 32), end - 1);
    return begin < end && entries.order ? __ldg(entries.order + at) : at;
  }
  __device__ __forceinline__ Batch(const Entries& entries, int place, int begin, int end) {
    if (begin >= end) return;
    item = __ldg(entries.items + place);
    if (begin + static_cast<int>(threadIdx.x % 32) < end) weight = __ldg(entries.weights + place);
  }
  __device__ __forceinline__ Batch(const Entries& entries, int begin, int end)
      : Batch(entries, place(entries, begin, end), begin, end) {}
};

// Adds rows `first` to first + kRows - 1 of a batch.
template <int kRows, typename T, bool kVector>
__device__ __forceinline__ void add_rows(const Entries& entries, const Batch& batch, int first,
                                         int col, float (&sum)[kPerLane]) {
  const T* source = static_cast<const T*>(entries.source);
  Piece<T, kVector> piece[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const auto item = static_cast<uint32_t>(__shfl_sync(~0u, batch.item, first + k));
    piece[k].load(source + uint64_t{item} * entries.source_ld, col, entries.width);
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const float w = __shfl_sync(~0u, batch.weight, first + k);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sum[j] = fmaf(w, widen(piece[k].x[j]), sum[j]);
  }
}

// Every step-th batch from `begin` on, the first one given, added to sum; returns what the weights of this lane's entries
// add up to. col: a column that exists. The next batch is read while this one's rows are on their way.
template <typename T, bool kVector>
__device__ __forceinline__ float add_entries(const Entries& entries, Batch batch, int begin,
                                             int end, int step, int col, float (&sum)[kPerLane]) {
  float total = 0.0f;
  for (int at = begin; at < end; at += 32 * step) {
    const Batch now = batch;
    batch = Batch(entries, at + 32 * step, end);
    total += now.weight;
    const int count = min(end - at, 32);
    int first = 0;
    for (; first + 4 < count; first += 8) add_rows<8, T, kVector>(entries, now, first, col, sum);
    if (first < count) add_rows<4, T, kVector>(entries, now, first, col, sum);
  }
  return total;
}

// What the kernels are made for: types of source and output, and whether all pieces are read and written at once.
template <typename Source, typename Output, bool kAtOnce>
struct GatherTypes {
  using T = Source;
  using Out = Output;
  static constexpr bool kVector = kAtOnce;
};

// launch(GatherTypes), by the tensors.
template <typename T, typename Out, typename Launch>
cudaError_t choose_types(const Entries& e, const Gradient& out, const Launch& launch) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const bool vector = e.width % 8 == 0 && e.source_ld % 8 == 0 && out.ld % 8 == 0 &&
                      aligned(e.source) && aligned(out.data);
  return vector ? launch(GatherTypes<T, Out, true>{}) : launch(GatherTypes<T, Out, false>{});
}
template <typename T, typename Launch>
cudaError_t choose_types(const Entries& e, const Gradient& out, const Launch& launch) {
  return out.fp32 ? choose_types<T, float>(e, out, launch) : choose_types<T, T>(e, out, launch);
}
template <typename Launch>
cudaError_t choose_types(const Entries& e, const Gradient& out, const Launch& launch) {
  return e.dtype == Dtype::kBFloat16 ? choose_types<__nv_bfloat16>(e, out, launch)
                                     : choose_types<__half>(e, out, launch);
}

}  // namespace cce::cuda
