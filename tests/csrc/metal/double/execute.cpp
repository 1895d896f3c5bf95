#include "execute.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "conditions.h"
#include "cpu/native/kernel.h"
#include "msl/run/executor.h"
#include "rules.h"

namespace metal_double {

using namespace zinc;

const KernelInfo* find_kernel(const std::string& name) { return msl::find_kernel(name.c_str()); }

struct Runner::State {
    msl::Executor executor;
    Workspace workspace;
    const bool native = condition("native").value_or("1") != "0";

    std::string run(const Work& work, uint32_t number) {
        if (!work.kernel) {
            std::memcpy(work.buffers[1], work.buffers[0], work.bytes[0]);
            return "";
        }
        const uint64_t n = uint64_t(work.grid[0]) * work.grid[1] * work.grid[2];
        if (const NativeKernel* kernel = native ? find_native(work.kernel->name) : nullptr) {
            const WorkspaceScope lent(workspace);
            kernel->fn({work.params.data(),
                        uint32_t(work.params.size()),
                        work.buffers.data(),
                        work.bytes.data(),
                        {work.grid[0], work.grid[1], work.grid[2]},
                        work.threads},
                       0, n);
            return "";
        }
        executor.reserve(work.threads);
        const msl::Job job{work.kernel,
                           work.params.data(),
                           work.buffers.data(),
                           work.bytes.data(),
                           {work.grid[0], work.grid[1], work.grid[2]},
                           work.threads,
                           number};
        return executor.run(job, 0, n) ? "" : executor.error();
    }

#ifdef ZINC_CHECKED
    void begin_segment(const std::vector<Work>& work, size_t begin) {
        std::vector<msl::ByteRange> written;
        for (size_t i = begin; i < work.size() && (i == begin || !work[i].after_barrier); i++)
            for (uint32_t b = 0; work[i].kernel && b < work[i].kernel->n_buffers; b++) {
                const auto at = reinterpret_cast<uintptr_t>(work[i].buffers[b]);
                if (work[i].kernel->buffers[b].writable) written.push_back({at, at + work[i].bytes[b]});
            }
        executor.checker().begin_segment(std::move(written));
    }
#else
    void begin_segment(const std::vector<Work>&, size_t) {}
#endif
};

Runner::Runner() : state_(std::make_unique<State>()) {}
Runner::~Runner() = default;

std::string Runner::run(const std::vector<Work>& work) {
    for (size_t i = 0; i < work.size(); i++) {
        if (i == 0 || work[i].after_barrier) state_->begin_segment(work, i);
        const std::string error = state_->run(work[i], uint32_t(i));
        if (!error.empty()) return error;
    }
    return "";
}

// ---- what all queues did

namespace {

struct Account {
    std::mutex mutex;
    std::condition_variable changed;
    Totals totals;
    int busy = 0;
};
Account& account() {
    static Account* one = new Account;  // threads may outlive static objects
    return *one;
}

}  // namespace

uint64_t take_longest() {
    const std::lock_guard lock(account().mutex);
    return std::exchange(account().totals.longest, 0);
}

Totals encoded() {
    const std::lock_guard lock(account().mutex);
    return account().totals;
}

void count(uint64_t Totals::* what, int64_t n) {
    const std::lock_guard lock(account().mutex);
    account().totals.*what += uint64_t(n);
}

void note_longest(double seconds) {
    const std::lock_guard lock(account().mutex);
    account().totals.longest = std::max(account().totals.longest, uint64_t(seconds * 1e6));
}

void meet(long n) {
    static std::mutex mutex;
    static std::condition_variable changed;
    static long inside = 0, met = 0;
    std::unique_lock lock(mutex);
    if (++inside >= n) met++, changed.notify_all();
    const long before = met - (inside >= n);
    if (!changed.wait_for(lock, std::chrono::seconds(20), [&] { return met != before; }))
        broken("meet", "%ld at a time were waited for, and %ld came", n, inside);
    inside--;
}

Busy::Busy() {
    const std::lock_guard lock(account().mutex);
    account().busy++;
}

Busy::~Busy() {
    const std::lock_guard lock(account().mutex);
    account().busy--;
    account().changed.notify_all();
}

void wait_until_idle() {
    std::unique_lock lock(account().mutex);
    account().changed.wait(lock, [] { return account().busy == 0; });
}

}  // namespace metal_double
