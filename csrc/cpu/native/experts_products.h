// The product of an expert's rows with the slots of a tile, for experts_few.cpp and experts_mm.cpp.
#pragma once

#include "cpu/native/experts_store.h"
#include "cpu/native/experts_tile.h"
#include "cpu/native/strips.h"

namespace zinc {

static_assert(STRIP <= STORED_ROWS);

// Multiplies rows of an expert in MATRICES tensors (bindings 4 ..) by X (the next binding) of a tile's slots into the
// last binding. The biases lie between. multiply(strips, x of the slots, n, finish) passes the products of a strip to
// finish(slot, n, y0, y1).
template <int MATRICES, class Multiply>
void multiply_expert(const NativeLaunch& l, Range rows, const ExpertTile& tile, Multiply&& multiply) {
    const auto& p = l.as<MoeMmParams>();
    const int32_t* slots = l.buffer<const int32_t>(1) + tile.first;
    const float* x = l.buffer<const float>(4 + MATRICES);
    float* out = l.buffer<float>(5 + 2 * MATRICES);
    const uint32_t n = uint32_t(tile.end - tile.first);
    const float** list = workspace().tokens.take<const float*>(n);
    for (uint32_t i = 0; i < n; i++) list[i] = x + size_t(uint32_t(slots[i]) / p.x_div) * p.k;
    const uint32_t expert = std::min(uint32_t(tile.expert), p.n_expert - 1);
    const size_t matrix = size_t(expert) * p.expert_bytes;
    for (uint32_t r = rows.begin; r < rows.end; r += STRIP) {
        Strip strips[MATRICES];
        for (int i = 0; i < MATRICES; i++)
            strips[i] = {l.buffer<const uint8_t>(4 + i) + matrix + size_t(r) * p.row_bytes, p.row_bytes,
                         std::min(rows.end - r, STRIP), p.k};
        multiply(strips, list, n, [&](size_t slot, uint32_t count, const float* y0, const float* y1) {
            store_expert<MATRICES>(p, expert, r, count, out + size_t(slots[slot]) * p.m + r, y0, y1,
                                   [&](int i) { return l.buffer<const float>(5 + MATRICES + i); });
        });
    }
}

}  // namespace zinc
