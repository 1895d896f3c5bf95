// Products of the rows of matrices with one vector of activations, with and without a gate.
#pragma once

#include "cpu/native/dot.h"
#include "cpu/native/norm.h"

namespace zinc {
namespace {

// Rows of k columns each.
struct Matrix {
    const uint8_t* rows;
    uint32_t row_bytes, k;

    const uint8_t* row(uint32_t i) const { return rows + size_t(i) * row_bytes; }
};

// out[0..n) = rows [first, first + n) of w · x.
template <class T>
__attribute__((noinline)) void products(const Matrix& w, uint32_t first, uint32_t n, const float* x, float* out) {
    uint32_t i = 0;
    for (; i + ROWS <= n; i += ROWS) dot_rows<ROWS, T>(w.row(first + i), w.row_bytes, x, w.k, out + i);
    for (; i < n; i++) dot_rows<1, T>(w.row(first + i), w.row_bytes, x, w.k, out + i);
}

// The activations at a binding, or their norm, whose weight the next binding has. p says which. The norm lies in memory
// of this thread.
template <class P>
INLINE const float* maybe_normed(const NativeLaunch& l, const P& p, int binding) {
    const float* x = l.buffer<const float>(binding);
    if (!p.normed) return x;
    float* out = thread_scratch().take<float>(p.k);
    multiply(out, x, rms_scale(x, p.k, p.eps), l.buffer<const float>(binding + 1), p.k);
    return out;
}

template <class P>
INLINE const float* maybe_normed(const NativeLaunch& l, int binding) {
    return maybe_normed(l, l.as<P>(), binding);
}

// Calls f(first, n) for strips of rows.
template <class F>
INLINE void for_strips(uint32_t begin, uint32_t end, F&& f) {
    for (uint32_t r = begin; r < end; r += STRIP) f(r, end - r < STRIP ? end - r : STRIP);
}

// out[i] = activation(gate · x) (up · x) for rows i of [begin, end).
template <class T, vf (*activation)(vf)>
INLINE void gated_products(const Matrix& gate, const Matrix& up, uint32_t begin, uint32_t end, const float* x,
                           float* out) {
    for_strips(begin, end, [&](uint32_t r, uint32_t n) {
        float a[STRIP], b[STRIP];
        products<T>(gate, r, n, x, a);
        products<T>(up, r, n, x, b);
        map_floats(n, out + r, a, b, [](vf g, vf u) { return activation(g) * u; });
    });
}

}  // namespace
}  // namespace zinc
