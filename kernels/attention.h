// Attention over the KV cache, with an online softmax. A row sees the positions of its sequence up to its own, or the
// last `window` of them. With `both_ways` it also sees those after its own, up to the end of its run. Heads are
// grouped: n_head / n_head_kv query heads share a key and value head. Rows start at multiples of 16 bytes (q, gate,
// out, float caches) or 8 (half caches), because head_dim is a multiple of 4.
//
// The kernels come in classes of head_dim: an instance named _128 serves every head_dim in (96, 128].
#pragma once

#include "kv_cache.h"

// Below every score, and finite: fast math may assume that no value is infinite.
constant constexpr float LOWEST_SCORE = -1e38f;
constant constexpr float LOG2_E = 1.44269504088896341f;  // exp(x) = exp2(x * LOG2_E); exp2 is the hardware's

// The positions that the row at `position` sees. `last` is the last position of its run.
struct KeyRange {
    uint begin, end;
};

METAL_FUNC KeyRange visible_keys(constant AttentionParams& p, uint position, uint last) {
    if (p.both_ways != 0) {
        const uint reach = p.window != 0 ? p.window / 2 : last;
        return {position > reach ? position - reach : 0, min(last, position + reach) + 1};
    }
    const uint end = position + 1;
    return {p.window != 0 && p.window < end ? end - p.window : 0, end};
}

// The score of a head's sink, in units of log 2; below every score if it has none.
METAL_FUNC float sink_score(constant AttentionParams& p, device const float* sinks, uint head) {
    return p.has_sinks != 0 ? sinks[head] * LOG2_E : LOWEST_SCORE;
}

// Elements 4 i to 4 i + 3 of a head's output times the sigmoid of their gates. row: t * n_head + head.
METAL_FUNC float4 gated(constant AttentionParams& p, device const float4* gate, ulong row, uint i, float4 x) {
    if (p.gate_stride == 0) return x;
    return x / (1.0f + precise::exp(-gate[((row + 1) * p.gate_stride - p.head_dim) / 4 + i]));
}

// CLASS(kv, KV, dim) for every type of cache and class of heads.
#define HEAD_CLASSES(CLASS)                                                                                            \
    HEAD_CLASSES_OF(CLASS, "f32", CacheF32)                                                                            \
    HEAD_CLASSES_OF(CLASS, "f16", CacheF16)                                                                            \
    HEAD_CLASSES_OF(CLASS, "q8_0", CacheQ8_0)
