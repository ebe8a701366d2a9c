// Tiles of matrices from global to shared memory by the bulk tensor copy engine (sm_90).
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include <cstdint>

namespace cce::cuda::ptx {

// What the second-level cache is told of the lines that a copy reads: to keep them, or nothing. PTX ISA, "createpolicy".
enum class Caching { kKeep, kNormal };

template <Caching kCaching>
__device__ __forceinline__ uint64_t cache_policy() {
  uint64_t policy;
  if constexpr (kCaching == Caching::kKeep)
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The box of `map` at (column x, row y); what lies outside of the matrix becomes zeros. Its bytes count on `barrier`.
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                         int x, int y, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "l"(policy)
      : "memory");
}

// The same into the blocks of the cluster whose bits are in `blocks`, at the same place in each, counted on each one's barrier.
__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const CUtensorMap* map,
                                                   uint32_t barrier, int x, int y, uint16_t blocks,
                                                   uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks), "l"(policy)
      : "memory");
}

// Orders this thread's earlier writes to shared memory before what the copy engine and the tensor cores do with it.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace cce::cuda::ptx
