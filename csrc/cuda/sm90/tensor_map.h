// Tensor maps: how the copy engine finds tiles of a matrix.
#pragma once

#include <cuda.h>

#include "cuda/params.h"

namespace cce::cuda::sm90 {

// The matrices of a head; those of absent ones are never used.
struct Maps {
  CUtensorMap e, c, u, lora_b, e_compact, u_compact;
};

// Whether the driver has what make_maps needs.
bool has_tensor_maps();

// Boxes of 64 columns, of part_m rows for those by rows and of part_n rows for C and B.
cudaError_t make_maps(const Head& head, int part_m, int part_n, Maps* maps);

}  // namespace cce::cuda::sm90
