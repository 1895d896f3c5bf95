// The state of a mapped file, as the buffers in it see it.
#pragma once

#include <atomic>

namespace zinc {

// The first fault in a map sets `damaged`, for good. A fault means that the file no longer backs a page, because the
// file was cut or its disk is gone. The page reads as zeros from then on. Lives as long as any holder of the map's
// memory.
struct FileDamage {
    std::atomic<bool> damaged{false};
    const char* path = "";
};

// The name of the capsule that passes a FileDamage from one module to another: attribute `_damage` of a map.
constexpr char FILE_DAMAGE[] = "zincmetal._host.FileDamage";

}  // namespace zinc
