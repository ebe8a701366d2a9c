// Special registers. PTX ISA, "Special Registers: %tid".
#pragma once

namespace cce::cuda::ptx {

// threadIdx.x, read anew: what is made of it is not kept in registers from one use to the next.
__device__ __forceinline__ int thread_again() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

}  // namespace cce::cuda::ptx
