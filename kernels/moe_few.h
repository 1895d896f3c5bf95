// Products of an expert's rows with the few slots that chose it, by a simdgroup. Weights are decoded once for up to
// MOE_FEW_SLOTS slots.
#pragma once

#include "moe.h"
#include "mul_mm_tile.h"
#include "mul_mv_rows.h"

constant constexpr uint MOE_FEW_SLOTS = 4;  // more take another turn, which finds the weights in the cache

// Part i of a row, decoded.
template <class Q>
struct FewWeights {
    static METAL_FUNC void decode(device const uchar* row, uint i, uint k, thread float4* w) {
        Q::weights(row, i, k, w);
    }
};

#ifdef __CUDACC__
// The same numbers. Conversions of integers take four times as long as other instructions there, so a byte becomes a
// part of a float: 2^23 + its value.
template <class B>
struct FewWeights<Quantised<B>> {
    static METAL_FUNC float byte(uint word, uint i) {
        return as_type<float>(__byte_perm(word, 0x4B000000u, 0x7650u + i)) - 8388608.0f;
    }

    static METAL_FUNC void decode(device const uchar* row, uint i, uint, thread float4* w) {
        const QuantPart p = B::part((device const B*)row + i / (B::BLOCK / PART), i % (B::BLOCK / PART));
        UNROLL for (uint j = 0; j < 4; j++) {
            const uint word = as_type<uint2>(p.quants[j / 2])[j % 2];
            UNROLL for (uint c = 0; c < 4; c++) w[j][c] = p.scale[j / 2] * byte(word, c) + p.offset[j / 2];
        }
    }
};
#endif

// The sums over the lanes of the first N values, N a power of two: lane l gets the sum of value l % N.
template <uint N>
struct SumEach {
    template <uint V>
    static METAL_FUNC float of(thread float (&v)[V], uint lane) {
        const bool upper = (lane & N / 2) != 0;
        UNROLL for (uint i = 0; i < N / 2; i++) {
            const float a = v[i], b = v[i + N / 2];  // registers: an index would not be
            v[i] = (upper ? b : a) + simd_shuffle_xor(upper ? a : b, ushort(N / 2));
        }
        return SumEach<N / 2>::of(v, lane);
    }
};
template <>
struct SumEach<1> {
    template <uint V>
    static METAL_FUNC float of(thread float (&v)[V], uint) {
        float sum = v[0];
        UNROLL for (ushort n = V; n < SIMD; n *= 2) sum += simd_shuffle_xor(sum, n);
        return sum;
    }
};

// A simdgroup's rows of weights of one matrix or of two, and the sums of up to N slots with each row.
template <class Q, uint R, uint N, uint MATRICES>
struct FewProducts {
    static constant constexpr uint EACH = R / MATRICES;  // rows of a matrix
    float sums[MATRICES * N * EACH];                     // [matrix][slot][row]

    static METAL_FUNC constexpr uint place(uint r, uint s) { return (r / EACH * N + s) * EACH + r % EACH; }

    // x_rows: of the slots, in floats from x.
    METAL_FUNC void multiply(Rows<R> rows, device const float* x, thread const uint (&x_rows)[N], uint k, uint lane) {
        UNROLL for (uint i = 0; i < N * R; i++) sums[i] = 0.0f;
        const uint n_parts = (k + Q::BLOCK - 1) / Q::BLOCK * Q::PARTS;
        for (uint part = lane; part < n_parts; part += SIMD) {
            float4 w[R][4];
            UNROLL for (uint r = 0; r < R; r++) FewWeights<Q>::decode(rows.at[r], part, k, w[r]);
            UNROLL for (uint i = 0; i < 4; i++) {
                UNROLL for (uint s = 0; s < N; s++) {
                    const float4 four = load_four<Q>(x + x_rows[s], run_column<Q>(part, i / 2) + i % 2 * 4, k);
                    UNROLL for (uint r = 0; r < R; r++) sums[place(r, s)] += dot(w[r][i], four);
                }
            }
        }
    }

    // Sums the lanes' shares. Lane s EACH + r hands the product of slot s and row r to the epilogue.
    template <class Epilogue>
    METAL_FUNC void put(Epilogue out, device const int* slots, uint n, uint first, uint m, uint lane) {
        const float a = SumEach<N * R>::of(sums, lane);
        const float b = MATRICES == 2 ? simd_shuffle_xor(a, ushort(N * EACH)) : 0.0f;
        const uint s = lane / EACH, row = first + lane % EACH;
        if (s >= n || row >= m) return;
        const uint slot = uint(slots[s]);
        out.put({slot, row, ulong(slot) * m + row}, a, b);
    }
};

// The products of n slots, at most N, with the rows from `first` on.
template <class Q, uint R, uint N, class Epilogue>
METAL_FUNC void moe_few_slots(constant MoeMmParams& p, Matrices<Epilogue::MATRICES> w, device const int* slots, uint n,
                              device const float* x, Epilogue out, uint first, uint lane) {
    uint x_rows[N];
    UNROLL for (uint s = 0; s < N; s++) x_rows[s] = uint(slots[min(s, n - 1)]) / p.x_div * p.k;
    FewProducts<Q, R, N, Epilogue::MATRICES> products;
    products.multiply(rows_of<R>(w, first, p.m, p.row_bytes), x, x_rows, p.k, lane);
    products.put(out, slots, n, first, p.m, lane);
}

// The products of all slots of a tile with its expert's rows. Simdgroup `simdgroup` of `simdgroups` takes every so
// manieth R rows of weights, of both matrices together.
template <class Q, uint R, class Epilogue>
METAL_FUNC void moe_few_tile(constant MoeMmParams& p, int4 tile, device const int* slots,
                             Matrices<Epilogue::MATRICES> w, device const float* x, Epilogue out, uint simdgroup,
                             uint simdgroups, uint lane) {
    const ulong before = expert_offset(p, tile.x);
    UNROLL for (uint i = 0; i < Epilogue::MATRICES; i++) w.w[i] += before;
    const uint each = R / Epilogue::MATRICES;
    for (uint first = simdgroup * each; first < p.m; first += simdgroups * each) {
        for (uint s = uint(tile.y); s < uint(tile.z); s += MOE_FEW_SLOTS) {
            const uint n = min(uint(tile.z) - s, MOE_FEW_SLOTS);
            if (n == 1)
                moe_few_slots<Q, R, 1>(p, w, slots + s, n, x, out, first, lane);
            else if (n == 2)
                moe_few_slots<Q, R, 2>(p, w, slots + s, n, x, out, first, lane);
            else  // half the rows at a time: registers hold no more
                for (uint row = first; row < first + each; row += each / 2)
                    moe_few_slots<Q, R / 2, MOE_FEW_SLOTS>(p, w, slots + s, n, x, out, row, lane);
        }
    }
}
