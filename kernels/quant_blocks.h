// The tensor types, one struct each. A struct has the block in memory (ggml's layouts; quants.py is the oracle) and the
// way that a lane reads its share, a part (see quant_part.h).
//
// Alignment: a tensor starts at a multiple of 8 bytes (GGUF's general.alignment is one), and block sizes do the rest.
#pragma once

#include "quant_part.h"

struct Q4_0 {
    half d;
    ushort qs[8];  // byte i: weight i in the low nibble, weight 16 + i in the high nibble

    static constant constexpr uint BLOCK = 32, SPAN = 16;

    static METAL_FUNC QuantPart part(device const Q4_0* b, uint i) {
        const float d = float(b->d);
        return nibble_part(eight_bytes(b->qs + 4 * i), float2(d), float2(-8.0f * d));
    }
};
static_assert(sizeof(Q4_0) == 18, "the file's layout");

struct Q4_1 {
    half d, m;
    uint qs[4];  // as Q4_0

    static constant constexpr uint BLOCK = 32, SPAN = 16;

    static METAL_FUNC QuantPart part(device const Q4_1* b, uint i) {
        return nibble_part(eight_bytes(b->qs + 2 * i), float2(float(b->d)), float2(float(b->m)));
    }
};
static_assert(sizeof(Q4_1) == 20, "the file's layout");

struct Q5_0 {
    half d;
    ushort qh[2];  // bit i of the 32: the fifth bit of weight i
    ushort qs[8];  // as Q4_0

    static constant constexpr uint BLOCK = 32, SPAN = 16;

    static METAL_FUNC QuantPart part(device const Q5_0* b, uint i) {
        const float d = float(b->d);
        return nibble_part(eight_bytes(b->qs + 4 * i), fifth_bits(b->qh[0] >> (8 * i)), fifth_bits(b->qh[1] >> (8 * i)),
                           float2(d), float2(-16.0f * d));
    }
};
static_assert(sizeof(Q5_0) == 22, "the file's layout");

struct Q5_1 {
    half d, m;
    ushort qh[2];  // as Q5_0
    uint2 qs[2];   // as Q4_0

    static constant constexpr uint BLOCK = 32, SPAN = 16;

    static METAL_FUNC QuantPart part(device const Q5_1* b, uint i) {
        return nibble_part(eight_bytes(b->qs + i), fifth_bits(b->qh[0] >> (8 * i)), fifth_bits(b->qh[1] >> (8 * i)),
                           float2(float(b->d)), float2(float(b->m)));
    }
};
static_assert(sizeof(Q5_1) == 24, "the file's layout");

struct Q8_0 {
    half d;
    ushort qs[16];  // 32 signed bytes

    static constant constexpr uint BLOCK = 32, SPAN = 16;

    static METAL_FUNC QuantPart part(device const Q8_0* b, uint i) {
        const float d = float(b->d);
        const ushort4 signs = ushort4(0x8080);  // flipping the sign bit adds 128
        return {{eight_bytes(b->qs + 4 * i) ^ signs, eight_bytes(b->qs + 8 + 4 * i) ^ signs},
                float2(d),
                float2(-128.0f * d)};
    }
};
static_assert(sizeof(Q8_0) == 34, "the file's layout");

// The 6-bit scales and minima of Q4_K and Q5_K: two sub-blocks of 32 weights at a time, one for each run of a part.
struct KScales {
    // Two halves: d and dmin. Then bytes 0-3: scales 0-3, 4-7: minima 0-3, 8-11: nibbles of scales and minima 4-7.
    // Their top two bits are the top two bits of bytes 0-7.
    uint2 words[2];

    // Scales and minima of sub-blocks 2 * pair and 2 * pair + 1, all four as bytes of one word. Lanes of a simdgroup
    // differ in pair: no branch.
    static METAL_FUNC void read(device const KScales* s, uint pair, thread float2& scale, thread float2& offset) {
        decode(s->words[0], s->words[1], pair, scale, offset);
    }
    static METAL_FUNC uint bytes(uint2 start, uint2 end, uint pair) {
        const uint shift = pair % 2 * 16;
        const uint first = (start.y >> shift & 0xFFFF) | end.x >> shift << 16, nibbles = end.y >> shift & 0xFFFF;
        const uint lower = first & 0x3F3F3F3F;
        const uint upper = ((nibbles | nibbles << 12) & 0x0F0F0F0F) | (first >> 2 & 0x30303030);
        return pair < 2 ? lower : upper;
    }
    static METAL_FUNC void decode(uint2 start, uint2 end, uint pair, thread float2& scale, thread float2& offset) {
        const float4 v = float4(as_type<uchar4>(bytes(start, end, pair)));
        const half2 d = as_type<half2>(start.x);
        scale = float(d.x) * v.xy;
        offset = -float(d.y) * v.zw;
    }
};
static_assert(sizeof(KScales) == 16, "the file's layout");

struct Q4_K {
    KScales scales;
    uint2 qs[16];  // 32 bytes hold two sub-blocks: one in the low nibbles, the next in the high nibbles

    static constant constexpr uint BLOCK = 256, SPAN = 32;

    static METAL_FUNC QuantPart part(device const Q4_K* b, uint i) {
        float2 scale, offset;
        KScales::read(&b->scales, i / 4, scale, offset);
        return nibble_part(eight_bytes(b->qs + i), scale, offset);
    }
};
static_assert(sizeof(Q4_K) == 144, "the file's layout");

struct Q5_K {
    KScales scales;
    uint2 qh[4];   // bit s of byte i: the fifth bit of weight i of sub-block s
    uint2 qs[16];  // as Q4_K

    static constant constexpr uint BLOCK = 256, SPAN = 32;

    static METAL_FUNC QuantPart part(device const Q5_K* b, uint i) {
        float2 scale, offset;
        KScales::read(&b->scales, i / 4, scale, offset);
        const ushort4 high = eight_bytes(b->qh + i % 4) >> ushort4(ushort(2 * (i / 4)));
        const ushort4 high0 = (high << ushort4(4)) & ushort4(0x1010), high1 = (high << ushort4(3)) & ushort4(0x1010);
        return nibble_part(eight_bytes(b->qs + i), high0, high1, scale, offset);
    }
};
static_assert(sizeof(Q5_K) == 176, "the file's layout");

struct Q6_K {
    ushort ql[64];      // each half of 128 weights: byte j holds the low nibbles of weights j and 64 + j
    ushort qh[32];      // each half: bits 2p and 2p + 1 of byte j are the high bits of weight 32 p + j
    int8_t scales[16];  // one per 16 weights
    half d;

    static constant constexpr uint BLOCK = 256, SPAN = 64;

    static METAL_FUNC QuantPart part(device const Q6_K* b, uint i) {
        const uint first = i / 8 * 8 + i % 8 / 2;  // the scale of the first run; the second is 64 weights on
        const float2 scale = float(b->d) * float2(float(b->scales[first]), float(b->scales[first + 4]));
        const ushort4 high = eight_bytes(b->qh + 16 * (i / 8) + 4 * (i % 4));
        const ushort shift = ushort(i % 8 / 4 * 2);  // the first run's bits are at shift, the second's at shift + 4
        const ushort4 high0 = (high << ushort4(ushort(4 - shift))) & ushort4(0x3030);
        const ushort4 high1 = (high >> ushort4(shift)) & ushort4(0x3030);
        return nibble_part(eight_bytes(b->ql + 4 * i), high0, high1, scale, -32.0f * scale);
    }
};
static_assert(sizeof(Q6_K) == 210, "the file's layout");

// Float types have no blocks; 32 weights make one here. quad(b, i): weights 4 i to 4 i + 3. element(row, i): for rows
// that are not whole blocks, and so have only the alignment of an element.
struct F32 {
    float2 w[16];

    static METAL_FUNC float4 quad(device const F32* b, uint i) { return float4(b->w[2 * i], b->w[2 * i + 1]); }
    static METAL_FUNC float element(device const uchar* row, uint i) { return ((device const float*)row)[i]; }
};

struct F16 {
    half4 w[8];

    static METAL_FUNC float4 quad(device const F16* b, uint i) { return float4(b->w[i]); }
    static METAL_FUNC float element(device const uchar* row, uint i) { return float(((device const half*)row)[i]); }
};

struct BF16 {
    ushort4 w[8];  // the upper halves of floats

    static METAL_FUNC float4 quad(device const BF16* b, uint i) { return as_type<float4>(uint4(b->w[i]) << uint4(16)); }
    static METAL_FUNC float element(device const uchar* row, uint i) {
        return as_type<float>(uint(((device const ushort*)row)[i]) << 16);
    }
};
