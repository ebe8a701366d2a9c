# One object library per architecture family, so that adding an architecture is one folder and one line here. The C++
# files learn from CCE_HAS_<FAMILY> which of them are compiled in.
set(CCE_CUDA_FAMILIES "")

function(cce_add_kernels family archs)
  set(sources "")
  foreach(folder IN LISTS ARGN)
    file(GLOB found CONFIGURE_DEPENDS "csrc/cuda/${folder}/*.cu")
    list(APPEND sources ${found})
  endforeach()
  if(NOT sources)
    return()
  endif()
  add_library(cce_${family} OBJECT ${sources})
  set_target_properties(cce_${family} PROPERTIES CUDA_ARCHITECTURES "${archs}")
  target_link_libraries(cce_${family} PRIVATE cce_options)
  # Two architectures of a file at a time: the largest one would otherwise end long after all others.
  target_compile_options(cce_${family} PRIVATE --threads=2 --expt-relaxed-constexpr
                         -Xptxas=--warn-on-spills -Xcompiler=-Wall)
  target_link_libraries(cce_ops PRIVATE cce_${family})
  string(TOUPPER ${family} upper)
  target_compile_definitions(cce_ops PRIVATE CCE_HAS_${upper}=1)
  set(CCE_CUDA_FAMILIES ${CCE_CUDA_FAMILIES} ${family} PARENT_SCOPE)
endfunction()

cce_add_kernels(cuda_common "${CCE_CUDA_ARCHS}" common sparse)
cce_add_kernels(sm80 "${CCE_CUDA_ARCHS}" sm80)
cce_add_kernels(sm90 90a-real sm90)  # wgmma and TMA exist for this exact architecture alone

file(GLOB CCE_CUDA_HOST_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cpp csrc/cuda/common/*.cpp
     csrc/cuda/sparse/*.cpp)
foreach(family IN LISTS CCE_CUDA_FAMILIES)
  file(GLOB FAMILY_HOST_SOURCES CONFIGURE_DEPENDS "csrc/cuda/${family}/*.cpp")
  list(APPEND CCE_CUDA_HOST_SOURCES ${FAMILY_HOST_SOURCES})
endforeach()
target_sources(cce_ops PRIVATE ${CCE_CUDA_HOST_SOURCES})
target_include_directories(cce_ops SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# The runtime is linked statically: its symbols stay inside, so that PyTorch's own copy is never picked up or replaced.
target_link_options(cce_ops PRIVATE "-Wl,--exclude-libs,ALL")
