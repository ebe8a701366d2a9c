#include "cuda/sm90/backend.h"

#include "cuda/device_info.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/tensor_map.h"

namespace cce::cuda::sm90 {

int block_n() { return Config::kBlockN; }

std::string unsupported() {
  const int capability = current_device().capability;
  if (capability != 90) {
    return "sm90: needs compute capability 9.0 (Hopper) exactly, this GPU has " +
           std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  }
  if (!has_tensor_maps()) return "sm90: the driver has no cuTensorMapEncodeTiled (12.0 or newer)";
  return "";
}

}  // namespace cce::cuda::sm90
