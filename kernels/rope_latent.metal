// Divides the queries of latent attention into the part that meets the latent vectors and the part that rotates, which
// it rotates. Stores the step's rows of the cache: the normalised latent vector, then the rotated key of all heads.
#include "kv_cache.h"
#include "temperature.h"

// Element j of x, rotated by the angles of a position, in pairs (2i, 2i + 1).
METAL_FUNC float rotated(constant RopeLatentParams& p, device const float* x, device const float* freqs, float position,
                         uint j) {
    const float a = x[j / 2 * 2], b = x[j / 2 * 2 + 1];
    // Angles reach the context length in radians: fast sine and cosine lose all precision there.
    const float angle = position * freqs[j / 2];
    const float c = precise::cos(angle) * p.magnitude;
    const float s = precise::sin(angle) * p.magnitude;
    return j % 2 == 0 ? a * c - b * s : a * s + b * c;
}

// One simdgroup per head of q, and one for the row of the cache. q has [still | rotating] for each head, kv has
// [latent | rotating].
// Grid: (n_head + 1, T). Threads: 32.
template <class KV>
kernel void rope_latent(constant RopeLatentParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                        device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                        device const float* q [[buffer(4)]], device const float* kv [[buffer(5)]],
                        device const float* norm_weight [[buffer(6)]], device const float* freqs [[buffer(7)]],
                        device float* q_still [[buffer(8)]], device float* q_rot [[buffer(9)]],
                        device typename KV::Unit* cache [[buffer(10)]], GRID_IDS) {
    const uint t = tg.y;
    const uint pos = rows[t].pos, table = rows[t].pages;  // before the branch: these loads wait for no other
    if (t >= step->n_tokens) return;
    const float position = float(pos);

    if (tg.x < p.n_head) {
        const ulong head = ulong(t) * p.n_head + tg.x;
        device const float* from = q + head * (p.n_still + p.n_rot);
        const float scale = q_scale(p, pos);
        for (uint i = lane; i < p.n_still; i += SIMD) q_still[head * p.n_still + i] = scale * from[i];
        for (uint i = lane; i < p.n_rot; i += SIMD)
            q_rot[head * p.n_rot + i] = scale * rotated(p, from + p.n_still, freqs, position, i);
        return;
    }
    device const float* from = kv + ulong(t) * (p.latent + p.n_rot);
    device typename KV::Unit* to = cache + cache_row(pages + table, pos) * ((p.latent + p.n_rot) / KV::ELEMENTS);
    float squares = 0.0f;
    for (uint i = lane; i < p.latent; i += SIMD) squares += from[i] * from[i];
    const float norm = precise::rsqrt(simd_sum(squares) / float(p.latent) + p.eps);
    for (uint i = lane; i < p.latent; i += SIMD) KV::put(to, i, from[i] * norm * norm_weight[i]);
    for (uint i = lane; i < p.n_rot; i += SIMD)
        KV::put(to, p.latent + i, rotated(p, from + p.latent, freqs, position, i));
}

KERNEL("rope_latent_f32", rope_latent<CacheF32>)
KERNEL("rope_latent_f16", rope_latent<CacheF16>)
KERNEL("rope_latent_q8_0", rope_latent<CacheQ8_0>)
