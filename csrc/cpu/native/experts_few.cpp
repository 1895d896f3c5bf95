// Native mixtures of experts on few rows: the products of each expert's rows with its slots. Most experts have one slot
// or two.
#include "cpu/native/dot.h"
#include "cpu/native/experts_products.h"

namespace zinc {
namespace {

constexpr uint32_t DIRECT_SLOTS = 2;  // up to here, decoding weights once more costs less than unpacking them

// y[0..n) = the rows of a strip times x.
template <class T>
__attribute__((noinline)) void multiply_slot(const Strip& strip, const float* x, float* y) {
    uint32_t i = 0;
    for (; i + ROWS <= strip.n; i += ROWS) dot_rows<ROWS, T>(strip.row(i), strip.row_bytes, x, strip.k, y + i);
    for (; i < strip.n; i++) dot_rows<1, T>(strip.row(i), strip.row_bytes, x, strip.k, y + i);
}

// The products of a tile's slots with a strip of MATRICES matrices, passed to finish(slot of the tile, n, y0, y1).
template <class T, int MATRICES, class Finish>
void multiply_tile(const Strip (&strips)[MATRICES], const float* const* x, uint32_t n_slots, Finish&& finish) {
    if (n_slots > DIRECT_SLOTS) return multiply_strips<T>(strips, Tokens(x, n_slots, n_slots), finish);
    float y[2][STRIP];
    for (uint32_t s = 0; s < n_slots; s++) {
        for (int i = 0; i < MATRICES; i++) multiply_slot<T>(strips[i], x[s], y[i]);
        finish(s, strips[0].n, y[0], y[1]);
    }
}

// Products of MATRICES matrices with the slots of each tile.
template <class T, int MATRICES>
void moe_few(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto* tiles = l.buffer<const ExpertTile>(2);
    const uint32_t n_tiles = uint32_t(*l.buffer<const int32_t>(3)), m = l.as<MoeMmParams>().m;
    for_blocks(begin, end, l.grid[0], [&](Range xs, Range ys) {
        const Range rows = pieces(m, ys, l.grid[1]);
        for (uint32_t tile = xs.begin; tile < std::min(xs.end, n_tiles); tile++)
            multiply_expert<MATRICES>(l, rows, tiles[tile], [](auto& strips, auto* x, uint32_t n, auto&& finish) {
                multiply_tile<T>(strips, x, n, finish);
            });
    });
}

}  // namespace

#define MOE_FEW(name, T) {"moe_few_" name, moe_few<T, 1>, 1}, {"moe_few_gated_" name, moe_few<T, 2>, 1},

NATIVE_TABLE(experts_few) = {TENSOR_TYPES(MOE_FEW){}};

}  // namespace zinc
