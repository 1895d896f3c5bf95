// Atomic operations, which are relaxed and exist for device and threadgroup memory.
#pragma once

#include "types.h"

namespace metal {

#if __METAL_VERSION__ >= 320
enum memory_order {
    memory_order_relaxed,
    memory_order_acquire,
    memory_order_release,
    memory_order_acq_rel,
    memory_order_seq_cst
};
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
enum class mem_flags;
void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device);
#else
enum memory_order { memory_order_relaxed };
#endif

template <class T>
struct atomic {
    static_assert(__is_same(T, int) || __is_same(T, uint) || __is_same(T, bool) || __is_same(T, ulong) ||
                      __is_same(T, float),
                  "MSL has atomics of int, uint, bool, ulong and float");
    T value;
};
template <class T>
using _atomic = atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;

namespace detail {

template <class T>
struct Itself {
    typedef T type;
};
// An operand takes no part in deduction.
template <class T>
using Operand = typename Itself<T>::type;

// Which operations there are (MSL specification, "Atomic functions"): 64 bits have a minimum and a maximum alone, and
// only in device memory; floats are added, and lie in device memory; booleans are loaded, stored and exchanged.
enum { in_device, in_threadgroup };
template <bool b>
struct Only {};
template <>
struct Only<true> {
    typedef void type;
};
template <class T>
constexpr constant bool is_int = __is_same(T, int) || __is_same(T, uint);
template <class T, int space>
using HasValue = typename Only<is_int<T> || __is_same(T, bool) || (__is_same(T, float) && space == in_device)>::type;
template <class T, int space>
using HasSum = typename Only<is_int<T> || (__is_same(T, float) && space == in_device)>::type;
template <class T, int space>
using HasBits = typename Only<is_int<T>>::type;

}  // namespace detail

#define MSL_ATOMIC_FETCH(space, name, Has)                                                                             \
    template <class T, class = detail::Has<T, detail::in_##space>>                                                     \
    T atomic_fetch_##name##_explicit(volatile space atomic<T>*, detail::Operand<T>, memory_order);
#define MSL_ATOMIC(space)                                                                                              \
    template <class T, class = detail::HasValue<T, detail::in_##space>>                                                \
    T atomic_load_explicit(const volatile space atomic<T>*, memory_order);                                             \
    template <class T, class = detail::HasValue<T, detail::in_##space>>                                                \
    void atomic_store_explicit(volatile space atomic<T>*, detail::Operand<T>, memory_order);                           \
    template <class T, class = detail::HasValue<T, detail::in_##space>>                                                \
    T atomic_exchange_explicit(volatile space atomic<T>*, detail::Operand<T>, memory_order);                           \
    template <class T, class = detail::HasValue<T, detail::in_##space>>                                                \
    bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, thread T*, detail::Operand<T>, memory_order, \
                                               memory_order);                                                          \
    MSL_ATOMIC_FETCH(space, add, HasSum)                                                                               \
    MSL_ATOMIC_FETCH(space, sub, HasSum)                                                                               \
    MSL_ATOMIC_FETCH(space, min, HasBits)                                                                              \
    MSL_ATOMIC_FETCH(space, max, HasBits)                                                                              \
    MSL_ATOMIC_FETCH(space, and, HasBits)                                                                              \
    MSL_ATOMIC_FETCH(space, or, HasBits)                                                                               \
    MSL_ATOMIC_FETCH(space, xor, HasBits)
MSL_ATOMIC(device)
MSL_ATOMIC(threadgroup)
void atomic_min_explicit(volatile device atomic<ulong>*, ulong, memory_order);
void atomic_max_explicit(volatile device atomic<ulong>*, ulong, memory_order);

}  // namespace metal
