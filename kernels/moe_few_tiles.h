// Products of an expert's rows with the slots that chose it, by tiles of the matrix unit: mul_mv_tile.h. CUDA alone.
// An expert of several slots takes a turn for each, which finds the weights in a cache.
#pragma once

#include "moe.h"
#include "mul_mv_tile.h"

// The products of all slots of a tile of moe_route. Threadgroup `mine` of n takes every n-th run of rows.
template <class B, class Epilogue>
METAL_FUNC void moe_few_tiles(constant MoeMmParams& p, int4 tile, device const int* slots,
                              Matrices<Epilogue::MATRICES> w, device const float* x, Epilogue out, uint mine, uint n,
                              uint sg, uint lane) {
    const ulong before = expert_offset(p, tile.x);
    UNROLL for (uint i = 0; i < Epilogue::MATRICES; i++) w.w[i] += before;
    TileShare share;
    share.divide(p.k, FEW_TILE_SIMDGROUPS, sg);
    const uint rows = FEW_TILE_SIMDGROUPS / share.splits * (TILE_ROWS / Epilogue::MATRICES);
    for (uint group = mine; group * rows < p.m; group += n) {
        for (int at = tile.y; at < tile.z; at++) {
            const uint slot = uint(slots[at]);
            const TileVectors<1> one{{x + ulong(slot / p.x_div) * p.k}, {slot}};
            mul_tiles<FEW_TILE_SIMDGROUPS, B>(p, w, one, 1, out, share, group, sg, lane);
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the sums have been read
        }
    }
}
