// What the kernels' launchers need to know of the current device, asked once a device.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

namespace cce::cuda {

// A value for each device, made when the first caller with this device as the current one asks.
template <typename T>
class PerDevice {
 public:
  // make(device, value)
  template <typename Make>
  const T& get(Make&& make) {
    int device = 0;
    cudaGetDevice(&device);
    std::call_once(asked_[device], [&] { make(device, values_[device]); });
    return values_[device];
  }

 private:
  static constexpr int kMaxDevices = 128;
  std::array<T, kMaxDevices> values_{};
  std::array<std::once_flag, kMaxDevices> asked_;
};

struct DeviceInfo {
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
  int shared_bytes = 0;  // largest dynamic shared memory of a block
  int cache_bytes = 0;   // second-level cache
};

const DeviceInfo& current_device();

}  // namespace cce::cuda
