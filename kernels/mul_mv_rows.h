// Products of a few rows of weights with one vector of activations, by a simdgroup. Every mul_mv kernel uses them.
#pragma once

#include "matmul_epilogue.h"
#include "mul_norm.h"
#include "quant_dot.h"
#include "shapes.h"
#ifdef __CUDACC__
#include "mul_mv_tile.h"
#endif

// Q8_0 with a lane for every run of 8 weights. Neighbouring lanes read neighbouring bytes and activations, and so fewer
// cache lines at a time.
struct Q8_0Runs {
    typedef Q8_0 Block;
    static constant constexpr uint BLOCK = Q8_0::BLOCK, LANES = BLOCK / RUN, QUADS = RUN / QUAD;

    struct X {
        float4 v[2];
    };

    static METAL_FUNC uint column(uint i, uint j) { return i * RUN + j * QUAD; }

    static METAL_FUNC X arrange(thread const float4* quads) { return {{quads[0], quads[1]}}; }

    static METAL_FUNC float dot_part(device const Block* block, uint i, thread const X& x) {
        const uint2 bytes = as_type<uint2>(eight_bytes(block->qs + 4 * i));
        const float4 low = float4(as_type<char4>(bytes.x)), high = float4(as_type<char4>(bytes.y));
        return float(block->d) * (dot(low, x.v[0]) + dot(high, x.v[1]));
    }

    static METAL_FUNC bool is_whole(uint) { return true; }
    static METAL_FUNC float element(device const uchar*, uint) { return 0.0f; }
};

// The way to read long rows of a type: Q8_0 by runs of 8. That takes twice as many steps, so mixtures, whose rows are
// short, read 16.
template <class Q>
struct LongRowsOf {
    typedef Q Type;
};
template <>
struct LongRowsOf<Quantised<Q8_0>> {
    typedef Q8_0Runs Type;
};
template <class Q>
using LongRows = typename LongRowsOf<Q>::Type;

template <uint R>
struct Rows {
    device const uchar* at[R];
};

template <uint R>
struct Sums {
    float of[R];

    METAL_FUNC void clear() { UNROLL for (uint r = 0; r < R; r++) of[r] = 0.0f; }
};

// The rows from `first` on of one matrix, or half as many rows of each of two matrices.
template <uint R, uint N>
METAL_FUNC Rows<R> rows_of(Matrices<N> w, uint first, uint m, uint row_bytes) {
    Rows<R> rows;
    UNROLL for (uint r = 0; r < R; r++) rows.at[r] = w.row(r, R, first, m, row_bytes);
    return rows;
}

// sums += factor * (rows · x), this lane's share. Lanes divide the blocks, 16 weights or 8 each, so that even a row of
// two super-blocks keeps all lanes busy. The lane's activations stay in registers for all rows. Each is read once.
template <class Q, uint STEPS = 1, uint R, class V>
METAL_FUNC void add_rows(thread Sums<R>& sums, Rows<R> rows, thread V& x, uint k, float factor, uint lane) {
    for (uint i = tail_of<Q>(k, lane); i < k; i += SIMD) {
        const float v = factor * x.one(i);
        UNROLL for (uint r = 0; r < R; r++) sums.of[r] += Q::element(rows.at[r], i) * v;
    }
    const uint part = lane % Q::LANES;
    const uint n_blocks = Q::is_whole(k) ? k / Q::BLOCK : 0;
    UNROLL_BY(STEPS)
    for (uint block = lane / Q::LANES; block < n_blocks; block += SIMD / Q::LANES) {
        const typename Q::X xs = load_share<Q>(x, block * Q::BLOCK, part);
        UNROLL for (uint r = 0; r < R; r++) {
            sums.of[r] += factor * Q::dot_part((device const typename Q::Block*)rows.at[r] + block, part, xs);
        }
    }
}

template <uint R>
METAL_FUNC void sum_lanes(thread Sums<R>& sums) {
    UNROLL for (uint r = 0; r < R; r++) sums.of[r] = simd_sum(sums.of[r]);
}

// sums = rows · x, this lane's share.
template <class Q, uint STEPS, uint R>
METAL_FUNC void set_rows(thread Sums<R>& sums, Rows<R> rows, Floats x, uint k, uint lane) {
    sums.clear();
    add_rows<Q, STEPS>(sums, rows, x, k, 1.0f, lane);
}

// The same for the norm of x, if there is one. Its scale is one for all products.
template <class Q, uint STEPS, uint R>
METAL_FUNC void set_rows(thread Sums<R>& sums, Rows<R> rows, MaybeNormed x, uint k, uint lane) {
    if (!x.normed) return set_rows<Q, STEPS>(sums, rows, Floats{x.at}, k, lane);
    sums.clear();
    Weighted weighted{x.at, x.weight, 0.0f};
    add_rows<Q>(sums, rows, weighted, k, 1.0f, lane);
    const float scale = x.scale(simd_sum(weighted.squares), k);
    UNROLL for (uint r = 0; r < R; r++) sums.of[r] *= scale;
}

// Sums the shares of the lanes and hands the products of the rows from `first` on to the epilogue.
template <class Epilogue, uint R>
METAL_FUNC void put_rows(Sums<R> sums, Epilogue out, uint first, uint m, uint lane) {
    const uint outputs = R / Epilogue::MATRICES;
    sum_lanes(sums);
    if (lane != 0) return;
    UNROLL for (uint r = 0; r < outputs; r++) {
        const uint row = first + r;
        if (row < m) out.put({0, row, row}, sums.of[r], sums.of[R - outputs + r]);
    }
}

// For KERNEL_UNROLLED: the steps of a kernel's loop. A tile needs no registers for them.
template <class Q, uint STEPS>
struct StepsOf {
    static constant constexpr uint N = STEPS;
};

#ifdef __CUDACC__
template <class Q, uint R>
struct IsTiled {
    static constant constexpr bool VALUE = R == MUL_MV_ROWS && LaneShare<typename Q::Block>::KNOWN;
    static constant constexpr bool MIXED = VALUE && LaneShare<typename Q::Block>::MIXED;
};

template <class Q, uint STEPS>
    requires(IsTiled<Q, MUL_MV_ROWS>::VALUE)
struct StepsOf<Q, STEPS> {
    static constant constexpr uint N = 1;
};
#endif

// W x for R rows of one matrix or of two for each simdgroup of threadgroup `group`. P has k, m and row_bytes. x is
// Floats or MaybeNormed.
template <class Q, uint R, uint STEPS = 1, uint TILED_BY = MUL_MV_TILE_SIMDGROUPS, class Epilogue, class P, class V>
METAL_FUNC void mul_mv_rows(constant P& p, Matrices<Epilogue::MATRICES> w, V x, Epilogue out, uint group, uint sg,
                            uint n_sg, uint lane) {
#ifdef __CUDACC__
    if constexpr (IsTiled<Q, R>::VALUE) {
        if (n_sg == TILED_BY) return mul_mv_tile<TILED_BY, typename Q::Block>(p, w, x.at, out, group, sg, lane);
    }
#endif
    const uint first = (group * n_sg + sg) * (R / Epilogue::MATRICES);
    if (first >= p.m) return;  // all 32 lanes
    Sums<R> sums;
    set_rows<Q, STEPS>(sums, rows_of<R>(w, first, p.m, p.row_bytes), x, p.k, lane);
    put_rows(sums, out, first, p.m, lane);
}
