#include "moe_choose.h"
#include "reduce.h"

static_assert(uint(MAX_EXPERTS) == SIMD * SIMD, "a lane for every word of the chosen experts' bits");

// Routes the rows of a step of few rows: moe_topk and moe_sort in one dispatch, by one threadgroup. A tile has all
// slots of an expert. So every expert that a row chose has one tile, and kernels read its matrices once.
//
// The rows' choices stand as bits in threadgroup memory. A slot's place follows from the number of earlier rows that
// chose its expert. Nothing depends on the order of threads.

// Bit t is set if row t chose the expert.
METAL_FUNC uint rows_of_expert(threadgroup const uint* chosen, uint words, uint n_tokens, uint expert) {
    uint rows = 0;
    for (uint t = 0; t < n_tokens; t++) rows |= (chosen[t * words + expert / SIMD] >> expert % SIMD & 1) << t;
    return rows;
}

// Bit e % 32 of lane e / 32 is set if expert e is among the n of lanes 0 to n - 1.
METAL_FUNC uint word_of_chosen(uint expert, uint n, uint lane) {
    uint word = 0;
    for (uint rank = 0; rank < n; rank++) {
        const uint e = simd_shuffle(expert, ushort(rank));
        word |= uint(lane == e / SIMD) << e % SIMD;
    }
    return word;
}

// tiles has room for min(T n_used, n_expert). T is at most MOE_FEW_ROWS.
// Grid: 1. Threads: MOE_ROUTE_THREADS, or any whole number of simdgroups.
template <class T>
kernel void moe_route(constant TopKParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                      device const T* logits [[buffer(2)]], device const T* shared_logit [[buffer(3)]],
                      device const T* bias [[buffer(4)]], device const T* scales [[buffer(5)]],
                      device int* ids [[buffer(6)]], device T* weights [[buffer(7)]], device int* slots [[buffer(8)]],
                      device int4* tiles [[buffer(9)]], device int* n_tiles [[buffer(10)]], GRID_IDS) {
    const uint WORDS = MAX_EXPERTS / SIMD;
    TG_ARRAY(uint, chosen, MOE_FEW_ROWS * WORDS);  // [row][word]: bit e % 32 of word e / 32 is expert e
    TG_ARRAY(uint, rows, MAX_EXPERTS);             // of each expert, as bits
    TG_ARRAY(uint, places, MAX_EXPERTS);           // of the first slot of each chosen expert
    TG_ARRAY(uint, sums, SIMD);
    const uint n_tokens = min(step->n_tokens, uint(MOE_FEW_ROWS)), n_threads = n_sg * SIMD;
    for (uint t = sg; t < n_tokens; t += n_sg) {
        const RowRouter<T> row = RowRouter<T>{logits, shared_logit, bias, scales}.of_row(p, t);
        const uint expert = row.choose(p, p.n_used, lane);
        chosen[t * WORDS + lane] = word_of_chosen(expert, p.n_used, lane);
        row.put(p, t, expert, ids, weights, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    uint slots_before = 0, tiles_before = 0;  // of the experts of earlier rounds
    for (uint base = 0; base < p.n_expert; base += n_threads) {
        const uint expert = base + tid;
        const uint mine = expert < p.n_expert ? rows_of_expert(chosen, WORDS, n_tokens, expert) : 0;
        const uint count = popcount(mine);
        uint all_slots, all_tiles;
        const uint begin = slots_before + threadgroup_prefix(count, sums, all_slots, sg, lane, n_sg);
        const uint tile = tiles_before + threadgroup_prefix(uint(count > 0), sums, all_tiles, sg, lane, n_sg);
        if (count > 0) {
            tiles[tile] = int4(int(expert), int(begin), int(begin + count), 0);
            rows[expert] = mine;
            places[expert] = begin;
        }
        slots_before += all_slots;
        tiles_before += all_tiles;
    }
    if (tid == 0) n_tiles[0] = int(tiles_before);
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);

    for (uint slot = tid; slot < n_tokens * p.n_used; slot += n_threads) {
        const uint expert = min(uint(ids[slot]), p.n_expert - 1), t = slot / p.n_used;
        slots[places[expert] + popcount(rows[expert] & ((1u << t) - 1))] = int(slot);
    }
}

// 64 registers: then there is room for MOE_ROUTE_THREADS.
KERNEL_UNROLLED(2, "moe_route", moe_route<float>)
