// simdgroup_matrix: an 8 by 8 matrix over the 32 lanes of a simdgroup. Each lane has two neighbours of a row.
#pragma once

#include "simd_functions.h"

namespace metal {

template <class T, int rows, int cols = rows>
struct simdgroup_matrix {
    static_assert(rows == 8 && cols == 8, "MSL has 8 by 8 matrices");
    static_assert(is_floating_point_v<T>);

    simdgroup_matrix() = default;
    METAL_FUNC explicit simdgroup_matrix(T diagonal);
    METAL_FUNC vec<T, 2>& thread_elements() { return held.change(); }
    METAL_FUNC const vec<T, 2>& thread_elements() const { return held.elements; }

    detail::Held<T> held;  // not MSL's: for the functions below
};

using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

namespace detail {

template <class T>
METAL_FUNC ulong matrix_index(uint lane, uint i, ulong stride, ulong2 origin, bool transpose) {
    const ulong r = matrix_row(lane), c = matrix_col(lane) + i;
    return transpose ? (origin.y + c) * stride + origin.x + r : (origin.y + r) * stride + origin.x + c;
}

}  // namespace detail

template <class T, int rows, int cols>
METAL_FUNC simdgroup_matrix<T, rows, cols>::simdgroup_matrix(T diagonal) {
    const uint lane = detail::current_lane();
    for (uint i = 0; i < 2; i++)
        thread_elements().data[i] = detail::matrix_row(lane) == detail::matrix_col(lane) + i ? diagonal : T(0);
}

template <class T, int rows, int cols = rows>
METAL_FUNC simdgroup_matrix<T, rows, cols> make_filled_simdgroup_matrix(T value) {
    simdgroup_matrix<T, rows, cols> m;
    m.thread_elements() = vec<T, 2>(value);
    return m;
}

// Element (r, c) of the matrix is source[(origin.y + r) * elements_per_row + origin.x + c], or with (c, r) transposed.
template <class T, int rows, int cols>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, rows, cols>& m, const T* source, ulong elements_per_row = cols,
                               ulong2 matrix_origin = 0, bool transpose_matrix = false, MSL_SITE) {
    detail::arrive("simdgroup_load", file, line);
    const uint lane = detail::current_lane();
    const auto elements = [&](bool transpose) {
        vec<T, 2> pair;
        for (uint i = 0; i < 2; i++)
            pair.data[i] = source[detail::matrix_index<T>(lane, i, elements_per_row, matrix_origin, transpose)];
        return pair;
    };
    m.held.load(elements, transpose_matrix);
}

template <class T, int rows, int cols>
METAL_FUNC void simdgroup_store(const simdgroup_matrix<T, rows, cols>& m, T* target, ulong elements_per_row = cols,
                                ulong2 matrix_origin = 0, bool transpose_matrix = false, MSL_SITE) {
    detail::arrive("simdgroup_store", file, line);
    const uint lane = detail::current_lane();
    for (uint i = 0; i < 2; i++)
        target[detail::matrix_index<T>(lane, i, elements_per_row, matrix_origin, transpose_matrix)] =
            m.thread_elements().data[i];
}

template <class D, class A, class B, class C, int rows, int cols>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, rows, cols>& d,
                                              const simdgroup_matrix<A, rows, cols>& a,
                                              const simdgroup_matrix<B, rows, cols>& b,
                                              const simdgroup_matrix<C, rows, cols>& c, MSL_SITE) {
    const vec<C, 2> sum = detail::multiply_accumulate(a.held, b.held, c.thread_elements(), file, line);
    for (uint i = 0; i < 2; i++) d.thread_elements().data[i] = D(float(sum.data[i]));
}

template <class D, class A, class B, int rows, int cols>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, rows, cols>& d, const simdgroup_matrix<A, rows, cols>& a,
                                   const simdgroup_matrix<B, rows, cols>& b, MSL_SITE) {
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, rows, cols>(D(0)), file, line);
}

// c[i] += a[i] b for all i. MSL lacks this function: there it is a loop (kernels/common.h), here a device may do all at
// once.
template <class A, class B, uint M>
METAL_FUNC void multiply_accumulate_each(simdgroup_float8x8 (&c)[M], const simdgroup_matrix<A, 8, 8> (&a)[M],
                                         const simdgroup_matrix<B, 8, 8>& b, MSL_SITE) {
    detail::multiply_accumulate_each(c, a, b, file, line);
}

// Blocks of 8 by 8 N columns, as N matrices: see kernels/common.h, which has these functions for Metal.
template <class T, uint N>
METAL_FUNC void load_columns(simdgroup_matrix<T, 8, 8> (&m)[N], const T* source, ulong stride, MSL_SITE) {
    detail::load_columns(m, source, stride, file, line);
}
template <class T, uint M, uint N>
METAL_FUNC void load_left(simdgroup_matrix<T, 8, 8> (&m)[M][N], const T* source, uint stride, MSL_SITE) {
    detail::load_left(m, source, stride, file, line);
}
template <class T, uint N>
METAL_FUNC void load_right(simdgroup_matrix<T, 8, 8> (&m)[N], const T* source, uint stride, MSL_SITE) {
    detail::load_right(m, source, stride, file, line);
}
template <class T, uint N>
METAL_FUNC void load_right_rows(simdgroup_matrix<T, 8, 8> (&m)[N], const T* source, uint stride, MSL_SITE) {
    detail::load_right_rows(m, source, stride, file, line);
}
// A left block of halves, four columns at a time: f(row, i) has the columns from 4 i on of a row, as two words.
template <uint N, class F>
METAL_FUNC void fill_columns(simdgroup_half8x8 (&m)[N], const F& f) {
    detail::fill_columns(m, f);
}
template <class T, uint N>
METAL_FUNC void load_columns_transposed(simdgroup_matrix<T, 8, 8> (&m)[N], const T* x, ulong stride, uint first, uint n,
                                        MSL_SITE) {
    detail::load_columns_transposed(m, x, stride, first, n, file, line);
}
template <class A, class B, uint M, uint N>
METAL_FUNC void multiply_accumulate_all(simdgroup_float8x8 (&c)[M], const simdgroup_matrix<A, 8, 8> (&a)[M][N],
                                        const simdgroup_matrix<B, 8, 8> (&b)[N], MSL_SITE) {
    detail::multiply_all<true>(c, a, b, file, line);
}
template <class A, class B, uint M, uint N>
METAL_FUNC void multiply_all(simdgroup_float8x8 (&c)[M], const simdgroup_matrix<A, 8, 8> (&a)[M][N],
                             const simdgroup_matrix<B, 8, 8> (&b)[N], MSL_SITE) {
    detail::multiply_all<false>(c, a, b, file, line);
}
template <uint N, uint M>
METAL_FUNC void scale_rows(simdgroup_float8x8 (&c)[N][M], const float* diagonals, MSL_SITE) {
    detail::arrive("scale_rows", file, line);
#pragma unroll
    for (uint m = 0; m < M; m++) {
        const float factor = diagonals[64 * m + 9 * detail::matrix_row(detail::current_lane())];
#pragma unroll
        for (uint i = 0; i < N; i++) c[i][m].thread_elements() *= factor;
    }
}
template <uint N>
METAL_FUNC void sum_columns(simdgroup_float8x8& c, const simdgroup_float8x8 (&b)[N], MSL_SITE) {
    detail::sum_columns(c, b, file, line);
}

}  // namespace metal
