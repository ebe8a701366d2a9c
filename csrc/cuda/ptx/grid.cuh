// Grids that overlap on a stream (sm_90). PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol".
#pragma once

namespace cce::cuda::ptx {

// The next grid of the stream may start, once all blocks have come here, if it was launched to do so.
__device__ __forceinline__ void allow_next_grid() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the grids that this one was launched to overlap have ended.
__device__ __forceinline__ void wait_for_grids_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace cce::cuda::ptx
