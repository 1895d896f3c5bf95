// The matrices of a stack: up to STACK_MATRICES on the same activations, in one dispatch. A simdgroup works on rows of
// one matrix, or of both matrices of a pair. The matrices follow each other in the order of the simdgroups.
#pragma once

#include "mul_mv_rows.h"

METAL_FUNC bool is_pair(constant StackParams& p, uint i) { return p.pair && i == 2; }

// Simdgroups of matrix i. Matrix 3 of a pair has no simdgroups: matrix 2's serve both.
template <uint R>
METAL_FUNC uint stack_tiles(constant StackParams& p, uint i) {
    const uint rows = is_pair(p, i) ? R / 2 : R;
    return p.pair && i == 3 ? 0 : (p.m[i] + rows - 1) / rows;
}

// Threadgroups of matrix i, each of n_sg simdgroups: a threadgroup has rows of one matrix.
template <uint R>
METAL_FUNC uint stack_groups(constant StackParams& p, uint i, uint n_sg) {
    return (stack_tiles<R>(p, i) + n_sg - 1) / n_sg;
}

// Parameters, not an array: registers have no addresses.
template <class T>
METAL_FUNC T one_of(uint i, T a, T b, T c, T d) {
    return i == 0 ? a : i == 1 ? b : i == 2 ? c : d;
}

// Stores the products of a matrix, after its biases.
struct StackOut {
    static constant constexpr uint MATRICES = 1;
    device float* out;
    device const float* bias;
    uint has_bias;

    METAL_FUNC void put(Place p, float a, float) const { out[p.at] = has_bias != 0 ? bias[p.row] + a : a; }
};
