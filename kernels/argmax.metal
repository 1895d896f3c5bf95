#include "best.h"
#include "reduce.h"
#include "sort_key.h"

// Every thread must call it. keys and ids hold one value per simdgroup. The result is valid in simdgroup 0.
METAL_FUNC ArgmaxBest threadgroup_best(ArgmaxBest mine, threadgroup uint* keys, threadgroup uint* ids, uint sg,
                                       uint lane, uint n_sg) {
    const ArgmaxBest part = simd_best(mine);
    if (lane == 0) {
        keys[sg] = part.key;
        ids[sg] = part.id;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ArgmaxBest best;
    if (lane < n_sg) {
        best.key = keys[lane];
        best.id = ids[lane];
    }
    return simd_best(best);
}

// Grid: n_part. Threads: ARGMAX_THREADS.
template <class T>
kernel void argmax_partial(constant ArgmaxParams& p [[buffer(0)]], device const T* logits [[buffer(1)]],
                           device float* part_value [[buffer(2)]], device int* part_id [[buffer(3)]], GRID_IDS) {
    TG_ARRAY(uint, keys, SIMD);
    TG_ARRAY(uint, ids, SIMD);
    const uint n_threads = n_sg * SIMD;
    ArgmaxBest best;
    for (uint i = tg.x * n_threads + tid; i < p.n; i += n_tg.x * n_threads) best.offer(argmax_key(logits[i]), i);
    best = threadgroup_best(best, keys, ids, sg, lane, n_sg);
    if (tid == 0) {
        part_value[tg.x] = value_of_sort_key(best.key);
        part_id[tg.x] = best.key == 0 ? -1 : int(best.id);  // -1: no logits in this share
    }
}

// Appends the id to the sequence: stores it for the host, and makes it the only token of the next step.
METAL_FUNC void choose(device Step* step, device int* tokens, int id) {
    step->chosen[step->n_chosen % N_CHOSEN][0] = id;
    step->n_chosen += 1;
    step->pos += step->n_tokens;
    step->n_tokens = 1;
    tokens[0] = id;
}

// Grid: 1. Threads: ARGMAX_THREADS.
template <class T>
kernel void argmax_final(constant ArgmaxParams& p [[buffer(0)]], device Step* step [[buffer(1)]],
                         device int* tokens [[buffer(2)]], device const T* part_value [[buffer(3)]],
                         device const int* part_id [[buffer(4)]], GRID_IDS) {
    TG_ARRAY(uint, keys, SIMD);
    TG_ARRAY(uint, ids, SIMD);
    ArgmaxBest best;
    for (uint i = tid; i < p.n_part; i += n_sg * SIMD)
        if (part_id[i] >= 0) best.offer(argmax_key(part_value[i]), uint(part_id[i]));
    best = threadgroup_best(best, keys, ids, sg, lane, n_sg);
    if (tid == 0) choose(step, tokens, best.key == 0 || best.key == NOT_FINITE ? -1 : int(best.id));
}

KERNEL("argmax_partial", argmax_partial<float>)
KERNEL("argmax_final", argmax_final<float>)
