# Writes generated/build_facts.h, which only csrc/python/module.cpp includes.
set(CCE_GIT_COMMIT "")
find_package(Git QUIET)
if(Git_FOUND AND EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git")
  execute_process(
    COMMAND "${GIT_EXECUTABLE}" describe --always --dirty --abbrev=12 --exclude=*
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    OUTPUT_VARIABLE CCE_GIT_COMMIT ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

set(CCE_CUDA_VERSION "")
set(CCE_CUDA_ARCHS_BUILT "")
set(CCE_HAS_SM80 0)
set(CCE_HAS_SM90 0)
if(CCE_CUDA_ENABLED)
  set(CCE_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
  if("sm80" IN_LIST CCE_CUDA_FAMILIES)
    set(CCE_HAS_SM80 1)
    list(APPEND CCE_CUDA_ARCHS_BUILT ${CCE_CUDA_ARCHS})
  endif()
  if("sm90" IN_LIST CCE_CUDA_FAMILIES)
    set(CCE_HAS_SM90 1)
    list(APPEND CCE_CUDA_ARCHS_BUILT 90a-real)
  endif()
endif()
configure_file(csrc/python/build_facts.h.in generated/build_facts.h @ONLY)
