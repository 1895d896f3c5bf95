// Native prefill of mixtures of experts: the products of each expert's rows with its slots.
#include "cpu/native/experts_products.h"

namespace zinc {
namespace {

// Calls run(tile, n) for each expert of tiles [begin, end), with one tile of all its slots there. So an expert's rows
// are unpacked once for all of them. The expert has n slots in all.
template <class Run>
void for_experts(const ExpertTile* tiles, uint32_t n_tiles, uint32_t begin, uint32_t end, Run&& run) {
    const auto same = [&](uint32_t a, uint32_t b) { return tiles[a].expert == tiles[b].expert; };
    while (begin < end) {
        uint32_t first = begin, next = begin + 1, last = begin;
        while (next < end && same(next, begin)) next++;
        while (first > 0 && same(first - 1, begin)) first--;
        while (last + 1 < n_tiles && same(last + 1, begin)) last++;
        run(ExpertTile{tiles[begin].expert, tiles[begin].first, tiles[next - 1].end, 0},
            uint32_t(tiles[last].end - tiles[first].first));
        begin = next;
    }
}

// Products of MATRICES matrices with all slots of each expert.
template <class T, int MATRICES>
void moe_mm(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto* tiles = l.buffer<const ExpertTile>(2);
    const uint32_t n_tiles = uint32_t(*l.buffer<const int32_t>(3)), m = l.as<MoeMmParams>().m;
    for_blocks(begin, end, l.grid[0], [&](Range xs, Range ys) {
        const Range rows = pieces(m, ys, l.grid[1]);
        for_experts(tiles, n_tiles, xs.begin, std::min(xs.end, n_tiles), [&](const ExpertTile& tile, uint32_t in_all) {
            multiply_expert<MATRICES>(l, rows, tile, [&](auto& strips, auto* x, uint32_t n, auto&& finish) {
                multiply_strips<T>(strips, Tokens(x, n, in_all), finish);
            });
        });
    });
}

}  // namespace

#define MOE_MM(name, T) {"moe_mm_" name, moe_mm<T, 1>, 1}, {"moe_mm_gated_" name, moe_mm<T, 2>, 1},

NATIVE_TABLE(experts_mm) = {TENSOR_TYPES(MOE_MM){}};

}  // namespace zinc
