// Operations on atomics for CUDA.
#pragma once

#include "atomics.h"

namespace metal {

namespace detail {

// CUDA's functions know unsigned long long, not unsigned long, for 64 bits.
template <class T>
struct AtomicOf {
    using type = T;
};
template <>
struct AtomicOf<ulong> {
    using type = unsigned long long;
};
template <class T>
METAL_FUNC auto address(volatile atomic<T>* a) {
    return (typename AtomicOf<T>::type*)&a->value;
}

}  // namespace detail

template <class T>
METAL_FUNC T atomic_load_explicit(const volatile atomic<T>* a, memory_order) {
    return a->value;
}
template <class T>
METAL_FUNC void atomic_store_explicit(volatile atomic<T>* a, std::type_identity_t<T> value, memory_order) {
    a->value = value;
}

#define MSL_ATOMIC(name, function)                                                                                     \
    template <class T>                                                                                                 \
    METAL_FUNC T name(volatile atomic<T>* a, std::type_identity_t<T> y, memory_order) {                                \
        return T(function(detail::address(a), typename detail::AtomicOf<T>::type(y)));                                 \
    }
MSL_ATOMIC(atomic_exchange_explicit, atomicExch)
MSL_ATOMIC(atomic_fetch_add_explicit, atomicAdd)
MSL_ATOMIC(atomic_fetch_min_explicit, atomicMin)
MSL_ATOMIC(atomic_fetch_max_explicit, atomicMax)
MSL_ATOMIC(atomic_fetch_and_explicit, atomicAnd)
MSL_ATOMIC(atomic_fetch_or_explicit, atomicOr)
MSL_ATOMIC(atomic_fetch_xor_explicit, atomicXor)
#undef MSL_ATOMIC

template <class T>
METAL_FUNC T atomic_fetch_sub_explicit(volatile atomic<T>* a, std::type_identity_t<T> y, memory_order order) {
    return atomic_fetch_add_explicit(a, T(-y), order);
}

template <class T>
METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* a, T* expected,
                                                      std::type_identity_t<T> desired, memory_order, memory_order) {
    using U = std::conditional_t<std::is_same_v<T, float>, uint, typename detail::AtomicOf<T>::type>;
    const U before = atomicCAS((U*)&a->value, as_type<U>(*expected), as_type<U>(desired));
    const bool exchanged = before == as_type<U>(*expected);
    *expected = as_type<T>(before);
    return exchanged;
}

}  // namespace metal
