// What the sampled rows drop, by id and class of rows, from the levels that the forward left of their logits. First one
// block puts the rows in the order of their classes. Then a block has 128 bytes of all rows, and each of its eight warps
// an eighth of the rows, one after the other: four bytes a lane, sixteen rows on their way at once. Where the class changes, the
// warp leaves its sums in shared memory, from where they are added up in the order of the warps. No atomics.
// cce_ext/sparse/reference.py has the same steps in PyTorch.
#include <cub/block/block_radix_sort.cuh>

#include "cuda/common/levels.cuh"
#include "cuda/sparse/tail.h"

namespace cce::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kBytes = 4 * 32, kInFlight = 16;
static_assert(kMaxSamples == kThreads,
              "a thread a row in sort_kernel, a lane a row in a warp's share");
static_assert(kTailClasses == kWarps, "a warp adds up a class");
constexpr int kClassBits = 4;
static_assert(kTailClasses < 1 << kClassBits, "one more for slots without a row");

__global__ void __launch_bounds__(kThreads) sort_kernel(const __grid_constant__ LevelSumsParams p) {
  using Sort = cub::BlockRadixSort<int, kThreads, 1, int>;
  __shared__ typename Sort::TempStorage storage;
  const bool exists = static_cast<int>(threadIdx.x) < p.samples;
  int of[1] = {exists ? static_cast<int>(p.classes[p.rows[threadIdx.x]]) : kTailClasses};
  int slots[1] = {static_cast<int>(threadIdx.x)};
  Sort(storage).Sort(of, slots, 0, kClassBits);
  const int slot = slots[0];
  if (slot >= p.samples) return;
  const int64_t row = p.rows[slot];
  const float lse2 = p.lse[row] * kLog2E, bound2 = p.bound2[row];
  const float weight = p.exact[row] ? 0.0f : p.draws[slot];
  const float above = bound2 - lse2;
  LevelRow r;
  r.slot = static_cast<int16_t>(slot);
  r.of = static_cast<int16_t>(of[0]);
  r.origin = kLowestOctave + bound2;
  r.offset = kLowestOctave + above + log2f(weight);
  // A level below this one is dropped. A row that stands for none, or has no lse, drops nothing.
  const float beyond = (p.log2_eps - above - kLowestOctave) * kLevelsPerOctave;
  const bool some = weight > 0.0f && fabsf(above) < INFINITY;
  r.limit = some ? static_cast<int>(ceilf(fminf(beyond, kTopLevel + 1.0f))) - 1 : -1;
  p.sorted[threadIdx.x] = r;
  p.weight[slot] = weight;
  // A target is never dropped.
  const int64_t target = p.targets[row];
  if (core::classify_target(target, p.vocab, p.options) != core::TargetKind::kHere) return;
  const int64_t id = target - p.options.vocab_start;
  const auto col = static_cast<int>(id % kLevelCols);
  p.levels[slot * p.ld + id - col + level_byte(col, p.paired)] = 0;
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
  __shared__ LevelRow all_rows[kThreads];
  __shared__ alignas(16) float parts[kTailClasses][kWarps][kBytes];  // by column
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = int64_t{blockIdx.x} * kBytes, at = begin + 4 * lane;
  const int in_word = 4 * lane % kLevelCols, word_col = 4 * lane - in_word;
  const auto leave = [&](int of, const float (&sum)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<float2*>(
          &parts[of][warp][word_col + level_column(in_word + 2 * i, p.paired)]) = {sum[2 * i],
                                                                                   sum[2 * i + 1]};
  };
  const int share = (p.samples + kWarps - 1) / kWarps;  // of the rows, 32 at most
  const int first = warp * share, count = min(share, p.samples - first);
  LevelRow* rows = all_rows + 32 * warp;
  if (lane < count) rows[lane] = p.sorted[first + lane];
  float sum[4] = {};
#pragma unroll
  for (int k = 0; k < kTailClasses; ++k) leave(k, sum);
  __syncwarp();
  const uint8_t* levels = p.levels + min(at, p.ld - 4);
  for (int i = 0; i < count; i += kInFlight) {
    uint32_t word[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      word[u] =
          *reinterpret_cast<const uint32_t*>(levels + rows[min(i + u, count - 1)].slot * p.ld);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (i + u >= count) break;
      const LevelRow row = rows[i + u];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        // The byte as the lowest of 2^23's number.
        const float level =
            __uint_as_float(__byte_perm(word[u], 0x4b000000u, 0x7440 + b)) - 0x1p23f;
        sum[b] += dropped<kCapped>(level, row, inv_softcap);
      }
      if (i + u + 1 < count && rows[i + u + 1].of == row.of) continue;
      leave(row.of, sum);
#pragma unroll
      for (int b = 0; b < 4; ++b) sum[b] = 0.0f;
    }
  }
  __syncthreads();
  float* to = p.sums + warp * p.vocab;
  for (int col = lane; col < kBytes && begin + col < p.vocab; col += 32) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += parts[warp][w][col];
    to[begin + col] = all;
  }
}

}  // namespace

cudaError_t level_sums(const LevelSumsParams& params, cudaStream_t stream) {
  if (params.samples > kMaxSamples || params.ld % kLevelCols) return cudaErrorInvalidValue;
  if (params.samples == 0 || params.vocab == 0) return cudaSuccess;
  sort_kernel<<<1, kThreads, 0, stream>>>(params);
  const auto blocks = static_cast<unsigned>((params.ld + kBytes - 1) / kBytes);
  const double cap = params.options.softcap;
  if (cap == 0.0)
    sums_kernel<false><<<blocks, kThreads, 0, stream>>>(params, 0.0f);
  else
    sums_kernel<true><<<blocks, kThreads, 0, stream>>>(params, static_cast<float>(1.0 / cap));
  return cudaGetLastError();
}

}  // namespace cce::cuda
