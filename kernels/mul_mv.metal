#include "mul_mv_rows.h"

// out[m] = W[m, k] x[k], or what an epilogue makes of it.

// Q8_0 with a lane for every run of 8 weights: neighbouring lanes read neighbouring bytes and activations, and so fewer
// cache lines at a time. Rows take twice as many steps: that pays where there are many, and not in stacks and mixtures.
struct Bytes {
    typedef Q8_0 Block;
    static constant constexpr uint BLOCK = Q8_0::BLOCK, LANES = BLOCK / RUN;

    struct X {
        float4 v[2];
    };

    static METAL_FUNC X load_x(device const float* x, uint i) {
        device const float4* run = (device const float4*)(x + i * RUN);
        return {{run[0], run[1]}};
    }

    static METAL_FUNC float dot_part(device const Block* block, uint i, thread const X& x) {
        const uint2 bytes = as_type<uint2>(eight_bytes(block->qs + 4 * i));
        const float4 low = float4(as_type<char4>(bytes.x)), high = float4(as_type<char4>(bytes.y));
        return float(block->d) * (dot(low, x.v[0]) + dot(high, x.v[1]));
    }

    static METAL_FUNC bool is_whole(uint) { return true; }
    static METAL_FUNC float dot_tail(device const uchar*, device const float*, uint, uint) { return 0.0f; }
};

// What takes the rows of a type here.
template <class Q>
struct Rowwise {
    typedef Q Type;
};
template <>
struct Rowwise<Quantised<Q8_0>> {
    typedef Bytes Type;
};

template <class Q, uint R = MUL_MV_ROWS>
kernel void mul_mv(constant MatMulParams& p [[buffer(0)]], device const uchar* w [[buffer(1)]],
                   device const float* x [[buffer(2)]], device float* out [[buffer(3)]], GRID_IDS) {
    mul_mv_rows<typename Rowwise<Q>::Type, R>(p, Matrices<1>{{w}}, x, Store{out}, tg.x * n_sg + sg, lane);
}

template <class Q, uint R = MUL_MV_ROWS>
kernel void mul_mv_add(constant MatMulParams& p [[buffer(0)]], device const uchar* w [[buffer(1)]],
                       device const float* x [[buffer(2)]], device const float* residual [[buffer(3)]],
                       device float* out [[buffer(4)]], GRID_IDS) {
    mul_mv_rows<typename Rowwise<Q>::Type, R>(p, Matrices<1>{{w}}, x, AddResidual{residual, 0, out}, tg.x * n_sg + sg,
                                              lane);
}

template <class Q, uint R = MUL_MV_ROWS>
kernel void mul_mv_mix(constant MatMulParams& p [[buffer(0)]], device const uchar* w [[buffer(1)]],
                       device const float* x [[buffer(2)]], device const float* residual [[buffer(3)]],
                       device const float* scale [[buffer(4)]], device float* out [[buffer(5)]], GRID_IDS) {
    mul_mv_rows<typename Rowwise<Q>::Type, R>(p, Matrices<1>{{w}}, x, AddScaled{{residual, 0, out}, scale, 0},
                                              tg.x * n_sg + sg, lane);
}

template <class Q, class Activation, uint R = MUL_MV_ROWS>
kernel void mul_mv_gated(constant MatMulParams& p [[buffer(0)]], device const uchar* gate [[buffer(1)]],
                         device const uchar* up [[buffer(2)]], device const float* x [[buffer(3)]],
                         device float* out [[buffer(4)]], GRID_IDS) {
    mul_mv_rows<typename Rowwise<Q>::Type, R>(p, Matrices<2>{{gate, up}}, x, Gated<Activation>{out}, tg.x * n_sg + sg,
                                              lane);
}

#define MUL_MV(type, Q)                                                                                                \
    KERNEL("mul_mv_" type, mul_mv<Q>)                                                                                  \
    KERNEL("mul_mv_add_" type, mul_mv_add<Q>)                                                                          \
    KERNEL("mul_mv_mix_" type, mul_mv_mix<Q>)                                                                          \
    KERNEL("mul_mv_swiglu_" type, mul_mv_gated<Q, Silu>)                                                               \
    KERNEL("mul_mv_geglu_" type, mul_mv_gated<Q, Gelu>)
TENSOR_TYPES(MUL_MV)

#define MUL_MV_OF(type, Q, R)                                                                                          \
    KERNEL("mul_mv_" type "_r" #R, mul_mv<Q, R>)                                                                       \
    KERNEL("mul_mv_add_" type "_r" #R, mul_mv_add<Q, R>)
ROW_VARIANTS(MUL_MV_OF)
