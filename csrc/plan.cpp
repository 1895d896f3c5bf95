#include "plan.h"

#include <algorithm>
#include <cstring>

namespace zinc {

namespace {

uint32_t count_barriers(const std::vector<Dispatch>& dispatches) {
    return uint32_t(std::count_if(dispatches.begin(), dispatches.end(), [](const Dispatch& d) { return d.barrier; }));
}

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

Plan::Plan(std::shared_ptr<Device> device, std::vector<Dispatch> dispatches, Encoding encoding, uint32_t max_tokens)
    : device(std::move(device)), max_tokens(max_tokens), n_dispatches(uint32_t(dispatches.size())),
      n_barriers(count_barriers(dispatches)), recording(this->device->record(std::move(dispatches), encoding)) {}

Session::Session(std::shared_ptr<Buffer> step, std::shared_ptr<Buffer> tokens, uint32_t n_ctx, uint32_t n_vocab)
    : step_(std::move(step)), tokens_(std::move(tokens)), n_ctx_(n_ctx), n_vocab_(n_vocab) {
    if (!step_ || !tokens_ || !step_->host || step_->bytes < sizeof(Step) || !tokens_->host)
        throw UsageError("the step and token buffers must be shared, the first of at least sizeof(Step) bytes");
}

void Session::check(const Plan& plan, const int32_t* ids, size_t n) const {
    if (closed_) throw UsageError("the model is closed; load it again");
    if (n == 0) throw UsageError("a step needs at least one token");
    if (n > plan.max_tokens || n * sizeof(int32_t) > tokens_->bytes)
        throw UsageError("a step of " + std::to_string(n) + " tokens in a plan for " + std::to_string(plan.max_tokens));
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || uint32_t(ids[i]) >= n_vocab_)
            throw UsageError("token id " + std::to_string(ids[i]) + " is outside the vocabulary of " +
                             std::to_string(n_vocab_));
    if (n > n_ctx_ - length_)
        throw ContextFullError("the context of " + std::to_string(n_ctx_) + " tokens is full (" +
                               std::to_string(length_) + " used, " + std::to_string(n) +
                               " more asked for); load the model with a larger context");
}

int32_t Session::run(Plan& plan, const int32_t* ids, size_t n) {
    Exclusive running(busy_);
    check(plan, ids, n);
    auto* step = static_cast<Step*>(step_->host);
    *step = Step{uint32_t(n), length_, -1, 0};
    std::memcpy(tokens_->host, ids, n * sizeof(int32_t));

    plan.device->submit(*plan.recording);
    RunTimes times = plan.device->wait();

    length_ += uint32_t(n);
    counters_.steps++;
    counters_.tokens += n;
    counters_.command_buffers++;
    counters_.dispatches += plan.n_dispatches;
    counters_.barriers += plan.n_barriers;
    counters_.gpu_seconds += times.gpu_end - times.gpu_start;
    return step->argmax;
}

void Session::rewind(uint32_t length) {
    Exclusive running(busy_);
    if (length > length_)
        throw UsageError("cannot rewind to " + std::to_string(length) + ": the sequence has " +
                         std::to_string(length_) + " tokens");
    length_ = length;
}

}  // namespace zinc
