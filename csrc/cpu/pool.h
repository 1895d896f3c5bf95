// Threads that share the work of one job at a time. They are made for jobs of microseconds: they spin for a while
// before they sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "core/device.h"

namespace zinc {

// Waits: first without leaving the core, then with yields to other threads.
class Backoff {
  public:
    void pause();
    // True if so much time has passed that sleeping is cheaper than spinning.
    bool exhausted() const { return n_ >= n_spins; }

  private:
    static constexpr uint32_t n_spins = 2000;
    uint32_t n_ = 0;
};

// Calls a poll. The first exception that it throws is kept.
class Inquiry {
  public:
    explicit Inquiry(const Poll& poll) : poll_(poll) {}
    void make() noexcept;
    bool failed() const { return bool(error_); }
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    const Poll& poll_;
    std::exception_ptr error_;
};

// Runs jobs in the order of their submission. The helpers start at once, and go on to the next job by themselves. The
// thread that waits for a job also works on it, so that exactly the requested number of threads is busy.
class Pool {
  public:
    static constexpr uint32_t depth = 2;  // jobs in flight; a job has one set of counters for each

    // A thread's work in a job.
    struct Turn {
        uint32_t set;  // of counters
        int worker;
        const std::atomic<bool>& dropped;  // the rest of the work must be skipped
        Inquiry* inquiry;                  // to call now and then; null if there is none

        bool is_over() const { return inquiry && inquiry->failed(); }  // this thread must leave
    };

    class Job {
      public:
        virtual ~Job() = default;
        // Makes a set of counters ready. Nobody is in run() with this set.
        virtual void prepare(uint32_t set) = 0;
        // Called by every thread that helps. Returns when all threads together have done all of the work. If the turn
        // is over, it ends what it has begun, and leaves the rest to the others.
        virtual void run(const Turn& turn) noexcept = 0;
    };

    // threads counts the waiting thread, which is worker 0. With one thread a job runs inside submit().
    explicit Pool(int threads);
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    ~Pool();
    int threads() const { return int(helpers_.size()) + 1; }

    // Returns the job's ticket: 1, 2, ... Waits first if depth jobs are in flight. The job stays until alone() returns.
    uint64_t submit(Job& job, const Poll& poll = {});
    // Works until this job and all before it are done. The times of a job are kept until depth others have followed.
    // If the poll throws here, the helpers go on with the jobs. If it throws in submit(), the new job is not in flight.
    RunTimes wait(uint64_t ticket, const Poll& poll = {});
    // The rest of this job's work is skipped, if it is in flight.
    void drop(uint64_t ticket);
    // Calls body when all jobs are done and no thread is in one.
    template <class Body>
    void alone(Body body) {
        if (process_.is_another()) return;  // the threads that are in a job are not here
        const std::lock_guard lock(caller_);
        finish(last_);
        for (Slot& slot : slots_) close(slot);
        body();
    }

  private:
    // A job in flight. A thread counts itself in, and touches the rest only if the ticket has not changed.
    struct alignas(64) Slot {
        std::atomic<uint64_t> ticket{0};
        std::atomic<int> n_inside{0};
        std::atomic<bool> dropped{false};
        std::atomic<int64_t> start{0}, end{0};  // nanoseconds; 0 before the first begin or end
        Job* job = nullptr;
        uint64_t timed = 0;  // the ticket that start and end belong to
    };

    Slot& slot_of(uint64_t ticket) { return slots_[ticket % depth]; }
    void finish(uint64_t ticket, const Poll& poll = {});
    void work(uint64_t ticket, int worker, Inquiry* inquiry);
    void close(Slot& slot);
    void help(int worker);
    bool await(uint64_t ticket);
    void ring();
    void stop();

    std::mutex caller_;  // one thread submits or is worker 0
    Slot slots_[depth];
    alignas(64) std::atomic<uint64_t> last_{0};  // the last ticket given
    alignas(64) std::atomic<uint64_t> done_{0};  // all up to this ticket are done
    alignas(64) std::atomic<uint32_t> bell_{0};  // changes when helpers should look again
    std::atomic<bool> stopping_{false}, starved_{false};
    std::atomic<int> n_ready_{0};  // helpers that have begun
    std::vector<std::thread> helpers_;
    const OpeningProcess process_{};
};

// The cores that this process may use: affinity and the quota of its control group.
int usable_cores();
// Physical memory that this process may use.
uint64_t usable_memory();

}  // namespace zinc
