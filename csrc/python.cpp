// fastrlhf._C: what needs Python's headers and is compiled once per Python version. The kernels are
// in libfastrlhf.so, which has no Python symbols.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <stdexcept>
#include <string>

#include "packer.h"

namespace py = pybind11;

namespace {

using Lengths = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

py::tuple pack(const Lengths& lengths, int64_t max_tokens, int64_t multiple_of) {
  if (lengths.ndim() != 1) {
    throw std::invalid_argument("lengths: expected one axis, got " +
                                std::to_string(lengths.ndim()));
  }
  const std::span<const int64_t> view(lengths.data(), static_cast<size_t>(lengths.size()));
  fastrlhf::Packing packing;
  {
    py::gil_scoped_release release;
    packing = fastrlhf::pack(view, max_tokens, multiple_of);
  }
  return py::make_tuple(py::array_t<int64_t>(packing.order.size(), packing.order.data()),
                        py::array_t<int64_t>(packing.offsets.size(), packing.offsets.data()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The sequence packer of fastrlhf.train.packing.";
  m.def("pack", &pack, py::arg("lengths"), py::arg("max_tokens"), py::arg("multiple_of") = 1,
        "Pack lengths int64[n] into bins of at most max_tokens: (order int64[n], offsets "
        "int64[k + 1]).");
}
