// Causal attention over the KV cache, with an online softmax. Row t of a step sees positions 0 .. pos + t, or the last
// `window` of them. Heads are grouped: n_head / n_head_kv query heads share a key and value head. Rows start at
// multiples of 16 bytes (q, gate, out, float caches) or 8 (half caches), because head_dim is a multiple of 4.
//
// The kernels come in classes of head_dim: an instance named _128 serves every head_dim in (96, 128].
#pragma once

#include "kv_cache.h"

// Below every score, and finite: fast math may assume that no value is infinite.
constant constexpr float LOWEST_SCORE = -1e38f;
constant constexpr float LOG2_E = 1.44269504088896341f;  // exp(x) = exp2(x * LOG2_E); exp2 is the hardware's

// The positions that the row at `position` sees.
struct KeyRange {
    uint begin, end;
};

METAL_FUNC KeyRange visible_keys(constant AttentionParams& p, uint position) {
    const uint end = position + 1;
    return {p.window != 0 && p.window < end ? end - p.window : 0, end};
}

// Elements 4 i to 4 i + 3 of a head's output times the sigmoid of their gates. row: t * n_head + head.
METAL_FUNC float4 gated(constant AttentionParams& p, device const float4* gate, ulong row, uint i, float4 x) {
    if (p.gate_stride == 0) return x;
    return x / (1.0f + precise::exp(-gate[(row * p.gate_stride + p.head_dim) / 4 + i]));
}

// CLASS(kv, KV, dim) for every type of cache and class of heads.
#define HEAD_CLASSES(CLASS)                                                                                            \
    HEAD_CLASSES_OF(CLASS, "f32", CacheF32)                                                                            \
    HEAD_CLASSES_OF(CLASS, "f16", CacheF16)                                                                            \
    HEAD_CLASSES_OF(CLASS, "q8_0", CacheQ8_0)
