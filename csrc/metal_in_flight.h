// The account of command buffers that the GPU has not finished. Plain C++ without Metal, so that every machine can test
// it; device_metal.mm is the only user.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "device.h"

namespace zinc {

// Counts command buffers between commit and completion, and keeps the first failure for good. Completion handlers call
// finished() from a thread of Metal's.
class InFlight {
  public:
    InFlight(uint32_t limit, double patience_seconds) : limit_(limit), patience_(patience_seconds) {}

    // Throws the first failure, if there was one.
    void check() {
        const std::lock_guard lock(mutex_);
        throw_failure();
    }

    // Waits until one more command buffer may be committed, and counts it.
    void begin() {
        std::unique_lock lock(mutex_);
        wait_until_at_most(lock, limit_ - 1);
        throw_failure();
        ++count_;
    }

    // The command buffer that begin() counted was never committed.
    void abandon() noexcept {
        const std::lock_guard lock(mutex_);
        --count_;
        changed_.notify_all();
    }

    // A command buffer ended; failure is empty when it did its work.
    void finished(double gpu_start, double gpu_end, const std::string& failure) noexcept {
        const std::lock_guard lock(mutex_);
        --count_;
        ++n_finished_;
        if (failure.empty()) {
            times_.gpu_start = times_.gpu_end == 0 ? gpu_start : std::min(times_.gpu_start, gpu_start);
            times_.gpu_end = std::max(times_.gpu_end, gpu_end);
        } else if (!failed_) {
            fail(failure.c_str());
        }
        changed_.notify_all();
    }

    // Waits for all; the time from the first start to the last end since the last settle().
    RunTimes settle() {
        std::unique_lock lock(mutex_);
        wait_until_at_most(lock, 0);
        throw_failure();
        return std::exchange(times_, RunTimes());
    }

    // Waits for all; false when the GPU gave up, and so may still write to what was bound.
    bool idle() noexcept {
        std::unique_lock lock(mutex_);
        wait_until_at_most(lock, 0);
        return count_ == 0;
    }

  private:
    // Gives up when nothing at all completes for `patience`: a driver that lost a command buffer must not hang us too.
    void wait_until_at_most(std::unique_lock<std::mutex>& lock, uint32_t count) noexcept {
        while (count_ > count && !lost_) {
            const uint64_t before = n_finished_;
            const auto progress = [&] { return count_ <= count || n_finished_ != before; };
            if (changed_.wait_for(lock, std::chrono::duration<double>(patience_), progress)) continue;
            lost_ = true;
            if (!failed_)
                fail("the GPU completed nothing for ZINCMETAL_METAL_TIMEOUT seconds (default 120); close other "
                     "GPU programs and restart the process");
        }
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

    const uint32_t limit_;
    const double patience_;
    std::mutex mutex_;
    std::condition_variable changed_;
    uint32_t count_ = 0;
    uint64_t n_finished_ = 0;
    bool failed_ = false, lost_ = false;
    std::string failure_;
    RunTimes times_;
};

}  // namespace zinc
