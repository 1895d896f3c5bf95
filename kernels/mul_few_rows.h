// Products of a few rows of weights with up to N rows of activations, by a simdgroup. Weights are read once for all
// rows of activations. Each product adds in the order of mul_mv.
#pragma once

#include "mul_mv_rows.h"

// How the products of mul_few go to the output: out = products; + residual; or residual + factor of the token *
// products.
struct FewOut {
    static constant constexpr uint MATRICES = 1;
    device const float* residual;
    device const float* scale;
    device float* out;
    uint kind, residual_stride, scale_stride;

    METAL_FUNC void put(Place p, float a, float) const {
        if (kind == FEW_MIX) a *= scale[ulong(p.token) * scale_stride];
        if (kind != FEW_STORE) a += residual[ulong(p.token) * residual_stride + p.row];
        out[p.at] = a;
    }
};

// Activation(gate) up, with SiLU or with GELU.
struct FewGated {
    static constant constexpr uint MATRICES = 2;
    device float* out;
    uint kind;

    METAL_FUNC void put(Place p, float gate, float up) const {
        out[p.at] = (kind == FEW_GELU ? gelu(gate) : silu(gate)) * up;
    }
};

// The sums of R rows of weights and N tokens: those of a simdgroup's lane.
template <uint R, uint N>
struct VectorSums {
    Sums<R> of[N];
};

// sums = rows X^T, this lane's share, for N tokens from `begin` on, but none from `end` on. Tokens past the last read
// its activations, and their products are dropped.
template <class Q, uint STEPS = 1, uint R, uint N>
METAL_FUNC void set_few_rows(thread VectorSums<R, N>& sums, Rows<R> rows, device const float* x, uint k, uint begin,
                             uint end, uint lane) {
    Floats of_token[N];
    UNROLL for (uint t = 0; t < N; t++) {
        of_token[t].at = x + ulong(min(begin + t, end - 1)) * k;
        sums.of[t].clear();
        for (uint i = tail_of<Q>(k, lane); i < k; i += SIMD) {
            UNROLL for (uint r = 0; r < R; r++) sums.of[t].of[r] += Q::element(rows.at[r], i) * of_token[t].one(i);
        }
    }
    const uint part = lane % Q::LANES, n_blocks = Q::is_whole(k) ? k / Q::BLOCK : 0;
    UNROLL_BY(STEPS)
    for (uint block = lane / Q::LANES; block < n_blocks; block += SIMD / Q::LANES) {
        typename Q::X xs[N];
        UNROLL for (uint t = 0; t < N; t++) xs[t] = load_share<Q>(of_token[t], block * Q::BLOCK, part);
        UNROLL for (uint r = 0; r < R; r++) {
            device const typename Q::Block* at = (device const typename Q::Block*)rows.at[r] + block;
            UNROLL for (uint t = 0; t < N; t++) sums.of[t].of[r] += Q::dot_part(at, part, xs[t]);
        }
    }
}

// Sums the shares of the lanes and hands the products of the rows from `first` on to the epilogue, for each token.
template <class Epilogue, uint R, uint N>
METAL_FUNC void put_few_rows(thread VectorSums<R, N>& sums, Epilogue out, uint first, uint m, uint begin, uint end,
                             uint lane) {
    const uint outputs = R / Epilogue::MATRICES;
    UNROLL for (uint t = 0; t < N; t++) {
        if (begin + t >= end) return;  // all 32 lanes
        sum_lanes(sums.of[t]);
        if (lane == 0) {
            UNROLL for (uint r = 0; r < outputs; r++) {
                const uint token = begin + t, row = first + r;
                if (row < m)
                    out.put({token, row, ulong(token) * m + row}, sums.of[t].of[r], sums.of[t].of[R - outputs + r]);
            }
        }
    }
}

// W X^T for R rows of one matrix or of two, and up to N tokens.
template <class Q, uint R, uint N, uint STEPS = 1, class Epilogue, class P>
METAL_FUNC void mul_few_rows(constant P& p, Matrices<Epilogue::MATRICES> w, device const float* x, Epilogue out,
                             uint first, uint begin, uint end, uint lane) {
    VectorSums<R, N> sums;
    set_few_rows<Q, STEPS>(sums, rows_of<R>(w, first, p.m, p.row_bytes), x, p.k, begin, end, lane);
    put_few_rows(sums, out, first, p.m, begin, end, lane);
}
