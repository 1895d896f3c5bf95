// Atomic integers and floats in device and threadgroup memory; relaxed, as in MSL. Each lane has its own operations.
#pragma once

#include "scalar.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
    T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_ulong = atomic<ulong>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;

}  // namespace metal

#ifdef __CUDACC__
#include "atomics_cuda.h"
#else
#include "atomics_cpu.h"
#endif
