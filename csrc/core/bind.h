#pragma once

#include <cstdint>

namespace zinc {

// A launch shape of kernels/shapes.h. The list ends with one without a name.
struct Shape {
    const char* name;
    uint32_t value;
};
extern const Shape shapes[];

// The sizes that a family of kernels is compiled for, ascending, then zeros. The list ends with one without a name.
struct SizeClasses {
    const char* name;
    uint32_t sizes[8];
};
extern const SizeClasses size_classes[];

// The names of tensor types that a family of kernels takes, then null pointers.
extern const char* const tensor_types[];
extern const char* const expert_types[];

}  // namespace zinc
