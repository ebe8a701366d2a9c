#include "cuda/device_info.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

namespace cce::cuda {

const DeviceInfo& current_device() {
  constexpr int kMaxDevices = 128;
  static std::array<DeviceInfo, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> asked;
  int device = 0;
  cudaGetDevice(&device);
  std::call_once(asked[device], [device] {
    int major = 0, minor = 0;
    DeviceInfo& info = devices[device];
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&info.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&info.cache_bytes, cudaDevAttrL2CacheSize, device);
    info.capability = 10 * major + minor;
  });
  return devices[device];
}

}  // namespace cce::cuda
