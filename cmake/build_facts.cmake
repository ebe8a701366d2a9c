# Writes generated/build_facts.h, which nothing but csrc/python includes.
function(cce_json_text out value)
  if(value STREQUAL "")
    set(${out} null PARENT_SCOPE)
  else()
    set(${out} "\"${value}\"" PARENT_SCOPE)
  endif()
endfunction()

file(STRINGS cce_ext/_version.py VERSION_LINE REGEX "^__version__ = ")
string(REGEX REPLACE "^__version__ = \"(.*)\"$" "\\1" VERSION "${VERSION_LINE}")

set(GIT_COMMIT "")
find_package(Git QUIET)
if(Git_FOUND AND EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git")
  execute_process(
    COMMAND "${GIT_EXECUTABLE}" describe --always --dirty --abbrev=12 --exclude=*
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    OUTPUT_VARIABLE GIT_COMMIT ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

set(ARCHS "")
set(HAS_SM80 false)
set(HAS_SM90 false)
set(CUDA_VERSION "")
if(CCE_CUDA_ENABLED)
  set(CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
  if("sm80" IN_LIST CCE_CUDA_FAMILIES)
    set(HAS_SM80 true)
    list(APPEND ARCHS ${CCE_CUDA_ARCHS})
  endif()
  if("sm90" IN_LIST CCE_CUDA_FAMILIES)
    set(HAS_SM90 true)
    list(APPEND ARCHS 90a-real)
  endif()
endif()
list(TRANSFORM ARCHS REPLACE "(.+)" "\"\\1\"")
list(JOIN ARCHS ", " ARCHS)

cce_json_text(CUDA_JSON "${CUDA_VERSION}")
cce_json_text(COMMIT_JSON "${GIT_COMMIT}")
cce_json_text(SANITIZER_JSON "${CCE_SANITIZE}")
set(CCE_BUILD_FACTS "{
  \"version\": \"${VERSION}\",
  \"git_commit\": ${COMMIT_JSON},
  \"compiler\": \"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\",
  \"build_type\": \"${CMAKE_BUILD_TYPE}\",
  \"sanitizer\": ${SANITIZER_JSON},
  \"torch_headers\": \"${CCE_TORCH_VERSION}\",
  \"torch_target\": \"${CCE_TORCH_FLOOR}\",
  \"cuda_toolkit\": ${CUDA_JSON},
  \"cuda_archs\": [${ARCHS}],
  \"backends\": {\"cpu\": true, \"sm80\": ${HAS_SM80}, \"sm90\": ${HAS_SM90}}
}")
configure_file(csrc/python/build_facts.h.in generated/build_facts.h @ONLY)
