// Reductions over a whole threadgroup: scratch holds one value per simdgroup, every thread takes part and gets the
// result.
#pragma once

#include "common.h"

METAL_FUNC float threadgroup_sum(float value, threadgroup float* scratch, uint sg, uint lane, uint n_sg) {
    const float part = simd_sum(value);
    if (lane == 0) scratch[sg] = part;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < n_sg ? scratch[lane] : 0.0f);
}
