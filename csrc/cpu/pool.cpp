#include "cpu/pool.h"

#include "core/device.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <cstdlib>
#include <string>
#include <system_error>
#ifdef __linux__
#include <sched.h>
#endif

namespace zinc {

void Backoff::pause() {
    if (n_++ < n_spins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");
#endif
    } else {
        std::this_thread::yield();
    }
}

Pool::Pool(int threads) {
    helpers_.reserve(size_t(std::max(threads, 1) - 1));
    try {
        for (int worker = 1; worker < threads; worker++) helpers_.emplace_back(&Pool::help, this, worker);
    } catch (const std::bad_alloc&) {
        stop();
        throw;
    } catch (const std::system_error&) {
        stop();
        throw DeviceError("the system cannot start " + std::to_string(threads) + " threads; ask for fewer");
    }
    for (int ready = n_ready_; ready < threads - 1; ready = n_ready_) n_ready_.wait(ready);
    if (starved_) {
        stop();
        throw std::bad_alloc();
    }
}

Pool::~Pool() {
    // A forked child has no threads to wait for; it leaks the objects that stand for them.
    if (process_.is_another())
        new std::vector<std::thread>(std::move(helpers_));
    else
        stop();
}

void Pool::stop() {
    stopping_ = true;
    ring();
    for (std::thread& helper : helpers_) helper.join();
}

void Pool::ring() {
    bell_.fetch_add(1);
    bell_.notify_all();
}

uint64_t Pool::submit(Job& job, const Poll& poll) {
    const std::lock_guard lock(caller_);
    const uint64_t ticket = last_ + 1;
    if (ticket > depth) finish(ticket - depth, poll);
    Slot& slot = slot_of(ticket);
    close(slot);
    job.prepare(ticket % depth);
    slot.job = &job;
    slot.start = slot.end = 0;
    slot.dropped = false;
    slot.timed = ticket;
    slot.ticket = ticket;
    last_ = ticket;
    if (helpers_.empty())
        finish(ticket, poll);
    else
        ring();
    return ticket;
}

RunTimes Pool::wait(uint64_t ticket, const Poll& poll) {
    const std::lock_guard lock(caller_);
    finish(std::min(ticket, last_.load()), poll);
    const Slot& slot = slot_of(ticket);
    if (slot.timed != ticket) return {};
    return {double(slot.start) * 1e-9, double(slot.end) * 1e-9};
}

void Pool::finish(uint64_t ticket, const Poll& poll) {
    if (done_ >= ticket) return;
    Inquiry inquiry(poll);
    while (done_ < ticket && !inquiry.failed()) work(done_ + 1, 0, poll ? &inquiry : nullptr);
    if (inquiry.failed() && helpers_.empty()) done_ = ticket;  // nobody goes on with it
    inquiry.rethrow();
}

void Pool::drop(uint64_t ticket) {
    const std::lock_guard lock(caller_);
    if (slot_of(ticket).ticket == ticket) slot_of(ticket).dropped.store(true, std::memory_order_relaxed);
}

void Inquiry::make() noexcept {
    if (error_) return;
    try {
        poll_();
    } catch (...) {
        error_ = std::current_exception();
    }
}

namespace {

// Stores the time, unless another thread was first.
void stamp(std::atomic<int64_t>& time) {
    int64_t none = 0;
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    time.compare_exchange_strong(none, std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

void raise_to(std::atomic<uint64_t>& value, uint64_t least) {
    for (uint64_t seen = value; seen < least && !value.compare_exchange_weak(seen, least);) {
    }
}

}  // namespace

void Pool::work(uint64_t ticket, int worker, Inquiry* inquiry) {
    Slot& slot = slot_of(ticket);
    slot.n_inside.fetch_add(1);
    if (slot.ticket == ticket) {
        stamp(slot.start);
        const Turn turn{uint32_t(ticket % depth), worker, slot.dropped, inquiry};
        slot.job->run(turn);
        if (!turn.is_over()) {
            stamp(slot.end);
            raise_to(done_, ticket);
        }
    }
    slot.n_inside.fetch_sub(1);
}

void Pool::close(Slot& slot) {
    slot.ticket = 0;
    for (Backoff backoff; slot.n_inside != 0;) backoff.pause();
}

namespace {

// The C++ library allocates memory for a thread when it first throws, and ends the process if it gets none. False:
// there is no memory now.
bool prepare_to_throw() {
    void* const room = malloc(1 << 14);
    if (!room) return false;
    free(room);
    return std::uncaught_exceptions() == 0;
}

}  // namespace

void Pool::help(int worker) {
    if (!prepare_to_throw()) starved_ = true;
    n_ready_.fetch_add(1);
    n_ready_.notify_all();
    for (uint64_t ticket = 1; await(ticket); ticket = done_ + 1) work(ticket, worker, nullptr);
}

// False when the pool ends.
bool Pool::await(uint64_t ticket) {
    for (Backoff backoff;;) {
        const uint32_t heard = bell_;
        if (stopping_) return false;
        if (last_ >= ticket) return true;
        if (backoff.exhausted())
            bell_.wait(heard);
        else
            backoff.pause();
    }
}

namespace {

// The first number in a file, or fallback if the file has none ("max").
[[maybe_unused]] double number_in(const char* path, int index, double fallback) {
    std::ifstream file(path);
    std::string word;
    for (int i = 0; i <= index; i++)
        if (!(file >> word)) return fallback;
    char* end = nullptr;
    const double value = strtod(word.c_str(), &end);
    return end == word.c_str() ? fallback : value;
}

}  // namespace

int usable_cores() {
    int cores = int(std::thread::hardware_concurrency());
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
    const double quota = number_in("/sys/fs/cgroup/cpu.max", 0, 0), period = number_in("/sys/fs/cgroup/cpu.max", 1, 0);
    if (quota > 0 && period > 0) cores = std::min(cores, std::max(1, int(quota / period + 0.5)));
#endif
    return std::max(cores, 1);
}

uint64_t usable_memory() {
    double bytes = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
#ifdef __linux__
    bytes = std::min(bytes, number_in("/sys/fs/cgroup/memory.max", 0, bytes));
    bytes = std::min(bytes, number_in("/sys/fs/cgroup/memory/memory.limit_in_bytes", 0, bytes));
#endif
    return uint64_t(bytes);
}

}  // namespace zinc
