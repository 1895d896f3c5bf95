// The order of logits: by value, the lowest id among equals. A logit that is not finite is above all numbers, so that
// the host sees it.
#pragma once

#include "sort_key.h"

constant constexpr uint NOT_FINITE = ~0u;  // the key of infinities and NaN, and as a value NaN

METAL_FUNC uint argmax_key(float x) { return is_finite_bits(x) ? sort_key(x) : NOT_FINITE; }

// The largest logit so far, by its key; 0 before there is one.
struct ArgmaxBest {
    uint key = 0;
    uint id = 0;

    METAL_FUNC void offer(uint other_key, uint other_id) {
        if (other_key > key || (other_key == key && other_id < id)) {
            key = other_key;
            id = other_id;
        }
    }
};

METAL_FUNC ArgmaxBest simd_best(ArgmaxBest mine) {
    ArgmaxBest best;
    best.key = simd_max(mine.key);
    best.id = simd_min(mine.key == best.key ? mine.id : ~0u);
    return best;
}
