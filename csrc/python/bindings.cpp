// pybind11: what is host-side and stateful. Tensors never pass here, so one build of this module
// serves every torch release.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Host-side objects of torch_winnow: how it was built.";
  m.def("build", [] {
    py::dict info;
    info["version"] = WINNOW_VERSION;
    info["torch"] = WINNOW_TORCH_VERSION;
    info["compiler"] = WINNOW_COMPILER;
    info["capabilities"] = WINNOW_CAPABILITIES;
    return info;
  });
}
