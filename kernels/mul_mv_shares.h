// A lane's share of a strip for mul_mv_tile.h: 64 weights of 256 columns of a row, as the matrix unit takes them.
//
// A share is eight runs of eight weights. Run r meets the run of x that begins at column 8 (first(t) + run(r)), and has
// the scale and the offset of group(r). Quants are halves that hold them exactly: bytes are subnormal halves, and so
// 2^-24 of their number. UNIT undoes that. Word 0 of a run has weights 0 and 2, then 1 and 3, 4 and 6, 5 and 7.
#pragma once

#include "quant_blocks.h"
#include "quant_table_blocks.h"

struct Run {
    uint2 first, second;
};

template <uint GROUPS>
struct RowShare {
    Run runs[8];
    float scale[GROUPS], offset[GROUPS];
};

constant constexpr float SUBNORMAL = 16777216.0f;  // 2^24

// Bytes of two words as halves.
METAL_FUNC Run run_of_bytes(uint a, uint b) {
    return {uint2(a & 0x00FF00FF, a >> 8 & 0x00FF00FF), uint2(b & 0x00FF00FF, b >> 8 & 0x00FF00FF)};
}
// The same of bytes that are the upper halves of halves.
METAL_FUNC Run run_of_upper_bytes(uint a, uint b) {
    return {uint2(a << 8 & 0xFF00FF00, a & 0xFF00FF00), uint2(b << 8 & 0xFF00FF00, b & 0xFF00FF00)};
}

// N words from byte `at` of a row on, an even number.
template <uint N>
METAL_FUNC void words_at(threadgroup const uchar* row, uint at, thread uint (&words)[N]) {
    threadgroup const uint* aligned = (threadgroup const uint*)(row + at / 4 * 4);
    uint next = aligned[0];
    UNROLL for (uint i = 0; i < N; i++) {
        const uint word = next;
        next = aligned[i + 1];
        words[i] = word_between(word, next, at % 4 * 8);
    }
}

// Four pairs of words from byte `at` of a row on, a multiple of 8.
METAL_FUNC void pairs_at(threadgroup const uchar* row, uint at, thread uint2 (&pairs)[4]) {
    if (at % 16 == 0) {  // wide loads meet fewer banks at a time
        threadgroup const uint4* from = (threadgroup const uint4*)(row + at);
        UNROLL for (uint i = 0; i < 2; i++) {
            const uint4 both = from[i];
            pairs[2 * i] = uint2(both.x, both.y);
            pairs[2 * i + 1] = uint2(both.z, both.w);
        }
    } else {
        UNROLL for (uint i = 0; i < 4; i++) pairs[i] = ((threadgroup const uint2*)(row + at))[i];
    }
}

METAL_FUNC float half_in(uint bits) { return float(as_type<half>(ushort(bits))); }

// The types that have shares. BYTES: of a strip of a row. HAS_OFFSET: weights are more than a scale times a quant.
// MIXED: on an H200 experts are mixed in less time by tiles; their rows take long to decode.
template <class B>
struct LaneShare {
    static constant constexpr bool KNOWN = false, MIXED = false;
};

template <uint BYTES_, uint GROUPS_>
struct LaneShareOf {
    static constant constexpr bool KNOWN = true, HAS_OFFSET = true, MIXED = false;
    static constant constexpr uint BYTES = BYTES_, GROUPS = GROUPS_;
    static constant constexpr float UNIT = SUBNORMAL;
    static METAL_FUNC uint first(uint t) { return 8 * t; }
    static METAL_FUNC uint run(uint r) { return r; }
    static METAL_FUNC uint group(uint r) { return r / 4; }
};

template <>
struct LaneShare<Q4_K> : LaneShareOf<144, 2> {
    static METAL_FUNC void load(threadgroup const uchar* row, uint at, uint t, uint, thread RowShare<2>& share) {
        threadgroup const uint2* block = (threadgroup const uint2*)(row + at);
        float2 scale, offset;
        KScales::decode(block[0], block[1], t, scale, offset);
        UNROLL for (uint h = 0; h < 2; h++) share.scale[h] = h == 0 ? scale.x : scale.y / 16;
        UNROLL for (uint h = 0; h < 2; h++) share.offset[h] = offset[h];
        uint2 qs[4];
        pairs_at(row, at + 16 + 32 * t, qs);
        UNROLL for (uint u = 0; u < 4; u++) {
            const uint2 q = qs[u];
            share.runs[u] = run_of_bytes(q.x & 0x0F0F0F0F, q.y & 0x0F0F0F0F);
            share.runs[4 + u] = run_of_bytes(q.x & 0xF0F0F0F0, q.y & 0xF0F0F0F0);  // 16 times too large
        }
    }
};

template <>
struct LaneShare<Q5_K> : LaneShareOf<176, 2> {
    static METAL_FUNC uint low(uint q, uint high) { return (q & 0x0F0F0F0F) | (high << 4 & 0x10101010); }
    static METAL_FUNC uint upper(uint q, uint high) { return (q >> 4 & 0x0F0F0F0F) | (high << 3 & 0x10101010); }

    static METAL_FUNC void load(threadgroup const uchar* row, uint at, uint t, uint, thread RowShare<2>& share) {
        threadgroup const uint2* block = (threadgroup const uint2*)(row + at);
        float2 scale, offset;
        KScales::decode(block[0], block[1], t, scale, offset);
        UNROLL for (uint h = 0; h < 2; h++) share.scale[h] = scale[h];
        UNROLL for (uint h = 0; h < 2; h++) share.offset[h] = offset[h];
        uint2 qs[4], highs[4];
        pairs_at(row, at + 48 + 32 * t, qs);
        pairs_at(row, at + 16, highs);
        UNROLL for (uint u = 0; u < 4; u++) {
            const uint2 q = qs[u], high = highs[u] >> uint2(2 * t);
            share.runs[u] = run_of_bytes(low(q.x, high.x), low(q.y, high.y));
            share.runs[4 + u] = run_of_bytes(upper(q.x, high.x), upper(q.y, high.y));
        }
    }
};

template <>
struct LaneShare<Q6_K> : LaneShareOf<210, 4> {
    static METAL_FUNC uint first(uint t) { return 16 * (t / 2) + 4 * (t % 2); }
    static METAL_FUNC uint run(uint r) { return r / 4 * 8 + r % 4; }
    static METAL_FUNC uint group(uint r) { return r / 2; }
    static METAL_FUNC uint low(uint q, uint high) { return (q & 0x0F0F0F0F) | (high << 4 & 0x30303030); }
    static METAL_FUNC uint upper(uint q, uint high) { return (q >> 4 & 0x0F0F0F0F) | (high & 0x30303030); }

    static METAL_FUNC void load(threadgroup const uchar* row, uint at, uint t, uint, thread RowShare<4>& share) {
        uint ql[8], qh[8], scales[2], d[1];
        words_at(row, at + 32 * t, ql);
        words_at(row, at + 128 + t / 2 * 32, qh);
        words_at(row, at + 192 + t / 2 * 8, scales);
        words_at(row, at + 206, d);
        UNROLL for (uint j = 0; j < 4; j++) {
            const uint byte = scales[j / 2] >> (t % 2 * 16 + j % 2 * 8);
            share.scale[j] = half_in(d[0] >> 16) * float(int(byte << 24) >> 24);
            share.offset[j] = -32.0f * share.scale[j];
        }
        UNROLL for (uint u = 0; u < 4; u++) {
            const uint a = ql[2 * u], b = ql[2 * u + 1];
            const uint a_high = qh[2 * u] >> (t % 2 * 2), b_high = qh[2 * u + 1] >> (t % 2 * 2);
            share.runs[u] = run_of_bytes(low(a, a_high), low(b, b_high));
            share.runs[4 + u] = run_of_bytes(upper(a, a_high), upper(b, b_high));
        }
    }
};

// Two blocks, of which `n` are there. Sign, exponent and fraction of FP4 are those of a half that is 2^-14 of the
// number.
template <>
struct LaneShare<MXFP4> : LaneShareOf<136, 2> {
    static constant constexpr bool HAS_OFFSET = false, MIXED = true;
    static constant constexpr float UNIT = 16384.0f;
    static METAL_FUNC uint low(uint q) { return (q << 1 & 0x0E0E0E0E) | (q << 4 & 0x80808080); }
    static METAL_FUNC uint upper(uint q) { return (q >> 3 & 0x0E0E0E0E) | (q & 0x80808080); }
    static METAL_FUNC float power(uint e) { return as_type<float>(e == 0 ? 0x00400000u : e << 23); }  // 2^(e - 127)

    static METAL_FUNC void load(threadgroup const uchar* row, uint at, uint t, uint n, thread RowShare<2>& share) {
        uint words[9];
        words_at(row, at + 34 * t, words);
        UNROLL for (uint b = 0; b < 2; b++) {
            share.scale[b] = b < n ? power((b == 0 ? words[0] : words[4] >> 8) & 0xFF) : 0.0f;
            share.offset[b] = 0.0f;
            UNROLL for (uint i = 0; i < 2; i++) {
                const uint w = 4 * b + 2 * i, shift = b == 0 ? 8 : 16;
                const uint x = word_between(words[w], words[w + 1], shift);
                const uint y = word_between(words[w + 1], words[w + 2], shift);
                share.runs[4 * b + i] = run_of_upper_bytes(low(x), low(y));
                share.runs[4 * b + 2 + i] = run_of_upper_bytes(upper(x), upper(y));
            }
        }
    }
};
