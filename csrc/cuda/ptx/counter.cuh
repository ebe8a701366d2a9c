// Numbers that tell other threads how far one has come, and order nothing: in device memory, and in shared memory.
// PTX ISA, "Data Movement and Conversion Instructions: ld" and "Parallel Synchronization and Communication Instructions:
// atom, red".
#pragma once

#include <cstdint>

namespace cce::cuda::ptx {

__device__ __forceinline__ void counter_add(int32_t* counter, int32_t x) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(x) : "memory");
}

__device__ __forceinline__ int32_t counter_read(const int32_t* counter) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(counter) : "memory");
  return x;
}

__device__ __forceinline__ void shared_set(uint32_t counter, int32_t x) {
  asm volatile(
      "{\n.reg .s32 old;\natom.relaxed.cta.shared.exch.b32 old, [%0], %1;\n}" ::"r"(counter), "r"(x)
      : "memory");
}

__device__ __forceinline__ int32_t shared_read(uint32_t counter) {
  int32_t x;
  asm volatile("atom.relaxed.cta.shared.add.s32 %0, [%1], 0;" : "=r"(x) : "r"(counter) : "memory");
  return x;
}

}  // namespace cce::cuda::ptx
