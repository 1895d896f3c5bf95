// Included by every kernel file. Under Metal the macros below are plain MSL; elsewhere the stand-in metal_stdlib
// (csrc/msl/stdlib) defines the same macros. There a kernel launches through a C++ template on its signature.
//
// The shape of a kernel, everywhere:
//   template <...>
//   kernel void name(constant XParams& p [[buffer(0)]], device const T* a [[buffer(1)]], ...,
//                    device U* out [[buffer(n)]], GRID_IDS) { ... }
//   KERNEL("name_variant", name<...>)      or KERNEL_UNROLLED, see UNROLL_BY
// Parameter order is buffer index; params come first. Threadgroups are one-dimensional, a multiple of 32 threads. A
// line before each kernel says how it is launched: the grid in threadgroups, and the threads of one. T is the number of
// rows of the plan, n_sg the simdgroups of a threadgroup, ceil() rounds up. Other names are parameters of the kernel or
// constants of shapes.h.
#pragma once

#include <metal_stdlib>
#include "params.h"

using namespace metal;

// COOPERATIVE: there are Metal 4's tensor operations. Whoever compiles for Metal says so. The CPU lane has a stand-in.
#ifndef __METAL_VERSION__
#ifndef __CUDACC__
#define COOPERATIVE 1
#endif
#endif

// Before a loop of constant length over an array that must live in registers.
#ifdef __METAL_VERSION__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("unroll")
#endif

// Before a loop that NVIDIA's compiler must unroll by n: then the loads of n steps are under way at once. n = 1 leaves
// the loop as it is. A kernel with a loop like this is named by KERNEL_UNROLLED(n, ..). Other compilers decide for
// themselves.
#ifdef __CUDACC__
#define ZINC_PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) ZINC_PRAGMA(unroll n)
#else
#define UNROLL_BY(n)
#endif

#ifdef __METAL_VERSION__
#define KERNEL(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
#define KERNEL_UNROLLED(n, name, ...) KERNEL(name, __VA_ARGS__)

// tg: this threadgroup's position, n_tg: threadgroups in the grid, tid: thread in its threadgroup,
// sg: simdgroup in its threadgroup, lane: thread in its simdgroup, n_sg: simdgroups in a threadgroup.
#define GRID_IDS                                                                                                       \
    uint3 tg [[threadgroup_position_in_grid]], uint3 n_tg [[threadgroups_per_grid]],                                   \
        uint tid [[thread_index_in_threadgroup]], uint sg [[simdgroup_index_in_threadgroup]],                          \
        uint lane [[thread_index_in_simdgroup]], uint n_sg [[simdgroups_per_threadgroup]]

// c[i] += a[i] b for all i. The stand-in has a separate version: a device may do all products at once.
template <class A, class B, uint M>
METAL_FUNC void multiply_accumulate_each(thread simdgroup_float8x8 (&c)[M], thread simdgroup_matrix<A, 8, 8> (&a)[M],
                                         thread simdgroup_matrix<B, 8, 8>& b) {
    UNROLL for (uint i = 0; i < M; i++) simdgroup_multiply_accumulate(c[i], a[i], b, c[i]);
}

// Two bytes of a word, the lower or the upper two, each below the byte `over`. For the stand-in it is one instruction.
METAL_FUNC uint spread_bytes(uint word, bool upper, uint over) {
    const uint two = upper ? word >> 16 : word;
    return (two & 0xFF) | (two << 8 & 0xFF0000) | over << 8 | over << 24;
}

// Blocks of 8 by 8 N columns, as N matrices: eight rows of a left matrix, or eight columns of a right one, which lie in
// memory as rows. A device may deal the columns to the matrices in another order, for both sides the same.
template <class T, uint N>
METAL_FUNC void load_columns(thread simdgroup_matrix<T, 8, 8> (&m)[N], threadgroup const T* source, ulong stride) {
    UNROLL for (uint i = 0; i < N; i++) simdgroup_load(m[i], source + 8 * i, stride);
}
// The same from matrices that lie one after the other, rows by rows. stride: from eight columns to the next eight.
template <class T, uint M, uint N>
METAL_FUNC void load_left(thread simdgroup_matrix<T, 8, 8> (&m)[M][N], threadgroup const T* source, uint stride) {
    UNROLL for (uint i = 0; i < M; i++) {
        UNROLL for (uint j = 0; j < N; j++) simdgroup_load(m[i][j], source + j * stride + 64 * i, 8);
    }
}
template <class T, uint N>
METAL_FUNC void load_right(thread simdgroup_matrix<T, 8, 8> (&m)[N], threadgroup const T* source, uint stride) {
    UNROLL for (uint j = 0; j < N; j++) simdgroup_load(m[j], source + j * stride, 8, ulong2(0), true);
}
// The same, for right matrices that lie row by row.
template <class T, uint N>
METAL_FUNC void load_right_rows(thread simdgroup_matrix<T, 8, 8> (&m)[N], threadgroup const T* source, uint stride) {
    UNROLL for (uint j = 0; j < N; j++) simdgroup_load(m[j], source + j * stride, 8);
}
// The columns of a right matrix are the rows from `first` on of the n rows of x; there must be eight. The stand-in
// takes fewer: then the last of them stands for those that lack.
template <class T, uint N>
METAL_FUNC void load_columns_transposed(thread simdgroup_matrix<T, 8, 8> (&m)[N], device const T* x, ulong stride,
                                        uint first, uint) {
    UNROLL for (uint i = 0; i < N; i++) {
        simdgroup_load(m[i], x + ulong(first) * stride + 8 * i, stride, ulong2(0), true);
    }
}

// Copies eight bytes to threadgroup memory. A device may do it later: end_copies makes the copies of a thread since the
// last a group, and wait_for_copies waits for all groups but the last N.
METAL_FUNC void copy_eight(threadgroup uint2* to, device const uint2* from) { *to = *from; }
METAL_FUNC void end_copies() {}
template <uint N>
METAL_FUNC void wait_for_copies() {}

// c[i] += the products of blocks, sum of a[i][j] b[j]. And without what c was.
template <class A, class B, uint M, uint N>
METAL_FUNC void multiply_accumulate_all(thread simdgroup_float8x8 (&c)[M], thread simdgroup_matrix<A, 8, 8> (&a)[M][N],
                                        thread simdgroup_matrix<B, 8, 8> (&b)[N]) {
    UNROLL for (uint i = 0; i < M; i++) {
        UNROLL for (uint j = 0; j < N; j++) simdgroup_multiply_accumulate(c[i], a[i][j], b[j], c[i]);
    }
}
template <class A, class B, uint M, uint N>
METAL_FUNC void multiply_all(thread simdgroup_float8x8 (&c)[M], thread simdgroup_matrix<A, 8, 8> (&a)[M][N],
                             thread simdgroup_matrix<B, 8, 8> (&b)[N]) {
    UNROLL for (uint i = 0; i < M; i++) c[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    multiply_accumulate_all(c, a, b);
}

// Multiplies row r of c[i][m], for all i, by element (r, r) of the m-th of the diagonal matrices.
template <uint N, uint M>
METAL_FUNC void scale_rows(thread simdgroup_float8x8 (&c)[N][M], threadgroup const float* diagonals) {
    UNROLL for (uint m = 0; m < M; m++) {
        simdgroup_float8x8 d;
        simdgroup_load(d, diagonals + 64 * m, 8);
        UNROLL for (uint i = 0; i < N; i++) simdgroup_multiply(c[i][m], d, c[i][m]);
    }
}

// Every row of c becomes the sums of the columns of a block.
template <uint N>
METAL_FUNC void sum_columns(thread simdgroup_float8x8& c, thread simdgroup_float8x8 (&b)[N]) {
    const simdgroup_float8x8 ones = make_filled_simdgroup_matrix<float, 8>(1.0f);
    c = make_filled_simdgroup_matrix<float, 8>(0.0f);
    UNROLL for (uint j = 0; j < N; j++) simdgroup_multiply_accumulate(c, ones, b[j], c);
}

// An array in threadgroup memory, shared by the threads of a threadgroup; declared in the kernel function itself.
#define TG_ARRAY(T, name, n) threadgroup T name[n]
#endif

METAL_FUNC float silu(float x) { return x / (1.0f + precise::exp(-x)); }

// GELU by its tanh formula x / 2 (1 + tanh u), which is x sigmoid(2 u).
METAL_FUNC float gelu(float x) {
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + precise::exp(-2.0f * u));
}

// SwiGLU with clamped factors and a shifted one (gpt-oss).
METAL_FUNC float swiglu_clamped(float gate, float up) {
    const float g = min(gate, 7.0f), u = clamp(up, -7.0f, 7.0f);
    return g / (1.0f + precise::exp(-1.702f * g)) * (u + 1.0f);
}

// Squared ReLU.
METAL_FUNC float relu2(float x) {
    const float positive = max(x, 0.0f);
    return positive * positive;
}

// Activations as types, for templates.
struct Silu {
    static METAL_FUNC float apply(float x) { return silu(x); }
};

struct Gelu {
    static METAL_FUNC float apply(float x) { return gelu(x); }
};

constant constexpr uint SIMD = 32;  // threads in a simdgroup, on Apple GPUs and NVIDIA's alike
