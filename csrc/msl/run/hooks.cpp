// The compiler's thread sanitizer calls these functions at every memory access of a kernel in the checked build. Its
// bounds sanitizer calls them if an index lies outside an array of known size, such as a thread's own array. The
// sanitizers' libraries are not linked: the checker takes their place.
#ifdef ZINC_CHECKED

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "msl/run/executor.h"

using zinc::msl::AccessKind;
using zinc::msl::Executor;

namespace {

void check(const volatile void* address, size_t bytes, AccessKind kind) {
    if (Executor* executor = Executor::current())
        executor->checker().access(const_cast<const void*>(address), bytes, kind);
}

void check_aligned(const volatile void* address, size_t bytes, AccessKind kind) {
    Executor* executor = Executor::current();
    if (!executor) return;
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        executor->checker().misaligned(const_cast<const void*>(address), bytes);
    executor->checker().access(const_cast<const void*>(address), bytes, kind);
}

// The compiler's description of an array, and of the place that indexes it.
struct ArrayType {
    uint16_t kind, info;
    char name[];
};
struct Indexing {
    const char* file;
    uint32_t line, column;
    const ArrayType *array, *index;
};

}  // namespace

void zinc::msl::no_component(uint32_t i, uint32_t n) {
    if (Executor* executor = Executor::current())
        executor->fail("takes component %d of a vector of %u: out of bounds", int32_t(i), n);
}

extern "C" {

void __ubsan_handle_out_of_bounds(const Indexing* at, uintptr_t index) {
    const char* slash = strrchr(at->file, '/');
    if (Executor* executor = Executor::current())
        executor->fail("indexes %.80s with %lld, at %s:%u: out of bounds", at->array->name, (long long)index,
                       slash ? slash + 1 : at->file, at->line);
}

#define HOOKS(bytes)                                                                                                   \
    void __tsan_read##bytes(void* p) { check_aligned(p, bytes, AccessKind::read); }                                    \
    void __tsan_write##bytes(void* p) { check_aligned(p, bytes, AccessKind::write); }                                  \
    void __tsan_unaligned_read##bytes(void* p) { check(p, bytes, AccessKind::read); }                                  \
    void __tsan_unaligned_write##bytes(void* p) { check(p, bytes, AccessKind::write); }                                \
    void __tsan_volatile_read##bytes(void* p) { check_aligned(p, bytes, AccessKind::read); }                           \
    void __tsan_volatile_write##bytes(void* p) { check_aligned(p, bytes, AccessKind::write); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) { check(p, bytes, AccessKind::read); }
void __tsan_write_range(void* p, size_t bytes) { check(p, bytes, AccessKind::write); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Clang sends memory functions here.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    check(from, bytes, AccessKind::read);
    check(to, bytes, AccessKind::write);
    return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    check(from, bytes, AccessKind::read);
    check(to, bytes, AccessKind::write);
    return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
    check(to, bytes, AccessKind::write);
    return memset(to, value, bytes);
}

// The operations that atomics.h uses. One thread runs at a time, but real atomic operations cost nothing more.
#define ATOMIC_HOOKS(bits, T)                                                                                          \
    T __tsan_atomic##bits##_load(const volatile T* p, int) {                                                           \
        check_aligned(p, sizeof(T), AccessKind::atomic);                                                               \
        return __atomic_load_n(p, __ATOMIC_RELAXED);                                                                   \
    }                                                                                                                  \
    void __tsan_atomic##bits##_store(volatile T* p, T value, int) {                                                    \
        check_aligned(p, sizeof(T), AccessKind::atomic_store);                                                         \
        __atomic_store_n(p, value, __ATOMIC_RELAXED);                                                                  \
    }                                                                                                                  \
    T __tsan_atomic##bits##_exchange(volatile T* p, T value, int) {                                                    \
        check_aligned(p, sizeof(T), AccessKind::atomic);                                                               \
        return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);                                                        \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T desired, int, int) {                 \
        check_aligned(p, sizeof(T), AccessKind::atomic);                                                               \
        return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);           \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T desired, int, int) {               \
        return __tsan_atomic##bits##_compare_exchange_weak(p, expected, desired, 0, 0);                                \
    }
ATOMIC_HOOKS(8, uint8_t)
ATOMIC_HOOKS(32, uint32_t)
ATOMIC_HOOKS(64, uint64_t)

}  // extern "C"

#endif
