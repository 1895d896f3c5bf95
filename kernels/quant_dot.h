// The interface of a tensor type for matrix kernels and embedding, quantised (Quantised<block>) or not (Plain<block>):
//   LANES              lanes that share a block in a product with a vector
//   column, arrange    the columns, in quads, of a lane's share of a block; the share of the activations, from its
//   quads dot_part           a lane's share of a block times that of the activations element            weight i of a
//   row that does not end with a block weights            part i of a row, decoded is_whole           true if rows of k
//   weights are whole blocks, and so aligned
// Only float rows may end inside a block. Then they are correct, but not fast.
#pragma once

#include "quant_blocks.h"
#include "quant_types.h"

constant constexpr uint PART = 16;  // weights of a part
constant constexpr uint RUN = 8;    // consecutive weights of a part
constant constexpr uint QUAD = 4;   // floats that are loaded at a time

// The first weight, in its block, of run h of part i.
template <uint SPAN>
METAL_FUNC uint run_start(uint i, uint h) {
    const uint parts = SPAN / RUN;
    return i / parts * 2 * SPAN + h * SPAN + i % parts * RUN;
}

template <class B>
struct Quantised {
    typedef B Block;
    static constant constexpr uint BLOCK = B::BLOCK, SPAN = B::SPAN, PARTS = B::BLOCK / PART, LANES = PARTS,
                                   QUADS = PART / QUAD;

    // The activations of a part, arranged as quants are. Even activations meet low bytes. Odd activations meet high
    // bytes, which stay in place and so count 256 times.
    struct X {
        float4 even[2], odd[2];
        float2 sum;  // per run, for the offset
    };

    static METAL_FUNC uint column(uint i, uint j) { return run_start<SPAN>(i, j / 2) + j % 2 * QUAD; }

    static METAL_FUNC X arrange(thread const float4* quads) {
        X out;
        UNROLL for (uint h = 0; h < 2; h++) {
            const float4 a = quads[2 * h], b = quads[2 * h + 1];
            out.even[h] = float4(a.x, a.z, b.x, b.z);
            out.odd[h] = float4(a.y, a.w, b.y, b.w);
            out.sum[h] = dot(out.even[h] + out.odd[h], float4(1.0f));
            out.odd[h] *= 1.0f / 256;
        }
        return out;
    }

    static METAL_FUNC float dot_part(device const Block* block, uint i, thread const X& x) {
        const QuantPart p = B::part(block, i);
        float2 sum;
        UNROLL for (uint h = 0; h < 2; h++) {
            sum[h] = dot(float4(p.quants[h] & ushort4(0x00FF)), x.even[h]) +
                     dot(float4(p.quants[h] & ushort4(0xFF00)), x.odd[h]);
        }
        return dot(p.scale, sum) + dot(p.offset, x.sum);
    }

    static METAL_FUNC bool is_whole(uint) { return true; }
    static METAL_FUNC float element(device const uchar*, uint) { return 0.0f; }

    // w[2 h] and w[2 h + 1] are run h.
    static METAL_FUNC void weights(device const uchar* row, uint i, uint, thread float4* w) {
        const QuantPart p = B::part((device const Block*)row + i / PARTS, i % PARTS);
        UNROLL for (uint h = 0; h < 2; h++) {
            const float4 even = p.scale[h] * float4(p.quants[h] & ushort4(0x00FF)) + p.offset[h];
            const float4 odd = p.scale[h] * float4(p.quants[h] >> ushort4(8)) + p.offset[h];
            w[2 * h] = float4(even.x, odd.x, even.y, odd.y);
            w[2 * h + 1] = float4(even.z, odd.z, even.w, odd.w);
        }
    }
};

template <class B>
struct Plain {
    typedef B Block;
    static constant constexpr uint BLOCK = 32, SPAN = 16, PARTS = BLOCK / PART, LANES = PARTS, QUADS = PART / QUAD;

    struct X {
        float4 v[4];
    };

    static METAL_FUNC uint column(uint i, uint j) { return run_start<SPAN>(i, j / 2) + j % 2 * QUAD; }

    static METAL_FUNC X arrange(thread const float4* quads) { return {{quads[0], quads[1], quads[2], quads[3]}}; }

    static METAL_FUNC float dot_part(device const Block* block, uint i, thread const X& x) {
        float sum = 0.0f;
        UNROLL for (uint j = 0; j < 4; j++) sum += dot(B::quad(block, column(i, j) / QUAD), x.v[j]);
        return sum;
    }

    static METAL_FUNC bool is_whole(uint k) { return k % BLOCK == 0; }

    static METAL_FUNC float element(device const uchar* row, uint i) { return B::element(row, i); }

    static METAL_FUNC void weights(device const uchar* row, uint i, uint k, thread float4* w) {
        UNROLL for (uint j = 0; j < 4; j++) {
            const uint block = i / PARTS, at = column(i % PARTS, j);
            if (is_whole(k)) {
                w[j] = B::quad((device const Block*)row + block, at / QUAD);
            } else {
                const uint first = block * BLOCK + at;
                UNROLL for (uint c = 0; c < 4; c++) w[j][c] = first + c < k ? B::element(row, first + c) : 0.0f;
            }
        }
    }
};

// A vector of activations, as products read it.
struct Floats {
    device const float* at;

    METAL_FUNC float4 quad(uint first, uint i) const { return *(device const float4*)(at + first + i); }
    METAL_FUNC float one(uint i) const { return at[i]; }
};

// A lane's share of a block of activations, the first of which is x[first].
template <class Q, class V>
METAL_FUNC typename Q::X load_share(thread V& x, uint first, uint i) {
    float4 quads[Q::QUADS];
    UNROLL for (uint j = 0; j < Q::QUADS; j++) quads[j] = x.quad(first, Q::column(i, j));
    return Q::arrange(quads);
}

// The first element of a row that is beyond its whole blocks, for a lane: each takes every SIMD-th.
template <class Q>
METAL_FUNC uint tail_of(uint k, uint lane) {
    return Q::is_whole(k) ? k : lane;
}

// The column of a row, from its start, of run h of part i.
template <class Q>
METAL_FUNC uint run_column(uint i, uint h) {
    return i / Q::PARTS * Q::BLOCK + run_start<Q::SPAN>(i % Q::PARTS, h);
}

// Instances of products with one vector that take another number of rows, T("<type>", <type>, rows). One list is for
// kernels of single matrices, one for kernels that may divide the rows between a pair. A build for sweeps (ZINC_SWEEP)
// has all numbers that are worth comparing.
#ifdef SOURCE_TYPES
#define ROWS_OF_TYPES(T, R)
#else
#define ROWS_OF_TYPES(T, R)                                                                                            \
    T("q8_0", Quantised<Q8_0>, R)                                                                                      \
    T("q4_k", Quantised<Q4_K>, R)                                                                                      \
    T("q5_k", Quantised<Q5_K>, R)                                                                                      \
    T("q6_k", Quantised<Q6_K>, R)
#endif
#ifdef ZINC_SWEEP
#define PAIR_ROW_VARIANTS(T) ROWS_OF_TYPES(T, 4) ROWS_OF_TYPES(T, 8)
#define ROW_VARIANTS(T) ROWS_OF_TYPES(T, 1) PAIR_ROW_VARIANTS(T)
#else
#define PAIR_ROW_VARIANTS(T)
#define ROW_VARIANTS(T)
#endif
