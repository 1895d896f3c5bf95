// Loaded before a program (LD_PRELOAD): fails calls of the system of one kind, by their number, whoever makes them.
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

namespace {

std::atomic<long> number{0}, first{0};  // first: 0 fails none
std::atomic<bool> failed{false};
std::atomic<const char*> chosen{""};

bool fails(const char* name, int error) {
    if (!first || strcmp(name, chosen) != 0) return false;
    if (++number != first) return false;
    failed = true;
    errno = error;
    return true;
}

template <class T>
T real(T, const char* name) {
    return reinterpret_cast<T>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

void calls_fail(const char* name, long n) { first = 0, failed = false, number = 0, chosen = strdup(name), first = n; }
int calls_failed() { return failed; }

int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*work)(void*), void* with) {
    static const auto call = real(&pthread_create, "pthread_create");
    return fails("thread", EAGAIN) ? EAGAIN : call(thread, how, work, with);
}

// Of a file; the allocator maps memory of its own.
void* mmap(void* at, size_t n, int protection, int flags, int fd, off_t offset) {
    static const auto call = real(&mmap, "mmap");
    return fd >= 0 && fails("map", ENOMEM) ? MAP_FAILED : call(at, n, protection, flags, fd, offset);
}

int fcntl64(int fd, int what, ...) {
    static const auto call = reinterpret_cast<int (*)(int, int, ...)>(dlsym(RTLD_NEXT, "fcntl64"));
    va_list arguments;
    va_start(arguments, what);
    void* argument = va_arg(arguments, void*);
    va_end(arguments);
    return what == F_DUPFD_CLOEXEC && fails("duplicate", EMFILE) ? -1 : call(fd, what, argument);
}

int fcntl(int fd, int what, ...) {
    static const auto call = reinterpret_cast<int (*)(int, int, ...)>(dlsym(RTLD_NEXT, "fcntl"));
    va_list arguments;
    va_start(arguments, what);
    void* argument = va_arg(arguments, void*);
    va_end(arguments);
    return what == F_DUPFD_CLOEXEC && fails("duplicate", EMFILE) ? -1 : call(fd, what, argument);
}

int open64(const char* path, int flags, ...) {
    static const auto call = reinterpret_cast<int (*)(const char*, int, ...)>(dlsym(RTLD_NEXT, "open64"));
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    return fails("open", EMFILE) ? -1 : call(path, flags, mode);
}

ssize_t write(int fd, const void* data, size_t n) {
    static const auto call = real(&write, "write");
    return fd > 2 && fails("write", ENOSPC) ? -1 : call(fd, data, n);
}

int rename(const char* from, const char* to) {
    static const auto call = real(&rename, "rename");
    return fails("rename", EACCES) ? -1 : call(from, to);
}

int mkdir(const char* path, mode_t mode) {
    static const auto call = real(&mkdir, "mkdir");
    return fails("mkdir", EACCES) ? -1 : call(path, mode);
}

}  // extern "C"
