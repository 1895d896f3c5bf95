// A long context: the keys of a row are divided among threadgroups.
#pragma once

#include "attention.h"

// The shares that the keys of a row are divided into, in runs of ATTENTION_SPLIT_KEYS: at most n_split, none empty.
struct KeyParts {
    KeyRange range;
    uint first_run, n_runs, n;

    METAL_FUNC KeyRange part(uint i) {
        const uint begin = first_run + n_runs * i / n, end = first_run + n_runs * (i + 1) / n;
        return {max(range.begin, begin * ATTENTION_SPLIT_KEYS), min(range.end, end * ATTENTION_SPLIT_KEYS)};
    }
};

METAL_FUNC KeyParts key_parts(KeyRange range, uint n_split) {
    const uint first_run = range.begin / ATTENTION_SPLIT_KEYS,
               n_runs = (range.end - 1) / ATTENTION_SPLIT_KEYS + 1 - first_run;
    return {range, first_run, n_runs, min(n_split, n_runs)};
}

// The result of a share, one of [T * n_head, n_split], begins at part_at(...), in float4s. It is the head vector, dim4
// of them, unnormalised, and one more. That has the largest score, the sum of the weights relative to that score, and
// two unused floats. row: t * n_head + head.
METAL_FUNC ulong part_at(ulong row, uint n_split, uint part, uint dim4) { return (row * n_split + part) * (dim4 + 1); }
