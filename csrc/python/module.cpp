// cce_ext._C: how this copy was built, also where libcce_ops.so is missing or does not load. No op lives here, and no
// PyTorch header is included: libcce_ops.so is the same for every Python, this module is not.
#include <pybind11/pybind11.h>

#include "build_facts.h"

namespace py = pybind11;

namespace {

py::dict build_info() { return py::module_::import("json").attr("loads")(kBuildFacts); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of cce_ext.";
  m.def("build_info", &build_info,
        "Version, compilers, architectures, options and compiled backends of this build.");
  m.def(
      "compiled_backends", [] { return build_info()["backends"].cast<py::dict>(); },
      "Backend name -> whether it was compiled in.");
}
