#include "moe_few.h"
#ifndef __METAL_VERSION__
#include "moe_few_matrix.h"
#endif

// A mixture of experts on a step of 2 to MOE_FEW_ROWS rows. Most experts get one slot or two, so the products are bound
// by the reading of weights: an expert's threadgroups multiply each weight with all slots that chose the expert.
// Bindings and outputs are moe_mm's. Tiles may be of any length.

static_assert(uint(MOE_FEW_ROWS) <= uint(MOE_MM_TOKENS), "moe_mm takes the tiles of moe_route, if it replaces moe_few");

// True for types whose products a matrix unit makes, on the devices that have one with bfloats.
#ifdef ZINC_FEW_MATRIX
#define FEW_BY_MATRIX true
#else
#define FEW_BY_MATRIX PER_DEVICE(false, true)
#endif
template <class Q>
struct FewKind {
    static constant constexpr bool BY_MATRIX = false;
};
template <>
struct FewKind<Quantised<Q4_K>> {
    static constant constexpr bool BY_MATRIX = FEW_BY_MATRIX;
};
template <>
struct FewKind<Quantised<Q5_K>> {
    static constant constexpr bool BY_MATRIX = FEW_BY_MATRIX;
};

#ifdef __METAL_VERSION__
#define MOE_FEW_MEMORY
#define MOE_FEW_TILE(w, out) MOE_FEW_ROWWISE(w, out)
#else
#define MOE_FEW_MEMORY                                                                                                 \
    const uint most = FewKind<Q>::BY_MATRIX ? FEW_MOST_SIMDGROUPS : 1;                                                 \
    TG_ARRAY(uint2, words, most* FewRight::WORDS);                                                                     \
    TG_ARRAY(float4, column_sums, most* FewRight::SUMS);                                                               \
    TG_ARRAY(float2, scratch, most * 2 * LEFT_ROWS)
#define MOE_FEW_TILE(w, out)                                                                                           \
    if constexpr (FewKind<Q>::BY_MATRIX)                                                                               \
        moe_few_matrix<typename Q::Block>(p, tile, slots, w, x, out,                                                   \
                                          FewRight{words + sg * FewRight::WORDS, column_sums + sg * FewRight::SUMS},   \
                                          scratch, tg.y, n_tg.y, tid, sg, lane, n_sg);                                 \
    else                                                                                                               \
        MOE_FEW_ROWWISE(w, out)
#endif
#define MOE_FEW_ROWWISE(w, out)                                                                                        \
    moe_few_tile<Q, MOE_FEW_WEIGHT_ROWS>(p, tile, slots, w, x, out, tg.y * n_sg + sg, n_tg.y * n_sg, lane)

// Grid: (most tiles, any number). Threads: MOE_FEW_THREADS.
template <class Q>
kernel void moe_few(constant MoeMmParams& p [[buffer(0)]], device const int* slots [[buffer(1)]],
                    device const int4* tiles [[buffer(2)]], device const int* n_tiles [[buffer(3)]],
                    device const uchar* w [[buffer(4)]], device const float* x [[buffer(5)]],
                    device const float* bias [[buffer(6)]], device float* y [[buffer(7)]], GRID_IDS) {
    MOE_FEW_MEMORY;
    const int4 tile = tiles[tg.x];        // read beside n_tiles, not after it
    if (int(tg.x) >= n_tiles[0]) return;  // the whole threadgroup
    MOE_FEW_TILE((Matrices<1>{{w}}), expert_out(p, tile.x, y, bias));
}

// Grid: as moe_few. Threads: MOE_FEW_THREADS.
template <class Q>
kernel void moe_few_gated(constant MoeMmParams& p [[buffer(0)]], device const int* slots [[buffer(1)]],
                          device const int4* tiles [[buffer(2)]], device const int* n_tiles [[buffer(3)]],
                          device const uchar* gate [[buffer(4)]], device const uchar* up [[buffer(5)]],
                          device const float* x [[buffer(6)]], device const float* gate_bias [[buffer(7)]],
                          device const float* up_bias [[buffer(8)]], device float* y [[buffer(9)]], GRID_IDS) {
    MOE_FEW_MEMORY;
    const int4 tile = tiles[tg.x];        // read beside n_tiles, not after it
    if (int(tg.x) >= n_tiles[0]) return;  // the whole threadgroup
    MOE_FEW_TILE((Matrices<2>{{gate, up}}), expert_gated(p, tile.x, y, gate_bias, up_bias));
}

#define MOE_FEW(type, Q)                                                                                               \
    KERNEL_UNROLLED(4, "moe_few_" type, moe_few<Q>)                                                                    \
    KERNEL_UNROLLED(4, "moe_few_gated_" type, moe_few_gated<Q>)
TENSOR_TYPES(MOE_FEW)
