#include "common.h"

// Rotates one head vector of x into out by the angles of its position: pairs (2i, 2i + 1), or with NEOX the halves
// (i, i + n_rot / 2). Each lane writes the elements that it reads, so out may be x.
template <bool NEOX, bool QK_NORM, class Out>
METAL_FUNC void rotate_head(constant RopeKvParams& p, device const float* x, device const float* norm_weight,
                            device const float* freqs, device Out* out, float position, uint lane) {
    float norm = 1.0f;
    if (QK_NORM) {
        float squares = 0.0f;
        for (uint i = lane; i < p.head_dim; i += SIMD) squares += x[i] * x[i];
        norm = precise::rsqrt(simd_sum(squares) / float(p.head_dim) + p.eps);
        simdgroup_barrier(mem_flags::mem_device);  // all of x has been read: out may be x
    }
    const uint n_pairs = p.n_rot / 2;
    for (uint i = lane; i < n_pairs; i += SIMD) {
        const uint ia = NEOX ? i : 2 * i;
        const uint ib = NEOX ? i + n_pairs : 2 * i + 1;
        const float a = x[ia] * (QK_NORM ? norm * norm_weight[ia] : 1.0f);
        const float b = x[ib] * (QK_NORM ? norm * norm_weight[ib] : 1.0f);
        // Angles reach the context length in radians: fast sine and cosine lose all precision there.
        const float angle = position * freqs[i];
        const float c = precise::cos(angle) * p.magnitude;
        const float s = precise::sin(angle) * p.magnitude;
        out[ia] = Out(a * c - b * s);
        out[ib] = Out(a * s + b * c);
    }
    for (uint i = 2 * n_pairs + lane; i < p.head_dim; i += SIMD)
        out[i] = Out(x[i] * (QK_NORM ? norm * norm_weight[i] : 1.0f));
}

// One simdgroup per head vector of a row: the q heads, then the k heads, then the v heads, which are only stored.
template <class KV, bool NEOX, bool QK_NORM>
kernel void rope_kv(constant RopeKvParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                    device const float* q [[buffer(2)]], device const float* k [[buffer(3)]],
                    device const float* v [[buffer(4)]], device const float* freqs [[buffer(5)]],
                    device const float* q_norm [[buffer(6)]], device const float* k_norm [[buffer(7)]],
                    device float* q_out [[buffer(8)]], device KV* k_cache [[buffer(9)]],
                    device KV* v_cache [[buffer(10)]], GRID_IDS) {
    const uint t = tg.y;
    const uint head = tg.x * n_sg + sg;
    if (t >= step->n_tokens || head >= p.n_head + 2 * p.n_head_kv) return;
    const uint cache_row = step->pos + t;
    const float position = float(cache_row);

    if (head < p.n_head) {
        const ulong at = (ulong(t) * p.n_head + head) * p.head_dim;
        rotate_head<NEOX, QK_NORM>(p, q + at, q_norm, freqs, q_out + at, position, lane);
        return;
    }
    const uint kv_head = (head - p.n_head) % p.n_head_kv;
    const ulong from = (ulong(t) * p.n_head_kv + kv_head) * p.head_dim;
    const ulong to = (ulong(cache_row) * p.n_head_kv + kv_head) * p.head_dim;
    if (head < p.n_head + p.n_head_kv)
        rotate_head<NEOX, QK_NORM>(p, k + from, k_norm, freqs, k_cache + to, position, lane);
    else
        for (uint i = lane; i < p.head_dim; i += SIMD) v_cache[to + i] = KV(v[from + i]);
}

KERNEL("rope_kv_norm_f32", rope_kv<float, false, false>)
KERNEL("rope_kv_norm_f16", rope_kv<half, false, false>)
KERNEL("rope_kv_neox_f32", rope_kv<float, true, false>)
KERNEL("rope_kv_neox_f16", rope_kv<half, true, false>)
KERNEL("rope_kv_norm_f32_qknorm", rope_kv<float, false, true>)
KERNEL("rope_kv_norm_f16_qknorm", rope_kv<half, false, true>)
KERNEL("rope_kv_neox_f32_qknorm", rope_kv<float, true, true>)
KERNEL("rope_kv_neox_f16_qknorm", rope_kv<half, true, true>)
