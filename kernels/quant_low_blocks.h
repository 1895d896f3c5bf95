// The K types of 2 and 3 bits, one struct each, as quant_blocks.h has the others.
#pragma once

#include "quant_part.h"

// The quants of a K block of few bits lie in halves of 128 weights. Each has 32 bytes, and pair p of byte j is weight
// 32 p + j. A part has two pairs of eight bytes: the first moved to the lowest bits, the second four times too large.
METAL_FUNC ushort4 two_pairs(ushort4 bytes, uint i) { return bytes >> ushort4(ushort(i / 4 % 2 * 4)); }

struct Q2_K {
    uchar scales[16];  // one per 16 weights: the scale in the low nibble, the minimum in the high one
    uint qs[16];
    half d, dmin;

    static constant constexpr uint BLOCK = 256, SPAN = 32;

    static METAL_FUNC QuantPart part(device const Q2_K* b, uint i) {
        const uint first = i / 4 * 4 + i % 4 / 2;  // the scale of the first run; the second is 32 weights on
        const uint2 packed = uint2(b->scales[first], b->scales[first + 2]);
        const ushort4 q = two_pairs(eight_bytes(b->qs + i / 8 * 8 + i % 4 * 2), i);
        return {{q & ushort4(0x0303), q & ushort4(0x0C0C)},
                float(b->d) * float2(packed & uint2(0xF)) * float2(1.0f, 1.0f / 4),
                -float(b->dmin) * float2(packed >> uint2(4))};
    }
};
static_assert(sizeof(Q2_K) == 84, "the file's layout");

struct Q3_K {
    ushort hmask[16];  // bit s of byte j: the high bit of weight 32 s + j
    ushort qs[32];
    uchar scales[12];  // 16 scales of six bits: eight bytes of low nibbles, four of bit pairs
    half d;

    static constant constexpr uint BLOCK = 256, SPAN = 32;

    // Scale s, less 32: nibble s / 8 of byte s % 8, and pair s / 4 of byte 8 + s % 4.
    static METAL_FUNC float scale_of(device const Q3_K* b, uint s) {
        const uint low = b->scales[s % 8] >> (s / 8 * 4) & 0xF, high = b->scales[8 + s % 4] >> (s / 4 * 2) & 3;
        return float(int(low | high << 4) - 32);
    }

    static METAL_FUNC QuantPart part(device const Q3_K* b, uint i) {
        const uint first = i / 4 * 4 + i % 4 / 2;
        const ushort4 q = two_pairs(eight_bytes(b->qs + i / 8 * 16 + i % 4 * 4), i);
        const ushort4 high = eight_bytes(b->hmask + i % 4 * 4) >> ushort4(ushort(i / 4 * 2));
        const float2 scale = float(b->d) * float2(scale_of(b, first), scale_of(b, first + 2));
        return {{(q & ushort4(0x0303)) | (high << ushort4(2) & ushort4(0x0404)),
                 (q & ushort4(0x0C0C)) | (high << ushort4(3) & ushort4(0x1010))},
                scale * float2(1.0f, 1.0f / 4),
                -4.0f * scale};
    }
};
static_assert(sizeof(Q3_K) == 110, "the file's layout");
