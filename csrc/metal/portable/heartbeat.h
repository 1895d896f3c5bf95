// Work to be done again and again while a device is in use, and once when it no longer is. Plain C++ without Metal, so
// that every machine can test it; metal/context.h is the only user.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace zinc {

// Calls beat() every `period` seconds on its own thread, for `keep` seconds after the last touch(), and then rest(). A
// beat gets the time since the last touch. It returns true if the device is in use although nobody touched, which
// counts as a touch. There is no thread at rest. beat() and rest() must not throw or call back.
class Heartbeat {
  public:
    Heartbeat(double period, double keep, std::function<bool(double idle_seconds)> beat, std::function<void()> rest)
        : period_(period), keep_(keep), beat_(std::move(beat)), rest_(std::move(rest)) {}
    ~Heartbeat() { stop(); }
    Heartbeat(const Heartbeat&) = delete;

    void touch() {
        const std::lock_guard one_by_one(control_);
        {
            const std::lock_guard lock(mutex_);
            last_ = Clock::now();
            if (running_ || keep_ <= 0) return;
            running_ = true;
            stopping_ = false;
        }
        if (thread_.joinable()) thread_.join();  // it is past its rest
        try {
            thread_ = std::thread([this] { run(); });
        } catch (const std::system_error&) {  // no thread can be started: nothing is kept
            const std::lock_guard lock(mutex_);
            running_ = false;
        }
    }

    // Ends the thread, if there is one, after rest().
    void stop() {
        const std::lock_guard one_by_one(control_);
        {
            const std::lock_guard lock(mutex_);
            stopping_ = true;
            changed_.notify_all();
        }
        if (thread_.joinable()) thread_.join();
    }

    bool running() {
        const std::lock_guard lock(mutex_);
        return running_;
    }

  private:
    using Clock = std::chrono::steady_clock;

    void run() {
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait_for(lock, period_, [this] { return stopping_; });
            if (stopping_) break;
            const double idle = idle_seconds();
            lock.unlock();
            const bool in_use = beat_(idle);
            lock.lock();
            if (in_use) last_ = Clock::now();
            if (idle_seconds() >= keep_) break;
        }
        rest_();  // under the lock: a touch after it starts a new thread
        running_ = false;
    }

    double idle_seconds() const { return std::chrono::duration<double>(Clock::now() - last_).count(); }

    const std::chrono::duration<double> period_;
    const double keep_;
    const std::function<bool(double)> beat_;
    const std::function<void()> rest_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::mutex control_;  // of the thread
    std::thread thread_;
    Clock::time_point last_;
    bool running_ = false, stopping_ = false;
};

}  // namespace zinc
