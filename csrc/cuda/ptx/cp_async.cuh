// Asynchronous 16-byte copies from global to shared memory (sm_80 and newer).
// PTX ISA, "Data Movement and Conversion Instructions: cp.async".
#pragma once

#include <cstdint>

namespace cce::cuda::ptx {

// Copies 16 bytes; where `zero` is set the global memory is not read and zeros are written instead.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool zero) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, p;\n}" ::"r"(shared),
      "l"(global), "r"(static_cast<uint32_t>(zero))
      : "memory");
}

// from + step * count, of 16-byte pieces: one instruction and no chain of sums, which would keep registers.
__device__ __forceinline__ const uint4* advance(const uint4* from, uint32_t step, int count) {
  const uint4* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(step), "r"(count * 16), "l"(from));
  return to;
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `Pending` of this thread's newest groups are still under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace cce::cuda::ptx
