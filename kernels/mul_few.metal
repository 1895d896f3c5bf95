#include "mul_few_tile.h"

// Y[t, m] = sum_k W[m, k] X[t, k] for 2 to 32 rows of X; weights are read once for all. N is the class of the number of
// rows. Small classes take each row of X as a vector, N of them in a threadgroup. The others take them as matrices.

// Of the loop for two rows: with more of them there would be no registers.
constant constexpr uint FEW_UNROLL = PER_DEVICE(1, 4);
template <uint N>
struct FewSteps {
    static constant constexpr uint STEPS = N == 2 ? FEW_UNROLL : 1;
};

// Grid: (ceil(m / (R n_sg)), ceil(T / N)). Threads: as mul_mv.
template <class Q, uint N, uint R = MUL_MV_ROWS>
kernel void mul_few(constant MulFewParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                    device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                    device const float* residual [[buffer(4)]], device const float* scale [[buffer(5)]],
                    device float* y [[buffer(6)]], GRID_IDS) {
    const uint first = (tg.x * n_sg + sg) * R, begin = tg.y * N, n_tokens = min(step->n_tokens, p.rows);
    const FewOut out{residual, scale, y, p.kind, p.residual_stride, p.scale_stride};
#ifdef __CUDACC__
    if constexpr (N == 2 && IsTiled<Q, R>::VALUE) {
        if (begin >= n_tokens) return;  // the whole threadgroup
        if (n_sg == FEW_TILE_SIMDGROUPS)
            return mul_few_by_tile<typename Q::Block>(p, Matrices<1>{{w}}, x, out, tg.x, begin, n_tokens, sg, lane);
    }
#endif
    if (first >= p.m || begin >= n_tokens) return;  // all 32 lanes
    mul_few_rows<LongRows<Q>, R, N, FewSteps<N>::STEPS>(p, Matrices<1>{{w}}, x, out, first, begin, n_tokens, lane);
}

// Grid: (ceil(m / (R / 2 n_sg)), ceil(T / N)): R rows are of two matrices. Threads: as mul_mv.
template <class Q, uint N, uint R = MUL_MV_ROWS>
kernel void mul_few_gated(constant MulFewParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                          device const uchar* gate [[buffer(2)]], device const uchar* up [[buffer(3)]],
                          device const float* x [[buffer(4)]], device float* y [[buffer(5)]], GRID_IDS) {
    const uint first = (tg.x * n_sg + sg) * (R / 2), begin = tg.y * N, n_tokens = min(step->n_tokens, p.rows);
    const Matrices<2> both{{gate, up}};
    const FewGated out{y, p.kind};
#ifdef __CUDACC__
    if constexpr (N == 2 && IsTiled<Q, R>::VALUE) {
        if (begin >= n_tokens) return;  // the whole threadgroup
        if (n_sg == FEW_TILE_SIMDGROUPS)
            return mul_few_by_tile<typename Q::Block>(p, both, x, out, tg.x, begin, n_tokens, sg, lane);
    }
#endif
    if (first >= p.m || begin >= n_tokens) return;  // all 32 lanes
    mul_few_rows<LongRows<Q>, R, N, FewSteps<N>::STEPS>(p, both, x, out, first, begin, n_tokens, lane);
}

// Grid: (ceil(m / (R SG / k_split)), ceil(T / N)). Threads: 32 SG, where SG = FEW_SIMDGROUPS FEW_ROWS / R.
template <class Q, uint N, uint R = FEW_ROWS>
kernel void mul_few_tile(constant MulFewParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                         device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                         device const float* residual [[buffer(4)]], device const float* scale [[buffer(5)]],
                         device float* y [[buffer(6)]], GRID_IDS) {
    typedef FewShape<Q, R, N> Shape;
    MUL_FEW_TILE(Shape, memory);
    const FewOut out{residual, scale, y, p.kind, p.residual_stride, p.scale_stride};
    mul_few_tiles<Q, Shape>(p, min(step->n_tokens, p.rows), Matrices<1>{{w}}, x, out, memory, tg, tid, sg, lane);
}

// Grid: (ceil(m / (R / 2 SG / k_split)), ceil(T / N)): R rows are of two matrices. Threads: 32 SG.
template <class Q, uint N, uint R = FEW_ROWS>
kernel void mul_few_gated_tile(constant MulFewParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                               device const uchar* gate [[buffer(2)]], device const uchar* up [[buffer(3)]],
                               device const float* x [[buffer(4)]], device float* y [[buffer(5)]], GRID_IDS) {
    typedef FewShape<Q, R, N> Shape;
    MUL_FEW_TILE(Shape, memory);
    mul_few_tiles<Q, Shape>(p, min(step->n_tokens, p.rows), Matrices<2>{{gate, up}}, x, FewGated{y, p.kind}, memory, tg,
                            tid, sg, lane);
}

#define FEW_UNROLL_OF(Q) (StepsOf<Q, FEW_UNROLL>::N)
#define MUL_FEW(type, Q)                                                                                               \
    KERNEL_UNROLLED(FEW_UNROLL_OF(Q), "mul_few_" type "_n2", mul_few<Q, 2>)                                            \
    KERNEL("mul_few_" type "_n4", mul_few<Q, 4>)                                                                       \
    KERNEL("mul_few_" type "_n8", mul_few_tile<Q, 8>)                                                                  \
    KERNEL("mul_few_" type "_n16", mul_few_tile<Q, 16>)                                                                \
    KERNEL("mul_few_" type "_n32", mul_few_tile<Q, 32>)                                                                \
    KERNEL_UNROLLED(FEW_UNROLL_OF(Q), "mul_few_gated_" type "_n2", mul_few_gated<Q, 2>)                                \
    KERNEL("mul_few_gated_" type "_n4", mul_few_gated<Q, 4>)                                                           \
    KERNEL("mul_few_gated_" type "_n8", mul_few_gated_tile<Q, 8>)                                                      \
    KERNEL("mul_few_gated_" type "_n16", mul_few_gated_tile<Q, 16>)                                                    \
    KERNEL("mul_few_gated_" type "_n32", mul_few_gated_tile<Q, 32>)
TENSOR_TYPES(MUL_FEW)

#define MUL_FEW_OF(type, Q, R)                                                                                         \
    KERNEL("mul_few_" type "_n8_r" #R, mul_few_tile<Q, 8, R>)                                                          \
    KERNEL("mul_few_" type "_n16_r" #R, mul_few_tile<Q, 16, R>)                                                        \
    KERNEL("mul_few_" type "_n32_r" #R, mul_few_tile<Q, 32, R>)                                                        \
    KERNEL("mul_few_gated_" type "_n8_r" #R, mul_few_gated_tile<Q, 8, R>)                                              \
    KERNEL("mul_few_gated_" type "_n16_r" #R, mul_few_gated_tile<Q, 16, R>)                                            \
    KERNEL("mul_few_gated_" type "_n32_r" #R, mul_few_gated_tile<Q, 32, R>)
#if defined(__CUDACC__) || defined(ZINC_CUDA)
#define MUL_FEW_SMALL(type, Q) MUL_FEW_OF(type, Q, 16)
TENSOR_TYPES(MUL_FEW_SMALL)
#endif

#ifdef ZINC_SWEEP
#define MUL_FEW_VECTORS_OF(type, Q, R)                                                                                 \
    KERNEL_UNROLLED(FEW_UNROLL, "mul_few_" type "_n2_r" #R, mul_few<Q, 2, R>)                                          \
    KERNEL("mul_few_" type "_n4_r" #R, mul_few<Q, 4, R>)
ROWS_OF_TYPES(MUL_FEW_VECTORS_OF, 4)
#ifdef __CUDACC__  // elsewhere there is no threadgroup memory for so many rows
ROWS_OF_TYPES(MUL_FEW_OF, 64)
#endif
#endif
