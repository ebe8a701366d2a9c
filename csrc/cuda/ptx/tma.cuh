// Tiles of matrices from global to shared memory by the bulk tensor copy engine (sm_90).
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include <cstdint>

namespace cce::cuda::ptx {

// What the second-level cache is told of the lines that a copy reads: to keep them, or nothing. PTX ISA, "createpolicy". A
// policy is made where it is used: registers are short where copies are issued.
enum class Caching { kKeep, kNormal };

// The box of `map` at (column x, row y); what lies outside of the matrix becomes zeros. Its bytes count on `barrier`.
template <Caching kCaching>
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                         int x, int y) {
  if constexpr (kCaching == Caching::kKeep) {
    asm volatile(
        "{\n.reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], policy;\n}" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
  }
}

// The same into the blocks of the cluster whose bits are in `blocks`, at the same place in each, counted on each one's barrier.
template <Caching kCaching>
__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const CUtensorMap* map,
                                                   uint32_t barrier, int x, int y,
                                                   uint16_t blocks) {
  if constexpr (kCaching == Caching::kKeep) {
    asm volatile(
        "{\n.reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, policy;\n}" ::"r"(
            shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
        : "memory");
  }
}

// Orders this thread's earlier writes to shared memory before what the copy engine and the tensor cores do with it.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace cce::cuda::ptx
