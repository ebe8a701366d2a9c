// The table of GPU backends: one entry an architecture, newest first. dispatch.cpp owns it.
#pragma once

#include <string>
#include <vector>

#include "cuda/params.h"

namespace cce::cuda {

struct Backend {
  const char* name;
  int (
      *block_n)();  // columns of the forward's tile on the current device: the partials' layout follows from them
  bool wants_compact_rows;       // whether Head::e_compact makes it faster
  bool paired_columns;           // how its threads hold columns, see cuda/common/levels.cuh
  std::string (*unsupported)();  // why it cannot run on the current device, or empty
  // How many units, a row block times a split, blocks of the forward have one after the other.
  int64_t (*forward_rounds)(int64_t n, int64_t splits);
  cudaError_t (*forward)(const ForwardParams&, cudaStream_t);
  cudaError_t (*backward)(const BackwardParams&, cudaStream_t);
  cudaError_t (*exact_rows)(const ExactRowsParams&, cudaStream_t);
};

struct Choice {
  const Backend* backend = nullptr;  // null: none can run
  std::string reasons;               // why the others were passed over, one a line
};

const std::vector<Backend>& backends();

// The newest backend that can run on the current device, or the one that CCE_BACKEND names.
Choice choose_backend();

}  // namespace cce::cuda
