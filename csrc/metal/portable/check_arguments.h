// Checks a dispatch against the arguments of its kernel. Plain C++ without Metal, so that every machine can test it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/check_dispatch.h"
#include "core/device.h"

namespace zinc {

// A buffer argument of a kernel, from pipeline reflection.
struct BufferArgument {
    std::string name;
    uint32_t index = 0;
    uint64_t alignment = 1;      // of the offset: the size of the type it points to, at most 16 for device pointers
    uint64_t element_bytes = 0;  // sizeof of the type it points to
};

inline void check_argument(const Dispatch& d, const BufferArgument& argument, const std::string& who) {
    const std::string which =
        who + "argument '" + argument.name + "' [[buffer(" + std::to_string(argument.index) + ")]] ";
    if (argument.index == 0) {
        if (d.params.size() >= argument.element_bytes) return;
        throw DeviceError(which + "is " + std::to_string(argument.element_bytes) + " bytes, the parameters given are " +
                          std::to_string(d.params.size()));
    }
    if (argument.index > d.bindings.size()) throw DeviceError(which + "has no buffer bound");
    const uint64_t offset = d.bindings[argument.index - 1].offset;
    if (argument.alignment > 1 && offset % argument.alignment != 0) {
        throw DeviceError(which + "needs an offset that is a multiple of " + std::to_string(argument.alignment) +
                          ", not " + std::to_string(offset));
    }
}

// Throws DeviceError for a dispatch that Metal's validation layer would object to, or that would fault on the GPU.
// position is its place in the recording.
inline void check_dispatch(const Dispatch& d, const std::vector<BufferArgument>& arguments, size_t position) {
    check_dispatch(d, position);
    for (const BufferArgument& argument : arguments) check_argument(d, argument, dispatch_name(d, position));
}

}  // namespace zinc
