// The names of simd.h, which Apple's compiler has for kernels too.
#pragma once

#include "../types.h"

namespace simd {
using namespace metal;
}

#define MSL_SIMD_NAMES(T)                                                                                              \
    typedef metal::vec<T, 2> simd_##T##2, vector_##T##2;                                                               \
    typedef metal::vec<T, 3> simd_##T##3, vector_##T##3;                                                               \
    typedef metal::vec<T, 4> simd_##T##4, vector_##T##4;
MSL_INTEGERS(MSL_SIMD_NAMES)
MSL_FLOATS(MSL_SIMD_NAMES)
#define MSL_SIMD_MATRIX_NAMES(N) typedef metal::matrix<float, N, N> simd_float##N##x##N, matrix_float##N##x##N;
MSL_SIMD_MATRIX_NAMES(2)
MSL_SIMD_MATRIX_NAMES(3)
MSL_SIMD_MATRIX_NAMES(4)
