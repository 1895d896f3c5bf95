#include "matmul_epilogue.h"
#include "quant_dot.h"
#include "shapes.h"

// out[m] = W[m, k] x[k]. A simdgroup takes MUL_MV_ROWS rows. Its lanes share the blocks, a part of 16 weights each, so
// that even a row of two super-blocks keeps all of them busy; the activations of a part stay in registers for all rows.
template <class Q, class Epilogue>
METAL_FUNC void mul_mv_rows(constant MatMulParams& p, Matrices<Epilogue::MATRICES> w, device const float* x,
                            Epilogue out, uint simdgroup, uint lane) {
    const uint outputs = MUL_MV_ROWS / Epilogue::MATRICES;
    const uint first = simdgroup * outputs;
    if (first >= p.m) return;  // all 32 lanes

    device const uchar* rows[MUL_MV_ROWS];
    float sums[MUL_MV_ROWS];
    UNROLL for (uint r = 0; r < MUL_MV_ROWS; r++) {
        rows[r] = w.row(r, MUL_MV_ROWS, first, p.m, p.row_bytes);
        sums[r] = Q::dot_tail(rows[r], x, p.k, lane);
    }

    const uint part = lane % Q::PARTS;
    const uint n_blocks = Q::is_whole(p.k) ? p.k / Q::BLOCK : 0;
    for (uint block = lane / Q::PARTS; block < n_blocks; block += SIMD / Q::PARTS) {
        const typename Q::X xs = Q::load_x(x + block * Q::BLOCK, part);
        UNROLL for (uint r = 0; r < MUL_MV_ROWS; r++) {
            sums[r] += Q::dot_part((device const typename Q::Block*)rows[r] + block, part, xs);
        }
    }

    UNROLL for (uint r = 0; r < MUL_MV_ROWS; r++) sums[r] = simd_sum(sums[r]);
    if (lane != 0) return;
    UNROLL for (uint r = 0; r < outputs; r++) {
        const uint row = first + r;
        if (row < p.m) out.put({0, row, row}, sums[r], sums[MUL_MV_ROWS - outputs + r]);
    }
}

template <class Q>
kernel void mul_mv(constant MatMulParams& p [[buffer(0)]], device const uchar* w [[buffer(1)]],
                   device const float* x [[buffer(2)]], device float* out [[buffer(3)]], GRID_IDS) {
    mul_mv_rows<Q>(p, Matrices<1>{{w}}, x, Store{out}, tg.x * n_sg + sg, lane);
}

template <class Q>
kernel void mul_mv_add(constant MatMulParams& p [[buffer(0)]], device const uchar* w [[buffer(1)]],
                       device const float* x [[buffer(2)]], device const float* residual [[buffer(3)]],
                       device float* out [[buffer(4)]], GRID_IDS) {
    mul_mv_rows<Q>(p, Matrices<1>{{w}}, x, AddResidual{residual, p.residual_stride, out}, tg.x * n_sg + sg, lane);
}

template <class Q>
kernel void mul_mv_swiglu(constant MatMulParams& p [[buffer(0)]], device const uchar* gate [[buffer(1)]],
                          device const uchar* up [[buffer(2)]], device const float* x [[buffer(3)]],
                          device float* out [[buffer(4)]], GRID_IDS) {
    mul_mv_rows<Q>(p, Matrices<2>{{gate, up}}, x, SwiGlu{out}, tg.x * n_sg + sg, lane);
}

#define MUL_MV(type, Q)                                                                                                \
    KERNEL("mul_mv_" type, mul_mv<Q>)                                                                                  \
    KERNEL("mul_mv_add_" type, mul_mv_add<Q>)                                                                          \
    KERNEL("mul_mv_swiglu_" type, mul_mv_swiglu<Q>)
TENSOR_TYPES(MUL_MV)
