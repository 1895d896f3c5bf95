// Native prefill of mixtures of experts: the slots sorted by expert, the products of each expert's rows with its slots,
// and their sum.
#include "shapes.h"
#include "cpu/native/strips.h"

namespace zinc {
namespace {

// As moe_sort writes them: slots[first .. end) are an expert's.
struct ExpertTile {
    int32_t expert, first, end, reserved;
};

// Calls run(expert, first, end, n) for each expert of tiles [begin, end) with its slots there. So an expert's rows are
// unpacked once for all of them. The expert has n slots in all.
template <class Run>
void for_experts(const ExpertTile* tiles, uint32_t n_tiles, uint32_t begin, uint32_t end, Run&& run) {
    const auto same = [&](uint32_t a, uint32_t b) { return tiles[a].expert == tiles[b].expert; };
    while (begin < end) {
        uint32_t first = begin, next = begin + 1, last = begin;
        while (next < end && same(next, begin)) next++;
        while (first > 0 && same(first - 1, begin)) first--;
        while (last + 1 < n_tiles && same(last + 1, begin)) last++;
        run(uint32_t(tiles[begin].expert), tiles[begin].first, tiles[next - 1].end,
            tiles[last].end - tiles[first].first);
        begin = next;
    }
}

// Multiplies MATRICES tensors of experts (bindings 4 ..) by X (the next binding), and passes the products to
// finish(slot, row, n, y0, y1).
template <class T, int MATRICES, class Finish>
void multiply(const NativeLaunch& l, uint64_t begin, uint64_t end, Finish&& finish) {
    const auto& p = l.as<MoeMmParams>();
    const auto* slots = l.buffer<const int32_t>(1);
    const auto* tiles = l.buffer<const ExpertTile>(2);
    const uint32_t n_tiles = uint32_t(*l.buffer<const int32_t>(3));
    const float* x = l.buffer<const float>(4 + MATRICES);
    const auto multiply_expert = [&](Range rows, uint32_t expert, const int32_t* mine, uint32_t n, uint32_t in_all) {
        const float** list = workspace().tokens.take<const float*>(n);
        for (uint32_t i = 0; i < n; i++) list[i] = x + size_t(uint32_t(mine[i]) / p.x_div) * p.k;
        const size_t matrix = size_t(std::min(expert, p.n_expert - 1)) * p.expert_bytes;
        for (uint32_t r = rows.begin; r < rows.end; r += STRIP) {
            Strip strips[MATRICES];
            for (int i = 0; i < MATRICES; i++)
                strips[i] = {l.buffer<const uint8_t>(4 + i) + matrix + size_t(r) * p.row_bytes, p.row_bytes,
                             std::min(rows.end - r, STRIP), p.k};
            multiply_strips<T>(strips, Tokens(list, n, in_all),
                               [&](size_t t, uint32_t count, const float* y0, const float* y1) {
                                   finish(size_t(mine[t]), r, count, y0, y1);
                               });
        }
    };
    for_blocks(begin, end, l.grid[0], [&](Range xs, Range ys) {
        const Range rows = pieces(p.m, ys, l.grid[1]);
        for_experts(tiles, n_tiles, xs.begin, std::min(xs.end, n_tiles),
                    [&](uint32_t expert, int32_t first, int32_t last, int32_t in_all) {
                        multiply_expert(rows, expert, slots + first, uint32_t(last - first), uint32_t(in_all));
                    });
    });
}

template <class T>
void moe_mm(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t m = l.as<MoeMmParams>().m;
    float* out = l.buffer<float>(6);
    multiply<T, 1>(l, begin, end, [&](size_t slot, uint32_t row, uint32_t n, const float* y, const float*) {
        std::memcpy(out + slot * m + row, y, n * sizeof(float));
    });
}

template <class T>
void moe_mm_swiglu(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t m = l.as<MoeMmParams>().m;
    float* out = l.buffer<float>(7);
    multiply<T, 2>(l, begin, end, [&](size_t slot, uint32_t row, uint32_t n, const float* gate, const float* up) {
        map_floats(n, out + slot * m + row, gate, up, [](vf g, vf u) { return silu(g) * u; });
    });
}

void moe_sort(const NativeLaunch& l, uint64_t, uint64_t) {
    const auto& p = l.as<MoeSortParams>();
    const auto* ids = l.buffer<const int32_t>(2);
    auto* slots = l.buffer<int32_t>(3);
    auto* tiles = l.buffer<ExpertTile>(4);
    const uint32_t n_slots = l.buffer<const Step>(1)->n_tokens * p.n_used;
    const auto expert_of = [&](uint32_t slot) { return std::min(uint32_t(ids[slot]), p.n_expert - 1); };

    auto* next = workspace().sums.take<uint32_t>(p.n_expert);  // an expert's next slot; at first, its count
    std::memset(next, 0, p.n_expert * sizeof(uint32_t));
    for (uint32_t slot = 0; slot < n_slots; slot++) next[expert_of(slot)]++;
    uint32_t first = 0, n_tiles = 0;
    for (uint32_t expert = 0; expert < p.n_expert; expert++) {
        const uint32_t end = first + next[expert];
        next[expert] = first;
        for (; first < end; first = std::min(first + MOE_MM_TOKENS, end))
            if (n_tiles < p.max_tiles)
                tiles[n_tiles++] = {int32_t(expert), int32_t(first), int32_t(std::min(first + MOE_MM_TOKENS, end)), 0};
    }
    for (uint32_t slot = 0; slot < n_slots; slot++) slots[next[expert_of(slot)]++] = int32_t(slot);
    *l.buffer<int32_t>(5) = int32_t(n_tiles);
}

void moe_mix(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MoeMixParams>();
    const float *weights = l.buffer<const float>(2), *y = l.buffer<const float>(3);
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    for (uint64_t i = begin; i < end && i / l.grid[0] < n_tokens; i++) {
        const size_t t = i / l.grid[0];
        const Range columns = piece(p.n, i % l.grid[0], l.grid[0]);
        const uint32_t n = columns.end - columns.begin;
        float* out = l.buffer<float>(5) + t * p.n + columns.begin;
        const float* sum = l.buffer<const float>(4) + t * p.n + columns.begin;
        for (uint32_t j = 0; j < p.n_used; j++, sum = out) {
            const float weight = weights[t * (p.n_used + 1) + j];
            map_floats(n, out, sum, y + (t * p.n_used + j) * p.n + columns.begin,
                       [weight](vf a, vf b) { return a + weight * b; });
        }
    }
}

}  // namespace

#define MOE_MM(name, T) {"moe_mm_" name, moe_mm<T>, 1}, {"moe_mm_swiglu_" name, moe_mm_swiglu<T>, 1},

NATIVE_TABLE(experts_mm) = {EXPERT_TYPES(MOE_MM){"moe_sort", moe_sort, 1}, {"moe_mix", moe_mix, 1}, {}};

}  // namespace zinc
