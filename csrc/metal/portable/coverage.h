// The size of the memory that buffers cover. Plain C++ without Metal; metal/residency.h is the only user.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>

namespace zinc {

// Memory that buffers cover. They may overlap: several no-copy buffers of one file share pages.
class Coverage {
  public:
    // The bytes that the buffer would add. Private memory has no address, and no buffer shares it.
    uint64_t added_by(const void* contents, uint64_t bytes) const {
        if (!contents) return bytes;
        uintptr_t at = reinterpret_cast<uintptr_t>(contents);
        const uintptr_t end = at + bytes;
        uint64_t fresh = 0;
        for (const auto& [from, to] : ranges_) {  // sorted by their begin
            if (from >= end) break;
            if (from > at) fresh += from - at;
            at = std::max(at, std::min(to, end));
        }
        return fresh + (end - at);
    }
    void add(const void* contents, uint64_t bytes) {
        bytes_ += added_by(contents, bytes);
        if (contents)
            ranges_.emplace(reinterpret_cast<uintptr_t>(contents), reinterpret_cast<uintptr_t>(contents) + bytes);
    }
    void remove(const void* contents, uint64_t bytes) {
        const auto begin = reinterpret_cast<uintptr_t>(contents);
        for (auto [at, last] = ranges_.equal_range(begin); at != last; ++at) {
            if (at->second != begin + bytes) continue;
            ranges_.erase(at);
            break;
        }
        bytes_ -= added_by(contents, bytes);
    }
    uint64_t bytes() const { return bytes_; }

  private:
    std::multimap<uintptr_t, uintptr_t> ranges_;  // begin and end
    uint64_t bytes_ = 0;
};

}  // namespace zinc
