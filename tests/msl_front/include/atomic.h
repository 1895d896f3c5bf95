// Atomic operations, which are relaxed and exist for device and threadgroup memory.
#pragma once

#include "types.h"

namespace metal {

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

}  // namespace detail

#define MSL_ATOMIC_FETCH(space, name)                                                                                  \
    template <class T>                                                                                                 \
    T atomic_fetch_##name##_explicit(volatile space atomic<T>*, detail::Operand<T>, memory_order);
#define MSL_ATOMIC(space)                                                                                              \
    template <class T>                                                                                                 \
    T atomic_load_explicit(const volatile space atomic<T>*, memory_order);                                             \
    template <class T>                                                                                                 \
    void atomic_store_explicit(volatile space atomic<T>*, detail::Operand<T>, memory_order);                           \
    template <class T>                                                                                                 \
    T atomic_exchange_explicit(volatile space atomic<T>*, detail::Operand<T>, memory_order);                           \
    template <class T>                                                                                                 \
    bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, thread T*, detail::Operand<T>, memory_order, \
                                               memory_order);                                                          \
    MSL_ATOMIC_FETCH(space, add)                                                                                       \
    MSL_ATOMIC_FETCH(space, sub)                                                                                       \
    MSL_ATOMIC_FETCH(space, min)                                                                                       \
    MSL_ATOMIC_FETCH(space, max)                                                                                       \
    MSL_ATOMIC_FETCH(space, and)                                                                                       \
    MSL_ATOMIC_FETCH(space, or)                                                                                        \
    MSL_ATOMIC_FETCH(space, xor)
MSL_ATOMIC(device)
MSL_ATOMIC(threadgroup)

}  // namespace metal
