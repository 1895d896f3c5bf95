#include "sort_key.h"
#include "shapes.h"

constant constexpr uint TOP_K_EXPERTS = 1024;  // at most

// How many experts come before expert i: those of a larger key, and the same key with a lower id.
METAL_FUNC uint rank_of(uint i, threadgroup const uint* keys, uint n_expert) {
    const uint key = keys[i];
    uint rank = 0;
    for (uint j = 0; j < i; j++) rank += keys[j] >= key;
    for (uint j = i + 1; j < n_expert; j++) rank += keys[j] > key;
    return rank;
}

// Which experts a row of the step meets: the n_used with the largest logits, NaN after all numbers, and their shares of
// a softmax over them (one over all experts, divided by what the chosen ones have of it, is the same). A threadgroup
// takes a row.
template <class T>
kernel void moe_topk(constant TopKParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const T* logits [[buffer(2)]], device const T* shared_logit [[buffer(3)]],
                     device int* ids [[buffer(4)]], device T* weights [[buffer(5)]], GRID_IDS) {
    TG_ARRAY(uint, keys, TOP_K_EXPERTS);
    TG_ARRAY(uint, chosen, SIMD);  // by rank
    if (tg.x >= step->n_tokens) return;
    device const T* row = logits + ulong(tg.x) * p.n_expert;
    for (uint i = tid; i < p.n_expert; i += n_sg * SIMD) keys[i] = sort_key(row[i]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = tid; i < p.n_expert; i += n_sg * SIMD) {
        const uint rank = rank_of(i, keys, p.n_expert);
        if (rank < p.n_used) chosen[rank] = i;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg != 0) return;

    const uint expert = lane < p.n_used ? chosen[lane] : 0;
    const uint key = lane < p.n_used ? keys[expert] : 0;
    // What is no number, and so has the key 0, has no share.
    const float largest = value_of_sort_key(simd_max(key));
    const float share = key != 0 ? precise::exp(value_of_sort_key(key) - largest) : 0.0f;
    const float total = simd_sum(share);
    device T* out = weights + ulong(tg.x) * (p.n_used + 1);
    if (lane < p.n_used) {
        ids[ulong(tg.x) * p.n_used + lane] = int(expert);
        out[lane] = p.scale * share / total;
    }
    if (lane == 0) out[p.n_used] = p.has_shared ? 1.0f / (1.0f + precise::exp(-shared_logit[tg.x])) : 0.0f;
}

KERNEL("moe_topk", moe_topk<float>)
