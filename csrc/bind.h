#pragma once

namespace pybind11 {
class module_;
}

namespace zinc {

// Fills an extension module.
void bind(pybind11::module_& m);

}  // namespace zinc
