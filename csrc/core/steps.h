// The steps of a sequence: the step buffer (Step in kernels/params.h), the steps in flight, and their cost.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core/device.h"
#include "core/plan.h"
#include "params.h"

namespace zinc {

// A call that cannot be carried out. Python sees zincmetal.errors.UsageError.
struct UsageError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// No room for the tokens of this step; Python sees zincmetal.errors.ContextFullError.
struct ContextFullError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The cost of running, summed over all steps of a sequence that have ended.
struct Counters {
    uint64_t steps = 0, tokens = 0, command_buffers = 0, dispatches = 0, barriers = 0;
    uint64_t max_in_flight = 0;  // the largest number of command buffers at a time
    double gpu_seconds = 0;
};

// The steps of one sequence. It knows the number of its tokens, and submits plans. It writes the step buffer, from
// which kernels read token ids and positions. A step may be in flight between calls. Its token joins the sequence when
// decode() or settle() has waited for it.
class Steps {
  public:
    Steps(std::shared_ptr<Buffer> step, std::shared_ptr<Buffer> tokens, uint32_t n_ctx, uint32_t n_vocab);

    // Appends the n tokens to the sequence with one submission, which Metal may cut into several command buffers.
    // Returns the arg max of the last row's logits, or -1 if the plan has none. If the step fails, or the poll throws,
    // the length stays as it was and nothing is in flight.
    int32_t prefill(const std::shared_ptr<Plan>& plan, const int32_t* ids, size_t n, const Poll& poll = {});

    // Appends one token, whose step may be in flight already. ahead: also submits the next step, fed by this step's arg
    // max, before it waits. So the device always has work.
    int32_t decode(const std::shared_ptr<Plan>& plan, int64_t token, bool ahead, const Poll& poll = {});

    // Waits for the step in flight, if there is one. Returns its token, which has joined the sequence.
    std::vector<int32_t> settle();

    void rewind(uint32_t length);  // forget all positions from length on
    void resume(uint32_t length);  // gives an empty sequence a length; the caller has put its state in place
    void close() { closed_ = true; }

    uint32_t length() const { return length_; }
    uint32_t n_ctx() const { return n_ctx_; }
    Counters counters() const;

  private:
    // A command buffer on its way.
    struct InFlight {
        std::shared_ptr<Plan> plan;
        uint64_t ticket;
        uint32_t n_tokens;
        uint32_t chosen;  // the number of its arg max: it will lie in Step::chosen[chosen % N_CHOSEN]
        int32_t token;    // of a step of one token, once the host knows it
    };

    void check(const Plan& plan, size_t n) const;
    void check_room(size_t n) const;
    void check_ahead(const Plan& plan) const;
    int32_t checked(int64_t id) const;
    void refuse_in_flight() const;
    void check_same(const Plan& plan, int32_t token) const;
    void write_step(const int32_t* ids, size_t n);
    InFlight submit(const std::shared_ptr<Plan>& plan, uint32_t n_tokens, int32_t token, const Poll& poll);
    InFlight submit_ahead(const std::shared_ptr<Plan>& plan, const Poll& poll);
    int32_t complete(uint64_t n_in_flight, const Poll& poll = {});

    const std::shared_ptr<Buffer> step_, tokens_;
    const OpeningProcess process_{};
    const uint32_t n_ctx_, n_vocab_;
    uint32_t n_chosen_ = 0;
    std::optional<InFlight> in_flight_;
    std::atomic<uint32_t> length_{0};
    std::atomic<bool> busy_{false}, closed_{false};
    mutable std::mutex counters_mutex_;
    Counters counters_;
};

}  // namespace zinc
