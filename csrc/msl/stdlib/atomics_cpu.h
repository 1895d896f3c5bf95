// Operations on atomics for the CPU.
#pragma once

#include "atomics.h"

namespace metal {

template <class T>
METAL_FUNC T atomic_load_explicit(const volatile atomic<T>* a, memory_order) {
    T value;
    __atomic_load(&a->value, &value, __ATOMIC_RELAXED);
    return value;
}
template <class T>
METAL_FUNC void atomic_store_explicit(volatile atomic<T>* a, std::type_identity_t<T> value, memory_order) {
    __atomic_store(&a->value, &value, __ATOMIC_RELAXED);
}
template <class T>
METAL_FUNC T atomic_exchange_explicit(volatile atomic<T>* a, std::type_identity_t<T> value, memory_order) {
    T before;
    __atomic_exchange(&a->value, &value, &before, __ATOMIC_RELAXED);
    return before;
}
template <class T>
METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* a, T* expected,
                                                      std::type_identity_t<T> desired, memory_order, memory_order) {
    return __atomic_compare_exchange(&a->value, expected, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

// Returns the old value. Retries until no other thread came between.
#define MSL_FETCH(name, expression)                                                                                    \
    template <class T>                                                                                                 \
    METAL_FUNC T atomic_fetch_##name##_explicit(volatile atomic<T>* a, std::type_identity_t<T> y, memory_order) {      \
        T x = atomic_load_explicit(a, memory_order_relaxed);                                                           \
        while (!atomic_compare_exchange_weak_explicit(a, &x, T(expression), memory_order_relaxed,                      \
                                                      memory_order_relaxed)) {                                         \
        }                                                                                                              \
        return x;                                                                                                      \
    }
MSL_FETCH(add, x + y)
MSL_FETCH(sub, x - y)
MSL_FETCH(min, y < x ? y : x)
MSL_FETCH(max, x < y ? y : x)
MSL_FETCH(and, (x & y))
MSL_FETCH(or, x | y)
MSL_FETCH(xor, x ^ y)
#undef MSL_FETCH

}  // namespace metal
