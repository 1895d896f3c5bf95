#include "moe_choose.h"

// Grid: T. Threads: 32.
template <class T>
kernel void moe_topk(constant TopKParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const T* logits [[buffer(2)]], device const T* shared_logit [[buffer(3)]],
                     device const T* bias [[buffer(4)]], device const T* scales [[buffer(5)]],
                     device int* ids [[buffer(6)]], device T* weights [[buffer(7)]], GRID_IDS) {
    if (tg.x >= step->n_tokens || sg != 0) return;
    const RowRouter<T> row = RowRouter<T>{logits, shared_logit, bias, scales}.of_row(p, tg.x);
    row.put(p, tg.x, row.choose(p, p.n_used, lane), ids, weights, lane);
}

KERNEL("moe_topk", moe_topk<float>)
