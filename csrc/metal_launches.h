// The calls that encode a recording, worked out once when it is made. Plain C++ without Metal, so that every machine
// can test it; device_metal.mm is the only user.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "device.h"
#include "metal_rules.h"

namespace zinc {

struct Bind {
    const Buffer* buffer;  // null: what the index holds already, at another offset
    uint64_t offset;
    uint32_t index;
};

struct Launch {
    const Dispatch* dispatch;
    bool new_encoder;   // starts an encoder, in which nothing is set yet
    bool new_pipeline;  // another kernel than the launch before
    bool barrier;
    std::vector<Bind> binds;  // what the argument table, which lasts from launch to launch, does not hold yet
};

// The buffer argument table of an encoder. Entry 0 holds the parameters, which every launch sets.
class ArgumentTable {
  public:
    std::vector<Bind> update(const std::vector<Binding>& bindings) {
        std::vector<Bind> changes;
        for (size_t i = 0; i < bindings.size(); ++i) {
            const Bind want = {bindings[i].buffer.get(), bindings[i].offset, static_cast<uint32_t>(i + 1)};
            const Bind have = std::exchange(entries_[i + 1], want);
            if (have.buffer != want.buffer) {
                changes.push_back(want);
            } else if (have.offset != want.offset) {
                changes.push_back({nullptr, want.offset, want.index});
            }
        }
        return changes;
    }

  private:
    std::array<Bind, MAX_BINDINGS + 1> entries_{};
};

// dispatches have passed check_dispatch, and stay where they are. encoder_each gives every dispatch an encoder of its
// own.
inline std::vector<Launch> launches_of(const std::vector<Dispatch>& dispatches, Encoding encoding, bool encoder_each) {
    std::vector<Launch> launches;
    ArgumentTable table;
    for (const Dispatch& d : dispatches) {
        const bool new_encoder = encoder_each || launches.empty();
        if (new_encoder) table = {};
        const bool new_pipeline = new_encoder || launches.back().dispatch->pipeline != d.pipeline;
        const bool barrier = d.barrier && !new_encoder && encoding == Encoding::concurrent;
        launches.push_back({&d, new_encoder, new_pipeline, barrier, table.update(d.bindings)});
    }
    return launches;
}

}  // namespace zinc
