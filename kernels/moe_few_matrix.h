// Products of an expert's rows with the few slots that chose it, by a matrix unit that multiplies 16 by 16 with 16 by 8
// bfloats (multiply_16x16x8 of the stand-in; Metal has none). The cost does not depend on the number of slots.
//
// The left matrix is quants, exact as bfloats. The right matrix is activations: a float is the exact sum of three
// bfloats, its pieces. Column 2 i + s is piece i of slot s, so a multiplication serves two slots, and columns 6 and 7
// have no meaning. The sums of a group of 32 columns are multiplied by the group's scale.
//
// Lane 4 g + t holds rows g and g + 8 of the left matrix, column g of the right one, and of the results columns 2 t and
// 2 t + 1 of rows g and g + 8.
#pragma once

#include "matmul_epilogue.h"
#include "moe.h"
#include "quant_blocks.h"
#include "shapes.h"

constant constexpr uint FEW_BLOCK =
    MOE_FEW_MATRIX_COLUMNS;              // columns that a simdgroup multiplies at a time: a block of weights
constant constexpr uint FEW_GROUPS = 8;  // of 32 columns with one scale
constant constexpr uint LEFT_ROWS = MOE_FEW_MATRIX_ROWS;  // rows of weights of a simdgroup: two left matrices
constant constexpr uint FEW_PAIR = 2;                     // slots at a time
constant constexpr uint FEW_MOST_SIMDGROUPS = MOE_FEW_THREADS / SIMD;  // of a threadgroup
constant constexpr uint FEW_SUMS = LEFT_ROWS * FEW_PAIR;

constant constexpr uint BEYOND_BYTES = 0x4B000000;  // as a float 2^23; the next are its sums with 1, 2, 3 ..

// 2^23 + byte i of a word. beyond: BEYOND_BYTES.
METAL_FUNC float byte_beyond(uint word, uint i, uint beyond) {
#ifdef __CUDACC__
    return as_type<float>(__byte_perm(word, beyond, 0x7650u + i));
#else
    return as_type<float>((word >> (8 * i) & 0xFF) | beyond);
#endif
}

// The upper halves of two words.
METAL_FUNC uint upper_halves(uint a, uint b) {
#ifdef __CUDACC__
    return __byte_perm(a, b, 0x7632u);
#else
    return a >> 16 | (b & 0xFFFF0000u);
#endif
}

// (word & MASK) | bits, as one instruction.
template <uint MASK>
METAL_FUNC uint masked_or(uint word, uint bits) {
#ifdef __CUDACC__
    uint out;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(word), "n"(MASK), "r"(bits));
    return out;
#else
    return (word & MASK) | bits;
#endif
}

// The eight scales and minima of Q4_K and Q5_K, as bytes. Minima are divided by `beyond`.
struct FewScales {
    uint2 scales, minima;
    float d, d_beyond, m, m_beyond;

    METAL_FUNC void load(device const KScales* from, float beyond) {
        const uint2 start = from->words[0], end = from->words[1];
        const half2 both = as_type<half2>(start.x);
        d = float(both.x);
        m = float(both.y) / beyond;
        d_beyond = -8388608.0f * d;
        m_beyond = -8388608.0f * m;
        scales = uint2(start.y & 0x3F3F3F3Fu, (end.y & 0x0F0F0F0Fu) | (start.y >> 2 & 0x30303030u));
        minima = uint2(end.x & 0x3F3F3F3Fu, (end.y >> 4 & 0x0F0F0F0Fu) | (end.x >> 2 & 0x30303030u));
    }

    METAL_FUNC float scale(uint group, uint beyond) const {
        return fma(byte_beyond(scales[group / 4], group % 4, beyond), d, d_beyond);
    }
    METAL_FUNC float minimum(uint group, uint beyond) const {
        return fma(byte_beyond(minima[group / 4], group % 4, beyond), m, m_beyond);
    }
};

// Bits of a word, moved up by `by`, or down if it is negative.
METAL_FUNC uint moved(uint word, int by) { return by >= 0 ? word << uint(by) : word >> uint(-by); }

// A lane's share of a block of a row: eight quants of each group. left(group, s, odd) is two bfloats, BEYOND + quant,
// of the columns 32 group + 8 t + 4 s + odd and 2 more.
template <class B>
struct FewQuants;

template <>
struct FewQuants<Q4_K> {
    static constant constexpr uint BEYOND = 16, AS_BFLOATS = 0x41804180;  // the second as two
    FewScales scales;
    uint2 qs[4];

    METAL_FUNC void load(device const uchar* row, uint block, uint t) {
        device const Q4_K* b = (device const Q4_K*)row + block;
        scales.load(&b->scales, BEYOND);
        UNROLL for (uint i = 0; i < 4; i++) qs[i] = b->qs[4 * i + t];
    }

    METAL_FUNC uint left(uint group, uint s, uint odd, uint none) const {
        const int at = int(8 * odd + group % 2 * 4);  // of the quant, in the lower half of the word
        return masked_or<0x00780078u>(moved(qs[group / 2][s], 3 - at), none);
    }
};

template <>
struct FewQuants<Q5_K> {
    static constant constexpr uint BEYOND = 32, AS_BFLOATS = 0x42004200;  // the second as two
    FewScales scales;
    uint2 qs[4], qh;

    METAL_FUNC void load(device const uchar* row, uint block, uint t) {
        device const Q5_K* b = (device const Q5_K*)row + block;
        scales.load(&b->scales, BEYOND);
        qh = b->qh[t];
        UNROLL for (uint i = 0; i < 4; i++) qs[i] = b->qs[4 * i + t];
    }

    METAL_FUNC uint left(uint group, uint s, uint odd, uint none) const {
        const int at = int(8 * odd + group % 2 * 4), high = int(8 * odd + group);
        const uint fifth = masked_or<0x00400040u>(moved(qh[s], 6 - high), none);
        return masked_or<0x003C003Cu>(moved(qs[group / 2][s], 2 - at), fifth);
    }
};

// The right matrices of a block, and the sums of their columns, in threadgroup memory. A lane reads the words that it
// wrote: two for each 16 columns of weights.
struct FewRight {
    threadgroup uint2* words;
    threadgroup float4* sums;  // [group][t]: of columns 2 t and 2 t + 1 times -BEYOND, twice

    static constant constexpr uint WORDS = 2 * FEW_GROUPS * SIMD, SUMS = FEW_GROUPS * 4;  // of a simdgroup

    // x: the activations of a block, of the slot of column g. minus: -BEYOND as two bfloats.
    METAL_FUNC void put(device const float* x, uint minus, uint lane) const {
        const uint t = lane % 4, piece = lane / 8;
        const uint first = piece > 0 ? 0xFFFF0000u : 0, second = piece > 1 ? 0xFFFF0000u : 0;
        simdgroup_barrier(mem_flags::mem_threadgroup);  // the block before has been read
        UNROLL for (uint group = 0; group < FEW_GROUPS; group++) {
            float4 sum = float4(0.0f);
            UNROLL for (uint s = 0; s < 2; s++) {
                float4 v = *(device const float4*)(x + 32 * group + 8 * t + 4 * s);
                v -= as_type<float4>(as_type<uint4>(v) & uint4(first));
                v -= as_type<float4>(as_type<uint4>(v) & uint4(second));
                const uint4 bits = as_type<uint4>(v);
                const uint2 two(upper_halves(bits.x, bits.z), upper_halves(bits.y, bits.w));
                words[(2 * group + s) * SIMD + lane] = two;
                sum = multiply_16x16x8(uint4(minus), two, sum);
            }
            if (lane < 4) sums[4 * group + t] = sum;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
};

// sums += the products of a block: rows g and g + 8 of left matrix i are rows[2 i] and rows[2 i + 1].
template <class B>
METAL_FUNC void add_block(thread float4 (&sums)[2], thread const FewQuants<B> (&rows)[4], FewRight right, uint none,
                          uint beyond, uint lane) {
    UNROLL for (uint group = 0; group < FEW_GROUPS; group++) {
        const uint2 words[2] = {right.words[2 * group * SIMD + lane], right.words[(2 * group + 1) * SIMD + lane]};
        const float4 sum = right.sums[4 * group + lane % 4];
        UNROLL for (uint i = 0; i < 2; i++) {
            thread const FewQuants<B>&upper = rows[2 * i], &lower = rows[2 * i + 1];
            float4 products = sum;
            UNROLL for (uint s = 0; s < 2; s++) {
                products = multiply_16x16x8(uint4(upper.left(group, s, 0, none), lower.left(group, s, 0, none),
                                                  upper.left(group, s, 1, none), lower.left(group, s, 1, none)),
                                            words[s], products);
            }
            const float2 scales(upper.scales.scale(group, beyond), lower.scales.scale(group, beyond));
            const float2 minima(upper.scales.minimum(group, beyond), lower.scales.minimum(group, beyond));
            sums[i] += float4(scales.xx, scales.yy) * products;
            sums[i] += float4(minima.xx, minima.yy) * sum;
        }
    }
}

// Puts the sums of a simdgroup, [row][slot], into `to`: adds the pieces.
METAL_FUNC void put_sums(thread const float4 (&sums)[2], threadgroup float2* to, uint lane) {
    const uint t = lane % 4;
    const bool second = t >= 2, lower = t % 2 != 0, none = t == 3;
    const float4 a = none ? float4(0.0f) : sums[0], b = none ? float4(0.0f) : sums[1];
    const float4 kept = (second ? b : a) + simd_shuffle_xor(second ? a : b, ushort(2));
    const float2 each = (lower ? float2(kept.zw) : float2(kept.xy)) +
                        simd_shuffle_xor(lower ? float2(kept.xy) : float2(kept.zw), ushort(1));
    to[(second ? 16 : 0) + (lower ? 8 : 0) + lane / 4] = each;
}

// The products of all slots of a tile with its expert's rows, by threadgroup `mine` of n. right: the simdgroup's. A
// simdgroup takes LEFT_ROWS rows of weights, of both matrices together. Simdgroups that share rows divide the blocks of
// columns.
template <class B, class Epilogue>
METAL_FUNC void moe_few_matrix(constant MoeMmParams& p, int4 tile, device const int* slots,
                               Matrices<Epilogue::MATRICES> w, device const float* x, Epilogue out, FewRight right,
                               threadgroup float2* scratch, uint mine, uint n, uint tid, uint sg, uint lane,
                               uint n_sg) {
    const ulong before = expert_offset(p, tile.x);
    UNROLL for (uint i = 0; i < Epilogue::MATRICES; i++) w.w[i] += before;
    const uint each = LEFT_ROWS / Epilogue::MATRICES, n_groups = (p.m + each - 1) / each, blocks = p.k / FEW_BLOCK;
    uint splits = n_sg;  // of the columns
    while (splits > blocks) splits /= 2;
    const uint abreast = n_sg / splits, t = lane % 4, g = lane / 4;
    // The last number of a tile is 0. The compiler does not know this, and keeps the sums in registers. It would load
    // constants again and again.
    const uint none = FewQuants<B>::AS_BFLOATS + uint(tile.w);  // BEYOND + quant 0, twice
    const uint beyond = BEYOND_BYTES + uint(tile.w);
    uint turn = 0;
    for (uint first = uint(tile.y); first < uint(tile.z); first += FEW_PAIR) {
        const uint n_slots = min(uint(tile.z) - first, FEW_PAIR);
        device const float* from = x + ulong(uint(slots[first + min(g % 2, n_slots - 1)]) / p.x_div) * p.k;
        uint loaded = blocks;
        for (uint base = mine * abreast; base < n_groups; base += n * abreast, turn++) {
            const uint group = base + sg / splits;
            float4 sums[2] = {float4(0.0f), float4(0.0f)};
            for (uint block = sg % splits; group < n_groups && block < blocks; block += splits) {
                FewQuants<B> rows[4];
                UNROLL for (uint i = 0; i < 4; i++) rows[i].load(
                    w.row(i * 8 + g, LEFT_ROWS, group * each, p.m, p.row_bytes), block, t);
                if (loaded != block) right.put(from + block * FEW_BLOCK, none ^ 0x80008000u, lane);
                loaded = block;
                add_block(sums, rows, right, none, beyond, lane);
            }
            threadgroup float2* turns = scratch + turn % 2 * (FEW_MOST_SIMDGROUPS * LEFT_ROWS);
            put_sums(sums, turns + sg * LEFT_ROWS, lane);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            threadgroup const float* put = (threadgroup const float*)turns;
            for (uint i = tid; i < abreast * each * FEW_PAIR; i += n_sg * SIMD) {
                const uint s = i % FEW_PAIR, row = i / FEW_PAIR % each, beside = i / (FEW_PAIR * each);
                float a = 0.0f, b = 0.0f;
                for (uint j = 0; j < splits; j++) {
                    threadgroup const float* sum = put + (beside * splits + j) * FEW_SUMS + row * FEW_PAIR + s;
                    a += sum[0];
                    b += sum[FEW_SUMS - each * FEW_PAIR];
                }
                const uint to = (base + beside) * each + row;
                if (s >= n_slots || to >= p.m) continue;
                const uint slot = uint(slots[first + s]);
                out.put({slot, to, ulong(slot) * p.m + to}, a, b);
            }
        }
    }
}
