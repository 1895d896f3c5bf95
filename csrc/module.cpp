// The entry point of an extension module, which is named after its backend; and what differs from one to another.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind.h"
#include "shapes.h"

namespace py = pybind11;

PYBIND11_MODULE(ZINC_MODULE, m) {
    zinc::bind(m);
    // The launch shapes of kernels/shapes.h.
    m.def("shapes", [] {
        py::dict d;
#define ADD_SHAPE(name, value) d[#name] = uint32_t(name);
        KERNEL_SHAPES(ADD_SHAPE)
        return d;
    });
}
