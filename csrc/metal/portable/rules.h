// What Metal asks of buffers and dispatches, and how kernels are named in errors. Plain C++ without Metal, so that
// every machine can test it; metal/device.mm is the only user.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/check_dispatch.h"

namespace zinc {

// A buffer argument of a kernel, as pipeline reflection tells it.
struct BufferArgument {
    std::string name;
    uint32_t index = 0;
    uint64_t alignment = 1;      // of the offset: the size of the type it points to, at most 16 for device pointers
    uint64_t element_bytes = 0;  // sizeof of what it points to
};

inline std::string join(const std::vector<std::string>& parts, const std::string& separator) {
    std::string out;
    for (const std::string& part : parts) out += (out.empty() ? "" : separator) + part;
    return out;
}

// ---------------------------------------------------------------------------------------------- device, buffers

struct MetalFamily {
    const char* name;
    long value;         // MTLGPUFamily by value: the newest names are not in every SDK
    const char* chips;  // of an Apple family
};

// The newest Apple family first; each includes the older ones.
constexpr MetalFamily METAL_FAMILIES[] = {{"Apple10", 1010, "M5"}, {"Apple9", 1009, "M3, M4"}, {"Apple8", 1008, "M2"},
                                          {"Apple7", 1007, "M1"},  {"Mac2", 2002, ""},         {"Metal3", 5001, ""},
                                          {"Metal4", 5002, ""}};

// Throws unless a buffer can be this long.
inline void check_length(uint64_t bytes, uint64_t max_buffer) {
    if (bytes == 0) throw DeviceError("a buffer cannot be empty");
    if (bytes > max_buffer) {
        throw DeviceError("a buffer of " + std::to_string(bytes) + " bytes: on this device it holds at most " +
                          std::to_string(max_buffer) + "; use a smaller context or model, or several buffers");
    }
}

// Throws unless [pointer, pointer + bytes) can become a no-copy buffer.
inline void check_wrap(const void* pointer, uint64_t bytes, uint64_t page, uint64_t max_buffer) {
    const uint64_t address = reinterpret_cast<uintptr_t>(pointer);
    if (address == 0) throw DeviceError("cannot wrap memory at a null pointer");
    if (address % page != 0 || bytes % page != 0) {
        throw DeviceError("cannot wrap " + std::to_string(bytes) + " bytes at address " + std::to_string(address) +
                          ": both must be multiples of the page size, " + std::to_string(page));
    }
    check_length(bytes, max_buffer);
}

inline std::string refusal_text(const std::string& verb, uint64_t bytes, uint64_t in_use, uint64_t recommended) {
    return "Metal refused to " + verb + " " + std::to_string(bytes) + " bytes; " + std::to_string(in_use) +
           " are in use and " + std::to_string(recommended) +
           " recommended at most; use a smaller context or model, or close other programs";
}

// ---------------------------------------------------------------------------------------------- dispatches

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

// Throws DeviceError for what Metal's validation layer would object to, or what would fault on the GPU. position is the
// dispatch's place in its recording.
inline void check_dispatch(const Dispatch& d, const std::vector<BufferArgument>& arguments, size_t position) {
    check_dispatch(d, position);
    for (const BufferArgument& argument : arguments) check_argument(d, argument, dispatch_name(d, position));
}

// ---------------------------------------------------------------------------------------------- names

// Insertions, deletions and substitutions from one string to the other.
inline size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t substitute = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({substitute, row[j] + 1, row[j - 1] + 1});
        }
    }
    return row[b.size()];
}

inline std::vector<std::string> closest_names(const std::string& name, std::vector<std::string> names, size_t count) {
    std::stable_sort(names.begin(), names.end(), [&](const std::string& a, const std::string& b) {
        return edit_distance(name, a) < edit_distance(name, b);
    });
    names.resize(std::min(names.size(), count));
    return names;
}

// broken: the compiler's words, by source that does not compile.
inline std::string missing_kernel_text(const std::string& name, const std::vector<std::string>& names,
                                       const std::map<std::string, std::string>& broken) {
    if (names.empty()) return "no kernel '" + name + "': the kernel library holds none; reinstall zincmetal";
    if (!broken.empty()) {
        std::vector<std::string> first_lines;
        for (const auto& [file, words] : broken) first_lines.push_back(words.substr(0, words.find('\n')));
        return "no kernel '" + name + "': " + join(first_lines, "; ") + " (python -m zincmetal.check says all of it)";
    }
    return "no kernel '" + name + "'; the closest of " + std::to_string(names.size()) + " are " +
           join(closest_names(name, names, 3), ", ");
}

}  // namespace zinc
