#include "host/bus_guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <new>

#include <cerrno>

namespace zinc {
namespace {

constexpr size_t MENDED_BYTES = 2 << 20;  // at a time: most often all following bytes are gone too

const size_t page = size_t(sysconf(_SC_PAGESIZE));
std::atomic<GuardedMap*> maps{nullptr};
std::mutex& opening = *new std::mutex;

struct sigaction before;        // the handler that was there
volatile sig_atomic_t passing;  // to that handler: it may fault
volatile sig_atomic_t passed;   // a fault to that handler: it may send the signal again, to the handler before it

void pass_on(int number, siginfo_t* info, void* context) {
    const bool sent = info->si_code <= 0;
    if (passing || (sent && passed) || before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
        signal(number, SIG_DFL);  // the instruction faults again, or the signal is sent again, and the process ends
        if (sent) raise(number);
        return;
    }
    passing = 1;
    passed = passed || !sent;
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else
        before.sa_handler(number);
    passing = 0;
}

// si_code is positive if the hardware raised the fault, and not a kill().
void handle(int number, siginfo_t* info, void* context) {
    const int saved = errno;
    if (info->si_code <= 0 || !GuardedMap::mend(info->si_addr)) pass_on(number, info, context);
    errno = saved;
}

}  // namespace

void arm_bus_guard() {
    const std::lock_guard lock(opening);
    struct sigaction now{};
    sigaction(SIGBUS, nullptr, &now);
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == handle) return;
    before = now;
    struct sigaction ours{};
    ours.sa_sigaction = handle;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, nullptr);
}

GuardedMap* GuardedMap::open(int fd, size_t bytes, const char* path) {
    void* memory = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) return nullptr;
    arm_bus_guard();
    const std::lock_guard lock(opening);
    GuardedMap* map = unused();
    if (!map) {
        munmap(memory, bytes);
        errno = ENOMEM;
        return nullptr;
    }
    map->bytes_ = bytes;
    map->damage_.path = path;
    map->damage_.damaged = false;
    map->end_ = reinterpret_cast<uintptr_t>(memory) + (bytes + page - 1) / page * page;
    map->begin_ = reinterpret_cast<uintptr_t>(memory);
    return map;
}

GuardedMap* GuardedMap::unused() {
    for (GuardedMap* map = maps; map; map = map->next_)
        if (map->begin_ == 0) return map;
    auto* map = new (std::nothrow) GuardedMap;
    if (!map) return nullptr;
    map->next_ = maps;
    maps = map;
    return map;
}

void GuardedMap::close() {
    const std::lock_guard lock(opening);
    munmap(memory(), bytes_);
    begin_ = 0;
}

bool GuardedMap::mend(const void* address) {
    const auto at = reinterpret_cast<uintptr_t>(address) / page * page;
    for (GuardedMap* map = maps; map; map = map->next_) {
        const uintptr_t begin = map->begin_, end = map->end_;
        if (begin == 0 || at < begin || at >= end) continue;
        const size_t n = std::min(end - at, MENDED_BYTES);
        constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (mmap(reinterpret_cast<void*>(at), n, PROT_READ, flags, -1, 0) == MAP_FAILED) return false;
        map->damage_.damaged = true;
        return true;
    }
    return false;
}

}  // namespace zinc
