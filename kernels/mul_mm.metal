#include "mul_mm_tile.h"

// Y[t, m] = sum_k W[m, k] X[t, k]. A threadgroup per tile, tokens along the grid's x, rows of W along its y.
template <class Q, class Epilogue>
METAL_FUNC void mul_mm_rows(constant MatMulParams& p, uint n_tokens, Matrices<Epilogue::MATRICES> weights,
                            device const float* x, Epilogue out, threadgroup uint4* tile, uint3 tg, uint tid, uint sg) {
    const uint first = tg.x * MUL_MM_TOKENS;
    if (first >= n_tokens) return;  // the whole threadgroup
    const Consecutive tokens{first, min(n_tokens - first, uint(MUL_MM_TOKENS))};
    mul_mm_tile<Q, MulMmShape<Q>>(p, tokens, tg.y, weights, x, out, tile, tid, sg);
}

// Grid: (ceil(T / MUL_MM_TOKENS), ceil(m / MUL_MM_ROWS)). Threads: MUL_MM_THREADS.
template <class Q>
kernel void mul_mm(constant MatMulParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                   device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                   device float* y [[buffer(4)]], GRID_IDS) {
    MUL_MM_TILE(MulMmShape<Q>, tile);
    mul_mm_rows<Q>(p, step->n_tokens, Matrices<1>{{w}}, x, Store{y}, tile, tg, tid, sg);
}

// Grid and threads: as mul_mm.
template <class Q>
kernel void mul_mm_add(constant MatMulParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                       device const float* residual [[buffer(4)]], device float* y [[buffer(5)]], GRID_IDS) {
    MUL_MM_TILE(MulMmShape<Q>, tile);
    const AddResidual sum{residual, p.residual_stride, y};
    mul_mm_rows<Q>(p, step->n_tokens, Matrices<1>{{w}}, x, sum, tile, tg, tid, sg);
}

// Grid and threads: as mul_mm.
template <class Q>
kernel void mul_mm_mix(constant MatMulParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                       device const float* residual [[buffer(4)]], device const float* scale [[buffer(5)]],
                       device float* y [[buffer(6)]], GRID_IDS) {
    MUL_MM_TILE(MulMmShape<Q>, tile);
    const AddScaled sum{{residual, p.residual_stride, y}, scale, p.scale_stride};
    mul_mm_rows<Q>(p, step->n_tokens, Matrices<1>{{w}}, x, sum, tile, tg, tid, sg);
}

// Grid: (ceil(T / MUL_MM_TOKENS), ceil(m / (MUL_MM_ROWS / 2))). Threads: MUL_MM_THREADS.
template <class Q, class Gating>
kernel void mul_mm_gated(constant MatMulParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                         device const uchar* gate [[buffer(2)]], device const uchar* up [[buffer(3)]],
                         device const float* x [[buffer(4)]], device float* y [[buffer(5)]], GRID_IDS) {
    MUL_MM_TILE(MulMmShape<Q>, tile);
    mul_mm_rows<Q>(p, step->n_tokens, Matrices<2>{{gate, up}}, x, Gating{y}, tile, tg, tid, sg);
}

#define MUL_MM(type, Q)                                                                                                \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm_" type, mul_mm<Q>)                                                             \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm_add_" type, mul_mm_add<Q>)                                                     \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm_mix_" type, mul_mm_mix<Q>)                                                     \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm_swiglu_" type, mul_mm_gated<Q, SwiGlu>)                                        \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm_geglu_" type, mul_mm_gated<Q, GeGlu>)
TENSOR_TYPES(MUL_MM)
