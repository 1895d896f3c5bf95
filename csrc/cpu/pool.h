// A pool of threads for work of a few microseconds: helpers spin for a while between jobs and then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace zinc {

// Waits politely: first without leaving the core, then letting others have it.
class Backoff {
  public:
    void pause();
    // Whether so much time has passed that sleeping is cheaper than spinning.
    bool exhausted() const { return n_ >= n_spins; }

  private:
    static constexpr uint32_t n_spins = 2000;
    uint32_t n_ = 0;
};

class Pool {
  public:
    using Job = void (*)(void* context, int worker);

    // threads counts the caller, who is worker 0.
    explicit Pool(int threads);
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    ~Pool();
    int threads() const { return int(helpers_.size()) + 1; }

    // Runs job on the caller and on every helper that wakes in time; the job must be complete when the caller's call
    // returns. Returns when no helper is in it any more.
    void run(Job job, void* context);

  private:
    void help(int worker);
    void stop();

    // Odd while a job is open to helpers. They count themselves in, look again, and only then touch the job.
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> n_inside_{0};
    std::atomic<bool> stopping_{false};
    Job job_ = nullptr;
    void* context_ = nullptr;
    std::vector<std::thread> helpers_;
};

// The cores that this process may use: affinity and the quota of its control group.
int usable_cores();
// Physical memory that this process may use.
uint64_t usable_memory();

}  // namespace zinc
