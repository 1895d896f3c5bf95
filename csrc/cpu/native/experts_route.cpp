// Native routing of mixtures of experts: the choice of each row's experts, and the slots sorted by expert. And the sum
// of their products.
#include <algorithm>
#include <cstring>

#include "cpu/native/experts_choose.h"
#include "cpu/native/experts_tile.h"
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

// The bindings of moe_topk and moe_route.
struct Routing {
    Router router;
    int32_t* ids;
    float* weights;

    explicit Routing(const NativeLaunch& l)
        : router{l.as<TopKParams>(), l.buffer<const float>(2), l.buffer<const float>(3), l.buffer<const float>(4),
                 l.buffer<const float>(5)},
          ids(l.buffer<int32_t>(6)), weights(l.buffer<float>(7)) {}

    void row(size_t t) const {
        int32_t* chosen = ids + t * router.p.n_used;
        router.choose(t, chosen);
        router.weigh(t, chosen, weights + t * (router.p.n_used + 1));
    }
};

void moe_topk(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    const Routing routing(l);
    for (uint64_t t = begin; t < end && t < n_tokens; t++) routing.row(t);
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
    const Routing routing(l);
    const auto& p = routing.router.p;
    const uint32_t n_tokens = std::min(l.buffer<const Step>(1)->n_tokens, uint32_t(MOE_FEW_ROWS));
    for (uint32_t t = 0; t < n_tokens; t++) routing.row(t);
    *l.buffer<int32_t>(10) = int32_t(sort_slots(routing.ids, n_tokens * p.n_used, p.n_expert, MOE_FEW_ROWS, p.n_expert,
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

NATIVE_TABLE(experts_route) = {{"moe_topk", moe_topk, 1}, {"moe_route", moe_route, 1}, {"moe_sort", moe_sort, 1},
                               {"moe_mix", moe_mix, 1},   {"moe_mix_few", moe_mix, 1}, {}};

}  // namespace zinc
