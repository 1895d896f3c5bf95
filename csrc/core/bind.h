#pragma once

#include <cstdint>

namespace zinc {

// A launch shape of kernels/shapes.h. The list ends with one without a name.
struct Shape {
    const char* name;
    uint32_t value;
};
extern const Shape shapes[];

}  // namespace zinc
