// What the kernels' launchers need to know of the current device, asked once a device.
#pragma once

namespace cce::cuda {

struct DeviceInfo {
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
  int shared_bytes = 0;  // largest dynamic shared memory of a block
  int cache_bytes = 0;   // second-level cache
};

const DeviceInfo& current_device();

}  // namespace cce::cuda
