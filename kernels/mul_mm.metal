#include "mul_mm_cooperative.h"

// Y[t, m] = sum_k W[m, k] X[t, k]. A threadgroup per tile, tokens along the grid's x, rows of W along its y.
template <class Q, class Shape, class Epilogue>
METAL_FUNC void mul_mm_rows(constant MatMulParams& p, uint n_tokens, Matrices<Epilogue::MATRICES> weights,
                            device const float* x, Epilogue out, threadgroup uint4* tile, uint3 tg, uint tid, uint sg) {
    const uint first = tg.x * Shape::TOKENS;
    if (first >= n_tokens) return;  // the whole threadgroup
    const Consecutive tokens{first, min(n_tokens - first, uint(Shape::TOKENS))};
    mul_mm_tile<Q, Shape>(p, tokens, tg.y, weights, x, out, tile, tid, sg);
}

// Grid: (ceil(T / TOKENS), ceil(m / ROWS)). Threads: THREADS, all of Shape.
template <class Q, class Shape>
kernel void mul_mm(constant MatMulParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                   device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                   device float* y [[buffer(4)]], GRID_IDS) {
    MUL_MM_TILE(Shape, tile);
    mul_mm_rows<Q, Shape>(p, step->n_tokens, Matrices<1>{{w}}, x, Store{y}, tile, tg, tid, sg);
}

// Grid and threads: as mul_mm.
template <class Q, class Shape>
kernel void mul_mm_add(constant MatMulParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                       device const float* residual [[buffer(4)]], device float* y [[buffer(5)]], GRID_IDS) {
    MUL_MM_TILE(Shape, tile);
    const AddResidual sum{residual, p.residual_stride, y};
    mul_mm_rows<Q, Shape>(p, step->n_tokens, Matrices<1>{{w}}, x, sum, tile, tg, tid, sg);
}

// Grid and threads: as mul_mm.
template <class Q, class Shape>
kernel void mul_mm_mix(constant MatMulParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                       device const float* residual [[buffer(4)]], device const float* scale [[buffer(5)]],
                       device float* y [[buffer(6)]], GRID_IDS) {
    MUL_MM_TILE(Shape, tile);
    const AddScaled sum{{residual, p.residual_stride, y}, scale, p.scale_stride};
    mul_mm_rows<Q, Shape>(p, step->n_tokens, Matrices<1>{{w}}, x, sum, tile, tg, tid, sg);
}

// Grid: (ceil(T / TOKENS), ceil(m / (ROWS / 2))). Threads: THREADS, of Shape.
template <class Q, class Shape, class Gating>
kernel void mul_mm_gated(constant MatMulParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                         device const uchar* gate [[buffer(2)]], device const uchar* up [[buffer(3)]],
                         device const float* x [[buffer(4)]], device float* y [[buffer(5)]], GRID_IDS) {
    MUL_MM_TILE(Shape, tile);
    mul_mm_rows<Q, Shape>(p, step->n_tokens, Matrices<2>{{gate, up}}, x, Gating{y}, tile, tg, tid, sg);
}

#define MUL_MM_BY(by, type, Q, Shape)                                                                                  \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm" by "_" type, mul_mm<Q, Shape>)                                                \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm" by "_add_" type, mul_mm_add<Q, Shape>)                                        \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm" by "_mix_" type, mul_mm_mix<Q, Shape>)                                        \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm" by "_swiglu_" type, mul_mm_gated<Q, Shape, SwiGlu>)                           \
    KERNEL_UNROLLED(TILE_STEPS, "mul_mm" by "_geglu_" type, mul_mm_gated<Q, Shape, GeGlu>)
#define MUL_MM(type, Q) MUL_MM_BY("", type, Q, MulMmShape<Q>)
TENSOR_TYPES(MUL_MM)
#ifdef COOPERATIVE
#define MUL_MM_COOPERATIVE(type, Q) MUL_MM_BY("_coop", type, Q, MulMmCooperative)
HALVED_TYPES(MUL_MM_COOPERATIVE)
#endif
