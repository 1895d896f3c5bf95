#include "shapes.h"
#include "sort_key.h"

// Chooses the experts of a row, the n_used with the largest logits (NaN after all numbers), and their shares of a
// softmax over the chosen. (A softmax over all experts, divided by its sum over the chosen, gives equal shares.) A
// simdgroup takes a row, and its lanes keep all keys of the row. With so few keys, reading and exchanging them costs
// more than comparing.

// A lane's share of a row of up to MAX logits.
template <uint MAX>
struct LaneKeys {
    static constant constexpr uint N = MAX / SIMD;
    uint of[N];  // of expert lane + j * SIMD: 0 if there is none or it has been taken, else a sort key + 1

    template <class T>
    METAL_FUNC void load(device const T* logits, uint n_expert, uint lane) {
        UNROLL for (uint j = 0; j < N; j++) {
            const uint i = lane + j * SIMD;
            of[j] = i < n_expert ? sort_key(logits[i]) + 1 : 0;
        }
    }

    // The largest key of the simdgroup, and the first expert that has it, which is then taken.
    METAL_FUNC uint take_largest(thread uint& expert, uint lane) {
        uint mine = of[0], slot = 0;
        UNROLL for (uint j = 1; j < N; j++) {
            if (of[j] > mine) {
                mine = of[j];
                slot = j;
            }
        }
        const uint largest = simd_max(mine);
        expert = simd_min(mine == largest ? lane + slot * SIMD : MAX);
        UNROLL for (uint j = 0; j < N; j++) {
            if (expert == lane + j * SIMD) of[j] = 0;
        }
        return largest;
    }
};

// Grid: T. Threads: 32.
template <class T, uint MAX>
kernel void moe_topk(constant TopKParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const T* logits [[buffer(2)]], device const T* shared_logit [[buffer(3)]],
                     device int* ids [[buffer(4)]], device T* weights [[buffer(5)]], GRID_IDS) {
    if (tg.x >= step->n_tokens || sg != 0) return;
    const float shared = p.has_shared ? float(shared_logit[tg.x]) : 0.0f;
    LaneKeys<MAX> keys;
    keys.load(logits + ulong(tg.x) * p.n_expert, p.n_expert, lane);
    uint expert = 0, key = 0;  // of rank `lane`
    for (uint rank = 0; rank < p.n_used; rank++) {
        uint chosen;
        const uint largest = keys.take_largest(chosen, lane);
        if (lane == rank) {
            expert = chosen;
            key = largest - 1;
        }
    }

    // A NaN logit has key 0, and so no share.
    const float largest = value_of_sort_key(simd_max(key));
    const float share = key != 0 ? precise::exp(value_of_sort_key(key) - largest) : 0.0f;
    const float total = simd_sum(share);
    device T* out = weights + ulong(tg.x) * (p.n_used + 1);
    if (lane < p.n_used) {
        ids[ulong(tg.x) * p.n_used + lane] = int(expert);
        out[lane] = p.scale * share / total;
    }
    if (lane == 0) out[p.n_used] = p.has_shared ? 1.0f / (1.0f + precise::exp(-shared)) : 0.0f;
}

#define MOE_TOPK(n) KERNEL("moe_topk_" #n, moe_topk<float, n>)
EXPERT_CLASSES(MOE_TOPK)
