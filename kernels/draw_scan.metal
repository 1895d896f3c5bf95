// The first pass over the logits of each output: sums, the largest logits, and without filters the best token.
#include "draw.h"

// Ranks in registers, one share of the logits.
struct Ranks {
    ulong rank[PER_THREAD];

    METAL_FUNC uint n_above(ulong border) const {
        uint n = 0;
        UNROLL for (uint j = 0; j < PER_THREAD; j++) n += uint(rank[j] > border);
        return n;
    }
};

struct Totals {
    uint n;
    uint top;     // the sort key of the largest logit
    uint bottom;  // of the smallest
    float largest, sum_exp, sum_x_exp;
};

METAL_FUNC Totals totals_of(thread const Ranks& ranks, thread Team& team) {
    Totals t;
    uint top = 0, not_bottom = 0;
    UNROLL for (uint j = 0; j < PER_THREAD; j++) {
        const uint key = key_of_rank(ranks.rank[j]);
        top = max(top, key);
        if (key > 0) not_bottom = max(not_bottom, ~key);
    }
    t.n = team.sum(ranks.n_above(0));
    t.top = team.largest(top);
    t.bottom = ~team.largest(not_bottom);
    t.largest = t.n > 0 ? value_of_sort_key(t.top) : -MOST;
    float sum_exp = 0.0f, sum_x_exp = 0.0f;
    UNROLL for (uint j = 0; j < PER_THREAD; j++) {
        if (ranks.rank[j] == 0) continue;
        const float below = logit_of_rank(ranks.rank[j]) - t.largest, weight = precise::exp(below);
        sum_exp += weight;
        if (weight > 0.0f) sum_x_exp += below * weight;
    }
    t.sum_exp = team.sum(sum_exp);
    t.sum_x_exp = team.sum(sum_x_exp);
    return t;
}

// Keeps the largest logits of a share: all, or more than half of the places.
METAL_FUNC void keep_best(thread Ranks& ranks, thread const Totals& t, device DrawKept& kept,
                          threadgroup atomic_uint* n_taken, thread Team& team) {
    if (team.tid == 0) atomic_store_explicit(n_taken, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ulong border = 0;
    if (t.n > DRAW_KEPT)
        border = border_of(ranks, DRAW_KEPT / 2 + 1, DRAW_KEPT, ulong(t.bottom) << 32, ulong(t.top + 1) << 32, team);
    UNROLL for (uint j = 0; j < PER_THREAD; j++) {
        if (ranks.rank[j] <= border) continue;
        const uint slot = atomic_fetch_add_explicit(n_taken, 1u, memory_order_relaxed);
        kept.key[slot] = key_of_rank(ranks.rank[j]);
        kept.id[slot] = id_of_rank(ranks.rank[j]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (team.tid == 0) {
        kept.n = atomic_load_explicit(n_taken, memory_order_relaxed);
        kept.floor_key = uint(border >> 32);
        kept.floor_id = id_of_rank(border);
    }
}

// Finds the best token of a share.
METAL_FUNC void find_best(thread const Ranks& ranks, thread const Totals& t, device const Draw& d,
                          device DrawPart& part, thread Team& team) {
    ulong best = 0;  // score, then token
    UNROLL for (uint j = 0; j < PER_THREAD; j++) {
        if (ranks.rank[j] == 0) continue;
        const uint id = id_of_rank(ranks.rank[j]);
        best = max(best, rank_of(score_key(d, ranks.rank[j], t.largest), id));
    }
    best = team.largest(best);
    UNROLL for (uint j = 0; j < PER_THREAD; j++) {
        if (ranks.rank[j] == 0 || id_of_rank(ranks.rank[j]) != id_of_rank(best)) continue;
        part.best_key = key_of_rank(ranks.rank[j]);
        part.best_id = id_of_rank(best);
    }
}

// Grid: n_part, outputs of the plan. Threads: DRAW_THREADS.
template <class T>
kernel void draw_scan(constant DrawParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                      device const T* logits [[buffer(2)]], device const Draw* draws [[buffer(3)]],
                      device const uint* pages [[buffer(4)]], device const int* history [[buffer(5)]],
                      device const Bias* biases [[buffer(6)]], device const uint* masks [[buffer(7)]],
                      device DrawPart* parts [[buffer(8)]], GRID_IDS) {
    TG_ARRAY(uint, scratch, 2 * SIMD);
    TG_ARRAY(atomic_uint, counts, DRAW_COLUMNS);
    TG_ARRAY(atomic_uint, n_taken, 1);
    if (tg.y >= step->n_out) return;
    Team team = {scratch, tid, sg, lane, n_sg, 0};
    device const Draw& d = draws[tg.y];
    const Source source = {logits + ulong(tg.y) * p.n, &d, pages, history, biases, masks};
    device DrawPart& part = parts[tg.y * p.n_part + tg.x];

    Share share;
    Ranks ranks;
    share.load(p, source, tg.x, tid);
    uint n_not_finite = 0;
    UNROLL for (uint j = 0; j < PER_THREAD; j++) {
        ranks.rank[j] = share.rank(p, tg.x, j, tid);
        n_not_finite += uint(ranks.rank[j] == 0 && token_of(p, tg.x, j * DRAW_THREADS + tid) < p.n);
    }
    n_not_finite = team.sum(n_not_finite);
    const bool filtered = filters(d, p.n), changed = changes(d);
    const Totals before = totals_of(ranks, team);
    Totals t = before;
    for (uint pass = 0; pass < 2; pass++) {  // the logits as they are, then changed
        team.restart();
        if (pass == 1) {
            share.change(p, source, tg.x, counts, tid);
            UNROLL for (uint j = 0; j < PER_THREAD; j++) ranks.rank[j] = share.rank(p, tg.x, j, tid);
            t = totals_of(ranks, team);
        }
        const bool last = pass == 1 || !changed;
        if ((pass == 0 && d.n_logprobs > 0) || (last && filtered))
            keep_best(ranks, t, last ? part.kept : part.before, n_taken, team);
        if (last) break;
    }
    team.restart();
    if (!filtered) find_best(ranks, t, d, part, team);
    if (tid == 0) {
        part.n_not_finite = n_not_finite;
        part.before_largest = before.largest;
        part.before_sum = before.sum_exp;
        part.n = t.n;
        part.largest = t.largest;
        part.sum_exp = t.sum_exp;
        part.sum_x_exp = t.sum_x_exp;
    }
}

KERNEL("draw_scan", draw_scan<float>)
