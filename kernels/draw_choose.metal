// Chooses the token of each output, if the largest logits and the sums over all logits suffice for that. If not, it
// leaves the state from which draw_try goes on.
#include "draw.h"

// The largest logits of all shares.
struct Listed {
    device const DrawPart* parts;
    uint n_part;
    bool before;
    uint tid;

    METAL_FUNC device const DrawKept& of_part(uint part) const {
        return before ? parts[part].before : parts[part].kept;
    }
    METAL_FUNC ulong rank(uint i) const {
        device const DrawKept& kept = of_part(i / DRAW_KEPT);
        const uint slot = i % DRAW_KEPT;
        return slot < kept.n ? rank_of(kept.key[slot], kept.id[slot]) : 0;
    }
    METAL_FUNC uint n_above(ulong border) const {
        uint n = 0;
        for (uint i = tid; i < n_part * DRAW_KEPT; i += DRAW_THREADS) n += uint(rank(i) > border);
        return n;
    }
};

// The most probable tokens, sorted; each thread has one of them. All others rank at or below the floor, which is 0 if
// there are no others.
struct Ranking {
    uint n;
    ulong floor;
    ulong mine;   // this thread's token
    float first;  // the largest logit
    float below;  // this thread's logit less the largest
    float weight;
};

METAL_FUNC Ranking ranked(thread Listed& listed, threadgroup ulong* list, threadgroup atomic_uint* n_taken,
                          thread Team& team) {
    ulong floor = 0, top = 0;
    for (uint i = team.tid; i < listed.n_part; i += DRAW_THREADS) {
        device const DrawKept& kept = listed.of_part(i);
        floor = max(floor, rank_of(kept.floor_key, kept.floor_id));
    }
    for (uint i = team.tid; i < listed.n_part * DRAW_KEPT; i += DRAW_THREADS) top = max(top, listed.rank(i));
    floor = team.largest(floor);
    top = team.largest(top);
    Ranking r;
    r.n = team.sum(listed.n_above(floor));
    if (r.n > DRAW_THREADS) {
        floor = border_of(listed, DRAW_THREADS / 2, DRAW_THREADS, floor, top + 1, team);
        r.n = team.sum(listed.n_above(floor));
    }
    uint size = 1;
    while (size < r.n) size *= 2;
    if (team.tid == 0) atomic_store_explicit(n_taken, 0u, memory_order_relaxed);
    list[team.tid] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = team.tid; i < listed.n_part * DRAW_KEPT; i += DRAW_THREADS) {
        const ulong rank = listed.rank(i);
        if (rank > floor) list[atomic_fetch_add_explicit(n_taken, 1u, memory_order_relaxed)] = rank;
    }
    sort_falling(list, size, team.tid);
    r.floor = floor;
    r.first = logit_of_rank(list[0]);
    r.mine = list[team.tid];
    return r;
}

METAL_FUNC void weigh(thread Ranking& r, thread Team& team) {
    const bool there = team.tid < r.n;
    r.below = there ? logit_of_rank(r.mine) - r.first : 0.0f;
    r.weight = there ? precise::exp(r.below) : 0.0f;
}

// Sums over all tokens, less the largest logit.
struct Sums {
    float total;  // of the weights
    float log_sum, entropy;

    METAL_FUNC void set(float sum_exp, float sum_x_exp) {
        total = sum_exp;
        log_sum = precise::log(sum_exp);
        entropy = log_sum - sum_x_exp / sum_exp;
    }
    METAL_FUNC void of(thread const Ranking& r, thread Team& team) {
        const float sum_exp = team.sum(r.weight), sum_x_exp = team.sum(r.weight > 0.0f ? r.below * r.weight : 0.0f);
        set(sum_exp, sum_x_exp);
    }
};

// Makes the first n tokens the whole ranking.
METAL_FUNC void shorten(thread Ranking& r, uint n, thread Sums& sums, thread Team& team) {
    r.n = min(r.n, n);
    r.floor = 0;
    weigh(r, team);
    sums.of(r, team);
}

// Applies typical-p. False if the ranking is too short to be certain.
METAL_FUNC bool keep_typical(thread Ranking& r, thread Sums& sums, float typical_p, threadgroup ulong* list,
                             threadgroup ulong* order, thread Team& team) {
    const uint tid = team.tid;
    const float distance = fabs(sums.log_sum - r.below - sums.entropy);
    // From the largest to the smallest, so the bits of the distance are turned.
    order[tid] = tid < r.n ? ulong(~as_type<uint>(distance)) << 32 | ulong(~tid) : 0;
    uint size = 1;
    while (size < r.n) size *= 2;
    sort_falling(order, size, tid);
    const uint at = ~uint(order[tid]);
    const float far = as_type<float>(~uint(order[tid] >> 32));
    const float weight = tid < r.n ? precise::exp(logit_of_rank(list[at]) - r.first) : 0.0f;
    float all;
    const float before = team.sum_before(weight, all), wanted = typical_p * sums.total;
    const bool kept = tid < r.n && (tid == 0 || before < wanted);
    const uint n = team.sum(uint(kept));
    if (r.floor != 0) {
        if (all < wanted) return false;
        const float last = as_type<float>(team.largest(kept ? as_type<uint>(far) : 0u));
        if (last >= sums.log_sum - (logit_of_rank(r.floor) - r.first) - sums.entropy) return false;
    }
    const ulong rank = kept ? list[at] : 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    list[tid] = rank;
    sort_falling(list, DRAW_THREADS, tid);
    r.first = logit_of_rank(list[0]);
    r.mine = list[tid];
    shorten(r, n, sums, team);
    return true;
}

// Counts the tokens that top-p and min-p keep. 0 if the ranking is too short to be certain.
METAL_FUNC uint n_left(thread const Ranking& r, thread const Sums& sums, device const Draw& d, thread Team& team) {
    uint n = 0;
    const bool whole = r.floor == 0;
    if (d.top_p < 1.0f) {
        float all;
        const float before = team.sum_before(r.weight, all), wanted = d.top_p * sums.total;
        const uint kept = team.sum(uint(team.tid < r.n && (team.tid == 0 || before < wanted)));
        if (whole || all >= wanted) n = kept;
    } else if (whole) {
        n = r.n;
    }
    if (d.min_p > 0.0f) {
        const float least = precise::log(d.min_p);
        const uint kept = team.sum(uint(team.tid < r.n && r.below >= least));
        if (whole || logit_of_rank(r.floor) - r.first < least) n = n > 0 ? min(n, kept) : kept;
    }
    return n;
}

// Finds the best of the first n tokens. 0 if the filters left more than the ranking has; then `mode` says how to go on.
METAL_FUNC ulong choose(thread Ranking& r, thread Sums& sums, device const Draw& d, uint n_tokens,
                        threadgroup ulong* list, threadgroup ulong* order, thread Team& team, thread uint& mode) {
    const bool typical = d.typical_p < 1.0f, sums_matter = d.top_p < 1.0f;
    weigh(r, team);
    if (limits_count(d, n_tokens)) {
        mode = typical || sums_matter ? DRAW_OPEN : DRAW_BY_RANK;
        if (r.floor != 0 && r.n < d.top_k) return 0;
        shorten(r, d.top_k, sums, team);
    }
    if (typical) {
        mode = sums_matter || d.min_p > 0.0f ? DRAW_OPEN : DRAW_BY_SURPRISAL;
        if (!keep_typical(r, sums, d.typical_p, list, order, team)) return 0;
    }
    mode = DRAW_BY_RANK;
    const uint n = n_left(r, sums, d, team);
    if (n == 0) return 0;
    const ulong score = team.tid < n ? rank_of(score_key(d, r.mine, r.first), team.tid) : 0;
    return list[id_of_rank(team.largest(score))];
}

// Reads the sums over all shares.
struct All {
    uint n, n_not_finite;
    float largest, sum_exp, sum_x_exp;
    float log_sum_exp;  // of the logits as they are
    ulong best;         // the token with the best score, if there are no filters
};

METAL_FUNC All sums_of_parts(device const DrawPart* parts, constant DrawParams& p, device const Draw& d,
                             thread Team& team) {
    uint n = 0, n_not_finite = 0, top = 0, before_top = 0;
    for (uint i = team.tid; i < p.n_part; i += DRAW_THREADS) {
        n += parts[i].n;
        n_not_finite += parts[i].n_not_finite;
        before_top = max(before_top, sort_key(parts[i].before_largest));
        if (parts[i].n > 0) top = max(top, sort_key(parts[i].largest));
    }
    All all;
    all.n = team.sum(n);
    all.n_not_finite = team.sum(n_not_finite);
    all.largest = value_of_sort_key(team.largest(top));
    const float before_largest = value_of_sort_key(team.largest(before_top));
    float before_sum = 0.0f, sum_exp = 0.0f, sum_x_exp = 0.0f;
    ulong score = 0;
    for (uint i = team.tid; i < p.n_part; i += DRAW_THREADS) {
        before_sum += precise::exp(parts[i].before_largest - before_largest) * parts[i].before_sum;
        if (parts[i].n == 0) continue;
        const float below = parts[i].largest - all.largest, scale = precise::exp(below);
        sum_exp += scale * parts[i].sum_exp;
        if (scale > 0.0f) sum_x_exp += scale * (parts[i].sum_x_exp + below * parts[i].sum_exp);
        if (filters(d, p.n)) continue;
        score = max(score,
                    rank_of(score_key(d, rank_of(parts[i].best_key, parts[i].best_id), all.largest), parts[i].best_id));
    }
    all.log_sum_exp = before_largest + precise::log(team.sum(before_sum));
    all.sum_exp = team.sum(sum_exp);
    all.sum_x_exp = team.sum(sum_x_exp);
    all.best = team.largest(score);
    return all;
}

METAL_FUNC DrawState state_of(uint mode, thread const All& all, device const Draw& d, uint n) {
    DrawState s;
    s.mode = mode;
    s.try_key = 0;
    s.try_id = ~0u;
    s.most = limits_count(d, n) ? d.top_k : n;
    s.largest = all.largest;
    s.log_sum = precise::log(all.sum_exp);
    s.entropy = s.log_sum - all.sum_x_exp / all.sum_exp;
    s.wanted = all.sum_exp * (mode == DRAW_BY_SURPRISAL ? d.typical_p : d.top_p);
    if (mode == DRAW_BY_RANK && d.top_p == 1.0f) s.wanted = INFINITY;
    s.least = d.min_p > 0.0f ? precise::log(d.min_p) : -INFINITY;
    s.log_sum_exp = all.log_sum_exp;
    return s;
}

// Its version for the CPU also reads what draw_scan reads.
//
// Grid: outputs of the plan. Threads: DRAW_THREADS.
template <class T>
kernel void draw_choose(constant DrawParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                        device const T* logits [[buffer(2)]], device const Draw* draws [[buffer(3)]],
                        device const uint* [[buffer(4)]], device const int* [[buffer(5)]],
                        device const Bias* [[buffer(6)]], device const uint* [[buffer(7)]],
                        device const DrawPart* all_parts [[buffer(8)]], device DrawState* states [[buffer(9)]],
                        device int* chosen [[buffer(10)]], device Choice* all_results [[buffer(11)]],
                        device Logprobs* logprobs [[buffer(12)]], GRID_IDS) {
    TG_ARRAY(uint, scratch, 2 * SIMD);
    TG_ARRAY(ulong, list, DRAW_THREADS);
    TG_ARRAY(ulong, order, DRAW_THREADS);
    TG_ARRAY(atomic_uint, n_taken, 1);
    if (tg.x >= step->n_out) return;
    Team team = {scratch, tid, sg, lane, n_sg, 0};
    device const Draw& d = draws[tg.x];
    device const DrawPart* parts = all_parts + tg.x * p.n_part;
    device DrawState& state = states[tg.x * (DRAW_TRIES + 1)];
    const Results results = results_of(p, step, logits, chosen, all_results, tg.x);
    const All all = sums_of_parts(parts, p, d, team);
    const bool wrong = all.n_not_finite > 0 || all.n == 0;
    if (tid == 0 && wrong) results.refuse(all.n_not_finite, all.n_not_finite > 0 ? 0 : uint(CHOICE_FORBIDDEN));

    Ranking r;
    if (d.n_logprobs > 0) {
        device Logprobs& found = logprobs[step->number % STEP_RING * MAX_OUT + tg.x];
        Listed listed = {parts, p.n_part, changes(d), tid};
        if (all.n_not_finite == 0) r = ranked(listed, list, n_taken, team);
        const uint n = all.n_not_finite > 0 ? 0 : min(min(d.n_logprobs, uint(MAX_LOGPROBS)), r.n);
        if (tid == 0) found.n = n;
        if (tid < n) {
            found.id[tid] = int(id_of_rank(r.mine));
            found.logprob[tid] = logit_of_rank(r.mine) - all.log_sum_exp;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    uint mode = DRAW_DONE;
    if (!wrong && filters(d, p.n)) {
        Listed listed = {parts, p.n_part, false, tid};
        if (d.n_logprobs == 0 || changes(d)) r = ranked(listed, list, n_taken, team);
        Sums sums;
        sums.set(all.sum_exp, all.sum_x_exp);
        const ulong token = choose(r, sums, d, p.n, list, order, team, mode);
        if (token != 0) mode = DRAW_DONE;
        if (token != 0 && tid == 0) results.write(id_of_rank(token), all.log_sum_exp);
    } else if (!wrong && tid == 0) {
        results.write(id_of_rank(all.best), all.log_sum_exp);
    }
    const DrawState made = state_of(mode, all, d, p.n);
    if (tid == 0) write_state(state, made);
}

KERNEL("draw_choose", draw_choose<float>)
