// The entry point of an extension module, which is named after its backend.
#include <pybind11/pybind11.h>

#include "bind.h"

PYBIND11_MODULE(ZINC_MODULE, m) { zinc::bind(m); }
