// The limits of Metal devices and buffers. Plain C++ without Metal, so that every machine can test it.
#pragma once

#include <cstdint>
#include <string>

#include "core/device.h"

namespace zinc {

struct MetalFamily {
    const char* name;
    long value;         // MTLGPUFamily by value: the newest names are not in every SDK
    const char* chips;  // of an Apple family
};

constexpr long APPLE10 = 1010, METAL4 = 5002;

// The newest Apple family first. Each includes the older families.
constexpr MetalFamily METAL_FAMILIES[] = {
    {"Apple10", APPLE10, "M5"}, {"Apple9", 1009, "M3, M4"}, {"Apple8", 1008, "M2"}, {"Apple7", 1007, "M1"},
    {"Mac2", 2002, ""},         {"Metal3", 5001, ""},       {"Metal4", METAL4, ""}};

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

}  // namespace zinc
