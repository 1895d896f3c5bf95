// A recorded plan and the sequence that it advances: the C++ half of decode_step.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "device.h"
#include "params.h"

namespace zinc {

// A call that cannot be carried out as asked; Python sees zincmetal.errors.UsageError.
struct UsageError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// No room for the tokens of this step; Python sees zincmetal.errors.ContextFullError.
struct ContextFullError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What running cost, summed over all steps of a session.
struct Counters {
    uint64_t steps = 0, tokens = 0, command_buffers = 0, dispatches = 0, barriers = 0;
    double gpu_seconds = 0;
};

// One step's dispatches, for up to max_tokens rows, made ready on a device.
class Plan {
  public:
    Plan(std::shared_ptr<Device> device, std::vector<Dispatch> dispatches, Encoding encoding, uint32_t max_tokens);

    const std::shared_ptr<Device> device;
    const uint32_t max_tokens, n_dispatches, n_barriers;
    const std::unique_ptr<Recording> recording;
};

// A sequence: its length, and the step buffer through which plans learn token ids and positions.
class Session {
  public:
    Session(std::shared_ptr<Buffer> step, std::shared_ptr<Buffer> tokens, uint32_t n_ctx, uint32_t n_vocab);

    // Appends the n tokens to the sequence with one command buffer; returns the arg max of the last row's logits
    // (-1 when the plan computes none). A failed step leaves the length as it was.
    int32_t run(Plan& plan, const int32_t* ids, size_t n);

    void rewind(uint32_t length);  // forget all positions from length on
    void close() { closed_ = true; }

    uint32_t length() const { return length_; }
    uint32_t n_ctx() const { return n_ctx_; }
    const Counters& counters() const { return counters_; }

  private:
    void check(const Plan& plan, const int32_t* ids, size_t n) const;

    std::shared_ptr<Buffer> step_, tokens_;
    uint32_t n_ctx_, n_vocab_, length_ = 0;
    std::atomic<bool> busy_{false}, closed_{false};
    Counters counters_;
};

}  // namespace zinc
