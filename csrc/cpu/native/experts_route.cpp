// Native routing of mixtures of experts: the choice of each row's experts, and the slots sorted by expert. And the sum
// of their products.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/native/experts_tile.h"
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

constexpr float LEAST_WEIGHTS = 6.103515625e-5f;  // sums of weights below this do not divide them

// True if a number comes before another: NaN after all numbers.
INLINE bool before(float a, float b) { return a > b || (a == a && b != b); }

// The best n of the values, in order; the lowest id among equals.
INLINE void best_of(const float* values, uint32_t n_values, uint32_t n, int32_t* ids) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < n_values; i++) {
        if (found == n && !before(values[i], values[ids[n - 1]])) continue;
        uint32_t at = found < n ? found++ : n - 1;
        for (; at > 0 && before(values[i], values[ids[at - 1]]); at--) ids[at] = ids[at - 1];
        ids[at] = int32_t(i);
    }
}

// The scores of a row's experts, of kind SCORE_*.
class Scores {
  public:
    Scores(const TopKParams& p, const float* logits) : kind(p.score) {
        if (kind != SCORE_SOFTMAX) return;
        largest = -HUGE_VALF;
        for (uint32_t i = 0; i < p.n_expert; i++) largest = logits[i] > largest ? logits[i] : largest;
        for (uint32_t i = 0; i < p.n_expert; i++)
            if (logits[i] == logits[i]) total += std::exp(logits[i] - largest);
    }
    float of(float logit) const {
        if (kind == SCORE_SIGMOID) return 1 / (1 + std::exp(-logit));
        return kind == SCORE_SOFTMAX ? std::exp(logit - largest) / total : logit;
    }

  private:
    uint32_t kind;
    float largest = 0, total = 0;
};

// The sum of the two largest of n values. NaN counts as 0.
float two_largest(const float* values, uint32_t n) {
    int32_t best[2] = {};
    best_of(values, n, 2, best);
    const float a = values[best[0]], b = values[best[1]];
    return (a == a ? a : 0) + (b == b ? b : 0);
}

// Makes the values of all groups NaN but those of the n_group_used best.
void keep_groups(const TopKParams& p, float* values) {
    float sums[MAX_GROUPS];
    int32_t kept[MAX_GROUPS];
    const uint32_t size = p.n_expert / p.n_group;
    for (uint32_t g = 0; g < p.n_group; g++) sums[g] = two_largest(values + g * size, size);
    best_of(sums, p.n_group, p.n_group_used, kept);
    for (uint32_t g = 0; g < p.n_group; g++)
        if (std::find(kept, kept + p.n_group_used, int32_t(g)) == kept + p.n_group_used)
            std::fill_n(values + g * size, size, NAN);
}

// The values by which a row's experts are chosen. Scores grow with their logits: without biases and groups, the logits
// themselves decide.
const float* values_of(const TopKParams& p, const Scores& scores, const float* logits, const float* bias) {
    if (!p.has_bias && p.n_group == 1) return logits;
    auto* values = workspace().sums.take<float>(p.n_expert);
    for (uint32_t i = 0; i < p.n_expert; i++) values[i] = scores.of(logits[i]) + (p.has_bias ? bias[i] : 0);
    if (p.n_group > 1) keep_groups(p, values);
    return values;
}

// The weights of the n chosen experts of a row. A NaN logit has no share.
void weigh(const TopKParams& p, const Scores& scores, const float* logits, const int32_t* ids, uint32_t n,
           float* weights) {
    float largest = -HUGE_VALF, total = 0;
    for (uint32_t j = 0; j < n; j++) largest = logits[ids[j]] > largest ? logits[ids[j]] : largest;
    for (uint32_t j = 0; j < n; j++) {
        const float logit = logits[ids[j]];
        weights[j] = logit != logit ? 0 : p.score == SCORE_LOGIT ? std::exp(logit - largest) : scores.of(logit);
        total += weights[j];
    }
    if (p.score != SCORE_LOGIT) total = p.normalised ? std::max(total, LEAST_WEIGHTS) : 1;
    for (uint32_t j = 0; j < n; j++) weights[j] *= p.scale / total;
}

// The bindings of moe_topk and moe_route: operands first.
struct Router {
    const TopKParams& p;
    const float *logits, *shared, *bias, *scales;
    int32_t* ids;
    float* weights;

    explicit Router(const NativeLaunch& l)
        : p(l.as<TopKParams>()), logits(l.buffer<const float>(2)), shared(l.buffer<const float>(3)),
          bias(l.buffer<const float>(4)), scales(l.buffer<const float>(5)), ids(l.buffer<int32_t>(6)),
          weights(l.buffer<float>(7)) {}

    // Chooses the experts of row t of the logits, and their weights.
    void choose(size_t t) const {
        const uint32_t n = std::min(p.n_used, p.n_expert);
        const float* row = logits + t * p.n_expert;
        int32_t* chosen = ids + t * p.n_used;
        float* to = weights + t * (p.n_used + 1);
        const Scores scores(p, row);
        best_of(values_of(p, scores, row, bias), p.n_expert, n, chosen);
        weigh(p, scores, row, chosen, n, to);
        for (uint32_t j = 0; p.has_scales && j < n; j++) to[j] *= scales[chosen[j]];
        const float gate = p.shared == SHARED_GATED ? 1 / (1 + std::exp(-shared[t])) : 1;
        to[p.n_used] = p.shared == SHARED_NONE ? 0 : gate;
    }
};

void moe_topk(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    const Router router(l);
    for (uint64_t t = begin; t < end && t < n_tokens; t++) router.choose(t);
}

// Sorts the slots by expert and cuts them into tiles of at most `tile` slots. Returns the number of tiles.
uint32_t sort_slots(const int32_t* ids, uint32_t n_slots, uint32_t n_expert, uint32_t tile, uint32_t max_tiles,
                    int32_t* slots, ExpertTile* tiles) {
    const auto expert_of = [&](uint32_t slot) { return std::min(uint32_t(ids[slot]), n_expert - 1); };

    auto* next = workspace().sums.take<uint32_t>(n_expert);  // an expert's next slot; at first, its count
    std::memset(next, 0, n_expert * sizeof(uint32_t));
    for (uint32_t slot = 0; slot < n_slots; slot++) next[expert_of(slot)]++;
    uint32_t first = 0, n_tiles = 0;
    for (uint32_t expert = 0; expert < n_expert; expert++) {
        const uint32_t end = first + next[expert];
        next[expert] = first;
        for (; first < end; first = std::min(first + tile, end))
            if (n_tiles < max_tiles)
                tiles[n_tiles++] = {int32_t(expert), int32_t(first), int32_t(std::min(first + tile, end)), 0};
    }
    for (uint32_t slot = 0; slot < n_slots; slot++) slots[next[expert_of(slot)]++] = int32_t(slot);
    return n_tiles;
}

void moe_sort(const NativeLaunch& l, uint64_t, uint64_t) {
    const auto& p = l.as<MoeSortParams>();
    const uint32_t n_slots = l.buffer<const Step>(1)->n_tokens * p.n_used;
    *l.buffer<int32_t>(5) = int32_t(sort_slots(l.buffer<const int32_t>(2), n_slots, p.n_expert, MOE_MM_TOKENS,
                                               p.max_tiles, l.buffer<int32_t>(3), l.buffer<ExpertTile>(4)));
}

void moe_route(const NativeLaunch& l, uint64_t, uint64_t) {
    const Router router(l);
    const auto& p = router.p;
    const uint32_t n_tokens = std::min(l.buffer<const Step>(1)->n_tokens, uint32_t(MOE_FEW_ROWS));
    for (uint32_t t = 0; t < n_tokens; t++) router.choose(t);
    *l.buffer<int32_t>(10) = int32_t(sort_slots(router.ids, n_tokens * p.n_used, p.n_expert, MOE_FEW_ROWS, p.n_expert,
                                                l.buffer<int32_t>(8), l.buffer<ExpertTile>(9)));
}

// out[t] = residual[t], or 0, + the sum over its experts j of weights[t, j] y[t, j].
void moe_mix(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MoeMixParams>();
    const float *weights = l.buffer<const float>(2), *y = l.buffer<const float>(3);
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    for (uint64_t i = begin; i < end && i / l.grid[0] < n_tokens; i++) {
        const size_t t = i / l.grid[0];
        const Range columns = piece(p.n, i % l.grid[0], l.grid[0]);
        const uint32_t n = columns.end - columns.begin;
        float* out = l.buffer<float>(5) + t * p.n + columns.begin;
        if (p.alone) std::memset(out, 0, n * sizeof(float));
        const float* sum = p.alone ? out : l.buffer<const float>(4) + t * p.n + columns.begin;
        for (uint32_t j = 0; j < p.n_used; j++, sum = out) {
            const float weight = weights[t * (p.n_used + 1) + j];
            map_floats(n, out, sum, y + (t * p.n_used + j) * p.n + columns.begin,
                       [weight](vf a, vf b) { return a + weight * b; });
        }
    }
}

}  // namespace

#define MOE_ROUTES(n) {"moe_topk_" #n, moe_topk, 1}, {"moe_route_" #n, moe_route, 1},

NATIVE_TABLE(experts_route) = {
    EXPERT_CLASSES(MOE_ROUTES){"moe_sort", moe_sort, 1}, {"moe_mix", moe_mix, 1}, {"moe_mix_few", moe_mix, 1}, {}};

}  // namespace zinc
