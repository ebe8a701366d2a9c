// cce_ext._C: how this copy was built. No op lives here, and no PyTorch header is included: libcce_ops.so is the same
// for every Python, this module is not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "build_facts.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const char* text) {
  return *text ? py::object(py::str(text)) : py::object(py::none());
}

// "a;b" -> ["a", "b"], as CMake writes lists
std::vector<std::string> split_list(const std::string& list) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(';', begin), list.size());
    parts.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = CCE_VERSION;
  info["git_commit"] = text_or_none(CCE_GIT_COMMIT);
  info["compiler"] = CCE_COMPILER;
  info["build_type"] = CCE_BUILD_TYPE;
  info["sanitizer"] = text_or_none(CCE_SANITIZE);
  info["torch_headers"] = CCE_TORCH_HEADERS;
  info["torch_target"] = CCE_TORCH_TARGET;
  info["cuda_toolkit"] = text_or_none(CCE_CUDA_VERSION);
  info["cuda_archs"] = split_list(CCE_CUDA_ARCHS);
  return info;
}

std::map<std::string, bool> compiled_backends() {
  return {{"cpu", true}, {"sm80", CCE_HAS_SM80 != 0}, {"sm90", CCE_HAS_SM90 != 0}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of cce_ext.";
  m.def("build_info", &build_info, "Version, compilers, architectures and options of this build.");
  m.def("compiled_backends", &compiled_backends, "Backend name -> whether it was compiled in.");
}
