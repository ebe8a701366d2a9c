// Named barriers among some of a block's warps, the barrier of a cluster, and the share of registers of a warpgroup (sm_90).
// PTX ISA, "Parallel Synchronization and Communication Instructions: bar" and "Miscellaneous Instructions: setmaxnreg".
#pragma once

namespace cce::cuda::ptx {

// Waits until `threads` threads have synced or arrived at barrier `id`.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Waits for all threads of all blocks of the cluster, and orders what they did before.
// PTX ISA, "barrier.cluster".
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace cce::cuda::ptx
