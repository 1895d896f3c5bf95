// Native kernels that end a plan: the arg max of the logits, or the candidates for the next token.
#include "cpu/native/register.h"

namespace zinc {
namespace {

// Sort keys as in kernels/sort_key.h, but 0 for all values that are not finite.
INLINE vi keys_of(vf x) {
    const vi bits = bits_as<vi>(x + 0.0f);  // -0 + 0 is +0
    const vi odd = (bits & 0x7f800000) == 0x7f800000;
    return ~odd & (bits ^ (bits >> 31 | int32_t(0x80000000)));
}

// Sorts logits from small to large, and equal logits from high id to low.
INLINE uint64_t rank_of_key(uint32_t key, uint32_t id) { return uint64_t(key) << 32 | uint32_t(~id); }

INLINE uint64_t rank_of(float x, uint32_t id) {
    const uint32_t bits = bits_as<uint32_t>(x + 0.0f);
    return rank_of_key(bits & 0x80000000u ? ~bits : bits | 0x80000000u, id);
}

INLINE float logit_of_rank(uint64_t rank) {
    const uint32_t key = uint32_t(rank >> 32);
    return bits_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Returns a number which exactly the `wanted` largest of n different ranks are not below. It counts the ranks by their
// bytes, from the highest byte, and goes on with the ranks that share the border's byte. 1 <= wanted <= n. Overwrites
// the ranks.
uint64_t lowest_of_largest(uint64_t* ranks, uint32_t n, uint32_t wanted) {
    for (int shift = 56;; shift -= 8) {
        uint32_t bins[256] = {};
        for (uint32_t i = 0; i < n; i++) bins[ranks[i] >> shift & 255]++;
        uint32_t digit = 255;
        while (bins[digit] < wanted) wanted -= bins[digit--];
        uint32_t n_equal = 0;
        for (uint32_t i = 0; i < n; i++) {
            ranks[n_equal] = ranks[i];
            n_equal += (ranks[i] >> shift & 255) == digit;
        }
        n = n_equal;
        if (n == wanted || shift == 0) return ranks[0] >> shift << shift;
    }
}

// Fills the places from n ranks, in their order; room has space for as many.
void choose(const uint64_t* ranks, uint32_t n, uint64_t* room, Candidates& out) {
    out.n = n < N_CANDIDATES ? n : uint32_t(N_CANDIDATES);
    if (n == 0) return;
    std::memcpy(room, ranks, n * sizeof *ranks);
    const uint64_t lowest = lowest_of_largest(room, n, out.n);
    for (uint32_t i = 0, slot = 0; i < n; i++) {
        if (ranks[i] < lowest) continue;
        out.logit[slot] = logit_of_rank(ranks[i]);
        out.id[slot++] = int32_t(~uint32_t(ranks[i]));
    }
}

// Calls f(index, vector) for n floats, the last vector filled up with infinities.
template <class F>
INLINE void for_vectors(const float* x, uint32_t n, F&& f) {
    uint32_t i = 0;
    for (; i + W <= n; i += W) f(i, load<vf>(x + i));
    if (i == n) return;
    vf tail = splat(HUGE_VALF);
    std::memcpy(&tail, x + i, (n - i) * sizeof(float));
    f(i, tail);
}

// Writes the keys of n logits (and up to W - 1 more), the largest logit, and the count of logits that are not finite.
void summarise(const float* x, uint32_t n, uint32_t* keys, Candidates& out) {
    vf top = splat(-HUGE_VALF);
    vi n_finite{};
    for_vectors(x, n, [&](uint32_t i, vf v) {
        const vi key = keys_of(v);
        store(keys + i, key);
        n_finite -= key != 0;
        top = ((key != 0) & (v > top)) ? v : top;
    });
    out.largest = -HUGE_VALF;
    out.n_not_finite = n;
    for (int lane = 0; lane < W; lane++) {
        out.largest = top[lane] > out.largest ? top[lane] : out.largest;
        out.n_not_finite -= uint32_t(n_finite[lane]);
    }
}

// Sums over all logits, once the largest is known.
void sum(const float* x, uint32_t n, Candidates& out) {
    vf sums{}, x_sums{};
    for_vectors(x, n, [&](uint32_t, vf v) {
        const vf below = v - out.largest;
        const vi finite = keys_of(v) != 0;
        const vf weight = finite ? exp(below) : vf{};
        sums += weight;
        x_sums += finite ? below * weight : vf{};
    });
    out.sum_exp = sum_lanes(sums);
    out.sum_x_exp = sum_lanes(x_sums);
}

// Returns a key, at least 1, such that enough of n keys to fill the places, and few more, are not below it. Only its
// leading bits count.
uint32_t bound_of_keys(const uint32_t* keys, uint32_t n) {
    constexpr int shift = 21;
    uint32_t bins[2][1 << (32 - shift)] = {};  // two: neighbours are often equal, and would wait for one another
    for (uint32_t i = 0; i < n; i++) bins[i & 1][keys[i] >> shift]++;
    uint32_t digit = (1u << (32 - shift)) - 1, n_reach = 0;
    for (; digit > 0; digit--)
        if ((n_reach += bins[0][digit] + bins[1][digit]) >= N_CANDIDATES) break;
    return digit ? digit << shift : 1;
}

void candidates_partial(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<CandidatesParams>();
    for (uint64_t part = begin; part < end; part++) {
        const Range range = piece(p.n, part, p.n_part);
        const float* x = l.buffer<const float>(1) + range.begin;
        Candidates& out = l.buffer<Candidates>(2)[part];
        const uint32_t n = range.end - range.begin;
        uint64_t* ranks = thread_scratch().take<uint64_t>(3 * size_t(n) + W);
        auto* keys = reinterpret_cast<uint32_t*>(ranks + 2 * size_t(n));
        summarise(x, n, keys, out);
        sum(x, n, out);
        const uint32_t bound = bound_of_keys(keys, n);
        uint32_t n_ranks = 0;
        for (uint32_t i = 0; i < n; i++) {
            ranks[n_ranks] = rank_of_key(keys[i], range.begin + i);
            n_ranks += keys[i] >= bound;
        }
        choose(ranks, n_ranks, ranks + n, out);
    }
}

// Only candidates at or above this can win: the section that has it fills all places by itself.
uint64_t bound_of_parts(const Candidates* parts, uint32_t n_part) {
    uint64_t bound = 0;
    for (uint32_t i = 0; i < n_part; i++) {
        if (parts[i].n < N_CANDIDATES) continue;
        uint64_t lowest = ~uint64_t(0);
        for (uint32_t j = 0; j < N_CANDIDATES; j++) {
            const uint64_t rank = rank_of(parts[i].logit[j], uint32_t(parts[i].id[j]));
            lowest = rank < lowest ? rank : lowest;
        }
        bound = lowest > bound ? lowest : bound;
    }
    return bound;
}

void candidates_final(const NativeLaunch& l, uint64_t, uint64_t) {
    const uint32_t n_part = l.as<CandidatesParams>().n_part;
    const Candidates* parts = l.buffer<const Candidates>(1);
    Candidates& out = *l.buffer<Candidates>(2);
    out.largest = -HUGE_VALF;
    out.sum_exp = out.sum_x_exp = 0;
    out.n_not_finite = 0;
    for (uint32_t i = 0; i < n_part; i++)
        if (parts[i].n && parts[i].largest > out.largest) out.largest = parts[i].largest;
    uint64_t* ranks = thread_scratch().take<uint64_t>(2 * size_t(n_part) * N_CANDIDATES);
    const uint64_t bound = bound_of_parts(parts, n_part);
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_part; i++) {
        out.n_not_finite += parts[i].n_not_finite;
        if (parts[i].n == 0) continue;
        const float below = parts[i].largest - out.largest, scale = std::exp(below);
        out.sum_exp += scale * parts[i].sum_exp;
        out.sum_x_exp += scale * (parts[i].sum_x_exp + below * parts[i].sum_exp);
        for (uint32_t j = 0; j < parts[i].n; j++) {
            ranks[n] = rank_of(parts[i].logit[j], uint32_t(parts[i].id[j]));
            n += ranks[n] >= bound;
        }
    }
    choose(ranks, n, ranks + n, out);
}

// ---- argmax

INLINE bool is_finite(float x) { return (bits_as<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// The largest of n values; NaN if one of them is not finite.
INLINE float largest(const float* x, uint32_t n) {
    vf top = splat(-HUGE_VALF);
    vi odd{};
    uint32_t i = 0;
    for (; i + W <= n; i += W) {
        const vf v = load<vf>(x + i);
        odd |= (bits_as<vi>(v) & 0x7f800000) == 0x7f800000;
        top = v > top ? v : top;
    }
    float best = -HUGE_VALF;
    bool finite = true;
    for (int lane = 0; lane < W; lane++) {
        best = top[lane] > best ? top[lane] : best;
        finite = finite && !odd[lane];
    }
    for (; i < n; i++) {
        best = x[i] > best ? x[i] : best;
        finite = finite && is_finite(x[i]);
    }
    return finite ? best : NAN;
}

void argmax_partial(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<ArgmaxParams>();
    const float* logits = l.buffer<const float>(1);
    for (uint64_t i = begin; i < end; i++) {
        const Range part = piece(p.n, i, l.grid[0]);
        const float best = largest(logits + part.begin, part.end - part.begin);
        uint32_t id = part.begin;
        while (is_finite(best) && logits[id] != best) id++;
        l.buffer<float>(2)[i] = best;
        l.buffer<int32_t>(3)[i] = part.begin < part.end ? int32_t(id) : -1;  // -1: no logits in this section
    }
}

void argmax_final(const NativeLaunch& l, uint64_t, uint64_t) {
    const auto& p = l.as<ArgmaxParams>();
    Step& step = *l.buffer<Step>(1);
    const float* values = l.buffer<const float>(3);
    const int32_t* ids = l.buffer<const int32_t>(4);
    float best = -HUGE_VALF;
    int32_t id = -1;
    for (uint32_t i = 0; i < p.n_part; i++) {
        if (ids[i] < 0) continue;
        if (!is_finite(values[i])) {
            id = -1;
            break;
        }
        if (values[i] > best || (values[i] == best && ids[i] < id)) {
            best = values[i];
            id = ids[i];
        }
    }
    step.chosen[step.n_chosen++ % N_CHOSEN][0] = id;
    step.pos += step.n_tokens;
    step.n_tokens = 1;
    l.buffer<int32_t>(2)[0] = id;
}

}  // namespace

NATIVE_TABLE(output) = {
    {"argmax_partial", argmax_partial, 1},
    {"argmax_final", argmax_final, 1},
    {"candidates_partial", candidates_partial, 1},
    {"candidates_final", candidates_final, 1},
    {},
};

}  // namespace zinc
