# The installed PyTorch, asked for its folders alone: find_package(Torch) stops on a CUDA build of PyTorch that lacks
# CUDA hints, and the stable ABI needs nothing from it.
set(CCE_TORCH_FLOOR 2.10)

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c [=[
import importlib.metadata, importlib.util, pathlib, sys
spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit("torch is not installed for " + sys.executable)
pybind = importlib.util.find_spec("pybind11")
if pybind is None or pybind.origin is None:
    sys.exit("pybind11 is not installed for " + sys.executable)
print(pathlib.Path(spec.origin).parent.as_posix(), importlib.metadata.version("torch"),
      (pathlib.Path(pybind.origin).parent / "share/cmake/pybind11").as_posix(), sep=";")
]=]
  OUTPUT_VARIABLE CCE_PYTHON_ANSWER ERROR_VARIABLE CCE_PYTHON_ERROR
  RESULT_VARIABLE CCE_PYTHON_RESULT OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT CCE_PYTHON_RESULT EQUAL 0)
  message(FATAL_ERROR "cce_ext: ${CCE_PYTHON_ERROR}"
          "Install the build requirements (pip install -r requirements-dev.txt), or choose another "
          "Python with -DPython_EXECUTABLE=...")
endif()
list(GET CCE_PYTHON_ANSWER 0 CCE_TORCH_DIR)
list(GET CCE_PYTHON_ANSWER 1 CCE_TORCH_VERSION)
list(GET CCE_PYTHON_ANSWER 2 CCE_PYBIND11_DIR)

string(REGEX MATCH "^[0-9]+\\.[0-9]+(\\.[0-9]+)?" CCE_TORCH_RELEASE "${CCE_TORCH_VERSION}")
if(CCE_TORCH_RELEASE VERSION_LESS CCE_TORCH_FLOOR)
  message(FATAL_ERROR "cce_ext needs the headers of torch >= ${CCE_TORCH_FLOOR}, found "
          "${CCE_TORCH_VERSION} in ${CCE_TORCH_DIR}: pip install 'torch>=${CCE_TORCH_FLOOR}'")
endif()
message(STATUS "cce_ext: headers of torch ${CCE_TORCH_VERSION}, stable ABI of ${CCE_TORCH_FLOOR}")

# Byte 7 is the major version, byte 6 the minor one (torch/headeronly/version.h).
string(REPLACE "." ";" CCE_TORCH_FLOOR_PARTS "${CCE_TORCH_FLOOR}")
list(GET CCE_TORCH_FLOOR_PARTS 0 CCE_TORCH_FLOOR_MAJOR)
list(GET CCE_TORCH_FLOOR_PARTS 1 CCE_TORCH_FLOOR_MINOR)
math(EXPR CCE_TORCH_TARGET_VERSION
     "(${CCE_TORCH_FLOOR_MAJOR} << 56) + (${CCE_TORCH_FLOOR_MINOR} << 48)"
     OUTPUT_FORMAT HEXADECIMAL)

add_library(cce_torch INTERFACE)
target_include_directories(cce_torch SYSTEM INTERFACE "${CCE_TORCH_DIR}/include")
target_compile_definitions(cce_torch INTERFACE
                           TORCH_TARGET_VERSION=${CCE_TORCH_TARGET_VERSION}ULL)
target_link_directories(cce_torch INTERFACE "${CCE_TORCH_DIR}/lib")
# libtorch.so has no symbol of its own that is used here, but it is what pulls libtorch_cuda.so into the lookup scope of
# this library: without it the weak aoti_torch_get_current_cuda_stream stays null on a CUDA build of PyTorch.
target_link_libraries(cce_torch INTERFACE
                      "-Wl,--push-state,--no-as-needed" torch "-Wl,--pop-state" torch_cpu)
