# Sets CCE_CUDA_ENABLED to 0 or 1. No nvcc: the CPU path is built and one line says so. An nvcc that cannot build a
# small CUDA program is an error, because a silent CPU-only build is what its owner wants least.
set(CCE_CUDA_ENABLED 0)
if(NOT CCE_WITH_CUDA MATCHES "^(auto|AUTO|0|1|ON|OFF)$")
  message(FATAL_ERROR "CCE_WITH_CUDA must be auto, 0 or 1, got '${CCE_WITH_CUDA}'")
endif()
if(CCE_WITH_CUDA MATCHES "^(0|OFF)$")
  message(STATUS "cce_ext: CCE_WITH_CUDA=0, building the CPU path only")
  return()
endif()

if(NOT CCE_NVCC)
  set(CCE_NVCC_HINTS "$ENV{CUDACXX}" "${CMAKE_CUDA_COMPILER}")
  foreach(CANDIDATE IN LISTS CCE_NVCC_HINTS)
    if(CANDIDATE AND EXISTS "${CANDIDATE}")
      set(CCE_NVCC "${CANDIDATE}" CACHE FILEPATH "The nvcc to use" FORCE)
    endif()
  endforeach()
endif()
find_program(CCE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
             PATHS /usr/local/cuda/bin DOC "The nvcc to use")
if(NOT CCE_NVCC)
  if(NOT CCE_WITH_CUDA MATCHES "^(auto|AUTO)$")
    message(FATAL_ERROR "CCE_WITH_CUDA=1, but no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or "
            "/usr/local/cuda. Install the CUDA toolkit (12.4 or newer) or point CUDA_HOME at it.")
  endif()
  message(STATUS "cce_ext: no nvcc found, building the CPU path only (CUDA_HOME names a toolkit)")
  return()
endif()

# One small program shows whether compiler, assembler, headers, CUB and the static runtime are all there.
if(NOT CCE_NVCC_CHECKED STREQUAL CCE_NVCC)
  set(CCE_PROBE "${CMAKE_CURRENT_BINARY_DIR}/nvcc_probe")
  file(WRITE "${CCE_PROBE}.cu" [=[
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#if !__has_include(<cub/version.cuh>)
#error "the CUB headers (CCCL) are missing"
#endif
#if CUDART_VERSION < 12040
#error "CUDA toolkit 12.4 or newer is needed"
#endif
__global__ void probe() {}
int main() { probe<<<1, 1>>>(); return cudaGetLastError(); }
]=])
  execute_process(
    COMMAND "${CCE_NVCC}" -std=c++17 -arch=sm_80 -cudart static "${CCE_PROBE}.cu" -o "${CCE_PROBE}"
    RESULT_VARIABLE CCE_PROBE_RESULT OUTPUT_VARIABLE CCE_PROBE_OUTPUT
    ERROR_VARIABLE CCE_PROBE_OUTPUT)
  if(NOT CCE_PROBE_RESULT EQUAL 0)
    message(FATAL_ERROR
            "${CCE_NVCC} cannot build a small CUDA program (${CCE_PROBE_RESULT}):\n"
            "${CCE_PROBE_OUTPUT}\n"
            "The toolkit is incomplete or too old. Ways out: install the whole CUDA toolkit (compiler, "
            "runtime headers, CCCL, static cudart; 12.4 or newer), point CUDA_HOME at a complete "
            "one, or set CCE_WITH_CUDA=0 to build the CPU path only.")
  endif()
  set(CCE_NVCC_CHECKED "${CCE_NVCC}" CACHE INTERNAL "The nvcc that built the probe")
endif()

set(CMAKE_CUDA_COMPILER "${CCE_NVCC}")
set(CMAKE_CUDA_ARCHITECTURES 80)  # every target sets its own
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CCE_CUDA_ENABLED 1)
message(STATUS "cce_ext: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CCE_CUDA_ARCHS}, and 90a for csrc/cuda/sm90")
