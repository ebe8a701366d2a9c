// What the headers of csrc/cuda need of CUDA where a host compiler reads them: device code that computes with plain numbers.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#define __device__
#define __host__
#define __forceinline__ inline

using cudaStream_t = void*;
using cudaError_t = int;
struct float2 {
  float x, y;
};
struct uint2 {
  unsigned x, y;
};
struct int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
struct Index {
  unsigned x = 0;
};
inline Index blockIdx, gridDim;
using std::max;
using std::min;
