// What the kernels of a draw share. `Sampler` (sampling/sampler.py) has the rule, docs/sampling.md the method.
//
// The logits of an output stay as they are. A share of them is changed in registers, wherever it is read: penalties,
// biases, forbidden tokens. Shares take lines of 32 logits in turns, because probable tokens often have neighbouring
// ids.
#pragma once

#include "kv_cache.h"
#include "reduce.h"
#include "shapes.h"
#include "sort_key.h"

constant constexpr uint LINE = 32;  // logits
constant constexpr uint PER_THREAD = DRAW_COLUMNS / DRAW_THREADS;
constant constexpr float MOST = 3.402823466e+38f;  // the largest float

// Sorts logits from small to large, and equal logits from high id to low. All ranks differ, and the rank of a token
// that may be chosen is not 0.
METAL_FUNC ulong rank_of(uint key, uint id) { return ulong(key) << 32 | ulong(~id); }
METAL_FUNC uint key_of_rank(ulong rank) { return uint(rank >> 32); }
METAL_FUNC uint id_of_rank(ulong rank) { return ~uint(rank); }
METAL_FUNC float logit_of_rank(ulong rank) { return value_of_sort_key(key_of_rank(rank)); }

// ---- threadgroups ---------------------------------------------------------------------------------------------------

// The threads of a threadgroup. All of them call its functions together, and all get the result.
struct Team {
    threadgroup uint* scratch;  // 2 * SIMD: one half is read while the other is written
    uint tid, sg, lane, n_sg;
    uint turn;

    // Gives lane i the value of simdgroup i.
    METAL_FUNC uint gather(uint mine) {
        threadgroup uint* half_of = scratch + (turn++ % 2) * SIMD;
        if (lane == 0) half_of[sg] = mine;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        return lane < n_sg ? half_of[lane] : 0u;
    }
    // Ends what came before, so that no value of it lives on.
    METAL_FUNC void restart() {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        turn = 0;
    }
    METAL_FUNC uint sum(uint x) { return simd_sum(gather(simd_sum(x))); }
    METAL_FUNC float sum(float x) { return simd_sum(as_type<float>(gather(as_type<uint>(simd_sum(x))))); }
    METAL_FUNC uint largest(uint x) { return simd_max(gather(simd_max(x))); }
    METAL_FUNC ulong largest(ulong x) {
        const uint high = largest(uint(x >> 32));
        return ulong(high) << 32 | largest(uint(x >> 32) == high ? uint(x) : 0u);
    }
    // The sum over the threads before this one; and over all threads.
    METAL_FUNC float sum_before(float x, thread float& all) {
        const float before = simd_prefix_exclusive_sum(x), part = as_type<float>(gather(as_type<uint>(simd_sum(x))));
        all = simd_sum(part);
        return simd_sum(lane < sg ? part : 0.0f) + before;
    }
};

// Finds a border: at least `least` and at most `most` of the source's ranks are above it. Fewer than `least` are above
// `high`, more than `most` are above `low`. The middle is that of the keys and that of the logits, in turns.
template <class Source>
METAL_FUNC ulong border_of(thread Source& source, uint least, uint most, ulong low, ulong high, thread Team& team) {
    for (uint i = 0; high - low > 1; i++) {
        ulong middle = low + (high - low) / 2;
        if (i % 2 == 0 && low != 0) {
            const float between = 0.5f * logit_of_rank(low) + 0.5f * logit_of_rank(high);
            const ulong better = rank_of(sort_key(between), 0);
            if (low < better && better < high) middle = better;
        }
        const uint n = team.sum(source.n_above(middle));
        if (n > most) {
            low = middle;
        } else if (n < least) {
            high = middle;
        } else {
            return middle;
        }
    }
    return high;
}

// Sorts `size` ranks, a power of two and at most the number of threads, from large to small.
METAL_FUNC void sort_falling(threadgroup ulong* list, uint size, uint tid) {
    for (uint run = 2; run <= size; run *= 2)
        for (uint distance = run / 2; distance > 0; distance /= 2) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const uint other = tid ^ distance;
            if (tid >= size || other < tid) continue;
            const ulong a = list[tid], b = list[other];
            if ((a < b) == ((tid & run) == 0)) {
                list[tid] = b;
                list[other] = a;
            }
        }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// ---- noise ----------------------------------------------------------------------------------------------------------

METAL_FUNC ulong mixed(ulong x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ul;
    x = (x ^ x >> 27) * 0x94D049BB133111EBul;
    return x ^ x >> 31;
}

// -log(1 - v) for 0 < v <= 1/2, to about 2e-7 relative: twice the area tangent of v / (2 - v).
METAL_FUNC float minus_log_of_rest(float v) {
    const float z = v / (2.0f - v), z2 = z * z;
    float y = z2 * (1.0f / 15) + 1.0f / 13;
    y = y * z2 + 1.0f / 11;
    y = y * z2 + 1.0f / 9;
    y = y * z2 + 1.0f / 7;
    y = y * z2 + 1.0f / 5;
    y = y * z2 + 1.0f / 3;
    return 2.0f * z * (y * z2 + 1.0f);
}

// Gumbel noise of a token (sampling/noise.py): -log(-log(u)), where u is (52 bits + 1/2) / 2^52. Near 1, u is no float:
// its distance v from 1 is. Below 1/2, u is a power of two times 1 - v. So -log(u) is right to 3e-7 relative for all
// bits.
METAL_FUNC float gumbel(ulong key, uint id) {
    const ulong bits = mixed(ulong(id) * 0x9E3779B97F4A7C15ul + key) >> 12;
    const float unit = 2.220446049250313e-16f;  // 2^-52
    float minus_log;
    if (bits >> 51) {
        minus_log = minus_log_of_rest((float(~bits & 0xFFFFFFFFFFFFFul) + 0.5f) * unit);
    } else {
        const uint u = as_type<uint>((float(bits) + 0.5f) * unit);
        const float v = 1.0f - as_type<float>((u & 0x7fffffu) | 0x3f000000u);
        minus_log = float(126u - (u >> 23)) * 0.6931471806f + (v > 0.0f ? minus_log_of_rest(v) : 0.0f);
    }
    return -precise::log(minus_log);
}

METAL_FUNC ulong key_of(device const Draw& d) { return ulong(d.key_high) << 32 | ulong(d.key_low); }

// The sort key of a token's score: (logit - largest) / temperature + noise, or the logit at temperature 0.
METAL_FUNC uint score_key(device const Draw& d, ulong rank, float largest) {
    if (d.temperature == 0.0f) return key_of_rank(rank);
    const float below = (logit_of_rank(rank) - largest) / d.temperature;
    return sort_key(max(below, -MOST) + gumbel(key_of(d), id_of_rank(rank)));
}

// ---- options --------------------------------------------------------------------------------------------------------

METAL_FUNC bool penalises(device const Draw& d) {
    return d.repeat_last_n > 0 &&
           (d.repeat_penalty != 1.0f || d.presence_penalty != 0.0f || d.frequency_penalty != 0.0f);
}
METAL_FUNC bool changes(device const Draw& d) { return penalises(d) || d.n_bias > 0 || d.has_mask != 0; }
METAL_FUNC bool limits_count(device const Draw& d, uint n) { return d.top_k > 0 && d.top_k < n; }
METAL_FUNC bool filters(device const Draw& d, uint n) {
    return d.temperature > 0.0f && (limits_count(d, n) || d.top_p < 1.0f || d.min_p > 0.0f || d.typical_p < 1.0f);
}

// ---- changed logits -------------------------------------------------------------------------------------------------

// The logits of an output, and what changes them.
struct Source {
    device const float* logits;
    device const Draw* draw;
    device const uint* pages;
    device const int* history;
    device const Bias* biases;
    device const uint* masks;
};

METAL_FUNC uint token_of(constant DrawParams& p, uint part, uint i) {
    return (i / LINE * p.n_part + part) * LINE + i % LINE;
}

METAL_FUNC float bounded(float x) { return clamp(x, -MOST, MOST); }

METAL_FUNC float penalised(float x, uint count, device const Draw& d) {
    const float scaled = bounded(x > 0.0f ? x / d.repeat_penalty : x * d.repeat_penalty);
    return bounded(scaled - bounded(d.presence_penalty + d.frequency_penalty * float(count)));
}

// The bias of a token, 0 if it has none.
METAL_FUNC float bias_of(device const Bias* biases, uint n, uint id) {
    uint first = 0;
    for (uint end = n; first < end;) {
        const uint middle = (first + end) / 2;
        if (uint(biases[middle].id) < id) {
            first = middle + 1;
        } else {
            end = middle;
        }
    }
    return first < n && uint(biases[first].id) == id ? biases[first].value : 0.0f;
}

// Counts the last tokens that lie in a share.
METAL_FUNC void count_tokens(constant DrawParams& p, thread const Source& s, uint part, threadgroup atomic_uint* counts,
                             uint tid) {
    for (uint i = tid; i < DRAW_COLUMNS; i += DRAW_THREADS) atomic_store_explicit(&counts[i], 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint pos = s.draw->pos, n = min(s.draw->repeat_last_n, pos + 1);
    device const uint* table = s.pages + s.draw->pages;
    for (uint i = tid; i < n; i += DRAW_THREADS) {
        const uint id = uint(s.history[cache_row(table, pos - i)]), line = id / LINE;
        if (id < p.n && line % p.n_part == part)
            atomic_fetch_add_explicit(&counts[line / p.n_part * LINE + id % LINE], 1u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

struct Share {
    float x[PER_THREAD];

    METAL_FUNC void load(constant DrawParams& p, thread const Source& s, uint part, uint tid) {
        UNROLL for (uint j = 0; j < PER_THREAD; j++) {
            const uint id = token_of(p, part, j * DRAW_THREADS + tid);
            x[j] = id < p.n ? s.logits[id] : -INFINITY;
        }
    }

    METAL_FUNC void change(constant DrawParams& p, thread const Source& s, uint part, threadgroup atomic_uint* counts,
                           uint tid) {
        device const Draw& d = *s.draw;
        if (penalises(d)) {
            count_tokens(p, s, part, counts, tid);
            UNROLL for (uint j = 0; j < PER_THREAD; j++) {
                const uint count = atomic_load_explicit(&counts[j * DRAW_THREADS + tid], memory_order_relaxed);
                if (count > 0 && is_finite_bits(x[j])) x[j] = penalised(x[j], count, d);
            }
        }
        UNROLL for (uint j = 0; j < PER_THREAD; j++) {
            const uint id = token_of(p, part, j * DRAW_THREADS + tid);
            if (id >= p.n || !is_finite_bits(x[j])) continue;
            if (d.n_bias > 0) {
                const float bias = bias_of(s.biases + d.bias_at, d.n_bias, id);
                x[j] = is_finite_bits(bias) ? bounded(x[j] + bias) : -INFINITY;
            }
            if (d.has_mask && !(s.masks[d.mask_at + id / 32] >> id % 32 & 1u)) x[j] = -INFINITY;
        }
    }

    METAL_FUNC ulong rank(constant DrawParams& p, uint part, uint j, uint tid) const {
        return is_finite_bits(x[j]) ? rank_of(sort_key(x[j]), token_of(p, part, j * DRAW_THREADS + tid)) : 0;
    }
};

// ---- states and results
// -------------------------------------------------------------------------------------------------------

METAL_FUNC DrawState read_state(device const DrawState& from) {
    DrawState s;
    s.mode = from.mode;
    s.try_key = from.try_key;
    s.try_id = from.try_id;
    s.most = from.most;
    s.wanted = from.wanted;
    s.largest = from.largest;
    s.least = from.least;
    s.log_sum = from.log_sum;
    s.entropy = from.entropy;
    s.log_sum_exp = from.log_sum_exp;
    return s;
}

METAL_FUNC void write_state(device DrawState& to, thread const DrawState& s) {
    to.mode = s.mode;
    to.try_key = s.try_key;
    to.try_id = s.try_id;
    to.most = s.most;
    to.wanted = s.wanted;
    to.largest = s.largest;
    to.least = s.least;
    to.log_sum = s.log_sum;
    to.entropy = s.entropy;
    to.log_sum_exp = s.log_sum_exp;
}

struct Results {
    device const float* logits;  // of the output
    device int* chosen;
    device Choice* choice;

    METAL_FUNC void write(uint id, float log_sum_exp) const { set(int(id), 0, logits[id] - log_sum_exp, 0); }
    METAL_FUNC void refuse(uint n_not_finite, uint flags) const { set(-1, n_not_finite, 0.0f, flags); }
    METAL_FUNC void set(int id, uint n_not_finite, float logprob, uint flags) const {
        *chosen = id;
        choice->id = id;
        choice->n_not_finite = n_not_finite;
        choice->logprob = logprob;
        choice->flags = flags;
        choice->accepted = 0;
    }
};

METAL_FUNC Results results_of(constant DrawParams& p, device const Step* step, device const float* logits,
                              device int* chosen, device Choice* results, uint out) {
    return {logits + ulong(out) * p.n, chosen + out, results + step->number % STEP_RING * MAX_OUT + out};
}
