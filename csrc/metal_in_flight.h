// The account of command buffers that the GPU has not finished. Plain C++ without Metal, so that every machine can test
// it; the Metal backend is the only user.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>

#include "device.h"

namespace zinc {

// Gives command buffers their tickets, follows them from commit to completion, and keeps the first failure for good.
// Completion handlers call finished() from threads of Metal's, in any order.
class InFlight {
  public:
    // Enough to let the CPU encode ahead of the GPU, and fewer than the 64 at which a Metal queue blocks without a time
    // limit.
    static constexpr uint32_t limit = 8;

    explicit InFlight(double patience_seconds) : patience_(patience_seconds) {}

    // Throws the first failure, if there was one.
    void check() {
        const std::lock_guard lock(mutex_);
        throw_failure();
    }

    // Waits until one more command buffer may be committed; its ticket. Its place is ticket % limit.
    uint64_t begin() {
        std::unique_lock lock(mutex_);
        while (last_ >= limit && !ended(last_ + 1 - limit) && !lost_) wait_until_ended(lock, last_ + 1 - limit);
        throw_failure();
        places_[++last_ % limit] = {};
        return last_;
    }

    // The command buffer that begin() counted was never committed.
    void abandon(uint64_t ticket) noexcept {
        const std::lock_guard lock(mutex_);
        end(uint32_t(ticket % limit));
    }

    // The command buffer of a place ended; failure is empty when it did its work.
    void finished(uint32_t place, double gpu_start, double gpu_end, const std::string& failure) noexcept {
        const std::lock_guard lock(mutex_);
        places_[place].times = {gpu_start, gpu_end};
        if (!failure.empty() && !failed_) fail(failure.c_str());
        end(place);
    }

    // Waits for this command buffer and all before it. Times are known until limit others have begun.
    RunTimes wait(uint64_t ticket) {
        std::unique_lock lock(mutex_);
        wait_until_ended(lock, std::min(ticket, last_));
        throw_failure();
        return ticket + limit > last_ && ticket <= last_ ? places_[ticket % limit].times : RunTimes();
    }

    // Waits for all; false when the GPU gave up, and so may still write to what was bound.
    bool idle() noexcept {
        std::unique_lock lock(mutex_);
        wait_until_ended(lock, last_);
        return ended(last_);
    }

  private:
    struct Place {
        bool ended = false;
        RunTimes times;
    };

    // Whether all command buffers up to this ticket have ended.
    bool ended(uint64_t ticket) const noexcept {
        for (uint64_t t = last_ < limit ? 1 : last_ + 1 - limit; t <= ticket; ++t)
            if (!places_[t % limit].ended) return false;
        return true;
    }

    void end(uint32_t place) noexcept {
        places_[place].ended = true;
        ++n_ended_;
        changed_.notify_all();
    }

    // Gives up when nothing at all completes for `patience`: a driver that lost a command buffer must not hang us too.
    void wait_until_ended(std::unique_lock<std::mutex>& lock, uint64_t ticket) noexcept {
        while (!ended(ticket) && !lost_) {
            if (has_progress(lock, ticket)) continue;
            lost_ = true;
            if (!failed_)
                fail("the GPU completed nothing for ZINCMETAL_METAL_TIMEOUT seconds (default 120); close other "
                     "GPU programs and restart the process");
        }
    }

    // Waits for anything to complete, until patience ends. It is counted in parts: clocks go on while a machine sleeps,
    // and its GPU does not, so that a lid which closes must not cost more than one of them.
    bool has_progress(std::unique_lock<std::mutex>& lock, uint64_t ticket) noexcept {
        const uint64_t before = n_ended_;
        const auto progress = [&] { return ended(ticket) || n_ended_ != before; };
        for (uint32_t part = 0; part < patience_parts; ++part)
            if (changed_.wait_for(lock, std::chrono::duration<double>(patience_ / patience_parts), progress))
                return true;
        return false;
    }

    // Copying the text can fail where memory is short; the failure must be kept all the same.
    void fail(const char* text) noexcept {
        failed_ = true;
        try {
            failure_ = text;
        } catch (...) {
        }
    }

    void throw_failure() const {
        if (failed_) throw DeviceError(failure_.empty() ? "the GPU did not finish a command buffer" : failure_);
    }

    static constexpr uint32_t patience_parts = 20;
    const double patience_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::array<Place, limit> places_;
    uint64_t last_ = 0;     // the last ticket given
    uint64_t n_ended_ = 0;  // in any order
    bool failed_ = false, lost_ = false;
    std::string failure_;
};

}  // namespace zinc
