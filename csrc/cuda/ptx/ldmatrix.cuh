// Loads of 8x8 matrices of 16-bit elements from shared memory into mma fragments (sm_75 and newer).
// PTX ISA, "Warp-level Matrix Instructions: ldmatrix".
#pragma once

#include <cstdint>

namespace cce::cuda::ptx {

// Four 8x8 matrices; lanes 8i to 8i + 7 give the addresses of the rows of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}

// The same, each matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}

}  // namespace cce::cuda::ptx
