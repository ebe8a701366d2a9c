// Which rows count, found on the device so that no count crosses to the host: a stable partition by CUB.
#include <thrust/iterator/counting_iterator.h>

#include <cub/device/device_partition.cuh>

#include "cuda/common/rows.h"

namespace cce::cuda {
namespace {

struct Counts {
  const int64_t* targets;
  int64_t ignore_index;
  __device__ bool operator()(int32_t row) const { return targets[row] != ignore_index; }
};

cudaError_t partition(void* workspace, size_t& bytes, const int64_t* targets, int64_t n,
                      int64_t ignore_index, int32_t* rows, int32_t* count, cudaStream_t stream) {
  return cub::DevicePartition::If(workspace, bytes, thrust::counting_iterator<int32_t>(0), rows,
                                  count, static_cast<int>(n), Counts{targets, ignore_index},
                                  stream);
}

}  // namespace

size_t order_rows_workspace(int64_t n) {
  size_t bytes = 0;
  partition(nullptr, bytes, nullptr, n, 0, nullptr, nullptr, nullptr);
  return bytes;
}

cudaError_t order_rows(const int64_t* targets, int64_t n, int64_t ignore_index, int32_t* rows,
                       int32_t* count, void* workspace, size_t workspace_bytes,
                       cudaStream_t stream) {
  return partition(workspace, workspace_bytes, targets, n, ignore_index, rows, count, stream);
}

}  // namespace cce::cuda
