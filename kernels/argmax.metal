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

// The largest logit of each share of an output's logits. O is the most outputs of the plan.
// Grid: (n_part, O). Threads: ARGMAX_THREADS.
template <class T>
kernel void argmax_partial(constant ArgmaxParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                           device const T* logits [[buffer(2)]], device float* part_value [[buffer(3)]],
                           device int* part_id [[buffer(4)]], GRID_IDS) {
    TG_ARRAY(uint, keys, SIMD);
    TG_ARRAY(uint, ids, SIMD);
    if (tg.y >= step->n_out) return;
    device const T* x = logits + ulong(tg.y) * p.n;
    const uint n_threads = n_sg * SIMD;
    ArgmaxBest best;
    for (uint i = tg.x * n_threads + tid; i < p.n; i += n_tg.x * n_threads) best.offer(argmax_key(x[i]), i);
    best = threadgroup_best(best, keys, ids, sg, lane, n_sg);
    if (tid == 0) {
        const uint part = tg.y * p.n_part + tg.x;
        part_value[part] = value_of_sort_key(best.key);
        part_id[part] = best.key == 0 ? -1 : int(best.id);  // -1: no logits in this share
    }
}

// The id of an output's largest logit: to `chosen` for the next step, and to `results` for the host.
// Grid: O. Threads: ARGMAX_THREADS.
template <class T>
kernel void argmax_final(constant ArgmaxParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                         device const T* part_value [[buffer(2)]], device const int* part_id [[buffer(3)]],
                         device int* chosen [[buffer(4)]], device Choice* results [[buffer(5)]], GRID_IDS) {
    TG_ARRAY(uint, keys, SIMD);
    TG_ARRAY(uint, ids, SIMD);
    if (tg.x >= step->n_out) return;
    const uint first = tg.x * p.n_part;
    ArgmaxBest best;
    for (uint i = tid; i < p.n_part; i += n_sg * SIMD)
        if (part_id[first + i] >= 0) best.offer(argmax_key(part_value[first + i]), uint(part_id[first + i]));
    best = threadgroup_best(best, keys, ids, sg, lane, n_sg);
    if (tid == 0) {
        const int id = best.key == 0 || best.key == NOT_FINITE ? -1 : int(best.id);
        chosen[tg.x] = id;
        device Choice* result = results + step->number % STEP_RING * MAX_OUT + tg.x;
        result->id = id;
        result->n_not_finite = id < 0 ? 1 : 0;
        result->logprob = 0.0f;
        result->flags = 0;
        result->accepted = 0;
    }
}

KERNEL("argmax_partial", argmax_partial<float>)
KERNEL("argmax_final", argmax_final<float>)
