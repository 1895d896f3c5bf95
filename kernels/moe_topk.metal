#include "moe_choose.h"

// Grid: T. Threads: 32.
template <class T, uint MAX>
kernel void moe_topk(constant TopKParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const T* logits [[buffer(2)]], device const T* shared_logit [[buffer(3)]],
                     device const T* bias [[buffer(4)]], device const T* scales [[buffer(5)]],
                     device int* ids [[buffer(6)]], device T* weights [[buffer(7)]], GRID_IDS) {
    if (tg.x >= step->n_tokens || sg != 0) return;
    LaneKeys<MAX> keys;
    choose_experts(p, tg.x, logits, shared_logit, bias, scales, ids, weights, keys, lane);
}

#define MOE_TOPK(n) KERNEL("moe_topk_" #n, moe_topk<float, n>)
EXPERT_CLASSES(MOE_TOPK)
