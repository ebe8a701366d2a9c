// What the sampled rows drop, by id and class of rows, from the levels that the forward left of their logits. First one
// block puts the rows in the order of their classes; then each thread has four neighbouring bytes, 512 a block, and
// goes through all rows, eight of a class on their way at once. No shared sums, no atomics; the rows are added in a fixed
// order. cce_ext/sparse/reference.py has the same steps in PyTorch.
#include "cuda/common/levels.cuh"
#include "cuda/sparse/tail.h"

namespace cce::cuda {
namespace {

constexpr int kThreads = 128, kBytes = 4 * kThreads, kInFlight = 8;

__global__ void __launch_bounds__(kMaxSamples)
    sort_kernel(const __grid_constant__ LevelSumsParams p) {
  __shared__ int classes[kMaxSamples];
  const int slot = threadIdx.x;
  const bool exists = slot < p.samples;
  const int64_t row = exists ? p.rows[slot] : 0;
  const int mine = exists ? static_cast<int>(p.classes[row]) : kTailClasses;
  classes[slot] = mine;
  __syncthreads();
  int place = 0;  // of rows of a smaller class, or of this one and before
  for (int other = 0; other < p.samples; ++other)
    place += classes[other] < mine || (classes[other] == mine && other < slot);
  if (slot <= kTailClasses) {
    int first = 0;
    for (int other = 0; other < p.samples; ++other) first += classes[other] < slot;
    p.first[slot] = first;
  }
  if (!exists) return;
  const float lse2 = p.lse[row] * kLog2E, bound2 = p.bound2[row];
  const float weight = p.exact[row] ? 0.0f : p.draws[slot];
  const float above = bound2 - lse2;
  LevelRow r;
  r.slot = slot;
  r.origin = kLowestOctave + bound2;
  r.offset = kLowestOctave + above + log2f(weight);
  // A level below this one is dropped. A row that stands for none, or has no lse, drops nothing.
  const float beyond = (p.log2_eps - above - kLowestOctave) * kLevelsPerOctave;
  const bool some = weight > 0.0f && fabsf(above) < INFINITY;
  r.limit = some ? static_cast<int>(ceilf(fminf(beyond, kTopLevel + 1.0f))) - 1 : -1;
  p.sorted[place] = r;
  p.weight[slot] = weight;
  const int64_t target = p.targets[row];
  const bool here = core::classify_target(target, p.vocab, p.options) == core::TargetKind::kHere;
  p.targets_of[slot] = here ? static_cast<int32_t>(target - p.options.vocab_start) : -1;
}

template <bool kCapped>
__device__ __forceinline__ float dropped(float level, const LevelRow& row, float inv_softcap) {
  constexpr float kOctave = 1.0f / kLevelsPerOctave;
  float w = ptx::ex2(fmaf(level, kOctave, row.offset));
  if (kCapped)
    w *= fmaxf(core::softcap_grad(fmaf(level, kOctave, row.origin) * kLn2, inv_softcap), 0.0f);
  return level > 0.0f && level <= static_cast<float>(row.limit) ? w : 0.0f;
}

template <bool kCapped>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const __grid_constant__ LevelSumsParams p, float inv_softcap) {
  __shared__ LevelRow rows[kMaxSamples];
  __shared__ int first[kTailClasses + 1];
  const int64_t begin = int64_t{blockIdx.x} * kBytes, at = begin + 4 * threadIdx.x;
  for (int i = threadIdx.x; i < p.samples; i += kThreads) {
    rows[i] = p.sorted[i];
    // A target is never dropped; only this block reads its level.
    const int64_t target = p.targets_of[i];
    if (target >= begin && target < begin + kBytes) {
      const auto col = static_cast<int>(target % kLevelCols);
      const int64_t byte = target - col + level_byte(col, p.paired);
      p.levels[i * p.ld + byte] = 0;
    }
  }
  if (threadIdx.x <= kTailClasses) first[threadIdx.x] = p.first[threadIdx.x];
  __syncthreads();
  if (at >= p.ld) return;
  const auto in_word = static_cast<int>(at % kLevelCols);
  const int64_t words = at - in_word;
  const int64_t columns[2] = {words + level_column(in_word, p.paired),
                              words + level_column(in_word + 2, p.paired)};
  for (int k = 0; k < kTailClasses; ++k) {
    float sum[4] = {};
    const int end = first[k + 1];
    for (int i = first[k]; i < end; i += kInFlight) {
      uint32_t word[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        word[u] = *reinterpret_cast<const uint32_t*>(p.levels +
                                                     rows[min(i + u, end - 1)].slot * p.ld + at);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (i + u >= end) break;
        const LevelRow row = rows[i + u];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          // The byte as the lowest of 2^23's number.
          const float level =
              __uint_as_float(__byte_perm(word[u], 0x4b000000u, 0x7440 + b)) - 0x1p23f;
          sum[b] += dropped<kCapped>(level, row, inv_softcap);
        }
      }
    }
    float* to = p.sums + k * p.vocab;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int64_t column = columns[b / 2] + b % 2;
      if (column < p.vocab) to[column] = sum[b];
    }
  }
}

}  // namespace

cudaError_t level_sums(const LevelSumsParams& params, cudaStream_t stream) {
  if (params.samples > kMaxSamples || params.ld % kLevelCols) return cudaErrorInvalidValue;
  if (params.samples == 0 || params.vocab == 0) return cudaSuccess;
  sort_kernel<<<1, kMaxSamples, 0, stream>>>(params);
  const auto blocks = static_cast<unsigned>((params.ld + kBytes - 1) / kBytes);
  const double cap = params.options.softcap;
  if (cap == 0.0)
    sums_kernel<false><<<blocks, kThreads, 0, stream>>>(params, 0.0f);
  else
    sums_kernel<true><<<blocks, kThreads, 0, stream>>>(params, static_cast<float>(1.0 / cap));
  return cudaGetLastError();
}

}  // namespace cce::cuda
