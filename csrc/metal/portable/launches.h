// The calls that encode dispatches. Plain C++ without Metal, so that every machine can test it; metal/recording.h is
// the only user.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/check_dispatch.h"
#include "core/device.h"

namespace zinc {

// The state of an encoder. It lasts from dispatch to dispatch, and only changes are encoded. Entry 0 of the argument
// table holds the parameters, which every dispatch sets.
class EncoderState {
  public:
    // False if the kernel is set already.
    bool set_pipeline(const Pipeline* pipeline) { return std::exchange(pipeline_, pipeline) != pipeline; }

    template <class Encoder>
    void bind(const std::vector<Binding>& bindings, Encoder& encoder) {
        for (size_t i = 0; i < bindings.size(); ++i) {
            const auto index = static_cast<uint32_t>(i + 1);
            const Entry want = {bindings[i].buffer.get(), bindings[i].offset};
            const Entry have = std::exchange(entries_[index], want);
            if (have.buffer != want.buffer) {
                encoder.set_buffer(*want.buffer, want.offset, index);
            } else if (have.offset != want.offset) {
                encoder.set_offset(want.offset, index);
            }
        }
    }

  private:
    struct Entry {
        const Buffer* buffer;
        uint64_t offset;
    };
    std::array<Entry, MAX_BINDINGS + 1> entries_{};
    const Pipeline* pipeline_ = nullptr;
};

// Encodes dispatches [begin, end), which have passed check_dispatch, into one new encoder, or into one for each
// dispatch. `open` makes an encoder for a dispatch. The encoder ends with its scope. Allocates nothing.
template <class Open>
void encode_dispatches(const std::vector<Dispatch>& dispatches, size_t begin, size_t end, bool encoder_each,
                       const Open& open) {
    for (size_t i = begin; i < end;) {
        auto encoder = open(dispatches[i]);
        EncoderState state;
        bool first = true;
        do {
            const Dispatch& d = dispatches[i++];
            // Encoders are ordered by the buffers that they share: the first dispatch of one needs no barrier.
            if (d.barrier && !first) encoder.barrier();
            if (state.set_pipeline(d.pipeline.get())) encoder.set_pipeline(*d.pipeline);
            encoder.set_params(d.params);
            state.bind(d.bindings, encoder);
            encoder.dispatch(d);
            first = false;
        } while (i < end && !encoder_each);
    }
}

}  // namespace zinc
