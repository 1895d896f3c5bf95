#include "cpu/pool.h"

#include "device.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
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
    } catch (const std::system_error&) {
        stop();
        throw DeviceError("the system cannot start " + std::to_string(threads) + " threads; ask for fewer");
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stopping_ = true;
    phase_ += 2;
    phase_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
}

void Pool::run(Job job, void* context) {
    if (helpers_.empty()) return job(context, 0);
    job_ = job;
    context_ = context;
    phase_.fetch_add(1);
    phase_.notify_all();
    job(context, 0);
    phase_.fetch_add(1);
    for (Backoff backoff; n_inside_.load() != 0;) backoff.pause();
}

void Pool::help(int worker) {
    uint32_t seen = 0;
    for (;;) {
        Backoff backoff;
        uint32_t phase;
        while ((phase = phase_.load()) == seen || !(phase & 1)) {
            if (stopping_) return;
            if (backoff.exhausted())
                phase_.wait(phase);
            else
                backoff.pause();
        }
        n_inside_.fetch_add(1);
        if (phase_.load() == phase) job_(context_, worker);
        n_inside_.fetch_sub(1);
        seen = phase;
    }
}

namespace {

// The first number in a file, or fallback where the file has none ("max").
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
