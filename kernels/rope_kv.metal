// RMSNorm (if the model has one per head) and rotary embedding of the query and key heads. Stores the step's keys and
// values in the cache. Values may have a norm too, without a weight.
#include "kv_cache.h"
#include "temperature.h"

constant constexpr uint MAX_HEAD_DIM = 512;

// 1 / sqrt(mean(x^2) + eps) of a head.
METAL_FUNC float head_scale(constant RopeKvParams& p, device const float* x, uint lane) {
    float squares = 0.0f;
    for (uint i = lane; i < p.head_dim; i += SIMD) squares += x[i] * x[i];
    return precise::rsqrt(simd_sum(squares) / float(p.head_dim) + p.eps);
}

// head = scale * x, normalised or as it is.
template <bool QK_NORM>
METAL_FUNC void load_head(constant RopeKvParams& p, device const float* x, device const float* norm_weight, float scale,
                          threadgroup float* head, uint lane) {
    if (QK_NORM) scale *= head_scale(p, x, lane);
    for (uint i = lane; i < p.head_dim; i += SIMD) head[i] = x[i] * (QK_NORM ? scale * norm_weight[i] : scale);
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Rotates the first n_rot elements by the angles of a position, in pairs (2i, 2i + 1), or with NEOX (i, i + n_rot / 2).
template <bool NEOX>
METAL_FUNC void rotate_head(constant RopeKvParams& p, device const float* freqs, float position,
                            threadgroup float* head, uint lane) {
    const uint n_pairs = p.n_rot / 2;
    for (uint i = lane; i < n_pairs; i += SIMD) {
        const uint ia = NEOX ? i : 2 * i;
        const uint ib = NEOX ? i + n_pairs : 2 * i + 1;
        const float a = head[ia], b = head[ib];
        // Angles reach the context length in radians: fast sine and cosine lose all precision there.
        const float angle = position * freqs[i];
        const float c = precise::cos(angle) * p.magnitude;
        const float s = precise::sin(angle) * p.magnitude;
        head[ia] = a * c - b * s;
        head[ib] = a * s + b * c;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

template <class KV>
METAL_FUNC void store_head(constant RopeKvParams& p, threadgroup const float* head, device typename KV::Unit* out,
                           uint lane) {
    for (uint i = lane; i < p.head_dim; i += SIMD) KV::put(out, i, head[i]);
}

// One simdgroup per head vector of a row: the q heads, then the k heads, then the v heads, which do not rotate. q_out
// may be q: a lane writes only the elements that it has read. k and v may be one.
// Grid: (n_head + 2 n_head_kv, T). Threads: 32.
template <class KV, bool NEOX, bool QK_NORM>
kernel void rope_kv(constant RopeKvParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                    device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                    device const float* q [[buffer(4)]], device const float* k [[buffer(5)]],
                    device const float* v [[buffer(6)]], device const float* freqs [[buffer(7)]],
                    device const float* q_norm [[buffer(8)]], device const float* k_norm [[buffer(9)]],
                    device float4* q_out [[buffer(10)]], device typename KV::Unit* k_cache [[buffer(11)]],
                    device typename KV::Unit* v_cache [[buffer(12)]], GRID_IDS) {
    TG_ARRAY(float, head, MAX_HEAD_DIM);
    const uint t = tg.y;
    const uint pos = rows[t].pos, table = rows[t].pages;  // before the branch: these loads wait for no other
    if (t >= step->n_tokens) return;
    const float position = float(pos);

    if (tg.x < p.n_head) {
        const ulong row = ulong(t) * p.n_head + tg.x;
        load_head<QK_NORM>(p, q + row * p.q_stride, q_norm, q_scale(p, pos), head, lane);
        rotate_head<NEOX>(p, freqs, position, head, lane);
        store_head<CacheF32>(p, head, q_out + row * (p.head_dim / 4), lane);
        return;
    }
    const uint kv_head = (tg.x - p.n_head) % p.n_head_kv;
    const ulong from = (ulong(t) * p.n_head_kv + kv_head) * p.head_dim;
    const ulong to = (cache_row(pages + table, pos) * p.n_head_kv + kv_head) * (p.head_dim / KV::ELEMENTS);
    if (tg.x < p.n_head + p.n_head_kv) {
        load_head<QK_NORM>(p, k + from, k_norm, 1.0f, head, lane);
        rotate_head<NEOX>(p, freqs, position, head, lane);
        store_head<KV>(p, head, k_cache + to, lane);
    } else {
        const float norm = p.v_norm ? head_scale(p, v + from, lane) : 1.0f;
        for (uint i = lane; i < p.head_dim; i += SIMD) KV::put(v_cache + to, i, norm * v[from + i]);
    }
}

#define ROPE_KV(name, KV)                                                                                              \
    KERNEL("rope_kv_norm_" name, rope_kv<KV, false, false>)                                                            \
    KERNEL("rope_kv_neox_" name, rope_kv<KV, true, false>)                                                             \
    KERNEL("rope_kv_norm_" name "_qknorm", rope_kv<KV, false, true>)                                                   \
    KERNEL("rope_kv_neox_" name "_qknorm", rope_kv<KV, true, true>)

ROPE_KV("f32", CacheF32)
ROPE_KV("f16", CacheF16)
ROPE_KV("q8_0", CacheQ8_0)
