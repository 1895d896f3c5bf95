// The order of logits: by value, the lowest id among equals, NaN below all numbers.
#pragma once

#include "sort_key.h"

// The largest logit so far, by its sort key.
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
