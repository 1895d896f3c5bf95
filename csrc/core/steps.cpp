#include "core/steps.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

namespace zinc {

namespace {

// Holds a flag for the length of a call, or refuses: two threads must not run one sequence at once.
class Exclusive {
  public:
    explicit Exclusive(std::atomic<bool>& flag) : flag_(flag) {
        if (flag_.exchange(true, std::memory_order_acquire))
            throw UsageError("another thread is running a step of this model; give each thread a model of its own");
    }
    ~Exclusive() { flag_.store(false, std::memory_order_release); }

  private:
    std::atomic<bool>& flag_;
};

}  // namespace

Steps::Steps(std::shared_ptr<Buffer> step, std::shared_ptr<Buffer> tokens, uint32_t n_ctx, uint32_t n_vocab)
    : step_(std::move(step)), tokens_(std::move(tokens)), n_ctx_(n_ctx), n_vocab_(n_vocab) {
    if (!step_ || !tokens_ || !step_->copies() || step_->bytes < sizeof(Step) || !tokens_->copies())
        throw UsageError("the step and token buffers must be shared, the first of at least sizeof(Step) bytes");
}

int32_t Steps::prefill(const std::shared_ptr<Plan>& plan, const int32_t* ids, size_t n, const Poll& poll) {
    process_.check();  // before the flag, which a thread of the parent may have set
    Exclusive running(busy_);
    check(*plan, n);
    std::for_each(ids, ids + n, [this](int32_t id) { checked(id); });
    refuse_in_flight();
    write_step(ids, n);
    in_flight_ = submit(plan, uint32_t(n), ids[0], poll);
    return complete(1, poll);
}

int32_t Steps::decode(const std::shared_ptr<Plan>& plan, int64_t token, bool ahead, const Poll& poll) {
    process_.check();
    Exclusive running(busy_);
    check(*plan, 1);
    if (ahead) check_ahead(*plan);
    const int32_t id = checked(token);
    if (in_flight_) {
        check_same(*plan, id);
    } else {
        write_step(&id, 1);
        in_flight_ = submit(plan, 1, id, poll);
    }
    if (!ahead) return complete(1, poll);
    InFlight next = submit_ahead(plan, poll);
    next.token = complete(2, poll);
    in_flight_ = std::move(next);
    return in_flight_->token;
}

std::vector<int32_t> Steps::settle() {
    process_.check();
    Exclusive running(busy_);
    if (!in_flight_) return {};
    std::vector<int32_t> tokens{in_flight_->token};  // before the step counts: there may be no memory for it
    complete(1);
    return tokens;
}

void Steps::rewind(uint32_t length) {
    process_.check();
    Exclusive running(busy_);
    refuse_in_flight();
    if (length > length_)
        throw UsageError("cannot rewind to " + std::to_string(length) + ": the sequence has " +
                         std::to_string(length_) + " tokens");
    length_ = length;
}

void Steps::resume(uint32_t length) {
    process_.check();
    Exclusive running(busy_);
    refuse_in_flight();
    if (length_ != 0 || length > n_ctx_)
        throw UsageError("cannot resume at " + std::to_string(length) + " of a context of " + std::to_string(n_ctx_) +
                         ": the sequence has " + std::to_string(length_) + " tokens and must be empty");
    length_ = length;
}

Counters Steps::counters() const {
    const std::lock_guard lock(counters_mutex_);
    return counters_;
}

// ---- checks of a call

void Steps::check(const Plan& plan, size_t n) const {
    if (closed_) throw UsageError("the model is closed; load it again");
    if (n == 0) throw UsageError("a step needs at least one token");
    if (n > plan.max_tokens || n * sizeof(int32_t) > tokens_->bytes)
        throw UsageError("a step of " + std::to_string(n) + " tokens in a plan for " + std::to_string(plan.max_tokens));
    check_room(n);
}

void Steps::check_room(size_t n) const {
    if (n > n_ctx_ - length_)
        throw ContextFullError("the context of " + std::to_string(n_ctx_) + " tokens is full (" +
                               std::to_string(length_) + " used, " + std::to_string(n) +
                               " more asked for); load the model with a larger context");
}

void Steps::check_ahead(const Plan& plan) const {
    if (!plan.has_argmax)
        throw UsageError("this plan computes no arg max, so that no step can run ahead; call without ahead");
    check_room(2);
}

int32_t Steps::checked(int64_t id) const {
    if (id < 0 || id >= int64_t(n_vocab_))
        throw UsageError("token id " + std::to_string(id) + " is outside the vocabulary of " +
                         std::to_string(n_vocab_));
    return int32_t(id);
}

void Steps::refuse_in_flight() const {
    if (in_flight_)
        throw UsageError("a step of token " + std::to_string(in_flight_->token) + " is in flight; call settle() first");
}

void Steps::check_same(const Plan& plan, int32_t token) const {
    if (in_flight_->token != token || in_flight_->plan.get() != &plan) refuse_in_flight();
}

// ---- one command buffer

// Only while nothing is in flight: the device writes the step buffer too.
void Steps::write_step(const int32_t* ids, size_t n) {
    const Step step{uint32_t(n), length_, n_chosen_, {}, {}};
    step_->write(0, &step, sizeof(step));
    tokens_->write(0, ids, n * sizeof(int32_t));
}

// If it fails, the step before it stays in flight. If the poll ends it, the step before it is dropped too.
Steps::InFlight Steps::submit_ahead(const std::shared_ptr<Plan>& plan, const Poll& poll) {
    try {
        return submit(plan, 1, -1, poll);
    } catch (const DeviceError&) {
        throw;
    } catch (...) {
        in_flight_.reset();
        throw;
    }
}

Steps::InFlight Steps::submit(const std::shared_ptr<Plan>& plan, uint32_t n_tokens, int32_t token, const Poll& poll) {
    const uint64_t ticket = plan->device->submit(*plan->recording, poll);
    return {plan, ticket, n_tokens, plan->has_argmax ? n_chosen_++ : 0, token};
}

// Waits for the first step in flight; returns its arg max, or -1. n_in_flight is the number of steps in flight.
int32_t Steps::complete(uint64_t n_in_flight, const Poll& poll) {
    const InFlight done = *std::exchange(in_flight_, std::nullopt);
    const Plan& plan = *done.plan;
    const RunTimes times = plan.device->wait(done.ticket, poll);
    for (const FileDamage* file : plan.files) check_file(*file);
    length_ += done.n_tokens;
    const std::lock_guard lock(counters_mutex_);
    counters_.steps++;
    counters_.tokens += done.n_tokens;
    counters_.command_buffers++;
    counters_.dispatches += plan.n_dispatches;
    counters_.barriers += plan.n_barriers;
    counters_.max_in_flight = std::max(counters_.max_in_flight, n_in_flight);
    counters_.gpu_seconds += times.gpu_end - times.gpu_start;
    int32_t best = -1;
    if (plan.has_argmax)
        step_->read(offsetof(Step, chosen) + done.chosen % N_CHOSEN * sizeof(Step::chosen[0]), &best, sizeof(best));
    return best;
}

}  // namespace zinc
