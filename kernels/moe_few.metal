#include "moe_few.h"
#ifdef __CUDACC__
#include "moe_few_tiles.h"
#endif

// A mixture of experts on a step of 2 to MOE_FEW_ROWS rows. Most experts get one slot or two, so the products are bound
// by the reading of weights: an expert's threadgroups multiply each weight with all slots that chose the expert.
// Bindings and outputs are moe_mm's. Tiles may be of any length.

static_assert(uint(MOE_FEW_ROWS) <= uint(MOE_MM_TOKENS), "moe_mm takes the tiles of moe_route, if it replaces moe_few");

// The products of an expert: by a matrix unit for types that have tiles there, else by rows.
template <class Q, class Epilogue>
METAL_FUNC void moe_few_products(constant MoeMmParams& p, int4 tile, device const int* slots,
                                 Matrices<Epilogue::MATRICES> w, device const float* x, Epilogue out, uint mine, uint n,
                                 uint sg, uint lane, uint n_sg) {
#ifdef __CUDACC__
    if constexpr (IsTiled<Q, MUL_MV_ROWS>::VALUE)
        return moe_few_tiles<typename Q::Block>(p, tile, slots, w, x, out, mine, n, sg, lane);
#endif
    moe_few_tile<Q, MOE_FEW_WEIGHT_ROWS>(p, tile, slots, w, x, out, mine * n_sg + sg, n * n_sg, lane);
}

// Grid: (most tiles, any number). Threads: MOE_FEW_THREADS.
template <class Q>
kernel void moe_few(constant MoeMmParams& p [[buffer(0)]], device const int* slots [[buffer(1)]],
                    device const int4* tiles [[buffer(2)]], device const int* n_tiles [[buffer(3)]],
                    device const uchar* w [[buffer(4)]], device const float* x [[buffer(5)]],
                    device const float* bias [[buffer(6)]], device float* y [[buffer(7)]], GRID_IDS) {
    const int4 tile = tiles[tg.x];        // read beside n_tiles, not after it
    if (int(tg.x) >= n_tiles[0]) return;  // the whole threadgroup
    moe_few_products<Q>(p, tile, slots, Matrices<1>{{w}}, x, expert_out(p, tile.x, y, bias), tg.y, n_tg.y, sg, lane,
                        n_sg);
}

// Grid: as moe_few. Threads: MOE_FEW_THREADS.
template <class Q>
kernel void moe_few_gated(constant MoeMmParams& p [[buffer(0)]], device const int* slots [[buffer(1)]],
                          device const int4* tiles [[buffer(2)]], device const int* n_tiles [[buffer(3)]],
                          device const uchar* gate [[buffer(4)]], device const uchar* up [[buffer(5)]],
                          device const float* x [[buffer(6)]], device const float* gate_bias [[buffer(7)]],
                          device const float* up_bias [[buffer(8)]], device float* y [[buffer(9)]], GRID_IDS) {
    const int4 tile = tiles[tg.x];        // read beside n_tiles, not after it
    if (int(tg.x) >= n_tiles[0]) return;  // the whole threadgroup
    moe_few_products<Q>(p, tile, slots, Matrices<2>{{gate, up}}, x, expert_gated(p, tile.x, y, gate_bias, up_bias),
                        tg.y, n_tg.y, sg, lane, n_sg);
}

// Measured on an H200: plain products by tiles are faster in 128 registers than in as many as they would take.
#define MOE_FEW_GATED_UNROLL(Q) (StepsOf<Q, 4>::N)
#define MOE_FEW(type, Q)                                                                                               \
    KERNEL_UNROLLED(4, "moe_few_" type, moe_few<Q>)                                                                    \
    KERNEL_UNROLLED(MOE_FEW_GATED_UNROLL(Q), "moe_few_gated_" type, moe_few_gated<Q>)
TENSOR_TYPES(MOE_FEW)
