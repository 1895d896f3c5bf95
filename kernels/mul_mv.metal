#include "mul_mv_rows.h"

// out[m] = W[m, k] x[k], then an epilogue: + residual (and biases), scaled, or under a gate. x may stand for its
// RMSNorm with a weight, `norm` [k]: see mul_norm.h.

// residual may be out itself.
struct AddBoth {
    static constant constexpr uint MATRICES = 1;
    device const float* residual;
    device const float* bias;
    uint has_bias;
    device float* out;

    METAL_FUNC void put(Place p, float a, float) const {
        out[p.at] = residual[p.row] + (has_bias != 0 ? bias[p.row] + a : a);
    }
};

// Products that are added have few rows: their speed depends on how much of each row is loaded at a time.
constant constexpr uint ADD_UNROLL = PER_DEVICE(1, 4);

// Grid: ceil(m / (R n_sg)). Threads: 32 MUL_MV_SIMDGROUPS, or as tuning.py says.
template <class Q, uint R = MUL_MV_ROWS>
kernel void mul_mv(constant MatMulParams& p [[buffer(0)]], device const uchar* w [[buffer(1)]],
                   device const float* x [[buffer(2)]], device const float* norm [[buffer(3)]],
                   device float* out [[buffer(4)]], GRID_IDS) {
    mul_mv_rows<LongRows<Q>, R>(p, Matrices<1>{{w}}, maybe_normed(p, x, norm), Store{out}, tg.x, sg, n_sg, lane);
}

// Grid and threads: as mul_mv.
template <class Q, uint R = MUL_MV_ROWS>
kernel void mul_mv_add(constant MatMulParams& p [[buffer(0)]], device const uchar* w [[buffer(1)]],
                       device const float* x [[buffer(2)]], device const float* norm [[buffer(3)]],
                       device const float* residual [[buffer(4)]], device const float* bias [[buffer(5)]],
                       device float* out [[buffer(6)]], GRID_IDS) {
    mul_mv_rows<LongRows<Q>, R, ADD_UNROLL>(p, Matrices<1>{{w}}, maybe_normed(p, x, norm),
                                            AddBoth{residual, bias, p.has_bias, out}, tg.x, sg, n_sg, lane);
}

// There is no norm.
// Grid and threads: as mul_mv.
template <class Q, uint R = MUL_MV_ROWS>
kernel void mul_mv_mix(constant MatMulParams& p [[buffer(0)]], device const uchar* w [[buffer(1)]],
                       device const float* x [[buffer(2)]], device const float* residual [[buffer(3)]],
                       device const float* scale [[buffer(4)]], device float* out [[buffer(5)]], GRID_IDS) {
    mul_mv_rows<LongRows<Q>, R>(p, Matrices<1>{{w}}, Floats{x}, AddScaled{{residual, 0, out}, scale, 0}, tg.x, sg, n_sg,
                                lane);
}

// Grid: ceil(m / (R / 2 n_sg)): R rows are of two matrices. Threads: 32 MUL_MV_SIMDGROUPS, or as tuning.py says.
template <class Q, class Activation, uint R = MUL_MV_ROWS>
kernel void mul_mv_gated(constant MatMulParams& p [[buffer(0)]], device const uchar* gate [[buffer(1)]],
                         device const uchar* up [[buffer(2)]], device const float* x [[buffer(3)]],
                         device const float* norm [[buffer(4)]], device float* out [[buffer(5)]], GRID_IDS) {
    mul_mv_rows<LongRows<Q>, R>(p, Matrices<2>{{gate, up}}, maybe_normed(p, x, norm), Gated<Activation>{out}, tg.x, sg,
                                n_sg, lane);
}

#define ADD_UNROLL_OF(Q) (StepsOf<Q, ADD_UNROLL>::N)
#define MUL_MV(type, Q)                                                                                                \
    KERNEL("mul_mv_" type, mul_mv<Q>)                                                                                  \
    KERNEL_UNROLLED(ADD_UNROLL_OF(Q), "mul_mv_add_" type, mul_mv_add<Q>)                                               \
    KERNEL("mul_mv_mix_" type, mul_mv_mix<Q>)                                                                          \
    KERNEL("mul_mv_swiglu_" type, mul_mv_gated<Q, Silu>)                                                               \
    KERNEL("mul_mv_geglu_" type, mul_mv_gated<Q, Gelu>)
TENSOR_TYPES(MUL_MV)

#define MUL_MV_OF(type, Q, R)                                                                                          \
    KERNEL("mul_mv_" type "_r" #R, mul_mv<Q, R>)                                                                       \
    KERNEL_UNROLLED(ADD_UNROLL, "mul_mv_add_" type "_r" #R, mul_mv_add<Q, R>)
ROW_VARIANTS(MUL_MV_OF)
