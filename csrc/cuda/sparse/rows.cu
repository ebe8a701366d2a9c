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

// What 16-bit factors are divided by: in float16 by about the largest, in bfloat16 by nothing.
__device__ void write_units(const BackwardRowsParams& p, float a, float d, float mass) {
  const bool wanted = p.unit_scale != 0.0f;
  p.units[0] = wanted ? (a + d) * p.unit_scale + 1e-30f : 1.0f;
  p.units[1] = wanted ? fmaxf(fmaxf(mass * p.unit_scale, d * p.unit_uniform), FLT_MIN) : 1.0f;
  p.units[2] = wanted ? p.units[1] / kShapeLift : 1.0f;
}

// Sums and maxima of two or three numbers at once.
struct Counts {
  int valid, exact;
  __device__ Counts operator+(Counts other) const {
    return {valid + other.valid, exact + other.exact};
  }
};
struct Steps {
  int64_t steps;
  int some;
  __device__ Steps operator+(Steps other) const { return {steps + other.steps, some + other.some}; }
};
struct Plus {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  __device__ float3 operator()(float3 a, float3 b) const {
    return {fmaxf(a.x, b.x), fmaxf(a.y, b.y), fmaxf(a.z, b.z)};
  }
};

// By the final T: exact rows, whose weights become zero here, their share and list; then the sample. Each thread has a
// stretch of rows.
__global__ void __launch_bounds__(kBlock)
    sample_kernel(const __grid_constant__ BackwardRowsParams p) {
  using Max = cub::BlockReduce<float3, kBlock>;
  using Count = cub::BlockScan<Counts, kBlock, cub::BLOCK_SCAN_WARP_SCANS>;
  using Scan = cub::BlockScan<Steps, kBlock, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ union {
    typename Max::TempStorage max;
    typename Count::TempStorage count;
    typename Scan::TempStorage scan;
  } storage;
  __shared__ float top_of_all;
  __shared__ int64_t reached[kBlock];  // steps up to the end of each thread's stretch
  const int64_t each = (p.n + kBlock - 1) / kBlock;
  const int64_t begin = min(threadIdx.x * each, p.n), end = min(begin + each, p.n);
  const bool flat = !(
      *p.share <= p.flat);  // a NaN goes the exact way, which carries it to where eager's would be
  Counts mine{0, 0};
  float3 largest{0.0f, 0.0f, 0.0f};  // of |a| mass, |a|, |d|
  visit_rows(
      begin, end,
      [&](int64_t row) {
        return Upstream{p.a[row], p.d[row], p.row_mass[row], p.targets[row] != p.ignore_index,
                        p.listed[row] != 0};
      },
      [&](int64_t row, Upstream x) {
        const bool is_exact = x.counts && (flat || x.listed);
        p.exact[row] = is_exact;
        mine = mine + Counts{x.counts, is_exact};
        p.d_all[row] = x.d;
        if (is_exact) p.a[row] = p.d[row] = x.a = x.d = 0.0f;
        const float a = fabsf(x.a);
        largest = Largest()(largest, {x.mass > kNothing ? a * x.mass : 0.0f, a, fabsf(x.d)});
      });
  largest = Max(storage.max).Reduce(largest, Largest());
  __syncthreads();
  Counts before, in_all;
  Count(storage.count).ExclusiveScan(mine, before, Counts{0, 0}, Plus(), in_all);
  if (threadIdx.x == 0) {
    *p.exact_share = static_cast<float>(in_all.exact) / (in_all.valid > 0 ? in_all.valid : 1);
    *p.count = in_all.exact;
    write_units(p, largest.y, largest.z, largest.x);
    top_of_all = largest.x;
  }
  __syncthreads();
  const float top = top_of_all;
  Steps steps_here{0, 0};
  int64_t listed = before.exact, unlisted = in_all.exact + begin - before.exact;
  visit_rows(
      begin, end,
      [&](int64_t row) {
        return Upstream{p.a[row], 0.0f, p.row_mass[row], false, p.exact[row] != 0};
      },
      [&](int64_t row, const Upstream& x) {
        const int64_t steps = steps_of(x.a, x.mass, top);
        steps_here = steps_here + Steps{steps, steps > 0};
        p.cumulated[row] = steps;  // so far, of this row alone
        p.order[x.listed ? listed++ : unlisted++] = static_cast<int32_t>(row);
      });
  Steps steps_before, steps_in_all;
  Scan(storage.scan).ExclusiveScan(steps_here, steps_before, Steps{0, 0}, Plus(), steps_in_all);
  const bool few = steps_in_all.some <= p.sample;
  int64_t others = begin - steps_before.some;  // rows without steps before this stretch
  int64_t place = steps_before.some, cumulated = steps_before.steps;
  struct Tail {
    int64_t steps;
    float a, mass;
  };
  visit_rows(
      begin, end, [&](int64_t row) { return Tail{p.cumulated[row], p.a[row], p.row_mass[row]}; },
      [&](int64_t row, const Tail& x) {
        cumulated += x.steps;
        p.cumulated[row] = cumulated;
        float weight = 0.0f;
        if (x.steps > 0) weight = few ? fabsf(x.a) / top : 1.0f / x.mass;
        p.weight[row] = weight;
        // Few rows: all of them, then rows that weigh nothing.
        const int64_t at = x.steps > 0 ? place++ : steps_in_all.some + others++;
        if (few && at < p.sample) p.rows[at] = row;
      });
  reached[threadIdx.x] = cumulated;
  __syncthreads();
  const int i = threadIdx.x;
  if (few || i >= p.sample) return;
  const int64_t all = steps_in_all.steps;
  const int64_t aim = all / p.sample * i + all / (2 * p.sample);
  // The first row whose steps reach beyond the aim: in the first stretch whose end does.
  const auto first_beyond = [&](const int64_t* values, int64_t low, int64_t high) {
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (values[middle] <= aim)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  const int64_t stretch = first_beyond(reached, 0, kBlock - 1);
  const int64_t row =
      first_beyond(p.cumulated, min(stretch * each, p.n), min((stretch + 1) * each, p.n));
  p.rows[i] = min(row, p.n - 1);
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
