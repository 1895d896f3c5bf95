#include "mul_stack.h"

// A larger number would leave room for fewer threadgroups at once, and the widest stacks have many threadgroups.
constant constexpr uint STACK_UNROLL = PER_DEVICE(1, 2);

// Grid: the sum of stack_groups of all matrices. Threads: 32 MUL_MV_SIMDGROUPS, or as tuning.py says.
template <class Q, uint R = MUL_MV_ROWS>
kernel void mul_mv_stack(constant StackParams& p [[buffer(0)]], device const float* x [[buffer(1)]],
                         device const float* norm [[buffer(2)]], device const uchar* w0 [[buffer(3)]],
                         device const uchar* w1 [[buffer(4)]], device const uchar* w2 [[buffer(5)]],
                         device const uchar* w3 [[buffer(6)]], device const float* bias0 [[buffer(7)]],
                         device const float* bias1 [[buffer(8)]], device const float* bias2 [[buffer(9)]],
                         device const float* bias3 [[buffer(10)]], device float* out0 [[buffer(11)]],
                         device float* out1 [[buffer(12)]], device float* out2 [[buffer(13)]],
                         device float* out3 [[buffer(14)]], GRID_IDS) {
    uint group = tg.x, i = 0;
    while (i < 4 && group >= stack_groups<R>(p, i, n_sg)) group -= stack_groups<R>(p, i++, n_sg);
    if (i == 4) return;  // the whole threadgroup

    const uint m = p.m[i], row_bytes = p.row_bytes[i];
    device const uchar* w = one_of(i, w0, w1, w2, w3);
    const MaybeNormed activations = maybe_normed(p, x, norm);
    const StackOut out{one_of(i, out0, out1, out2, out3), one_of(i, bias0, bias1, bias2, bias3), p.has_bias};
#ifdef __CUDACC__
    if constexpr (IsTiled<Q, R>::VALUE) {
        typedef typename Q::Block B;
        const MatMulParams one{p.k, m, row_bytes, 0, 0, 0, 0, 0.0f};
        if (n_sg == TILE_SIMDGROUPS && p.is_f32[i] == 0) {
            if (is_pair(p, i))
                return mul_mv_tile<TILE_SIMDGROUPS, B>(one, Matrices<2>{{w2, w3}}, x, SwiGlu{out2}, group, sg, lane);
            return mul_mv_tile<TILE_SIMDGROUPS, B>(one, Matrices<1>{{w}}, x, out, group, sg, lane);
        }
    }
#endif
    const uint first = (group * n_sg + sg) * (is_pair(p, i) ? R / 2 : R);
    if (first >= m) return;  // all 32 lanes
    const Rows<R> rows = is_pair(p, i) ? rows_of<R>(Matrices<2>{{w2, w3}}, first, m, row_bytes)
                                       : rows_of<R>(Matrices<1>{{w}}, first, m, row_bytes);
    Sums<R> sums;
    if (p.is_f32[i])
        set_rows<Plain<F32>, STACK_UNROLL>(sums, rows, activations, p.k, lane);
    else
        set_rows<LongRows<Q>, STACK_UNROLL>(sums, rows, activations, p.k, lane);
    if (is_pair(p, i))
        put_rows(sums, SwiGlu{out2}, first, m, lane);
    else
        put_rows(sums, out, first, m, lane);
}

#define STACK_UNROLL_OF(Q) (StepsOf<Q, STACK_UNROLL>::N)
#define MUL_MV_STACK(type, Q) KERNEL_UNROLLED(STACK_UNROLL_OF(Q), "mul_mv_stack_" type, mul_mv_stack<Q>)
TENSOR_TYPES(MUL_MV_STACK)

#define MUL_MV_STACK_OF(type, Q, R) KERNEL_UNROLLED(STACK_UNROLL, "mul_mv_stack_" type "_r" #R, mul_mv_stack<Q, R>)
PAIR_ROW_VARIANTS(MUL_MV_STACK_OF)
