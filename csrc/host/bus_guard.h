// Mapped files whose pages may vanish while they are read.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/file_map.h"

namespace zinc {

// A file in memory, read-only, under the guard. Never deleted, but used again: the guard's handler may run in any
// thread at any time, and walks all maps ever made.
class GuardedMap {
  public:
    // Maps a whole file. Returns null, with errno, if that fails. The path outlives the map.
    static GuardedMap* open(int fd, size_t bytes, const char* path);
    void close();

    void* memory() const { return reinterpret_cast<void*>(begin_.load()); }
    size_t bytes() const { return bytes_; }
    const FileDamage& damage() const { return damage_; }

    // In a handler: mends the map that holds the address. False: no map holds it.
    static bool mend(const void* address);

  private:
    static GuardedMap* unused();

    std::atomic<uintptr_t> begin_{0}, end_{0};  // whole pages; begin 0: not in use
    size_t bytes_ = 0;
    FileDamage damage_;
    GuardedMap* next_ = nullptr;
};

// Makes the guard's handler of SIGBUS the first one. It passes faults outside the maps on to the handler before it.
// Called when a map is opened, and again when another library may have set its own handler since.
void arm_bus_guard();

}  // namespace zinc
