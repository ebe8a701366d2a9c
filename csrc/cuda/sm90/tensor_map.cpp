#include "cuda/sm90/tensor_map.h"

#include <cuda_runtime_api.h>

namespace cce::cuda::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the library does not link libcuda.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

cudaError_t make_map(const Matrix& m, Dtype dtype, int box_rows, CUtensorMap* map) {
  if (m.data == nullptr) return cudaSuccess;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m.cols), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(m.ld) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result =
      encoder()(map,
                dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                2, const_cast<void*>(m.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

bool has_tensor_maps() { return encoder() != nullptr; }

cudaError_t make_maps(const Head& head, int part_m, int part_n, Maps* maps) {
  const auto add = [&](const Matrix& m, int box_rows, CUtensorMap* map, cudaError_t before) {
    return before == cudaSuccess ? make_map(m, head.dtype, box_rows, map) : before;
  };
  cudaError_t error = add(head.e, part_m, &maps->e, cudaSuccess);
  error = add(head.c, part_n, &maps->c, error);
  error = add(head.u, part_m, &maps->u, error);
  error = add(head.lora_b, part_n, &maps->lora_b, error);
  error = add(head.e_compact, part_m, &maps->e_compact, error);
  error = add(head.u_compact, part_m, &maps->u_compact, error);
  return error;
}

}  // namespace cce::cuda::sm90
