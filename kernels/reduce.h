// Reductions over some lanes of a simdgroup and over a whole threadgroup.
#pragma once

#include "common.h"

// The sum over each aligned run of LANES lanes, for every lane of the run.
template <uint LANES>
METAL_FUNC float lanes_sum(float value) {
    UNROLL for (ushort mask = 1; mask < LANES; mask <<= 1) value += simd_shuffle_xor(value, mask);
    return value;
}

// The sum over a threadgroup. scratch holds one value per simdgroup. Every thread must call it and gets the result.
template <class T>
METAL_FUNC T threadgroup_sum(T value, threadgroup T* scratch, uint sg, uint lane, uint n_sg) {
    const T part = simd_sum(value);
    if (lane == 0) scratch[sg] = part;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < n_sg ? scratch[lane] : T(0));
}

// The largest value in a threadgroup, with the rules of the sum.
METAL_FUNC uint threadgroup_max(uint value, threadgroup uint* scratch, uint sg, uint lane, uint n_sg) {
    const uint part = simd_max(value);
    if (lane == 0) scratch[sg] = part;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_max(lane < n_sg ? scratch[lane] : 0u);
}
