# Include path, warnings and sanitizers for everything written here. -fopenmp-simd honours `#pragma omp simd` and needs
# no OpenMP runtime: threads come from PyTorch. Without errno and floating-point traps more loops become vector code.
add_library(cce_options INTERFACE)
target_include_directories(cce_options INTERFACE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
target_compile_options(cce_options INTERFACE
                       "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-fopenmp-simd;-fno-math-errno;-fno-trapping-math>")

if(CCE_SANITIZE STREQUAL "asan")
  set(CCE_SANITIZE_FLAGS -fsanitize=address -fno-omit-frame-pointer)
elseif(CCE_SANITIZE STREQUAL "ubsan")
  set(CCE_SANITIZE_FLAGS -fsanitize=undefined -fno-sanitize-recover=all)
elseif(CCE_SANITIZE)
  message(FATAL_ERROR "CCE_SANITIZE must be empty, asan or ubsan, got '${CCE_SANITIZE}'")
endif()
if(CCE_SANITIZE)
  # Function clones are chosen by resolvers that run before a sanitizer's runtime is up.
  target_compile_definitions(cce_options INTERFACE CCE_NO_CLONES)
  target_compile_options(cce_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${CCE_SANITIZE_FLAGS}>")
  target_link_options(cce_options INTERFACE ${CCE_SANITIZE_FLAGS})
endif()
