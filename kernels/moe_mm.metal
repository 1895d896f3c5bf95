#include "moe.h"
#include "mul_mm_cooperative.h"

// Most experts get only a few tokens. Stacking the simdgroups along the rows keeps all of them busy when a tile has few
// tokens.
template <class Q>
struct MoeMmShape : TileShape<typename OperandOf<Q>::T, MOE_MM_THREADS, MOE_MM_ROWS, MOE_MM_TOKENS,
                              OperandOf<Q>::COLUMNS, PER_DEVICE(2, 1), 2> {};
#ifdef COOPERATIVE
typedef CooperativeShape<COOP_THREADS, COOP_ROWS, MOE_MM_TOKENS, COOP_COLUMNS> MoeMmCooperative;
#endif

// Prefill of a mixture of experts: the rows that chose an expert meet its matrices together. A slot is a row's place
// for one of its n_used experts, t * n_used + j. moe_sort orders the slots by expert and cuts them into tiles.

// A threadgroup per tile of slots (the grid's x) and tile of the expert's rows (y). Y has a row per slot. `found` is
// the tile: expert, first slot, end.
template <class Q, class Shape, class Epilogue>
METAL_FUNC void moe_mm_rows(constant MoeMmParams& p, device const int* slots, int4 found,
                            Matrices<Epilogue::MATRICES> weights, device const float* x, Epilogue out,
                            threadgroup uint4* tile, uint3 tg, uint tid, uint sg) {
    const Gathered tokens{slots + found.y, min(uint(found.z - found.y), uint(MOE_MM_TOKENS)), p.x_div};
    const ulong before = expert_offset(p, found.x);
    UNROLL for (uint i = 0; i < Epilogue::MATRICES; i++) weights.w[i] += before;
    mul_mm_tile<Q, Shape>(p, tokens, tg.y, weights, x, out, tile, tid, sg);
}

// Grid: (max_tiles of moe_sort, ceil(m / ROWS)). Threads: THREADS, both of Shape.
template <class Q, class Shape>
kernel void moe_mm(constant MoeMmParams& p [[buffer(0)]], device const int* slots [[buffer(1)]],
                   device const int4* tiles [[buffer(2)]], device const int* n_tiles [[buffer(3)]],
                   device const uchar* w [[buffer(4)]], device const float* x [[buffer(5)]],
                   device const float* bias [[buffer(6)]], device float* y [[buffer(7)]], GRID_IDS) {
    MUL_MM_TILE(Shape, tile);
    if (int(tg.x) >= n_tiles[0]) return;  // the whole threadgroup
    const int4 found = tiles[tg.x];
    moe_mm_rows<Q, Shape>(p, slots, found, Matrices<1>{{w}}, x, expert_out(p, found.x, y, bias), tile, tg, tid, sg);
}

// Grid: (max_tiles of moe_sort, ceil(m / (ROWS / 2))). Threads: THREADS, of Shape.
template <class Q, class Shape>
kernel void moe_mm_gated(constant MoeMmParams& p [[buffer(0)]], device const int* slots [[buffer(1)]],
                         device const int4* tiles [[buffer(2)]], device const int* n_tiles [[buffer(3)]],
                         device const uchar* gate [[buffer(4)]], device const uchar* up [[buffer(5)]],
                         device const float* x [[buffer(6)]], device const float* gate_bias [[buffer(7)]],
                         device const float* up_bias [[buffer(8)]], device float* y [[buffer(9)]], GRID_IDS) {
    MUL_MM_TILE(Shape, tile);
    if (int(tg.x) >= n_tiles[0]) return;  // the whole threadgroup
    const int4 found = tiles[tg.x];
    moe_mm_rows<Q, Shape>(p, slots, found, Matrices<2>{{gate, up}}, x, expert_gated(p, found.x, y, gate_bias, up_bias),
                          tile, tg, tid, sg);
}

#ifndef SOURCE_TYPES
// out[t] = residual[t], or 0, + the sum over its experts j of weights[t, j] y[t, j]. residual may be out itself. A row
// of weights ends with one more, the shared expert's, which this kernel does not read. A threadgroup takes COLUMNS of a
// row: fewer if there are few rows.
// Grid: (ceil(n / COLUMNS), T). Threads: ELEMENTWISE_THREADS.
template <class T, uint COLUMNS>
kernel void moe_mix(constant MoeMixParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                    device const T* weights [[buffer(2)]], device const T* y [[buffer(3)]],
                    device const T* residual [[buffer(4)]], device T* out [[buffer(5)]], GRID_IDS) {
    if (tg.y >= step->n_tokens) return;
    const ulong row = ulong(tg.y) * p.n;
    device const T* mine = weights + ulong(tg.y) * (p.n_used + 1);
    UNROLL for (uint c = 0; c < COLUMNS; c += ELEMENTWISE_THREADS) {
        const uint i = tg.x * COLUMNS + c + tid;
        if (i >= p.n) continue;
        float sum = 0.0f;
        for (uint j = 0; j < p.n_used; j++) sum += mine[j] * y[row * p.n_used + j * p.n + i];
        out[row + i] = p.alone != 0 ? sum : residual[row + i] + sum;
    }
}
KERNEL("moe_mix", moe_mix<float, ELEMENTWISE_COLUMNS>)
KERNEL("moe_mix_few", moe_mix<float, ELEMENTWISE_THREADS>)
#endif

#define MOE_MM_BY(by, type, Q, Shape)                                                                                  \
    KERNEL_UNROLLED(TILE_STEPS, "moe_mm" by "_" type, moe_mm<Q, Shape>)                                                \
    KERNEL_UNROLLED(TILE_STEPS, "moe_mm" by "_gated_" type, moe_mm_gated<Q, Shape>)
#define MOE_MM(type, Q) MOE_MM_BY("", type, Q, MoeMmShape<Q>)
TENSOR_TYPES(MOE_MM)
#ifdef COOPERATIVE
#define MOE_MM_COOPERATIVE(type, Q) MOE_MM_BY("_coop", type, Q, MoeMmCooperative)
HALVED_TYPES(MOE_MM_COOPERATIVE)
#endif
