// The steps of a device (Step in kernels/params.h): their descriptions, the steps in flight, their results and cost.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/device.h"
#include "core/plan.h"
#include "params.h"

namespace zinc {

// A call that cannot be carried out. Python sees zincmetal.errors.UsageError.
struct UsageError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// The cost of running, summed over all steps that were collected.
struct Counters {
    uint64_t steps = 0, tokens = 0, command_buffers = 0, dispatches = 0, barriers = 0;
    uint64_t max_in_flight = 0;  // the largest number of steps at a time
    double gpu_seconds = 0;
};

// What the host says of a step.
struct Description {
    std::span<const Row> rows;
    std::span<const uint32_t> outs;  // rows whose logits are wanted
    std::span<const PageWrite> page_writes;
    std::span<const Draw> draws;  // one for each output, or none: then all are zero, which is greedy
    uint32_t n_single = 0;        // runs of one row, which come first
};

// The buffers that steps are described in and answered by. All but `step` are memory that the host sees.
struct StepBuffers {
    std::shared_ptr<Buffer> step, next_step, next_rows, next_outs, next_pages, next_draws, results;
};

// A buffer of STEP_RING places of equal size in memory that the host sees. Step number n has place n % STEP_RING.
template <class T>
class Ring {
  public:
    Ring(std::shared_ptr<Buffer> buffer, const char* name) : buffer_(std::move(buffer)) {
        constexpr size_t each = sizeof(T) * STEP_RING;
        if (!buffer_ || !buffer_->host || buffer_->bytes == 0 || buffer_->bytes % each != 0)
            throw UsageError(std::string("the buffer ") + name + " must be shared, and a multiple of " +
                             std::to_string(each) + " bytes");
    }
    size_t most() const { return buffer_->bytes / sizeof(T) / STEP_RING; }  // items of a place
    T* place(uint32_t number) const { return static_cast<T*>(buffer_->host) + number % STEP_RING * most(); }

  private:
    std::shared_ptr<Buffer> buffer_;
};

// Submits steps, of which two may be in flight, and collects their results in order. It knows no sequence. One thread
// calls at a time; in_flight(), counters() and close() may be called by others.
class Steps {
  public:
    static constexpr uint32_t depth = 2;

    // n_page_entries: of the buffer `pages`, which holds the page tables.
    Steps(std::shared_ptr<Device> device, const StepBuffers& buffers, uint32_t n_vocab, uint32_t n_page_entries);

    // Describes a step, submits it, and returns its number. If that throws, the step is not in flight.
    uint32_t decode(const std::shared_ptr<Plan>& plan, const Description& step, const Poll& poll = {});

    // The same in two calls, for a step whose plan is cut into sections. The caller runs the first sections in between,
    // of which the first begins the step, and submits the last.
    void describe(const Description& step);
    uint32_t submit_described(const std::shared_ptr<Plan>& plan, const Poll& poll = {});

    // Waits for the oldest step in flight, and returns its results. If the step failed, nothing is in flight any more.
    // If the poll throws, the step stays in flight.
    std::vector<Choice> collect(const Poll& poll = {});

    // Waits for everything in flight and forgets it, with what was described. Failures are ignored.
    void drop();

    void close() { closed_ = true; }
    uint32_t in_flight() const { return n_in_flight_; }
    Counters counters() const;

  private:
    struct InFlight {
        std::shared_ptr<Plan> plan;
        uint64_t ticket = 0;
        uint32_t number = 0, n_rows = 0, n_out = 0;
        uint32_t n_in_flight = 0;  // with this one, when it was submitted
    };
    struct Described {
        uint32_t n_rows = 0, n_out = 0;  // 0 rows: nothing is described
    };

    void check_open() const;
    void check_plan(const Plan& plan, Described step) const;
    void check(const Description& step) const;
    void check_run(const Description& step, size_t t) const;
    void check_token(int32_t token) const;
    void check_drafted(const Row& row) const;
    void check_outs(const Description& step) const;
    void check_page(uint64_t pages, uint64_t pos) const;
    void write(const Description& step);
    void correct_number();
    uint32_t submit(const std::shared_ptr<Plan>& plan, const Poll& poll);
    void count(const InFlight& done, const RunTimes& times);
    void forget_all() noexcept;

    const std::shared_ptr<Device> device_;
    const std::shared_ptr<Buffer> step_;
    const Ring<Step> next_step_;
    const Ring<Row> next_rows_;
    const Ring<uint32_t> next_outs_;
    const Ring<PageWrite> next_pages_;
    const Ring<Draw> next_draws_;
    const Ring<Choice> results_;
    const OpeningProcess process_{};
    const uint32_t n_vocab_, n_page_entries_;

    uint32_t number_ = 0;           // of the last step that was submitted
    bool number_is_known_ = false;  // to the device
    uint32_t n_fed_ = 0;            // outputs of that step, whose choices the next step may take
    Described described_;
    std::array<InFlight, depth> in_flight_;  // the oldest first
    std::atomic<uint32_t> n_in_flight_{0};
    std::atomic<bool> busy_{false}, closed_{false};
    mutable std::mutex counters_mutex_;
    Counters counters_;
};

}  // namespace zinc
