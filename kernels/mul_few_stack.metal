#include "mul_few_rows.h"
#include "mul_stack.h"

// Stacks of 2 to 8 rows of activations, as mul_mv_stack is for one: weights are read once for N rows. More rows are
// more threadgroups, which find the weights in a cache.

// Blocks of two rows of activations that NVIDIA's compiler has on their way at once. More rows lack the registers.
constant constexpr uint FEW_STACK_UNROLL = PER_DEVICE(1, 4);

// Grid: (ceil(simdgroups / n_sg), ceil(T / N)), simdgroups by stack_tiles of all matrices. Threads: as mul_mv_stack.
template <class Q, uint N, uint R = FEW_STACK_ROWS>
kernel void mul_few_stack(constant StackParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                          device const float* x [[buffer(2)]], device const uchar* w0 [[buffer(3)]],
                          device const uchar* w1 [[buffer(4)]], device const uchar* w2 [[buffer(5)]],
                          device const uchar* w3 [[buffer(6)]], device const float* bias0 [[buffer(7)]],
                          device const float* bias1 [[buffer(8)]], device const float* bias2 [[buffer(9)]],
                          device const float* bias3 [[buffer(10)]], device float* out0 [[buffer(11)]],
                          device float* out1 [[buffer(12)]], device float* out2 [[buffer(13)]],
                          device float* out3 [[buffer(14)]], GRID_IDS) {
    const uint begin = tg.y * N, n_tokens = step->n_tokens;
    if (begin >= n_tokens) return;  // the whole threadgroup
#ifdef __CUDACC__
    if constexpr (N == 2 && IsTiled<Q, R>::VALUE) {
        if (n_sg == FEW_TILE_SIMDGROUPS) {
            uint group = tg.x, i = 0;
            while (i < 4 && group >= stack_groups<FEW_TILE_ROWS>(p, i, n_sg))
                group -= stack_groups<FEW_TILE_ROWS>(p, i++, n_sg);
            if (i == 4) return;  // the whole threadgroup
            const StackOut out{one_of(i, out0, out1, out2, out3), one_of(i, bias0, bias1, bias2, bias3), p.has_bias};
            const Matrices<1> w{{one_of(i, w0, w1, w2, w3)}};
            const MatMulParams one{p.k, p.m[i], p.row_bytes[i], 0, 0, 0, 0, 0.0f};
            typedef typename Q::Block B;
            if (p.is_f32[i])
                mul_few_rows<Plain<F32>, FEW_TILE_ROWS, N>(one, w, x, out, (group * n_sg + sg) * FEW_TILE_ROWS, begin,
                                                           n_tokens, lane);
            else if (is_pair(p, i))
                mul_few_by_tile<B>(one, Matrices<2>{{w2, w3}}, x, SwiGlu{out2}, group, begin, n_tokens, sg, lane);
            else
                mul_few_by_tile<B>(one, w, x, out, group, begin, n_tokens, sg, lane);
            return;
        }
    }
#endif
    uint tile = tg.x * n_sg + sg, i = 0;
    while (i < 4 && tile >= stack_tiles<R>(p, i)) tile -= stack_tiles<R>(p, i++);
    if (i == 4) return;  // all 32 lanes

    const uint m = p.m[i], row_bytes = p.row_bytes[i];
    const uint first = tile * (is_pair(p, i) ? R / 2 : R);
    device const uchar* w = one_of(i, w0, w1, w2, w3);
    const Rows<R> rows = is_pair(p, i) ? rows_of<R>(Matrices<2>{{w2, w3}}, first, m, row_bytes)
                                       : rows_of<R>(Matrices<1>{{w}}, first, m, row_bytes);
    constexpr uint STEPS = N == 2 ? FEW_STACK_UNROLL : 1;
    VectorSums<R, N> sums;
    if (p.is_f32[i])
        set_few_rows<Plain<F32>, STEPS>(sums, rows, x, p.k, begin, n_tokens, lane);
    else
        set_few_rows<LongRows<Q>, STEPS>(sums, rows, x, p.k, begin, n_tokens, lane);
    if (is_pair(p, i))
        put_few_rows(sums, SwiGlu{out2}, first, m, begin, n_tokens, lane);
    else
        put_few_rows(sums,
                     StackOut{one_of(i, out0, out1, out2, out3), one_of(i, bias0, bias1, bias2, bias3), p.has_bias},
                     first, m, begin, n_tokens, lane);
}

#define FEW_STACK_UNROLL_OF(Q) (StepsOf<Q, FEW_STACK_UNROLL>::N)
#define MUL_FEW_STACK(type, Q) KERNEL_UNROLLED(FEW_STACK_UNROLL_OF(Q), "mul_few_stack_" type "_n2", mul_few_stack<Q, 2>)
TENSOR_TYPES(MUL_FEW_STACK)

#ifndef __CUDACC__  // there FEW_STACK_TOKENS is 2
#define MUL_FEW_STACK_OF_MORE(type, Q)                                                                                 \
    KERNEL("mul_few_stack_" type "_n4", mul_few_stack<Q, 4>)                                                           \
    KERNEL("mul_few_stack_" type "_n8", mul_few_stack<Q, 8>)
TENSOR_TYPES(MUL_FEW_STACK_OF_MORE)
#endif
