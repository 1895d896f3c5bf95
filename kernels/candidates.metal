// The N_CANDIDATES largest of n logits, exactly, and the sums over all logits that sampling needs. The first pass finds
// them for every section of the logits, the second for the candidates of all sections. Both passes are one kernel over
// two kinds of source.
#include "reduce.h"
#include "sort_key.h"

constant constexpr uint RADIX = 256;

// Sorts logits from small to large, and equal logits from high id to low. All ranks differ, and the rank of a finite
// logit is not 0.
METAL_FUNC ulong rank_of(float logit, uint id) { return ulong(sort_key(logit)) << 32 | ulong(~id); }
METAL_FUNC uint id_of_rank(ulong rank) { return ~uint(rank); }

// Counts over some logits.
struct Summary {
    uint n_finite = 0;
    uint n_not_finite = 0;
    uint top = 0;  // the sort key of the largest, 0 if there is none
};

struct Sums {
    float sum_exp = 0.0f;
    float sum_x_exp = 0.0f;
};

// Section `part` of the logits.
struct Logits {
    using In = float;
    device const float* in;
    uint first;
    uint n;  // entries: each may become a candidate

    METAL_FUNC static Logits part_of(device const float* in, constant CandidatesParams& p, uint part) {
        const uint each = (p.n + p.n_part - 1) / p.n_part, first = min(part * each, p.n);
        return {in, first, min(each, p.n - first)};
    }
    METAL_FUNC uint n_summaries() const { return n; }
    METAL_FUNC void summarise(uint i, thread Summary& s) const {
        const float x = in[first + i];
        s.n_finite += uint(is_finite_bits(x));
        s.n_not_finite += uint(!is_finite_bits(x));
        if (is_finite_bits(x)) s.top = max(s.top, sort_key(x));
    }
    METAL_FUNC void sum(uint i, float largest, thread Sums& s) const {
        const float x = in[first + i];
        if (!is_finite_bits(x)) return;
        const float weight = precise::exp(x - largest);
        s.sum_exp += weight;
        s.sum_x_exp += (x - largest) * weight;
    }
    METAL_FUNC float logit(uint i) const { return in[first + i]; }
    METAL_FUNC ulong rank(uint i) const {
        const float x = in[first + i];
        return is_finite_bits(x) ? rank_of(x, first + i) : 0;
    }
};

// The candidates of all sections.
struct Parts {
    using In = Candidates;
    device const Candidates* in;
    uint n_part;
    uint n;

    METAL_FUNC static Parts part_of(device const Candidates* in, constant CandidatesParams& p, uint) {
        return {in, p.n_part, p.n_part * N_CANDIDATES};
    }
    METAL_FUNC uint n_summaries() const { return n_part; }
    METAL_FUNC void summarise(uint i, thread Summary& s) const {
        s.n_finite += in[i].n;  // a lower bound: enough to know whether they fill the places
        s.n_not_finite += in[i].n_not_finite;
        if (in[i].n > 0) s.top = max(s.top, sort_key(in[i].largest));
    }
    METAL_FUNC void sum(uint i, float largest, thread Sums& s) const {
        if (in[i].n == 0) return;
        const float below = in[i].largest - largest, scale = precise::exp(below);
        s.sum_exp += scale * in[i].sum_exp;
        s.sum_x_exp += scale * (in[i].sum_x_exp + below * in[i].sum_exp);
    }
    METAL_FUNC float logit(uint i) const { return in[i / N_CANDIDATES].logit[i % N_CANDIDATES]; }
    METAL_FUNC ulong rank(uint i) const {
        const uint part = i / N_CANDIDATES, slot = i % N_CANDIDATES;
        return slot < in[part].n ? rank_of(in[part].logit[slot], uint(in[part].id[slot])) : 0;
    }
};

// A byte of the searched rank: its value, the count of ranks with a larger byte, the count of ranks with this byte.
struct Digit {
    uint value;
    uint n_above;
    uint n_equal;
};

// Finds the digit of the wanted-th largest from the count of each digit. Runs on one simdgroup.
METAL_FUNC void find_digit(const threadgroup atomic_uint* bins, uint wanted, threadgroup Digit* found, uint lane) {
    const uint per_lane = RADIX / SIMD, high = RADIX - 1 - lane * per_lane;
    uint mine = 0;
    for (uint j = 0; j < per_lane; j++) mine += atomic_load_explicit(&bins[high - j], memory_order_relaxed);
    uint above = simd_prefix_exclusive_sum(mine);
    if (above >= wanted || above + mine < wanted) return;  // not in this lane's digits
    for (uint j = 0; j < per_lane; j++) {
        const uint count = atomic_load_explicit(&bins[high - j], memory_order_relaxed);
        if (above + count >= wanted) {
            found->value = high - j;
            found->n_above = above;
            found->n_equal = count;
            return;
        }
        above += count;
    }
}

// Returns a number which exactly the `wanted` largest ranks are not below; there are at least `wanted` ranks. It takes
// a byte at a time, from the highest, and counts each value among the ranks that agree so far. It stops when all of
// these ranks are wanted.
template <class Source>
METAL_FUNC ulong lowest_of_largest(thread const Source& source, uint wanted, threadgroup atomic_uint* bins,
                                   threadgroup Digit* found, uint tid, uint sg, uint lane, uint n_sg) {
    const uint n_threads = n_sg * SIMD;
    ulong prefix = 0, mask = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (uint i = tid; i < RADIX; i += n_threads) atomic_store_explicit(&bins[i], 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = tid; i < source.n; i += n_threads) {
            const ulong rank = source.rank(i);
            if ((rank & mask) == prefix)
                atomic_fetch_add_explicit(&bins[uint(rank >> shift) % RADIX], 1u, memory_order_relaxed);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (sg == 0) find_digit(bins, wanted, found, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        prefix |= ulong(found->value) << shift;
        mask |= ulong(RADIX - 1) << shift;
        wanted -= found->n_above;
        if (found->n_equal == wanted) break;
    }
    return prefix;
}

// Grid: n_part, then 1. Threads: CANDIDATES_THREADS, then CANDIDATES_FINAL_THREADS.
template <class Source>
kernel void candidates(constant CandidatesParams& p [[buffer(0)]], device const typename Source::In* in [[buffer(1)]],
                       device Candidates* out [[buffer(2)]], GRID_IDS) {
    TG_ARRAY(atomic_uint, bins, RADIX);
    TG_ARRAY(atomic_uint, n_taken, 1);
    TG_ARRAY(Digit, found, 1);
    TG_ARRAY(uint, tops, SIMD);
    TG_ARRAY(uint, finite, SIMD);
    TG_ARRAY(uint, not_finite, SIMD);
    TG_ARRAY(float, sums, SIMD);
    TG_ARRAY(float, x_sums, SIMD);
    const uint n_threads = n_sg * SIMD;
    const Source source = Source::part_of(in, p, tg.x);

    Summary all;
    for (uint i = tid; i < source.n_summaries(); i += n_threads) source.summarise(i, all);
    const float largest = value_of_sort_key(threadgroup_max(all.top, tops, sg, lane, n_sg));
    const uint wanted = min(uint(N_CANDIDATES), threadgroup_sum(all.n_finite, finite, sg, lane, n_sg));
    const uint n_not_finite = threadgroup_sum(all.n_not_finite, not_finite, sg, lane, n_sg);

    Sums mine;
    for (uint i = tid; i < source.n_summaries(); i += n_threads) source.sum(i, largest, mine);
    const float sum_exp = threadgroup_sum(mine.sum_exp, sums, sg, lane, n_sg);
    const float sum_x_exp = threadgroup_sum(mine.sum_x_exp, x_sums, sg, lane, n_sg);

    device Candidates& mine_out = out[tg.x];
    if (tid == 0) {
        mine_out.n = wanted;
        mine_out.n_not_finite = n_not_finite;
        mine_out.largest = largest;
        mine_out.sum_exp = sum_exp;
        mine_out.sum_x_exp = sum_x_exp;
        atomic_store_explicit(&n_taken[0], 0u, memory_order_relaxed);
    }
    if (wanted == 0) return;  // all threads together
    const ulong lowest = lowest_of_largest(source, wanted, bins, found, tid, sg, lane, n_sg);
    for (uint i = tid; i < source.n; i += n_threads) {
        const ulong rank = source.rank(i);
        if (rank < lowest) continue;
        const uint slot = atomic_fetch_add_explicit(&n_taken[0], 1u, memory_order_relaxed);
        mine_out.logit[slot] = source.logit(i);
        mine_out.id[slot] = int(id_of_rank(rank));
    }
}

KERNEL("candidates_partial", candidates<Logits>)
KERNEL("candidates_final", candidates<Parts>)
