#include "core/steps.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "shapes.h"

namespace zinc {

namespace {

// Holds a flag for the length of a call, or refuses: two threads must not submit steps at once.
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

std::string of(size_t n, const char* what) { return std::to_string(n) + " " + what + (n == 1 ? "" : "s"); }

void check_most(size_t n, size_t most, const char* what) {
    if (n > most) throw UsageError("a step of " + of(n, what) + ", where there is room for " + std::to_string(most));
}

template <class T>
void fill(const Ring<T>& ring, uint32_t number, std::span<const T> items) {
    std::copy(items.begin(), items.end(), ring.place(number));
}

}  // namespace

Steps::Steps(std::shared_ptr<Device> device, const StepBuffers& buffers, uint32_t n_vocab, uint32_t n_page_entries)
    : device_(std::move(device)), step_(buffers.step), next_step_(buffers.next_step, "next_step"),
      next_rows_(buffers.next_rows, "next_rows"), next_outs_(buffers.next_outs, "next_outs"),
      next_pages_(buffers.next_pages, "next_pages"), next_draws_(buffers.next_draws, "next_draws"),
      results_(buffers.results, "results"), n_vocab_(n_vocab), n_page_entries_(n_page_entries) {
    if (!step_ || !step_->copies() || step_->bytes < sizeof(Step))
        throw UsageError("the buffer step must have at least sizeof(Step) bytes that the host can copy");
}

uint32_t Steps::decode(const std::shared_ptr<Plan>& plan, const Description& step, const Poll& poll) {
    process_.check();  // before the flag, which a thread of the parent may have set
    Exclusive running(busy_);
    check_open();
    check_plan(*plan, {uint32_t(step.rows.size()), uint32_t(step.outs.size())});
    check(step);
    write(step);
    return submit(plan, poll);
}

void Steps::describe(const Description& step) {
    process_.check();
    Exclusive running(busy_);
    check_open();
    check(step);
    write(step);
}

uint32_t Steps::submit_described(const std::shared_ptr<Plan>& plan, const Poll& poll) {
    process_.check();
    Exclusive running(busy_);
    check_open();
    if (described_.n_rows == 0) throw UsageError("no step is described; call describe() first");
    check_plan(*plan, described_);
    return submit(plan, poll);
}

std::vector<Choice> Steps::collect(const Poll& poll) {
    process_.check();
    Exclusive running(busy_);
    if (n_in_flight_ == 0) throw UsageError("no step is in flight; submit one with decode_step() first");
    const InFlight& done = in_flight_[0];
    std::vector<Choice> results(done.n_out);  // before the step counts: there may be no memory for it
    bool interrupted = false;
    const auto ask = [&] {
        try {
            poll();
        } catch (...) {
            interrupted = true;
            throw;
        }
    };
    try {
        const RunTimes times = device_->wait(done.ticket, poll ? Poll(std::ref(ask)) : Poll());
        for (const FileDamage* file : done.plan->files) check_file(*file);
        count(done, times);
    } catch (...) {
        if (!interrupted) forget_all();
        throw;
    }
    std::copy_n(results_.place(done.number), done.n_out, results.begin());
    in_flight_[0] = std::exchange(in_flight_[1], {});
    --n_in_flight_;
    return results;
}

void Steps::drop() {
    process_.check();
    Exclusive running(busy_);
    forget_all();
}

Counters Steps::counters() const {
    const std::lock_guard lock(counters_mutex_);
    return counters_;
}

// ---- checks of a call

void Steps::check_open() const {
    if (closed_) throw UsageError("the model is closed; load it again");
    if (n_in_flight_ == depth)
        throw UsageError("two steps are in flight; take the results of the older with collect_step() first");
}

void Steps::check_plan(const Plan& plan, Described step) const {
    if (plan.device != device_) throw UsageError("the plan was compiled for another device");
    if (step.n_rows > plan.max_tokens)
        throw UsageError("a step of " + of(step.n_rows, "row") + " in a plan for " + std::to_string(plan.max_tokens));
    if (step.n_out > plan.n_out)
        throw UsageError("a step of " + of(step.n_out, "output") + " in a plan for " + std::to_string(plan.n_out));
}

void Steps::check(const Description& step) const {
    const size_t n = step.rows.size();
    if (n == 0) throw UsageError("a step needs at least one row");
    check_most(n, next_rows_.most(), "row");
    check_most(step.page_writes.size(), next_pages_.most(), "page write");
    if (step.n_single > n) throw UsageError("a step of " + of(n, "row") + " has no " + of(step.n_single, "single row"));
    for (size_t t = 0; t < n; t++) {
        check_run(step, t);
        check_page(step.rows[t].pages, step.rows[t].pos);
        check_token(step.rows[t].token);
        check_drafted(step.rows[t]);
    }
    check_outs(step);
    for (const PageWrite& w : step.page_writes)
        if (w.at >= n_page_entries_)
            throw UsageError("a page write at " + std::to_string(w.at) + " of " + std::to_string(n_page_entries_) +
                             " entries");
}

// The rows before t have been checked.
void Steps::check_run(const Description& step, size_t t) const {
    const Row& row = step.rows[t];
    const auto refuse = [t](const std::string& why) { throw UsageError("row " + std::to_string(t) + why); };
    const bool is_first = t == 0 || step.rows[t - 1].end == t;
    if (is_first) {
        if (row.begin != t || row.end <= t || row.end > step.rows.size())
            refuse(" begins a run, which it says has rows " + std::to_string(row.begin) + " to " +
                   std::to_string(row.end) + " of " + std::to_string(step.rows.size()));
        if (t < step.n_single && row.end != t + 1)
            refuse(" begins a longer run, but is among the " + of(step.n_single, "single row"));
        return;
    }
    const Row& before = step.rows[t - 1];
    if (row.begin != before.begin || row.end != before.end || row.pos != before.pos + 1 || row.pages != before.pages ||
        row.slot != before.slot || row.slot_out != before.slot_out)
        refuse(" does not continue the run of the row before");
}

void Steps::check_token(int32_t token) const {
    if (token >= 0) {
        if (uint32_t(token) >= n_vocab_)
            throw UsageError("token id " + std::to_string(token) + " is outside the vocabulary of " +
                             std::to_string(n_vocab_));
        return;
    }
    const uint32_t output = uint32_t(-1 - token);
    if (output >= n_fed_)
        throw UsageError("a row takes the token of output " + std::to_string(output) +
                         " of the step before, which has " + of(n_fed_, "output") + " to take from");
}

// The row comes up to as many positions and outputs later.
void Steps::check_drafted(const Row& row) const {
    if (row.drafted == 0) return;
    if (row.token >= 0 || row.end != row.begin + 1)
        throw UsageError("a row behind a draft must be a run of its own, and take the token of an output");
    if (row.drafted >= n_fed_ - uint32_t(-1 - row.token))
        throw UsageError("a row is behind a draft of " + of(row.drafted, "token") + " after output " +
                         std::to_string(-1 - row.token) + " of the step before, which has " + of(n_fed_, "output"));
    check_page(row.pages, uint64_t(row.pos) + row.drafted);
}

void Steps::check_outs(const Description& step) const {
    const size_t n_out = step.outs.size();
    check_most(n_out, std::min({next_outs_.most(), next_draws_.most(), results_.most()}), "output");
    if (n_out > step.rows.size())
        throw UsageError("a step of " + of(step.rows.size(), "row") + " has no " + of(n_out, "output"));
    for (const uint32_t row : step.outs)
        if (row >= step.rows.size())
            throw UsageError("row " + std::to_string(row) + " is an output of a step of " +
                             of(step.rows.size(), "row"));
    if (step.draws.empty()) return;
    if (step.draws.size() != n_out) throw UsageError(of(step.draws.size(), "draw") + " for " + of(n_out, "output"));
    for (const Draw& draw : step.draws) check_page(draw.pages, draw.pos);
}

void Steps::check_page(uint64_t pages, uint64_t pos) const {
    const uint64_t entry = pages + pos / KV_PAGE;
    if (entry >= n_page_entries_)
        throw UsageError("position " + std::to_string(pos) + " has page entry " + std::to_string(entry) + " of " +
                         std::to_string(n_page_entries_));
}

// ---- one step

// The place of this step is in use by none in flight: there are more places than steps.
void Steps::write(const Description& step) {
    static_assert(STEP_RING > depth);
    if (described_.n_rows) number_is_known_ = false;  // its first section may have run
    described_ = {};
    if (!number_is_known_) correct_number();
    const uint32_t number = number_ + 1, n_rows = uint32_t(step.rows.size()), n_out = uint32_t(step.outs.size());
    *next_step_.place(number) = {n_rows, step.n_single, n_out, uint32_t(step.page_writes.size()), 0, {}};
    fill(next_rows_, number, step.rows);
    fill(next_outs_, number, step.outs);
    fill(next_pages_, number, step.page_writes);
    fill(next_draws_, number, step.draws);
    if (step.draws.empty()) std::fill_n(next_draws_.place(number), n_out, Draw{});
    std::fill_n(results_.place(number), n_out, Choice{-1, 0, 0, 0, 0});  // of a plan that chooses nothing
    described_ = {n_rows, n_out};
}

// The device counts steps by itself. After a step that failed or was dropped, nobody knows how far it came.
void Steps::correct_number() {
    for (uint32_t i = 0; i < n_in_flight_; i++) {
        try {
            device_->wait(in_flight_[i].ticket);
        } catch (const DeviceError&) {  // collect() will tell
        }
    }
    step_->write(offsetof(Step, number), &number_, sizeof(number_));
    number_is_known_ = true;
}

uint32_t Steps::submit(const std::shared_ptr<Plan>& plan, const Poll& poll) {
    const Described step = std::exchange(described_, {});
    n_fed_ = 0;
    number_is_known_ = false;  // if it fails
    const uint64_t ticket = device_->submit(*plan->recording, poll);
    number_is_known_ = true;
    n_fed_ = step.n_out;
    const uint32_t n = n_in_flight_;
    in_flight_[n] = {plan, ticket, ++number_, step.n_rows, step.n_out, n + 1};
    n_in_flight_ = n + 1;
    return number_;
}

void Steps::count(const InFlight& done, const RunTimes& times) {
    const std::lock_guard lock(counters_mutex_);
    counters_.steps++;
    counters_.tokens += done.n_rows;
    counters_.command_buffers++;
    counters_.dispatches += done.plan->n_dispatches;
    counters_.barriers += done.plan->n_barriers;
    counters_.max_in_flight = std::max<uint64_t>(counters_.max_in_flight, done.n_in_flight);
    counters_.gpu_seconds += times.gpu_end - times.gpu_start;
}

void Steps::forget_all() noexcept {
    number_is_known_ = number_is_known_ && n_in_flight_ == 0 && described_.n_rows == 0;
    described_ = {};
    for (uint32_t i = 0; i < n_in_flight_; i++) device_->drop(in_flight_[i].ticket);
    for (uint32_t i = 0; i < n_in_flight_; i++) {
        n_fed_ = 0;
        try {
            device_->wait(in_flight_[i].ticket);
        } catch (...) {  // nobody wants its results
        }
        in_flight_[i] = {};
    }
    n_in_flight_ = 0;
}

}  // namespace zinc
