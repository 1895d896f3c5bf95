// Reductions over part of a simdgroup and over a whole threadgroup.
#pragma once

#include "common.h"

// The sum over each aligned run of LANES lanes, in all of them.
template <uint LANES>
METAL_FUNC float lanes_sum(float value) {
    UNROLL for (ushort mask = 1; mask < LANES; mask <<= 1) value += simd_shuffle_xor(value, mask);
    return value;
}

// scratch holds one value per simdgroup; every thread takes part and gets the result.
METAL_FUNC float threadgroup_sum(float value, threadgroup float* scratch, uint sg, uint lane, uint n_sg) {
    const float part = simd_sum(value);
    if (lane == 0) scratch[sg] = part;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < n_sg ? scratch[lane] : 0.0f);
}
