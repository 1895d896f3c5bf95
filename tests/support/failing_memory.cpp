// Loaded before a program (LD_PRELOAD): fails allocations that one library asks for, by their number.
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>
#include <new>
#include <sys/mman.h>

extern "C" void* __libc_malloc(size_t);

namespace {

std::atomic<uintptr_t> low{0}, high{0};
std::atomic<long> number{0}, first{0};  // first: 0 fails none
std::atomic<bool> all{false}, failed{false};

bool fails(void* caller) {
    const auto at = reinterpret_cast<uintptr_t>(caller);
    if (!first || at < low || at >= high) return false;
    const long n = ++number;
    if (n != first && !(all && n > first)) return false;
    failed = true;
    return true;
}

}  // namespace

#define CALLER __builtin_return_address(0)

extern "C" {

void memory_of(uintptr_t begin, uintptr_t end) { low = begin, high = end; }
void memory_fail(long n, int and_all_after) { failed = false, number = 0, all = and_all_after != 0, first = n; }
int memory_failed() { return failed; }

void* malloc(size_t n) {
    if (!fails(CALLER)) return __libc_malloc(n);
    errno = ENOMEM;
    return nullptr;
}

void* mmap(void* at, size_t n, int protection, int flags, int fd, off_t offset) {
    static const auto real = reinterpret_cast<decltype(&mmap)>(dlsym(RTLD_NEXT, "mmap"));
    if (!fails(CALLER)) return real(at, n, protection, flags, fd, offset);
    errno = ENOMEM;
    return MAP_FAILED;
}

}  // extern "C"

void* operator new(size_t n) {
    void* p = fails(CALLER) ? nullptr : __libc_malloc(n ? n : 1);
    if (!p) throw std::bad_alloc();
    return p;
}
void operator delete(void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
