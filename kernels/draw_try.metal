// Draws where the largest logits do not suffice. A token is tried: the one with the best score. It is drawn if the
// filters leave it. They leave it if few tokens come before it, or if their weights are small. Otherwise they leave no
// token that comes after it. So the next try is the best of the tokens before it.
#include "draw.h"

// What is left of all tokens before top-p and min-p.
struct Left {
    ulong top_k;   // ranks above this
    bool typical;  // and no farther from the entropy than `far`; just as far: ranks not below `far_rank`
    float log_sum, entropy, far;
    ulong far_rank;

    METAL_FUNC float distance(float below) const { return fabs(log_sum - below - entropy); }
    METAL_FUNC bool has(ulong rank, float below) const {
        if (rank <= top_k) return false;
        const float d = distance(below);
        return !typical || d < far || (d == far && rank >= far_rank);
    }
};

// What is before the token that is tried.
struct Tried {
    DrawState s;
    Left left;
    device const Draw* draw;
    ulong token;  // 0: all others are before it
    float distance;
    uint n;
    float sum;
    ulong best;  // score, then token
    uint best_key;

    METAL_FUNC void start() {
        token = s.try_key > 0 ? rank_of(s.try_key, s.try_id) : 0;
        distance = token ? left.distance(logit_of_rank(token) - s.largest) : INFINITY;
        n = 0;
        sum = 0.0f;
        best = 0;
        best_key = 0;
    }
    METAL_FUNC void meet(ulong rank) {
        const float below = logit_of_rank(rank) - s.largest;
        if (!left.has(rank, below)) return;
        if (s.mode == DRAW_BY_SURPRISAL) {
            const float d = left.distance(below);
            if (token && (d > distance || (d == distance && rank <= token))) return;
        } else if (rank <= token) {
            return;
        }
        n += 1;
        sum += precise::exp(below);
        if (below < s.least) return;
        const ulong score = rank_of(score_key(*draw, rank, s.largest), id_of_rank(rank));
        if (score > best) {
            best = score;
            best_key = key_of_rank(rank);
        }
    }
    METAL_FUNC void join(thread Team& team) {
        n = team.sum(n);
        sum = team.sum(sum);
        const ulong mine = best;
        best = team.largest(best);
        best_key = team.largest(mine == best ? best_key : 0u);
    }
    // Accepts the token, or goes on to the next.
    METAL_FUNC bool accepts() {
        const bool first = n == 0, least = logit_of_rank(token) - s.largest >= s.least;
        if (token && (best == 0 || (least && (first || (n < s.most && sum < s.wanted))))) return true;
        s.try_key = best_key;
        s.try_id = id_of_rank(best);
        return false;
    }
};

METAL_FUNC Left all_left(thread const DrawState& s) { return {0, false, s.log_sum, s.entropy, 0.0f, 0}; }

// Sums up what all shares found.
METAL_FUNC void collect(thread Tried& t, device const DrawTry* tries, uint n_part, thread Team& team) {
    t.start();
    for (uint i = team.tid; i < n_part; i += DRAW_THREADS) {
        t.n += tries[i].n;
        t.sum += tries[i].sum;
        const ulong score = tries[i].best_score > 0 ? rank_of(tries[i].best_score, tries[i].best_id) : 0;
        if (score > t.best) {
            t.best = score;
            t.best_key = tries[i].best_key;
        }
    }
    t.join(team);
}

// Grid: n_part, outputs of the plan. Threads: DRAW_THREADS.
template <class T>
kernel void draw_try(constant DrawParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const T* logits [[buffer(2)]], device const Draw* draws [[buffer(3)]],
                     device const uint* pages [[buffer(4)]], device const int* history [[buffer(5)]],
                     device const Bias* biases [[buffer(6)]], device const uint* masks [[buffer(7)]],
                     device DrawState* all_states [[buffer(8)]], device DrawTry* all_tries [[buffer(9)]],
                     device int* chosen [[buffer(10)]], device Choice* results [[buffer(11)]], GRID_IDS) {
    TG_ARRAY(uint, scratch, 2 * SIMD);
    TG_ARRAY(atomic_uint, counts, DRAW_COLUMNS);
    if (tg.y >= step->n_out) return;
    Team team = {scratch, tid, sg, lane, n_sg, 0};
    device const Draw& d = draws[tg.y];
    device DrawState* states = all_states + tg.y * (DRAW_TRIES + 1) + p.tried;
    device DrawTry* tries = all_tries + (tg.y * DRAW_TRIES + p.tried) * p.n_part;
    const bool writes = tg.x == 0 && tid == 0;

    Tried t;
    t.s = read_state(states[0]);
    t.draw = &d;
    t.left = all_left(t.s);
    if (t.s.mode == DRAW_DONE || t.s.mode == DRAW_OPEN) {
        if (writes) write_state(states[1], t.s);
        return;
    }
    if (p.tried > 0) {
        collect(t, tries - p.n_part, p.n_part, team);
        if (t.accepts()) {
            if (writes) {
                results_of(p, step, logits, chosen, results, tg.y).write(id_of_rank(t.token), t.s.log_sum_exp);
                t.s.mode = DRAW_DONE;
                write_state(states[1], t.s);
            }
            return;
        }
    }
    if (writes) write_state(states[1], t.s);
    const Source source = {logits + ulong(tg.y) * p.n, &d, pages, history, biases, masks};
    Share share;
    share.load(p, source, tg.x, tid);
    share.change(p, source, tg.x, counts, tid);
    t.start();
    UNROLL for (uint j = 0; j < PER_THREAD; j++) {
        const ulong rank = share.rank(p, tg.x, j, tid);
        if (rank != 0) t.meet(rank);
    }
    t.join(team);
    if (tid == 0) {
        tries[tg.x].n = t.n;
        tries[tg.x].sum = t.sum;
        tries[tg.x].best_score = key_of_rank(t.best);
        tries[tg.x].best_key = t.best_key;
        tries[tg.x].best_id = id_of_rank(t.best);
    }
}

// ---- the rest, by one threadgroup for each output
// -----------------------------------------------------------------------

// All logits of an output, share by share. Every visitor has meet(rank), for each token that may be chosen.
struct Everything {
    constant DrawParams* p;
    Source source;
    threadgroup atomic_uint* counts;
    uint tid;

    template <class Visitor>
    METAL_FUNC void visit(thread Visitor& visitor) const {
        for (uint part = 0; part < p->n_part; part++) {
            Share share;
            share.load(*p, source, part, tid);
            share.change(*p, source, part, counts, tid);
            for (uint j = 0; j < PER_THREAD; j++) {
                const ulong rank = share.rank(*p, part, j, tid);
                if (rank != 0) visitor.meet(rank);
            }
        }
    }
};

struct CountAbove {
    ulong border;
    uint n;
    METAL_FUNC void meet(ulong rank) { n += uint(rank > border); }
};

struct Above {
    Everything all;
    METAL_FUNC uint n_above(ulong border) const {
        CountAbove count = {border, 0};
        all.visit(count);
        return count.n;
    }
};

// Sums over the tokens that are left.
struct SumLeft {
    Left left;
    float largest;
    float sum_exp, sum_x_exp;
    uint top;
    METAL_FUNC void meet(ulong rank) {
        const float below = logit_of_rank(rank) - largest;
        if (!left.has(rank, below)) return;
        const float weight = precise::exp(below);
        sum_exp += weight;
        if (weight > 0.0f) sum_x_exp += below * weight;
        top = max(top, key_of_rank(rank));
    }
};

METAL_FUNC SumLeft sums_left(thread const Everything& all, thread const Left& left, float largest, thread Team& team) {
    SumLeft s = {left, largest, 0.0f, 0.0f, 0};
    all.visit(s);
    s.sum_exp = team.sum(s.sum_exp);
    s.sum_x_exp = team.sum(s.sum_x_exp);
    s.top = team.largest(s.top);
    return s;
}

// Finds how far from the entropy the tokens are that typical-p keeps.
METAL_FUNC void limit_typical(thread const Everything& all, thread Left& left, float largest, float wanted,
                              thread Team& team) {
    left.typical = true;
    left.far_rank = 0;
    uint low = 0, high = as_type<uint>(float(INFINITY));
    while (low < high) {
        const uint middle = low + (high - low) / 2;
        left.far = as_type<float>(middle);
        if (sums_left(all, left, largest, team).sum_exp >= wanted) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    left.far = as_type<float>(low);
    // Of the tokens at just this distance, the first ones.
    ulong lowest = 0, above = ~0ul;
    while (above - lowest > 1) {
        left.far_rank = lowest + (above - lowest) / 2;
        if (sums_left(all, left, largest, team).sum_exp >= wanted) {
            lowest = left.far_rank;
        } else {
            above = left.far_rank;
        }
    }
    left.far_rank = lowest;
}

// Finds which tokens top-k and typical-p leave, and what top-p and min-p want of them.
METAL_FUNC void open_state(thread const Everything& all, thread Tried& t, thread Team& team) {
    device const Draw& d = *t.draw;
    const uint n = all.p->n;
    if (limits_count(d, n)) {
        Above above = {all};
        if (team.sum(above.n_above(0)) > d.top_k)
            t.left.top_k = border_of(above, d.top_k, d.top_k, 0, ulong(sort_key(t.s.largest) + 1) << 32, team);
    }
    SumLeft sums = sums_left(all, t.left, t.s.largest, team);
    if (d.typical_p < 1.0f) {
        t.left.log_sum = precise::log(sums.sum_exp);
        t.left.entropy = t.left.log_sum - sums.sum_x_exp / sums.sum_exp;
        limit_typical(all, t.left, t.s.largest, d.typical_p * sums.sum_exp, team);
        sums = sums_left(all, t.left, t.s.largest, team);
    }
    t.s.mode = DRAW_BY_RANK;
    t.s.most = n;
    t.s.wanted = d.top_p < 1.0f ? d.top_p * sums.sum_exp : INFINITY;
    t.s.least += value_of_sort_key(sums.top) - t.s.largest;
}

// Grid: outputs of the plan. Threads: DRAW_THREADS.
template <class T>
kernel void draw_finish(constant DrawParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                        device const T* logits [[buffer(2)]], device const Draw* draws [[buffer(3)]],
                        device const uint* pages [[buffer(4)]], device const int* history [[buffer(5)]],
                        device const Bias* biases [[buffer(6)]], device const uint* masks [[buffer(7)]],
                        device const DrawState* states [[buffer(8)]], device const DrawTry* tries [[buffer(9)]],
                        device int* chosen [[buffer(10)]], device Choice* results [[buffer(11)]], GRID_IDS) {
    TG_ARRAY(uint, scratch, 2 * SIMD);
    TG_ARRAY(atomic_uint, counts, DRAW_COLUMNS);
    if (tg.x >= step->n_out) return;
    Tried t;
    t.s = read_state(states[tg.x * (DRAW_TRIES + 1) + DRAW_TRIES]);
    if (t.s.mode == DRAW_DONE) return;
    Team team = {scratch, tid, sg, lane, n_sg, 0};
    t.draw = draws + tg.x;
    t.left = all_left(t.s);
    const Source source = {logits + ulong(tg.x) * p.n, t.draw, pages, history, biases, masks};
    const Everything all = {&p, source, counts, tid};
    if (t.s.mode == DRAW_OPEN) {
        open_state(all, t, team);
        t.start();
        all.visit(t);
        t.join(team);
    } else {
        collect(t, tries + (tg.x * DRAW_TRIES + DRAW_TRIES - 1) * p.n_part, p.n_part, team);
    }
    while (!t.accepts()) {
        t.start();
        all.visit(t);
        t.join(team);
    }
    if (tid == 0) results_of(p, step, logits, chosen, results, tg.x).write(id_of_rank(t.token), t.s.log_sum_exp);
}

KERNEL("draw_try", draw_try<float>)
KERNEL("draw_finish", draw_finish<float>)
