#include "cuda/device_info.h"

namespace cce::cuda {

const DeviceInfo& current_device() {
  static PerDevice<DeviceInfo> devices;
  return devices.get([](int device, DeviceInfo& info) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&info.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&info.cache_bytes, cudaDevAttrL2CacheSize, device);
    info.capability = 10 * major + minor;
  });
}

}  // namespace cce::cuda
