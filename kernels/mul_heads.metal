// Products of the heads of a row, each with a matrix of its own: out[t, h, m] = sum_k W[h, m, k] x[t, h, k].
#include "mul_mm_cooperative.h"
#include "mul_mv_rows.h"

// For few rows of the step: a head of a row is a vector.
// Grid: (ceil(m / (R n_sg)), n_head, T). Threads: 32 MUL_MV_SIMDGROUPS.
template <class Q, uint R = MUL_MV_ROWS>
kernel void mul_heads_mv(constant HeadsParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                         device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                         device float* out [[buffer(4)]], GRID_IDS) {
    if (tg.z >= step->n_tokens) return;
    const ulong head = ulong(tg.z) * p.n_head + tg.y;
    mul_mv_rows<LongRows<Q>, R>(p, Matrices<1>{{w + ulong(tg.y) * p.head_bytes}}, Floats{x + head * p.k},
                                Store{out + head * p.m}, tg.x, sg, n_sg, lane);
}

// Tokens of a tile, at least one, of one head.
struct OfHead {
    uint first, n, head, n_head;

    METAL_FUNC uint x_row(uint i) const { return (first + i) * n_head + head; }
    METAL_FUNC uint y_row(uint i) const { return x_row(i); }
};

// Grid: (ceil(T / TOKENS), ceil(m / ROWS), n_head). Threads: THREADS, all of Shape.
template <class Q, class Shape>
kernel void mul_heads_mm(constant HeadsParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                         device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                         device float* out [[buffer(4)]], GRID_IDS) {
    MUL_MM_TILE(Shape, tile);
    const uint first = tg.x * Shape::TOKENS, n_tokens = step->n_tokens;
    if (first >= n_tokens) return;  // the whole threadgroup
    const OfHead tokens{first, min(n_tokens - first, uint(Shape::TOKENS)), tg.z, p.n_head};
    mul_mm_tile<Q, Shape>(p, tokens, tg.y, Matrices<1>{{w + ulong(tg.z) * p.head_bytes}}, x, Store{out}, tile, tid, sg);
}

#define MUL_HEADS(type, Q)                                                                                             \
    KERNEL("mul_heads_mv_" type, mul_heads_mv<Q>)                                                                      \
    KERNEL_UNROLLED(TILE_STEPS, "mul_heads_mm_" type, mul_heads_mm<Q, MulMmShape<Q>>)
TENSOR_TYPES(MUL_HEADS)
#ifdef COOPERATIVE
#define MUL_HEADS_COOPERATIVE(type, Q)                                                                                 \
    KERNEL_UNROLLED(TILE_STEPS, "mul_heads_mm_coop_" type, mul_heads_mm<Q, MulMmCooperative>)
HALVED_TYPES(MUL_HEADS_COOPERATIVE)
#endif
