// The state of a mapped file, as the buffers in it see it.
#pragma once

#include <atomic>

namespace zinc {

// The first fault in a map sets `damaged`, for good: a page that the file no longer backs, because it was cut or its
// disk is gone, reads as zeros from then on. Lives as long as whoever holds the map's memory.
struct FileDamage {
    std::atomic<bool> damaged{false};
    const char* path = "";
};

// The name of the capsule, the attribute `_damage` of a map, in which a FileDamage goes from one module to another.
constexpr char FILE_DAMAGE[] = "zincmetal._host.FileDamage";

}  // namespace zinc
