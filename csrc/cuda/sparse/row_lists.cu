// A row's kept entries in order, and what the row drops of each vocabulary group: a block a row that counts or not.
//
// Sort: by key, which no two entries share, into buckets, then each behind those of its bucket that are smaller; hot ids, which
// are multiplied as a dense matrix, at the end. The first entries of a thread stay in its registers. Mass: of the partials
// of the forward, less what is kept, added up in 31 bits behind the point, in shared memory, so that no order matters.
#include <cub/block/block_scan.cuh>

#include "cuda/common/epilogue.cuh"
#include "cuda/sparse/capped.cuh"
#include "cuda/sparse/lists.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 64, kBucketsEach = 6, kBuckets = kThreads * kBucketsEach;
constexpr int kOffsetOctaves = 11;  // below the vocabulary's size
constexpr int kTile = 1024;         // keys in shared memory
constexpr int kHeld = 4;            // entries in a thread's registers
constexpr float kMassUnit = 0x1p-31f;

// Buckets of keys, in their order: for ids that are hot and others, sixteen an octave of id + offset, so that frequent ids,
// which are usually the small ones, have buckets of few.
__device__ __forceinline__ int bucket_of(int key, int id_bits) {
  const int offset = 1 << (id_bits > kOffsetOctaves ? id_bits - kOffsetOctaves : 0);
  const auto sixteenth = [](int x) {  // of an octave, by the exponent and four more bits
    return static_cast<int>(__float_as_uint(__int2float_rz(x)) >> 19);
  };
  const int id = key & ((1 << id_bits) - 1);
  const int bucket = sixteenth(id + offset) - sixteenth(offset);
  return (key >> id_bits) * (kBuckets / 2) + bucket;
}
static_assert(16 * kOffsetOctaves < kBuckets / 2);

// Σ p softcap' of one group, kept entries included, from the forward's partials.
__device__ __forceinline__ float group_mass(const SortRowsParams& p, int64_t position, int group,
                                            float lse2) {
  const int end = min((group + 1) * p.splits_per_group, p.splits);
  constexpr int kInFlight = 4;
  float mass = 0.0f;
  for (int64_t s = group * p.splits_per_group; s < end; s += kInFlight) {
    float2 part[kInFlight];
    float sum[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = min(s + i, int64_t{end} - 1) * p.n + position;
      part[i] = p.partials.max_sum[at];
      sum[i] = p.partials.capped ? p.partials.capped[at] : part[i].y;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (s + i < end && part[i].x != -INFINITY) mass += sum[i] * ptx::ex2(part[i].x - lse2);
    }
  }
  return mass;
}

// A probability that is kept, in units; more than 1 is a rounding error, and what is no number has no part.
__device__ __forceinline__ uint32_t mass_units(float kept) {
  return static_cast<uint32_t>(fminf(fmaxf(kept, 0.0f), 1.0f) * (1.0f / kMassUnit));
}

__global__ void __launch_bounds__(kThreads) sort_kernel(const __grid_constant__ SortRowsParams p) {
  using Scan = cub::BlockScan<int, kThreads>;
  extern __shared__ uint32_t kept[];  // of each group, in units
  __shared__ typename Scan::TempStorage storage;
  __shared__ int tile[kTile], first[kBuckets + 1], next[kBuckets];
  const int64_t position = blockIdx.x;
  const int begin = p.row_first[position], count = p.row_first[position + 1] - begin;
  const int row = p.order.rows[position];
  const bool counts = position < *p.order.count;
  const float lse2 = counts ? p.lse[row] * kLog2E : 0.0f;
  const int me = static_cast<int>(threadIdx.x);
  int held_keys[kHeld];
  float held_logits[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int i = me + j * kThreads;
    held_keys[j] = i < count ? p.keys[begin + i] : 0;
    held_logits[j] = i < count ? p.logits[begin + i] : 0.0f;
  }
  // f(key, logit) for this thread's entries.
  const auto visit = [&](auto&& f) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (me + j * kThreads < count) f(held_keys[j], held_logits[j]);
    }
    for (int i = me + kHeld * kThreads; i < count; i += kThreads)
      f(p.keys[begin + i], p.logits[begin + i]);
  };
  const int b = me * kBucketsEach;
#pragma unroll
  for (int i = 0; i < kBucketsEach; ++i) next[b + i] = 0;
  for (int g = me; g < p.groups; g += kThreads) kept[g] = 0;
  __syncthreads();
  visit([&](int key, float) { atomicAdd(next + bucket_of(key, p.id_bits), 1); });
  __syncthreads();
  int starts[kBucketsEach];
#pragma unroll
  for (int i = 0; i < kBucketsEach; ++i) starts[i] = next[b + i];
  Scan(storage).ExclusiveSum(starts, starts);
#pragma unroll
  for (int i = 0; i < kBucketsEach; ++i) first[b + i] = next[b + i] = starts[i];
  if (me == 0) first[kBuckets] = count;
  __syncthreads();
  // Where the keys are by bucket: of a long row, in what will be its rows.
  int* const bucketed = count <= kTile ? tile : p.rows + begin;
  visit([&](int key, float) { bucketed[atomicAdd(next + bucket_of(key, p.id_bits), 1)] = key; });
  __syncthreads();
  visit([&](int key, float z) {
    const int bucket = bucket_of(key, p.id_bits), end = first[bucket + 1];
    int at = begin + first[bucket];
    for (int j = first[bucket]; j < end; ++j) at += bucketed[j] < key;
    const int id = key & ((1 << p.id_bits) - 1);
    p.ids[at] = id;
    p.sorted_logits[at] = z;
    atomicAdd(kept + id / kGroupCols,
              mass_units(ptx::ex2(fmaf(z, kLog2E, -lse2)) * capped(p.options, z)));
  });
  __syncthreads();
  for (int i = me; i < count; i += kThreads) p.rows[begin + i] = row;
  for (int g = me; g < p.groups; g += kThreads) {
    const float left =
        counts ? group_mass(p, position, g, lse2) - static_cast<float>(kept[g]) * kMassUnit : 0.0f;
    p.mass[int64_t{row} * p.groups + g] = left < 0.0f ? 0.0f : left;  // rounding; a NaN stays
  }
  if (me != 0) return;
  p.row_hot[position] = begin + first[kBuckets / 2];
  p.exact_rows[row] = counts && p.exact[position / kRowBlock];
}

}  // namespace

cudaError_t sort_rows(const SortRowsParams& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  sort_kernel<<<static_cast<unsigned>(params.n), kThreads, params.groups * sizeof(uint32_t),
                stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
