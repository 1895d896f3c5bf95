// Floats as integers of the same order. Integer compares keep their meaning under fast math, float compares with NaN
// do not.
#pragma once

#include "common.h"

// NaN is 0, below -inf; -0 is equal to +0.
METAL_FUNC uint sort_key(float x) {
    const uint bits = as_type<uint>(x);
    const uint magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0;
    if (magnitude == 0) return 0x80000000u;
    return bits == magnitude ? bits | 0x80000000u : ~bits;
}

// The key 0 gives the NaN whose bits are all set.
METAL_FUNC float value_of_sort_key(uint key) { return as_type<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

METAL_FUNC bool is_finite_bits(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }
