// What the sparse backward needs to know of the rows before it starts: upstream weights, which rows go the exact way, and the
// rows that stand for all when the tail's shape is learnt. Sums are made in a fixed order; cce_ext/sparse/tail.py has the
// same steps in PyTorch.
#include <cfloat>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/sparse/lists.h"
#include "cuda/sparse/tail.h"

namespace cce::cuda {
namespace {

constexpr int kBlock = 1024, kThreads = 128;
// Steps of the largest row's share; a million rows of them still fit into 64 bits.
constexpr double kSteps = 1099511627776.0;  // 2^40

// Upstream weights by row (nothing of ignored rows is used: it may be NaN) and dropped masses over all groups; a warp a row.
__global__ void __launch_bounds__(kThreads)
    row_kernel(const __grid_constant__ BackwardRowsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.n) return;
  const int lane = threadIdx.x % 32;
  float mass = 0.0f;
  for (int g = lane; g < p.groups; g += 32) mass += p.mass[row * p.groups + g];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) mass += __shfl_xor_sync(~0u, mass, d);
  if (lane != 0) return;
  const bool counts = p.targets[row] != p.ignore_index;
  const float d = counts && p.dnll ? p.dnll[row * p.dnll_stride] : 0.0f;
  p.d[row] = d;
  p.a[row] = d + (counts && p.dlse ? p.dlse[row] : 0.0f);
  p.row_mass[row] = mass;
}

// T = Σ|a| m / Σ|a| over the rows that are not on the list already; 0 / 0 is 0, a NaN stays.
__global__ void __launch_bounds__(kBlock)
    share_kernel(const __grid_constant__ BackwardRowsParams p) {
  using Sum = cub::BlockReduce<double, kBlock>;
  __shared__ typename Sum::TempStorage storage;
  double weighted = 0.0, total = 0.0;
  for (int64_t row = threadIdx.x; row < p.n; row += kBlock) {
    if (p.listed[row]) continue;
    const double a = fabs(static_cast<double>(p.a[row]));
    weighted += a * p.row_mass[row];
    total += a;
  }
  weighted = Sum(storage).Sum(weighted);
  __syncthreads();
  total = Sum(storage).Sum(total);
  if (threadIdx.x == 0) *p.share = total == 0.0 ? 0.0f : static_cast<float>(weighted / total);
}

// use(row, load(row)) for rows begin to end, in their order, kBatch loads on their way at once: one block has nothing else to
// hide their latency with.
constexpr int kBatch = 4;
template <typename Load, typename Use>
__device__ __forceinline__ void visit_rows(int64_t begin, int64_t end, Load&& load, Use&& use) {
  for (int64_t row = begin; row < end; row += kBatch) {
    decltype(load(row)) values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) values[i] = load(min(row + i, end - 1));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row + i < end) use(row + i, values[i]);
    }
  }
}

// Upstream weights of a row and what it drops; whether its target counts, and whether it is on the list of exact rows.
struct Upstream {
  float a, d, mass;
  bool counts, listed;
};

// Steps that a row takes in the systematic sample.
__device__ __forceinline__ int64_t steps_of(float a, float mass, float top) {
  const float share = mass > kNothing ? fabsf(a) * mass : 0.0f;
  if (!(top > 0.0f)) return 0;
  return static_cast<int64_t>(ceil(static_cast<double>(share) / static_cast<double>(top) * kSteps));
}

struct Largest {
  __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// What 16-bit factors are divided by: in float16 by about the largest, in bfloat16 by nothing.
__device__ void write_units(const BackwardRowsParams& p, float a, float d, float mass) {
  const bool wanted = p.unit_scale != 0.0f;
  p.units[0] = wanted ? (a + d) * p.unit_scale + 1e-30f : 1.0f;
  p.units[1] = wanted ? fmaxf(fmaxf(mass * p.unit_scale, d * p.unit_uniform), FLT_MIN) : 1.0f;
  p.units[2] = wanted ? p.units[1] / kShapeLift : 1.0f;
}

// By the final T: exact rows, whose weights become zero here, their share and list; then the sample. Each thread has a
// stretch of rows.
__global__ void __launch_bounds__(kBlock)
    sample_kernel(const __grid_constant__ BackwardRowsParams p) {
  using Max = cub::BlockReduce<float, kBlock>;
  using Sum = cub::BlockReduce<int, kBlock>;
  using Scan = cub::BlockScan<int64_t, kBlock, cub::BLOCK_SCAN_WARP_SCANS>;
  using Count = cub::BlockScan<int, kBlock, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ union {
    typename Max::TempStorage max;
    typename Sum::TempStorage sum;
    typename Scan::TempStorage scan;
    typename Count::TempStorage count;
  } storage;
  __shared__ float top_of_all;
  const int64_t each = (p.n + kBlock - 1) / kBlock;
  const int64_t begin = threadIdx.x * each, end = begin + each < p.n ? begin + each : p.n;
  const bool flat = !(
      *p.share <= p.flat);  // a NaN goes the exact way, which carries it to where eager's would be
  int valid = 0, exact = 0;
  float top = 0.0f, top_a = 0.0f, top_d = 0.0f;
  visit_rows(
      begin, end,
      [&](int64_t row) {
        return Upstream{p.a[row], p.d[row], p.row_mass[row], p.targets[row] != p.ignore_index,
                        p.listed[row] != 0};
      },
      [&](int64_t row, Upstream x) {
        const bool is_exact = x.counts && (flat || x.listed);
        p.exact[row] = is_exact;
        valid += x.counts;
        exact += is_exact;
        p.d_all[row] = x.d;
        if (is_exact) p.a[row] = p.d[row] = x.a = x.d = 0.0f;
        if (x.mass > kNothing) top = fmaxf(top, fabsf(x.a) * x.mass);
        top_a = fmaxf(top_a, fabsf(x.a));
        top_d = fmaxf(top_d, fabsf(x.d));
      });
  valid = Sum(storage.sum).Sum(valid);
  __syncthreads();
  int exact_before, exact_in_all;
  Count(storage.count).ExclusiveSum(exact, exact_before, exact_in_all);
  __syncthreads();
  top_a = Max(storage.max).Reduce(top_a, Largest());
  __syncthreads();
  top_d = Max(storage.max).Reduce(top_d, Largest());
  __syncthreads();
  top = Max(storage.max).Reduce(top, Largest());
  if (threadIdx.x == 0) {
    *p.exact_share = static_cast<float>(exact_in_all) / (valid > 0 ? valid : 1);
    *p.count = exact_in_all;
    write_units(p, top_a, top_d, top);
    top_of_all = top;
  }
  __syncthreads();
  top = top_of_all;
  int64_t mine = 0;
  int some = 0;
  int64_t listed = exact_before, unlisted = exact_in_all + begin - exact_before;
  visit_rows(
      begin, end,
      [&](int64_t row) {
        return Upstream{p.a[row], 0.0f, p.row_mass[row], false, p.exact[row] != 0};
      },
      [&](int64_t row, const Upstream& x) {
        const int64_t steps = steps_of(x.a, x.mass, top);
        mine += steps;
        some += steps > 0;
        p.order[x.listed ? listed++ : unlisted++] = static_cast<int32_t>(row);
      });
  int64_t before, all;
  Scan(storage.scan).ExclusiveSum(mine, before, all);
  __syncthreads();
  int some_before, some_in_all;
  Count(storage.count).ExclusiveSum(some, some_before, some_in_all);
  const bool few = some_in_all <= p.sample;
  int64_t others = begin - some_before;  // rows without steps before this stretch
  int64_t place = some_before;
  visit_rows(
      begin, end, [&](int64_t row) { return float2{p.a[row], p.row_mass[row]}; },
      [&](int64_t row, float2 x) {
        const int64_t steps = steps_of(x.x, x.y, top);
        before += steps;
        p.cumulated[row] = before;
        float weight = 0.0f;
        if (steps > 0) weight = few ? fabsf(x.x) / top : 1.0f / x.y;
        p.weight[row] = weight;
        // Few rows: all of them, then rows that weigh nothing.
        const int64_t at = steps > 0 ? place++ : some_in_all + others++;
        if (few && at < p.sample) p.rows[at] = row;
      });
  __syncthreads();  // `cumulated` is complete
  const int i = threadIdx.x;
  if (few || i >= p.sample) return;
  const int64_t aim = all / p.sample * i + all / (2 * p.sample);
  int64_t low = 0, high = p.n;
  while (low < high) {  // the first row whose steps reach beyond the aim
    const int64_t middle = (low + high) / 2;
    if (p.cumulated[middle] <= aim)
      low = middle + 1;
    else
      high = middle;
  }
  p.rows[i] = low < p.n ? low : p.n - 1;
}

}  // namespace

cudaError_t backward_shares(const BackwardRowsParams& params, cudaStream_t stream) {
  const int blocks = static_cast<int>((params.n + kThreads / 32 - 1) / (kThreads / 32));
  row_kernel<<<blocks, kThreads, 0, stream>>>(params);
  share_kernel<<<1, kBlock, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t backward_sample(const BackwardRowsParams& params, cudaStream_t stream) {
  if (params.sample > kBlock) return cudaErrorInvalidValue;
  sample_kernel<<<1, kBlock, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cce::cuda
