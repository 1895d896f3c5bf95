// The account of command buffers that the GPU has not finished. Plain C++ without Metal, so that every machine can test
// it; the Metal backend is the only user.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/device.h"
#include "metal/portable/errors.h"

namespace zinc {

// The time without a completion after which the GPU counts as lost.
struct Patience {
    double seconds;
    bool from_the_first = true;  // else only after a first completion, which includes paging in the whole file
};

// Gives submissions their tickets, and their command buffers (one or several in a row) their numbers. Follows the
// command buffers from commit to completion, and keeps failures. Completion handlers call finished() from threads of
// Metal's, in any order. Submissions begin and end one after the other.
class InFlight {
  public:
    // Command buffers: enough to let the CPU encode ahead of the GPU. A Metal queue blocks without a time limit at 64.
    static constexpr uint32_t limit = 8;
    // Command buffers of one submission: one runs and one waits, so that an interrupt finds little committed.
    static constexpr uint32_t ahead = 2;
    static constexpr std::chrono::milliseconds poll_every{50};

    explicit InFlight(Patience patience) : patience_(patience) {}

    // Throws the failure that lasts, if there was one.
    void check() {
        const std::lock_guard lock(mutex_);
        throw_lasting();
    }

    // Returns a submission's ticket. After a failure that passes, and if the poll throws, all work in flight ends
    // first. awaited: somebody will wait for it. Otherwise the next begin() throws its failure, unless wait() does so
    // for work behind it.
    uint64_t begin(const Poll& poll = {}, bool awaited = true) {
        std::unique_lock lock(mutex_);
        throw_lasting();
        or_all(lock, [&] {
            wait_for_room(lock, poll);
            if (unsettled_) wait_until_ended(lock, n_committed_, poll);
        });
        throw_lasting();
        unsettled_ = false;
        if (const uint64_t untold = std::exchange(untold_, 0)) throw_failure_of(untold);
        ++last_ticket_;
        submissions_[last_ticket_ % limit] = {last_ticket_, n_committed_, n_committed_, awaited, {}};
        return last_ticket_;
    }

    // Waits until one more command buffer of this submission, the last one, may be committed. Returns its number. Its
    // place is number % limit.
    uint64_t begin_command_buffer(const Poll& poll = {}) {
        std::unique_lock lock(mutex_);
        Submission& submission = submissions_[last_ticket_ % limit];
        wait_for_room(lock, poll);
        const uint64_t number = n_committed_ + 1;
        if (number > submission.before + ahead) wait_until_ended(lock, number - ahead, poll);
        throw_failure_of(last_ticket_);
        places_[number % limit] = {false, false, last_ticket_, {}};
        n_committed_ = submission.last = number;
        return number;
    }

    // The command buffer that was begun was never committed.
    void abandon(uint64_t number) noexcept {
        const std::lock_guard lock(mutex_);
        end(uint32_t(number % limit));
    }

    // Ends the last submission early: waits for its command buffers that were begun.
    void drop() noexcept {
        std::unique_lock lock(mutex_);
        const uint64_t last = submissions_[last_ticket_ % limit].last;
        wait_unasked(lock, last);
    }

    // The command buffer of a place ended. The failure is empty if it succeeded.
    void finished(uint32_t place, double gpu_start, double gpu_end, const Failure& failure) noexcept {
        const std::lock_guard lock(mutex_);
        Place& ended = places_[place];
        ended.times = {gpu_start, gpu_end};
        ended.stopped = failure.took_too_long;
        Submission& submission = submissions_[ended.ticket % limit];
        if (submission.ticket == ended.ticket) {
            RunTimes& times = submission.times;
            times.gpu_start = times.gpu_start > 0 ? std::min(times.gpu_start, gpu_start) : gpu_start;
            times.gpu_end = std::max(times.gpu_end, gpu_end);
        }
        if (!failure.text.empty()) fail(failure, ended.ticket);
        ++n_completed_;
        end(place);
    }

    // Waits for this submission and all before it. If it throws, it has waited for everything in flight, so that the
    // caller may write to the buffers. Times are from its first command buffer to its last, and known until `limit`
    // others have begun.
    RunTimes wait(uint64_t ticket, const Poll& poll = {}) {
        std::unique_lock lock(mutex_);
        const bool known = submissions_[ticket % limit].ticket == ticket;
        const uint64_t last = known ? submissions_[ticket % limit].last : n_committed_;
        or_all(lock, [&] { wait_until_ended(lock, last, poll); });
        if (is_spoilt(ticket)) {
            wait_unasked(lock, n_committed_);
            untold_ = 0;
        }
        throw_failure_of(ticket);
        const Submission& submission = submissions_[ticket % limit];
        return submission.ticket == ticket ? submission.times : RunTimes();
    }

    // Waits for this command buffer and all before it.
    void wait_for(uint64_t number) noexcept {
        std::unique_lock lock(mutex_);
        wait_unasked(lock, number);
    }

    // Waits for everything in flight. False if the GPU is lost, and so may still write to the buffers.
    bool idle() noexcept {
        std::unique_lock lock(mutex_);
        const uint64_t last = n_committed_;  // others may commit during the wait
        wait_unasked(lock, last);
        return ended(last);
    }

    // The end of a command buffer, unless it still runs or another has taken its place. Unknown times are zero.
    struct Ended {
        double seconds;
        bool took_too_long;  // for the driver, which stopped it
    };
    enum class State { running, ended, forgotten };
    State state_of(uint64_t number, Ended& ended) {
        const std::lock_guard lock(mutex_);
        if (number + limit <= n_committed_) return State::forgotten;
        const Place& place = places_[number % limit];
        if (!place.ended) return State::running;
        ended = {place.times.gpu_end - place.times.gpu_start, place.stopped};
        return State::ended;
    }

    // True if it goes on failing, so that only a new device helps.
    bool failed() {
        const std::lock_guard lock(mutex_);
        return lasting_.has_value();
    }

  private:
    using Lock = std::unique_lock<std::mutex>;

    struct Place {
        bool ended = true, stopped = false;
        uint64_t ticket = 0;
        RunTimes times;
    };
    struct Submission {
        uint64_t ticket = 0;
        uint64_t before = 0, last = 0;  // command buffers: the one before its first, and its last
        bool awaited = true;
        RunTimes times;
    };
    // Submissions that a failure spoiled and the device outlived.
    struct Spoilt {
        uint64_t from, to;
        Failure failure;
    };

    void wait_for_room(Lock& lock, const Poll& poll) {
        if (n_committed_ >= limit) wait_until_ended(lock, n_committed_ + 1 - limit, poll);
    }

    // True if all command buffers up to this one have ended.
    bool ended(uint64_t number) const noexcept {
        for (uint64_t n = n_committed_ < limit ? 1 : n_committed_ + 1 - limit; n <= number; ++n)
            if (!places_[n % limit].ended) return false;
        return true;
    }

    void end(uint32_t place) noexcept {
        places_[place].ended = true;
        ++n_ended_;
        changed_.notify_all();
    }

    // Calls `poll` now and then; it may throw. Gives up when nothing completes for the time of the patience: a driver
    // that lost a command buffer must not hang us too. The time is counted in slices. While a machine sleeps, its
    // clocks go on and its GPU does not. So a lid that closes costs one slice at most.
    void wait_until_ended(Lock& lock, uint64_t number, const Poll& poll, bool always_patient = false) {
        auto next_poll = std::chrono::steady_clock::now() + poll_every;
        const std::chrono::duration<double> part(std::min(0.05, patience_.seconds / 20));
        double waited = 0;
        while (!ended(number) && !lost_) {
            const uint64_t before = n_ended_;
            const auto progress = [&] { return ended(number) || n_ended_ != before; };
            waited = changed_.wait_for(lock, part, progress) ? 0 : waited + part.count();
            if (poll && std::chrono::steady_clock::now() >= next_poll) {
                ask(lock, poll);
                next_poll = std::chrono::steady_clock::now() + poll_every;
            }
            const bool counts = always_patient || patience_.from_the_first || n_completed_ > 0;
            if (counts && waited >= patience_.seconds) lose();
        }
    }

    // Without a poll nobody can interrupt, so the wait must end by itself.
    void wait_unasked(Lock& lock, uint64_t number) noexcept { wait_until_ended(lock, number, {}, true); }

    // If an interrupt ends the wait, all work in flight ends before the exception is passed on.
    template <class Wait>
    void or_all(Lock& lock, const Wait& wait) {
        try {
            wait();
        } catch (...) {
            if (!lock.owns_lock()) lock.lock();
            wait_unasked(lock, n_committed_);
            throw;
        }
    }

    static void ask(Lock& lock, const Poll& poll) {
        lock.unlock();
        poll();
        lock.lock();
    }

    void lose() noexcept {
        lost_ = true;
        keep("the GPU completed nothing for ZINCMETAL_METAL_TIMEOUT seconds (default 120); close other GPU programs "
             "and restart the process");
    }

    // Copying a text can fail for lack of memory. The failure must be kept even then.
    void keep(const char* text) noexcept {
        if (lasting_) return;
        try {
            lasting_ = text;
        } catch (...) {
            lasting_.emplace();
        }
    }

    // The work in flight behind a failed command buffer read results that were not written.
    void fail(const Failure& failure, uint64_t ticket) noexcept {
        if (!failure.passes) return keep(failure.text.c_str());
        unsettled_ = true;
        if (!submissions_[ticket % limit].awaited) untold_ = ticket;
        if (!spoilt_.empty() && spoilt_.back().to >= ticket) {
            spoilt_.back().to = last_ticket_;
            return;
        }
        try {
            spoilt_.push_back({ticket, last_ticket_, failure});
        } catch (...) {
            keep(failure.text.c_str());
        }
    }

    void throw_lasting() const {
        if (lasting_) throw DeviceError(lasting_->empty() ? "the GPU did not finish a command buffer" : *lasting_);
    }

    const Spoilt* is_spoilt(uint64_t ticket) const {
        for (const Spoilt& spoilt : spoilt_)
            if (spoilt.from <= ticket && ticket <= spoilt.to) return &spoilt;
        return nullptr;
    }

    void throw_failure_of(uint64_t ticket) const {
        throw_lasting();
        if (const Spoilt* spoilt = is_spoilt(ticket)) throw_failure(spoilt->failure);
    }

    const Patience patience_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::array<Place, limit> places_;
    std::array<Submission, limit> submissions_;
    uint64_t last_ticket_ = 0;  // given
    uint64_t n_committed_ = 0;  // command buffers begun
    uint64_t n_ended_ = 0;      // in any order, also abandoned command buffers
    uint64_t n_completed_ = 0;
    bool lost_ = false, unsettled_ = false;
    uint64_t untold_ = 0;                 // a submission that failed and that nobody waits for
    std::optional<std::string> lasting_;  // the first failure that lasts
    std::vector<Spoilt> spoilt_;
};

}  // namespace zinc
