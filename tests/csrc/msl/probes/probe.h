// Kernels that only the tests run: they put the stand-in metal_stdlib and the checker themselves to the test.
// The lists of operations are the tests' lists too: tests/test_msl.py reads them from these files.
#pragma once

#include "common.h"

struct ProbeParams {
    u32 n;        // elements per operand
    u32 variant;  // which behaviour of a kernel
};

// Components of element i, wherever they lie.
template <class V, int N> struct Components {
    template <class T> static METAL_FUNC V load(device const T* at) {
        V v;
        for (int j = 0; j < N; j++) v[j] = at[j];
        return v;
    }
    template <class T> static METAL_FUNC void store(V v, device T* at) {
        for (int j = 0; j < N; j++) at[j] = T(v[j]);
    }
};
template <class V> struct Components<V, 1> {
    template <class T> static METAL_FUNC V load(device const T* at) { return at[0]; }
    template <class T> static METAL_FUNC void store(V v, device T* at) { at[0] = T(v); }
};

template <class T, int N> struct VectorOf {
    typedef vec<T, N> type;
};
template <class T> struct VectorOf<T, 1> {
    typedef T type;
};
