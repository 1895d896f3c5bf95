// The tensor types with a grid, one struct each, as quant_blocks.h has the others. A block has indices of points, and a
// point is the magnitudes of 4 or 8 consecutive weights (quant_grids.h). Runs of a part lie side by side: 16 weights.
//
// A byte of a point is ready to be a quant: 64 + the magnitude, or for IQ3_S, whose magnitudes are odd, 8 + half of it.
// A negative weight is the mirror image of the byte. All bytes of a run change sign at a time, in four instructions,
// and unpacking the values would cost more than the cache of smaller tables saves. The points of the IQ1 types are the
// exception: as bytes they take 16 KB, as much as some GPUs cache at all. They have two bits a value, 4 KB.
#pragma once

#include "quant_part.h"
#include "quant_grids.h"

// The bits of a byte become the lowest bits of eight bytes.
METAL_FUNC uint2 bits_of_eight(uint bits) {
    return uint2((bits & 0xF) * 0x00204081, (bits >> 4 & 0xF) * 0x00204081) & uint2(0x01010101);
}

// The quants of a point of 64 + magnitude: 64 - magnitude where a bit of `signs` is set.
METAL_FUNC ushort4 mirrored(uint2 point, uint signs) {
    const uint2 minus = bits_of_eight(signs);
    return as_type<ushort4>((point ^ ((minus << uint2(7)) - minus)) + minus);  // no byte carries
}

// Seven signs have an eighth, which makes the number of minus signs even.
METAL_FUNC uint eight_signs(uint seven) { return seven | (popcount(seven) & 1) << 7; }

METAL_FUNC uint byte_of(ushort two, uint i) { return i == 0 ? two & 0xFF : two >> 8; }
METAL_FUNC uint word_of(device const ushort* p) { return p[0] | uint(p[1]) << 16; }
METAL_FUNC float2 mirror_offset(float2 scale) { return -64.0f * scale; }

struct IQ3_XXS {
    half d;
    ushort qs[32];     // 64 indices
    ushort words[16];  // 8 words, one for 32 weights: four times seven signs, and the scale in the top nibble

    static constant constexpr uint BLOCK = 256, SPAN = 8;

    static METAL_FUNC QuantPart part(device const IQ3_XXS* b, uint i) {
        const uint word = word_of(b->words + i / 2 * 2), signs = word >> (i % 2 * 14);
        const ushort first = b->qs[2 * i], second = b->qs[2 * i + 1];
        const uint2 a = uint2(IQ3_XXS_GRID[byte_of(first, 0)], IQ3_XXS_GRID[byte_of(first, 1)]);
        const uint2 c = uint2(IQ3_XXS_GRID[byte_of(second, 0)], IQ3_XXS_GRID[byte_of(second, 1)]);
        const float2 scale = float2(float(b->d) * (0.25f + 0.5f * float(word >> 28)));
        return {{mirrored(a, eight_signs(signs & 127)), mirrored(c, eight_signs(signs >> 7 & 127))},
                scale,
                mirror_offset(scale)};
    }
};
static_assert(sizeof(IQ3_XXS) == 98, "the file's layout");

struct IQ3_S {
    half d;
    ushort qs[32];     // the low bytes of 64 indices
    uchar qh[8];       // bit j of byte g: the ninth bit of index 8 g + j
    ushort signs[16];  // a bit for each weight
    uchar scales[4];   // nibbles, one for 32 weights

    static constant constexpr uint BLOCK = 256, SPAN = 8;

    // 8 + half of the magnitude, or 7 - half of it: 7.5 +- magnitude / 2.
    static METAL_FUNC ushort4 quants(ushort low, uint high, uint signs) {
        const uint2 point =
            uint2(IQ3_S_GRID[byte_of(low, 0) | (high << 8 & 0x100)], IQ3_S_GRID[byte_of(low, 1) | (high << 7 & 0x100)]);
        const uint2 minus = bits_of_eight(signs);
        return as_type<ushort4>(point ^ ((minus << uint2(4)) - minus));
    }

    static METAL_FUNC QuantPart part(device const IQ3_S* b, uint i) {
        const uint high = b->qh[i / 2] >> (i % 2 * 4), nibble = b->scales[i / 4] >> (i / 2 % 2 * 4) & 0xF;
        const ushort signs = b->signs[i];
        const float scale = float(b->d) * float(4 * nibble + 2);
        return {{quants(b->qs[2 * i], high, byte_of(signs, 0)), quants(b->qs[2 * i + 1], high >> 2, byte_of(signs, 1))},
                float2(scale),
                float2(-7.5f * scale)};
    }
};
static_assert(sizeof(IQ3_S) == 110, "the file's layout");

struct IQ2_XXS {
    half d;
    ushort groups[32];  // of 32 weights, four: four indices, then a word as in IQ3_XXS

    static constant constexpr uint BLOCK = 256, SPAN = 8;

    static METAL_FUNC QuantPart part(device const IQ2_XXS* b, uint i) {
        device const ushort* group = b->groups + i / 2 * 4;
        const uint word = word_of(group + 2), signs = word >> (i % 2 * 14);
        const ushort both = group[i % 2];
        const float2 scale = float2(float(b->d) * (0.125f + 0.25f * float(word >> 28)));
        return {{mirrored(as_type<uint2>(IQ2_XXS_GRID[byte_of(both, 0)]), eight_signs(signs & 127)),
                 mirrored(as_type<uint2>(IQ2_XXS_GRID[byte_of(both, 1)]), eight_signs(signs >> 7 & 127))},
                scale,
                mirror_offset(scale)};
    }
};
static_assert(sizeof(IQ2_XXS) == 66, "the file's layout");

struct IQ2_XS {
    half d;
    ushort qs[32];    // nine bits of an index, and seven signs
    uchar scales[8];  // nibbles, one for 16 weights

    static constant constexpr uint BLOCK = 256, SPAN = 8;

    static METAL_FUNC ushort4 quants(uint q) {
        return mirrored(as_type<uint2>(IQ2_XS_GRID[q & 511]), eight_signs(q >> 9));
    }

    static METAL_FUNC QuantPart part(device const IQ2_XS* b, uint i) {
        const uint nibble = b->scales[i / 2] >> (i % 2 * 4) & 0xF;
        const float2 scale = float2(float(b->d) * (0.125f + 0.25f * float(nibble)));
        return {{quants(b->qs[2 * i]), quants(b->qs[2 * i + 1])}, scale, mirror_offset(scale)};
    }
};
static_assert(sizeof(IQ2_XS) == 74, "the file's layout");

struct IQ2_S {
    half d;
    ushort qs[16];     // the low bytes of 32 indices
    ushort signs[16];  // a bit for each weight
    uchar qh[8];       // bits 2 j and 2 j + 1 of byte g: the high bits of index 4 g + j
    uchar scales[8];   // as IQ2_XS

    static constant constexpr uint BLOCK = 256, SPAN = 8;

    static METAL_FUNC QuantPart part(device const IQ2_S* b, uint i) {
        const ushort low = b->qs[i], signs = b->signs[i];
        const uint high = b->qh[i / 2] >> (i % 2 * 4), nibble = b->scales[i / 2] >> (i % 2 * 4) & 0xF;
        const uint2 first = as_type<uint2>(IQ2_S_GRID[byte_of(low, 0) | (high << 8 & 0x300)]);
        const uint2 second = as_type<uint2>(IQ2_S_GRID[byte_of(low, 1) | (high << 6 & 0x300)]);
        const float2 scale = float2(float(b->d) * (0.125f + 0.25f * float(nibble)));
        return {{mirrored(first, byte_of(signs, 0)), mirrored(second, byte_of(signs, 1))}, scale, mirror_offset(scale)};
    }
};
static_assert(sizeof(IQ2_S) == 82, "the file's layout");

// The points of the IQ1 types, as quants 0, 1 and 2. A word has in nibble i weights j and 4 + j, where j is 0, 2, 1, 3.
METAL_FUNC ushort4 iq1_quants(uint index) {
    const uint word = IQ1_GRID[index], nibbles = (word | word << 12) & 0x0F0F0F0F;
    return as_type<ushort4>(uint2(nibbles, nibbles >> 2) & uint2(0x03030303));
}

// The offset of weights scale * (quant - 1 +- 1/8).
METAL_FUNC float iq1_offset(float scale, bool minus) { return scale * (minus ? -1.125f : -0.875f); }

struct IQ1_S {
    half d;
    ushort qs[16];  // the low bytes of 32 indices
    ushort qh[8];   // for 32 weights: three high bits of four indices, three bits of a scale, and minus

    static constant constexpr uint BLOCK = 256, SPAN = 8;

    static METAL_FUNC QuantPart part(device const IQ1_S* b, uint i) {
        const ushort low = b->qs[i];
        const uint qh = b->qh[i / 2], high = qh >> (i % 2 * 6);
        const float scale = float(b->d) * float((qh >> 11 & 14) + 1);
        return {{iq1_quants(byte_of(low, 0) | (high << 8 & 0x700)), iq1_quants(byte_of(low, 1) | (high << 5 & 0x700))},
                float2(scale),
                float2(iq1_offset(scale, qh >> 15 != 0))};
    }
};
static_assert(sizeof(IQ1_S) == 50, "the file's layout");

struct IQ1_M {
    ushort qs[16];  // the low bytes of 32 indices
    uchar qh[16];   // nibbles, one for an index: three high bits, and minus
    uint2 scales;   // four times four scales of three bits, for 16 weights each, and a nibble of the half d

    static constant constexpr uint BLOCK = 256, SPAN = 8;

    static METAL_FUNC QuantPart part(device const IQ1_M* b, uint i) {
        const ushort low = b->qs[i];
        const uint high = b->qh[i];
        const uint2 words = b->scales;
        const uint4 top = uint4(words.x >> 12, words.x >> 24, words.y >> 4, words.y >> 16);
        const uint bits = (top.x & 0xF) | (top.y & 0xF0) | (top.z & 0xF00) | (top.w & 0xF000);
        const uint three = (i < 8 ? words.x : words.y) >> (i / 4 % 2 * 16 + i % 4 * 3) & 7;
        const float scale = float(as_type<half>(ushort(bits))) * float(2 * three + 1);
        return {{iq1_quants(byte_of(low, 0) | (high << 8 & 0x700)), iq1_quants(byte_of(low, 1) | (high << 4 & 0x700))},
                float2(scale),
                float2(iq1_offset(scale, (high & 8) != 0), iq1_offset(scale, (high & 128) != 0))};
    }
};
static_assert(sizeof(IQ1_M) == 56, "the file's layout");
