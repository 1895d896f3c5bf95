// The checks of a dispatch on every device. A plan that passes on one device has sizes that all devices take.
#pragma once

#include <cstdint>
#include <string>

#include "core/device.h"

namespace zinc {

constexpr uint32_t SIMDGROUP_THREADS = 32;
constexpr size_t MAX_PARAM_BYTES = 4096;  // of setBytes:length:atIndex:
constexpr size_t MAX_BINDINGS = 30;       // Metal's buffer argument table has 31 entries, and entry 0 holds the params

namespace dispatch_rules {

inline void check_threads(const Dispatch& d, const std::string& who) {
    if (d.threads == 0 || d.threads % SIMDGROUP_THREADS != 0)
        throw DeviceError(who + std::to_string(d.threads) + " threads per threadgroup is not a multiple of 32");
    if (d.threads > d.pipeline->limits.max_threads)
        throw DeviceError(
            who + std::to_string(d.threads) + " threads per threadgroup; on this device the kernel takes " +
            std::to_string(d.pipeline->limits.max_threads) + ": launch fewer threads or use a smaller variant");
}

inline void check_grid(const Dispatch& d, const std::string& who) {
    uint64_t total = 1;
    for (const uint32_t n : d.grid)
        if (n == 0 || __builtin_mul_overflow(total, uint64_t(n), &total))
            throw DeviceError(who + "a grid of " + std::to_string(d.grid[0]) + " x " + std::to_string(d.grid[1]) +
                              " x " + std::to_string(d.grid[2]) + " threadgroups is empty or too large");
}

inline void check_sizes(const Dispatch& d, const std::string& who) {
    if (d.params.empty() || d.params.size() > MAX_PARAM_BYTES)
        throw DeviceError(who + "parameters of " + std::to_string(d.params.size()) + " bytes; 1 to 4096 can be passed");
    if (d.bindings.size() > MAX_BINDINGS)
        throw DeviceError(who + std::to_string(d.bindings.size()) +
                          " buffers; at most 30 can be bound beside the params");
}

inline void check_extent(const Binding& b, const std::string& which) {
    if (!b.buffer) throw DeviceError(which + "is not set");
    const uint64_t size = b.buffer->bytes;
    if (b.offset >= size || b.bytes > size - b.offset)
        throw DeviceError(which + "covers bytes " + std::to_string(b.offset) + " to " + std::to_string(b.offset) + "+" +
                          std::to_string(b.bytes) + " of a buffer of " + std::to_string(size));
}

}  // namespace dispatch_rules

// "dispatch 7 (rms_norm): ". Throws DeviceError if the dispatch, the position-th of its recording, has no kernel.
inline std::string dispatch_name(const Dispatch& d, size_t position) {
    const std::string number = "dispatch " + std::to_string(position);
    if (!d.pipeline) throw DeviceError(number + " has no kernel");
    return number + " (" + d.pipeline->name + "): ";
}

inline std::string binding_name(const std::string& who, size_t i) {
    return who + "buffer " + std::to_string(i + 1) + " ";
}

// Throws DeviceError for a dispatch that no device can run.
inline void check_dispatch(const Dispatch& d, size_t position) {
    const std::string who = dispatch_name(d, position);
    dispatch_rules::check_threads(d, who);
    dispatch_rules::check_grid(d, who);
    dispatch_rules::check_sizes(d, who);
    for (size_t i = 0; i < d.bindings.size(); ++i) dispatch_rules::check_extent(d.bindings[i], binding_name(who, i));
}

}  // namespace zinc
