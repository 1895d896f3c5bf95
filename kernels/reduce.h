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

// The sum of x over the threads before this one. sums holds one value per simdgroup. total becomes the sum of all.
METAL_FUNC uint threadgroup_prefix(uint x, threadgroup uint* sums, thread uint& total, uint sg, uint lane, uint n_sg) {
    const uint before = simd_prefix_exclusive_sum(x);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last call's sums have been read
    if (lane == SIMD - 1) sums[sg] = before + x;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint part = lane < n_sg ? sums[lane] : 0;
    total = simd_sum(part);
    return before + simd_sum(lane < sg ? part : 0);
}
