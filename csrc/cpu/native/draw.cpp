// Native kernels of a draw. draw_scan and draw_choose fill the same buffers as the Metal kernels, with other shares.
// draw_choose draws every token, so that nothing is left for draw_try and draw_finish.
#include <algorithm>

#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

constexpr uint32_t RANKED = 256;  // tokens that draw_choose sorts at first
constexpr uint64_t BITS = (uint64_t(1) << 52) - 1;

// A rank, as in kernels/draw.h. A type of this file, so that the templates of <algorithm> have no copy in other files.
struct Rank {
    uint64_t value;

    uint32_t id() const { return ~uint32_t(value); }
    float logit() const {
        const uint32_t key = uint32_t(value >> 32);
        return bits_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
    }
};
struct Above {
    bool operator()(Rank a, Rank b) const { return a.value > b.value; }
};

INLINE Rank rank_of(float x, uint32_t id) {
    const uint32_t bits = bits_as<uint32_t>(x + 0.0f);  // -0 + 0 is +0
    return {uint64_t(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | uint32_t(~id)};
}
INLINE Rank rank_of_key(uint32_t key, uint32_t id) { return {uint64_t(key) << 32 | uint32_t(~id)}; }

INLINE bool is_finite(float x) { return (bits_as<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
INLINE vi finite(vf x) { return (bits_as<vi>(x) & 0x7f800000) != 0x7f800000; }

INLINE bool any(vi lanes) {
    uint64_t words[sizeof(vi) / 8], all = 0;
    std::memcpy(words, &lanes, sizeof words);
    for (uint64_t word : words) all |= word;
    return all != 0;
}

// ---- options -------------------------------------------------------------------------------------------------------

bool penalises(const Draw& d) {
    return d.repeat_last_n > 0 && (d.repeat_penalty != 1 || d.presence_penalty != 0 || d.frequency_penalty != 0);
}
bool changes(const Draw& d) { return penalises(d) || d.n_bias > 0 || d.has_mask; }
bool limits_count(const Draw& d, uint32_t n) { return d.top_k > 0 && d.top_k < n; }
bool filters(const Draw& d, uint32_t n) {
    return d.temperature > 0 && (limits_count(d, n) || d.top_p < 1 || d.min_p > 0 || d.typical_p < 1);
}

// ---- changed logits ------------------------------------------------------------------------------------------------

INLINE double bounded(double x) {
    constexpr double most = 3.4028234663852886e38;
    return x < -most ? -most : x > most ? most : x;
}

INLINE float penalised(float x, uint32_t count, const Draw& d) {
    const double scaled = bounded(x > 0 ? double(x) / d.repeat_penalty : double(x) * d.repeat_penalty);
    return float(bounded(scaled - bounded(double(d.presence_penalty) + double(d.frequency_penalty) * count)));
}

// The logits of output `out`, and what changes them: the bindings 2 to 7 of draw_scan.
struct Source {
    const float* logits;
    const Draw* draw;
    const uint32_t* pages;
    const int32_t* history;
    const Bias* biases;
    const uint32_t* masks;

    Source(const NativeLaunch& l, uint32_t out, uint32_t n)
        : logits(l.buffer<const float>(2) + size_t(out) * n), draw(l.buffer<const Draw>(3) + out),
          pages(l.buffer<const uint32_t>(4)), history(l.buffer<const int32_t>(5)), biases(l.buffer<const Bias>(6)),
          masks(l.buffer<const uint32_t>(7)) {}
};

// Penalises the tokens [range) in x. `counts` has room for as many.
void penalise(const Source& s, Range range, float* x, uint32_t* counts) {
    const Draw& d = *s.draw;
    const uint32_t n = range.end - range.begin, most = d.repeat_last_n < d.pos + 1 ? d.repeat_last_n : d.pos + 1;
    std::memset(counts, 0, n * sizeof *counts);
    const uint32_t* table = s.pages + d.pages;
    const auto token = [&](uint32_t i) {
        const uint32_t pos = d.pos - i;
        return uint32_t(s.history[size_t(table[pos / KV_PAGE]) * KV_PAGE + pos % KV_PAGE]) - range.begin;
    };
    for (uint32_t i = 0; i < most; i++)
        if (const uint32_t at = token(i); at < n) counts[at]++;
    for (uint32_t i = 0; i < most; i++) {
        const uint32_t at = token(i);
        if (at >= n || counts[at] == 0) continue;
        if (is_finite(x[at])) x[at] = penalised(x[at], counts[at], d);
        counts[at] = 0;
    }
}

// Copies the logits [range) to x, changed.
void change(const Source& s, Range range, float* x, uint32_t* counts) {
    const Draw& d = *s.draw;
    std::memcpy(x, s.logits + range.begin, (range.end - range.begin) * sizeof *x);
    if (penalises(d)) penalise(s, range, x, counts);
    for (uint32_t i = 0; i < d.n_bias; i++) {
        const Bias& bias = s.biases[d.bias_at + i];
        const uint32_t at = uint32_t(bias.id) - range.begin;
        if (uint32_t(bias.id) < range.begin || uint32_t(bias.id) >= range.end || !is_finite(x[at])) continue;
        x[at] = is_finite(bias.value) ? float(bounded(double(x[at]) + bias.value)) : -HUGE_VALF;
    }
    if (!d.has_mask) return;
    for (uint32_t id = range.begin; id < range.end; id++)
        if (!(s.masks[d.mask_at + id / 32] >> id % 32 & 1)) x[id - range.begin] = -HUGE_VALF;
}

// ---- sums ----------------------------------------------------------------------------------------------------------

struct Totals {
    uint32_t n = 0;  // finite logits
    float largest = -3.402823466e+38f;
    float sum_exp = 0, sum_x_exp = 0;
};

// Calls f(vector) for n floats, the last vector filled up with infinities.
template <class F>
INLINE void for_vectors(const float* x, uint32_t n, F&& f) {
    uint32_t i = 0;
    for (; i + W <= n; i += W) f(load<vf>(x + i));
    if (i == n) return;
    vf tail = splat(-HUGE_VALF);
    std::memcpy(&tail, x + i, (n - i) * sizeof(float));
    f(tail);
}

Totals totals_of(const float* x, uint32_t n, bool entropy) {
    Totals t;
    vf top = splat(t.largest);
    vi odd{};
    for_vectors(x, n, [&](vf v) {
        odd |= ~finite(v);
        top = ((v > top) & finite(v)) ? v : top;
    });
    for (int lane = 0; lane < W; lane++) t.largest = top[lane] > t.largest ? top[lane] : t.largest;
    t.n = n;
    if (any(odd)) {
        t.n = 0;
        for (uint32_t i = 0; i < n; i++) t.n += is_finite(x[i]);
    }
    vf sums{}, x_sums{};
    for_vectors(x, n, [&](vf v) {
        const vf below = v - t.largest;
        const vf weight = exp(below);  // NaN and infinity spoil only sums of an output that is refused
        sums += weight;
        if (entropy) x_sums += weight > 0.0f ? below * weight : vf{};
    });
    t.sum_exp = sum_lanes(sums);
    t.sum_x_exp = sum_lanes(x_sums);
    return t;
}

// A number that `most` of n logits at least are above, and not many more: a few of the largest logits of 8 W groups.
float bound_of(const float* x, uint32_t n, uint32_t most) {
    constexpr uint32_t groups = 8 * W;
    if (n < 4 * groups || most > groups / 2) return -HUGE_VALF;
    vf tops[8];
    for (vf& top : tops) top = splat(-HUGE_VALF);
    for (uint32_t i = 0; i + groups <= n; i += groups) UNROLL for (uint32_t j = 0; j < 8; j++) {
            const vf v = load<vf>(x + i + j * W);
            tops[j] = v > tops[j] ? v : tops[j];
        }
    Rank ranks[groups];
    for (uint32_t i = 0; i < groups; i++) ranks[i] = rank_of(tops[i / W][i % W], i);
    std::nth_element(ranks, ranks + most - 1, ranks + groups, Above{});
    return std::nextafter(ranks[most - 1].logit(), -HUGE_VALF);
}

// Keeps the `most` largest of n logits, the first of which is token `first`.
void keep(const float* x, uint32_t n, uint32_t first, uint32_t most, DrawKept& kept) {
    constexpr uint32_t full = DRAW_KEPT + 256;
    Rank room[full + 4 * W];
    uint32_t n_room = 0;
    float bound = bound_of(x, n, most);
    bool dropped = bound > -HUGE_VALF;
    const auto shorten = [&] {
        if (n_room <= most) return;
        std::nth_element(room, room + most - 1, room + n_room, Above{});
        n_room = most;
        bound = room[most - 1].logit();  // ids rise: of equal logits, the later ones rank lower
        dropped = true;
    };
    const auto take = [&](uint32_t begin, uint32_t end) {
        for (uint32_t id = begin; id < end; id++)
            if (x[id] > bound && is_finite(x[id])) room[n_room++] = rank_of(x[id], first + id);
        if (n_room >= full) shorten();
    };
    uint32_t i = 0;
    for (; i + W <= n; i += W)
        if (any(load<vf>(x + i) > bound)) take(i, i + W);
    take(i, n);
    shorten();
    uint64_t lowest = ~uint64_t(0);
    for (i = 0; i < n_room; i++) {
        kept.key[i] = uint32_t(room[i].value >> 32);
        kept.id[i] = room[i].id();
        lowest = room[i].value < lowest ? room[i].value : lowest;
    }
    const Rank floor = {dropped ? lowest - 1 : 0};
    kept.n = n_room;
    kept.floor_key = uint32_t(floor.value >> 32);
    kept.floor_id = floor.id();
}

// ---- noise ---------------------------------------------------------------------------------------------------------

INLINE uint64_t bits_of(uint64_t key, uint32_t id) {
    uint64_t x = id * 0x9E3779B97F4A7C15u + key;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return (x ^ x >> 31) >> 12;
}
INLINE uint64_t key_of(const Draw& d) { return uint64_t(d.key_high) << 32 | d.key_low; }

// -log(-log(u)) of u = (bits + 1/2) / 2^52; near 1, u is known by its distance from 1.
INLINE double gumbel(uint64_t bits) {
    const double minus_log =
        bits >> 51 ? -std::log1p(-((double(~bits & BITS) + 0.5) * 0x1p-52)) : -std::log((double(bits) + 0.5) * 0x1p-52);
    return -std::log(minus_log);
}

struct Best {
    double score = -HUGE_VAL;
    Rank rank = {0};
};

INLINE void offer(Best& best, Rank rank, float largest, const Draw& d) {
    const double below = (double(rank.logit()) - double(largest)) / double(d.temperature);
    const double score = below + gumbel(bits_of(key_of(d), rank.id()));
    if (best.rank.value == 0 || score > best.score) best = {score, rank};
}

// Meets n logits, the first of which is token `first`. Those for which left(x, id) is true may become the best.
//
// Noise of at least g has a u whose distance from 1 is at most e^-g. So a token with the weight w = e^(x / T) reaches a
// score s only if that distance is at most w e^-s. Few tokens pass this test.
template <class Left>
INLINE void meet(const float* x, uint32_t n, uint32_t first, float largest, const Draw& d, Best& best, Left left) {
    constexpr uint32_t block = 4 * W;
    float weights[block];
    int32_t distances[block];  // 31 bits, rounded down
    const float inverse = 1 / d.temperature < HUGE_VALF ? 1 / d.temperature : 3e38f;
    const uint64_t key = key_of(d);
    float limit = HUGE_VALF;
    for (uint32_t at = 0; at < n; at += block) {
        const uint32_t m = n - at < block ? n - at : block;
        uint32_t i = 0;
        for_vectors(x + at, m, [&](vf v) {
            store(weights + i, exp((v - largest) * inverse));
            i += W;
        });
        for (i = 0; i < block; i++) distances[i] = int32_t((~bits_of(key, first + at + i) & BITS) >> 21);
        vi reach{};
        UNROLL for (i = 0; i < block; i += W) reach |=
            convert<vf>(load<vi>(distances + i)) * 0x1p-31f <= load<vf>(weights + i) * limit;
        if (!any(reach) && limit < HUGE_VALF) continue;
        for (i = 0; i < m; i++) {
            if (float(distances[i]) * 0x1p-31f > weights[i] * limit) continue;
            if (!is_finite(x[at + i]) || !left(x[at + i], first + at + i)) continue;
            offer(best, rank_of(x[at + i], first + at + i), largest, d);
            limit = float(std::exp(-best.score) * 1.001);
        }
    }
}

// ---- draw_scan -----------------------------------------------------------------------------------------------------

void scan(const Source& s, Range range, const DrawParams& p, DrawPart& part) {
    const Draw& d = *s.draw;
    const uint32_t n = range.end - range.begin;
    const float* x = s.logits + range.begin;
    const bool filtered = filters(d, p.n), changed = changes(d), entropy = filtered && d.typical_p < 1;
    const uint32_t most = p.n_part < 8 ? uint32_t(DRAW_KEPT) : DRAW_KEPT / 2;  // enough for RANKED together
    Totals t = totals_of(x, n, entropy && !changed);
    part.n_not_finite = n - t.n;
    part.before_largest = t.largest;
    part.before_sum = t.sum_exp;
    if (changed) {
        if (d.n_logprobs) keep(x, n, range.begin, most, part.before);
        float* copy = thread_scratch().take<float>(2 * size_t(n));
        change(s, range, copy, reinterpret_cast<uint32_t*>(copy + n));
        x = copy;
        t = totals_of(x, n, entropy);
    }
    part.n = t.n;
    part.largest = t.largest;
    part.sum_exp = t.sum_exp;
    part.sum_x_exp = t.sum_x_exp;
    if (filtered || (d.n_logprobs && !changed)) keep(x, n, range.begin, most, part.kept);
    if (filtered || t.n == 0) return;
    Best best;
    if (d.temperature == 0) {
        uint32_t i = 0;
        while (x[i] != t.largest) i++;
        best.rank = rank_of(x[i], range.begin + i);
    } else {
        meet(x, n, range.begin, t.largest, d, best, [](float, uint32_t) { return true; });
    }
    part.best_key = uint32_t(best.rank.value >> 32);
    part.best_id = best.rank.id();
}

void draw_scan(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<DrawParams>();
    const Step& step = *l.buffer<const Step>(1);
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t out = uint32_t(i / l.grid[0]);
        if (out >= step.n_out) return;
        scan(Source(l, out, p.n), piece(p.n, i % l.grid[0], p.n_part), p, l.buffer<DrawPart>(8)[i]);
    }
}

// ---- filters -------------------------------------------------------------------------------------------------------

// Tokens from the most probable one on. All others rank at or below the floor, which is 0 if there are no others.
struct Ranking {
    Rank* ranks;
    uint32_t n;
    Rank floor;
    double total, x_total;  // of exp(x - first), and of (x - first) exp(x - first), over all tokens

    double below(Rank r) const { return double(r.logit()) - double(ranks[0].logit()); }
    double weight(Rank r) const { return std::exp(below(r)); }
    bool whole() const { return floor.value == 0; }

    void shorten(uint32_t most) {
        n = n < most ? n : most;
        floor = {0};
        total = x_total = 0;
        for (uint32_t i = 0; i < n; i++) {
            const double b = below(ranks[i]), w = std::exp(b);
            total += w;
            x_total += w > 0 ? b * w : 0;
        }
    }
};

struct Distant {
    double distance;
    uint32_t at;
};
struct Nearer {
    bool operator()(const Distant& a, const Distant& b) const {
        return a.distance < b.distance || (a.distance == b.distance && a.at < b.at);
    }
};

// Applies typical-p. False if the ranking is too short to be certain.
bool keep_typical(Ranking& r, double typical_p) {
    auto* order = workspace().panel.take<Distant>(r.n);
    const double log_sum = std::log(r.total), entropy = log_sum - r.x_total / r.total;
    for (uint32_t i = 0; i < r.n; i++) order[i] = {std::fabs(log_sum - r.below(r.ranks[i]) - entropy), i};
    std::sort(order, order + r.n, Nearer{});
    const double wanted = typical_p * r.total;
    double sum = 0;
    uint32_t n = 0;
    while (n < r.n && (n == 0 || sum < wanted)) sum += r.weight(r.ranks[order[n++].at]);
    if (!r.whole() && (sum < wanted || order[n - 1].distance >= log_sum - r.below(r.floor) - entropy)) return false;
    auto* kept = workspace().weights.take<Rank>(n);
    for (uint32_t i = 0; i < n; i++) kept[i] = r.ranks[order[i].at];
    std::sort(kept, kept + n, Above{});
    std::memcpy(r.ranks, kept, n * sizeof *kept);
    r.shorten(n);
    return true;
}

// Finds the token. False if the ranking is too short to be certain.
bool choose(Ranking& r, const Draw& d, uint32_t n_vocab, Rank& token) {
    if (limits_count(d, n_vocab)) {
        if (!r.whole() && r.n < d.top_k) return false;
        r.shorten(d.top_k);
    }
    if (d.typical_p < 1 && !keep_typical(r, d.typical_p)) return false;
    uint32_t n = 0;
    if (d.top_p < 1) {
        const double wanted = double(d.top_p) * r.total;
        double sum = 0;
        while (n < r.n && (n == 0 || sum < wanted)) sum += r.weight(r.ranks[n++]);
        if (!r.whole() && sum < wanted) n = 0;
    } else if (r.whole()) {
        n = r.n;
    }
    if (d.min_p > 0) {
        const double least = std::log(double(d.min_p));
        uint32_t kept = 0;
        while (kept < r.n && r.below(r.ranks[kept]) >= least) kept++;
        if (r.whole() || r.below(r.floor) < least) n = n > 0 && n < kept ? n : kept;
    }
    Best best;
    for (uint32_t i = 0; i < n; i++) offer(best, r.ranks[i], r.ranks[0].logit(), d);
    token = best.rank;
    return n > 0;
}

// ---- draw_choose ---------------------------------------------------------------------------------------------------

// What all shares found.
struct Sums {
    uint32_t n = 0, n_not_finite = 0;
    float largest = -HUGE_VALF;
    double sum_exp = 0, sum_x_exp = 0, log_sum_exp = 0;
};

Sums sums_of(const DrawPart* parts, uint32_t n_part) {
    Sums s;
    float before = -HUGE_VALF;
    for (uint32_t i = 0; i < n_part; i++) {
        s.n += parts[i].n;
        s.n_not_finite += parts[i].n_not_finite;
        before = parts[i].before_largest > before ? parts[i].before_largest : before;
        if (parts[i].n && parts[i].largest > s.largest) s.largest = parts[i].largest;
    }
    double before_sum = 0;
    for (uint32_t i = 0; i < n_part; i++) {
        before_sum += std::exp(double(parts[i].before_largest) - before) * parts[i].before_sum;
        if (parts[i].n == 0) continue;
        const double below = double(parts[i].largest) - s.largest, scale = std::exp(below);
        s.sum_exp += scale * parts[i].sum_exp;
        if (scale > 0) s.sum_x_exp += scale * (parts[i].sum_x_exp + below * parts[i].sum_exp);
    }
    s.log_sum_exp = before + std::log(before_sum);
    return s;
}

// Ranks the most probable tokens of all shares, at most RANKED.
Ranking ranked(const DrawPart* parts, uint32_t n_part, bool before) {
    Rank* ranks = workspace().sums.take<Rank>(size_t(n_part) * DRAW_KEPT);
    Rank floor = {0};
    const auto kept_of = [&](uint32_t i) -> const DrawKept& { return before ? parts[i].before : parts[i].kept; };
    for (uint32_t i = 0; i < n_part; i++) {
        const Rank other = rank_of_key(kept_of(i).floor_key, kept_of(i).floor_id);
        floor = other.value > floor.value ? other : floor;
    }
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_part; i++) {
        const DrawKept& kept = kept_of(i);
        for (uint32_t j = 0; j < kept.n; j++) {
            ranks[n] = rank_of_key(kept.key[j], kept.id[j]);
            n += ranks[n].value > floor.value;
        }
    }
    if (n > RANKED) {
        std::nth_element(ranks, ranks + RANKED, ranks + n, Above{});
        floor = ranks[RANKED];
        n = RANKED;
    }
    std::sort(ranks, ranks + n, Above{});
    return {ranks, n, floor, 0, 0};
}

// Sums the weights of the tokens before `token`, and counts them.
double sum_before(const float* x, uint32_t n, float largest, Rank token, uint64_t& n_before) {
    constexpr uint32_t block = 64 * W;
    const float at = token.logit();
    double sum = 0;
    for (uint32_t i = 0; i < n; i += block) {
        const uint32_t m = n - i < block ? n - i : block;
        vf sums{};
        vi counts{}, equal{};
        for_vectors(x + i, m, [&](vf v) {
            const vi above = v > at;
            equal |= v == at;
            counts -= above;
            sums += above ? exp(v - largest) : vf{};
        });
        for (int lane = 0; lane < W; lane++) n_before += uint32_t(counts[lane]);
        sum += sum_lanes(sums);
        if (!any(equal)) continue;
        for (uint32_t id = i; id < i + m && id < token.id(); id++) {
            if (x[id] != at) continue;
            n_before++;
            sum += std::exp(double(at) - double(largest));
        }
    }
    return sum;
}

// Tries the token with the best score, then the best one of those that come before it, until top-p and min-p leave it.
// draw_try.metal does the same.
Rank draw_by_tries(const float* x, uint32_t n, const Sums& s, const Draw& d) {
    const float least = d.min_p > 0 ? float(std::log(double(d.min_p))) : -HUGE_VALF;
    const double wanted = d.top_p < 1 ? d.top_p * s.sum_exp : HUGE_VAL;
    const uint64_t most = limits_count(d, n) ? d.top_k : n;
    Rank token = {0};
    for (;;) {
        const float at = token.value ? token.logit() : -HUGE_VALF;
        const uint32_t id = token.value ? token.id() : n;
        uint64_t n_before = 0;
        const double sum = token.value ? sum_before(x, n, s.largest, token, n_before) : 0;
        if (token.value && (n_before == 0 || (n_before < most && sum < wanted))) return token;
        Best best;
        meet(x, n, 0, s.largest, d, best,
             [&](float y, uint32_t i) { return (y > at || (y == at && i < id)) && y - s.largest >= least; });
        if (best.rank.value == 0) return token;
        token = best.rank;
    }
}

// Draws from all logits.
Rank draw_from_all(const Source& source, uint32_t n, const Sums& s) {
    const Draw& d = *source.draw;
    const float* x = source.logits;
    if (changes(d)) {
        float* copy = workspace().rows.take<float>(2 * size_t(n));
        change(source, {0, n}, copy, reinterpret_cast<uint32_t*>(copy + n));
        x = copy;
    }
    if (d.typical_p == 1 && (d.top_p == 1 || !limits_count(d, n))) return draw_by_tries(x, n, s, d);
    Rank* ranks = workspace().sums.take<Rank>(n);
    uint32_t n_ranks = 0;
    for (uint32_t id = 0; id < n; id++)
        if (is_finite(x[id])) ranks[n_ranks++] = rank_of(x[id], id);
    std::sort(ranks, ranks + n_ranks, Above{});
    Ranking all = {ranks, n_ranks, {0}, 0, 0};
    all.shorten(n_ranks);
    Rank token = {0};
    choose(all, d, n, token);
    return token;
}

// Chooses the token of an output; its sums allow a choice.
Rank token_of(const Source& source, const DrawPart* parts, const DrawParams& p, const Sums& s) {
    const Draw& d = *source.draw;
    if (filters(d, p.n)) {
        Ranking r = ranked(parts, p.n_part, false);
        r.total = s.sum_exp;
        r.x_total = s.sum_x_exp;
        Rank token = {0};
        return choose(r, d, p.n, token) ? token : draw_from_all(source, p.n, s);
    }
    Best best;
    for (uint32_t i = 0; i < p.n_part; i++) {
        if (parts[i].n == 0) continue;
        const Rank rank = rank_of_key(parts[i].best_key, parts[i].best_id);
        if (d.temperature > 0) {
            offer(best, rank, s.largest, d);
        } else if (rank.value > best.rank.value) {
            best.rank = rank;
        }
    }
    return best.rank;
}

void write_logprobs(const DrawPart* parts, uint32_t n_part, const Draw& d, const Sums& s, Logprobs& out) {
    out.n = 0;
    if (s.n_not_finite) return;
    const Ranking r = ranked(parts, n_part, changes(d));
    out.n = d.n_logprobs < MAX_LOGPROBS ? d.n_logprobs : uint32_t(MAX_LOGPROBS);
    out.n = r.n < out.n ? r.n : out.n;
    for (uint32_t i = 0; i < out.n; i++) {
        out.id[i] = int32_t(r.ranks[i].id());
        out.logprob[i] = float(r.ranks[i].logit() - s.log_sum_exp);
    }
}

void draw_choose(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<DrawParams>();
    const Step& step = *l.buffer<const Step>(1);
    const size_t place = size_t(step.number % STEP_RING) * MAX_OUT;
    for (uint64_t out = begin; out < end && out < step.n_out; out++) {
        const Source source(l, uint32_t(out), p.n);
        const DrawPart* parts = l.buffer<const DrawPart>(8) + out * p.n_part;
        const Sums s = sums_of(parts, p.n_part);
        const Draw& d = *source.draw;
        Choice choice = {-1, s.n_not_finite, 0, s.n_not_finite ? 0 : uint32_t(CHOICE_FORBIDDEN), 0};
        if (d.n_logprobs) write_logprobs(parts, p.n_part, d, s, l.buffer<Logprobs>(12)[place + out]);
        if (s.n_not_finite == 0 && s.n > 0) {
            const uint32_t id = token_of(source, parts, p, s).id();
            choice = {int32_t(id), 0, float(source.logits[id] - s.log_sum_exp), 0, 0};
        }
        l.buffer<int32_t>(10)[out] = choice.id;
        l.buffer<Choice>(11)[place + out] = choice;
        l.buffer<DrawState>(9)[out * (DRAW_TRIES + 1)].mode = DRAW_DONE;
    }
}

void nothing(const NativeLaunch&, uint64_t, uint64_t) {}

}  // namespace

NATIVE_TABLE(draw) = {
    {"draw_scan", draw_scan, 1},
    {"draw_choose", draw_choose, 1},
    {"draw_try", nothing, 0},
    {"draw_finish", nothing, 0},
    {},
};

}  // namespace zinc
