// The tail's tilt by a sample of ids: the ids (a block a group, each thread with nine neighbouring ones), the classes'
// mean logits (32 ids a block, 32 threads an id), then a warp a row, whose numbers stay in shared memory between three
// passes, two groups at a time. cce_ext/sparse/tail.py has the same steps in PyTorch. No atomics; sums in a fixed order.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/common/convert.cuh"
#include "cuda/common/epilogue.cuh"
#include "cuda/sparse/tail_steps.cuh"
#include "cuda/sparse/tilt.h"

namespace cce::cuda {
namespace {

constexpr int kIdThreads = 512, kIdCols = kGroupCols / kIdThreads;
static_assert(kIdCols * kIdThreads == kGroupCols, "whole columns a thread");
constexpr int kMeanCols = 32, kMeanParts = 32;
static_assert(kTailClasses <= kMeanParts, "a warp adds up a class");
constexpr int kRowWarps = 8;

__global__ void __launch_bounds__(kIdThreads) ids_kernel(const __grid_constant__ TiltIdsParams p) {
  using Sum = cub::BlockReduce<int64_t, kIdThreads>;
  using Scan = cub::BlockScan<int64_t, kIdThreads>;
  __shared__ union {
    typename Sum::TempStorage sum;
    typename Scan::TempStorage scan;
  } storage;
  __shared__ int64_t before_group, all;
  const int group = static_cast<int>(blockIdx.x);
  int64_t before = 0, total = 0;
  for (int g = threadIdx.x; g < p.groups; g += kIdThreads) {
    total += p.totals[g];
    if (g < group) before += p.totals[g];
  }
  before = Sum(storage.sum).Sum(before);
  __syncthreads();
  total = Sum(storage.sum).Sum(total);
  if (threadIdx.x == 0) {
    before_group = before;
    all = total;
  }
  __syncthreads();
  const int64_t step = all / p.count;
  if (step == 0) {  // no tail: the id 0 alone
    for (int j = threadIdx.x; group == 0 && j < p.count; j += kIdThreads) p.ids[j] = 0;
    if (threadIdx.x == 0) p.first[group + 1] = p.count;
    if (threadIdx.x == 0 && group == 0) p.first[0] = 0;
    return;
  }
  const int64_t first = int64_t{group} * kGroupCols + threadIdx.x * kIdCols;
  int64_t steps[kIdCols], mine = 0;
#pragma unroll
  for (int i = 0; i < kIdCols; ++i) {
    float sum = 0.0f;
    for (int k = 0; k < kTailClasses; ++k)
      sum += first + i < p.vocab ? p.sums[k * p.vocab + first + i] : 0.0f;
    mine += steps[i] = tail_steps(sum);
  }
  int64_t at;
  Scan(storage.scan).ExclusiveSum(mine, at);
  at += before_group;
  const Aims aims(step, p.count);
  int next = aims.before(at);
  if (threadIdx.x == 0) p.first[group] = next;
  if (threadIdx.x == 0 && group == p.groups - 1) p.first[p.groups] = p.count;
#pragma unroll
  for (int i = 0; i < kIdCols; ++i) {
    at += steps[i];
    for (const int end = aims.before(at); next < end; ++next) p.ids[next] = first + i;
  }
}

// The logit of sampled id j from its 16-bit product.
template <typename T>
struct Logit {
  const float* bias;
  const int64_t* ids;
  float scale, cap, inv_cap;

  __device__ __forceinline__ explicit Logit(const TiltParams& p)
      : bias(p.bias),
        ids(p.ids),
        scale(static_cast<float>(p.options.logit_scale)),
        cap(static_cast<float>(p.options.softcap)),
        inv_cap(1.0f / cap) {}
  __device__ __forceinline__ float operator()(T product, int j) const {
    float x = widen(product);
    if (bias) x += bias[ids[j]];
    x *= scale;
    return cap == 0.0f ? x : core::softcap<DeviceMath>(x, cap, inv_cap);
  }
};

// means[k, j]: over the sampled rows of class k, each with the mass that it stands for, and a little of all.
template <typename T>
__global__ void __launch_bounds__(kMeanCols* kMeanParts)
    means_kernel(const __grid_constant__ TiltParams p) {
  __shared__ float sums[kMeanParts][kTailClasses][kMeanCols];
  __shared__ float weights[kMeanParts][kTailClasses];
  const int lane = threadIdx.x % kMeanCols, part = threadIdx.x / kMeanCols;
  const int j = static_cast<int>(blockIdx.x) * kMeanCols + lane;
  const Logit<T> logit(p);
  float sum[kTailClasses] = {}, weight[kTailClasses] = {};
#pragma unroll 4
  for (int s = part; s < p.samples; s += kMeanParts) {
    const int64_t row = p.rows[s];
    const int of = static_cast<int>(p.classes[row]);
    const float w = p.weight[s] * p.row_mass[row];
    const float z = j < p.count ? logit(static_cast<const T*>(p.z)[row * p.ld + j], j) : 0.0f;
#pragma unroll
    for (int k = 0; k < kTailClasses; ++k) {
      if (k != of || w == 0.0f) continue;
      sum[k] = fmaf(w, z, sum[k]);
      weight[k] += w;
    }
  }
#pragma unroll
  for (int k = 0; k < kTailClasses; ++k) {
    sums[part][k][lane] = sum[k];
    if (lane == 0) weights[part][k] = weight[k];
  }
  __syncthreads();
  // A warp a class adds up the parts; then it has a little of all classes.
  if (part < kTailClasses) {
    for (int i = 1; i < kMeanParts; ++i) {
      sums[0][part][lane] += sums[i][part][lane];
      if (lane == 0) weights[0][part] += weights[i][part];
    }
  }
  __syncthreads();
  if (part >= kTailClasses || j >= p.count) return;
  float sum_of_all = 0.0f, weight_of_all = 0.0f;
#pragma unroll
  for (int k = 0; k < kTailClasses; ++k) {
    sum_of_all += sums[0][k][lane];
    weight_of_all += weights[0][k];
  }
  p.means[part * p.count + j] = fmaf(p.shared, sum_of_all, sums[0][part][lane]) /
                                fmaxf(fmaf(p.shared, weight_of_all, weights[0][part]), kNothing);
}

// Two neighbouring numbers.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

template <typename T>
__global__ void __launch_bounds__(32 * kRowWarps)
    rows_kernel(const __grid_constant__ TiltParams p) {
  __shared__ alignas(8) float all[kRowWarps][kMaxTiltIds];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (row >= p.n) return;
  const int lane = threadIdx.x % 32;
  float* x = all[threadIdx.x / 32];
  auto* out = reinterpret_cast<Pair<T>*>(static_cast<T*>(p.z) + row * p.ld);
  const float a = p.a[row], whole = p.row_mass[row];
  if (a == 0.0f || whole == 0.0f) {
    for (int j = lane; j < p.count / 2; j += 32) out[j] = {narrow<T>(0.0f), narrow<T>(0.0f)};
    return;
  }
  const float* masses = p.mass + row * p.groups;
  const auto* means = reinterpret_cast<const float2*>(p.means + p.classes[row] * p.count);
  const Logit<T> logit(p);
  // An id that a bias of -inf masks is above no mean, and in no tail.
  const auto above = [](float z, float mean) { return z == -INFINITY ? 0.0f : z - mean; };
  constexpr int kInFlight = 4;
  for (int base = lane; base < p.count / 2; base += 32 * kInFlight) {
    Pair<T> product[kInFlight];
    float2 mean[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int j = min(base + 32 * i, p.count / 2 - 1);
      product[i] = out[j];
      mean[i] = means[j];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int j = base + 32 * i;
      if (j < p.count / 2)
        reinterpret_cast<float2*>(x)[j] = {above(logit(product[i].x, 2 * j), mean[i].x),
                                           above(logit(product[i].y, 2 * j + 1), mean[i].y)};
    }
  }
  __syncwarp();
  // Half a warp a group: x above the group's mean, times the mass that each of its ids stands for. A lane knows where one
  // of 32 groups begins and ends, and its mass; those without ids are passed over.
  float moment = 0.0f;
  for (int first = 0; first < p.groups; first += 32) {
    const bool exists = first + lane < p.groups;
    const int my_begin = exists ? p.first[first + lane] : 0;
    const int my_end = exists ? p.first[first + lane + 1] : 0;
    const float my_mass = exists ? masses[first + lane] : 0.0f;
    for (unsigned left = __ballot_sync(~0u, my_begin < my_end); left != 0;) {
      const int one = __ffs(left) - 1;
      left &= left - 1;
      const int other = left == 0 ? one : __ffs(left) - 1;
      const bool alone = left == 0;
      left &= left - 1;
      const int group = lane < 16 ? one : other;
      const int begin = __shfl_sync(~0u, my_begin, group), last = __shfl_sync(~0u, my_end, group);
      const float mass = __shfl_sync(~0u, my_mass, group);
      const int end = alone && lane >= 16 ? begin : last;
      const float each = 1.0f / static_cast<float>(max(end - begin, 1));
      float sum = 0.0f, squares = 0.0f;
      for (int j = begin + lane % 16; j < end; j += 16) {
        sum += x[j];
        squares = fmaf(x[j], x[j], squares);
      }
#pragma unroll
      for (int d = 8; d > 0; d /= 2) {
        sum += __shfl_xor_sync(~0u, sum, d);
        squares += __shfl_xor_sync(~0u, squares, d);
      }
      const float mean = sum * each;
      for (int j = begin + lane % 16; j < end; j += 16)
        x[j] = mass == 0.0f ? 0.0f : (x[j] - mean) * mass * each;
      if (mass != 0.0f) moment += mass * fmaxf(fmaf(-mean, mean, squares * each), 0.0f);
    }
  }
  moment += __shfl_xor_sync(~0u, moment, 16);
  __syncwarp();
  const float lift = p.dtype == Dtype::kHalf ? kShapeLift : 1.0f;
  const float beta = p.strength / (1.0f + p.damping * moment / fmaxf(whole, kNothing));
  const float factor = beta * a * static_cast<float>(p.options.logit_scale) * lift / p.units[1];
  for (int j = lane; j < p.count / 2; j += 32) {
    const float2 here = reinterpret_cast<const float2*>(x)[j];
    out[j] = {narrow<T>(here.x * factor), narrow<T>(here.y * factor)};
  }
}

template <typename T>
cudaError_t launch(const TiltParams& p, cudaStream_t stream) {
  means_kernel<T><<<(p.count + kMeanCols - 1) / kMeanCols, kMeanCols * kMeanParts, 0, stream>>>(p);
  const int64_t blocks = (p.n + kRowWarps - 1) / kRowWarps;
  rows_kernel<T><<<static_cast<unsigned>(blocks), 32 * kRowWarps, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t tilt_ids(const TiltIdsParams& params, cudaStream_t stream) {
  if (params.groups == 0 || params.count == 0) return cudaSuccess;
  ids_kernel<<<params.groups, kIdThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t tilt_rows(const TiltParams& params, cudaStream_t stream) {
  if (params.count > kMaxTiltIds || params.count % 2 || params.ld % 2) return cudaErrorInvalidValue;
  if (params.n == 0 || params.count == 0) return cudaSuccess;
  return params.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(params, stream)
                                          : launch<__half>(params, stream);
}

}  // namespace cce::cuda
