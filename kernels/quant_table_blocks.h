// The tensor types whose quants stand for numbers of a small table, and those of one or two bits, one struct each: see
// quant_blocks.h.
#pragma once

#include "quant_part.h"

// The numbers that nibbles stand for in IQ4_NL and IQ4_XS, -127 to 113, each larger by 128. Four to a word.
#define IQ4_WORDS(W) W(0x3F2D1801) W(0x766A5D4F) W(0xA6998D81) W(0xF1D9C5B5)

// The numbers of eight nibbles, which lie in the low bits of bytes.
#ifdef __CUDACC__
METAL_FUNC ushort4 iq4_numbers(ushort4 nibbles) {
#define IQ4_WORD(word) word,
    const uint words[] = {IQ4_WORDS(IQ4_WORD)};
    uint2 found = as_type<uint2>(nibbles);
    UNROLL for (uint i = 0; i < 2; i++) {
        const uint pairs = (found[i] | found[i] >> 4) & 0x00FF00FF, four = pairs | pairs >> 8;  // nibbles side by side
        const uint low = __byte_perm(words[0], words[1], four & 0x7777);
        const uint high = __byte_perm(words[2], words[3], four & 0x7777);
        found[i] = __byte_perm(low, high, 0x3210 | (four & 0x8888) >> 1);
    }
    return as_type<ushort4>(found);
}
#else
#define IQ4_BYTES_OF(word) word & 0xFF, word >> 8 & 0xFF, word >> 16 & 0xFF, word >> 24,
constant constexpr uchar IQ4_NUMBERS[16] = {IQ4_WORDS(IQ4_BYTES_OF)};

METAL_FUNC ushort4 iq4_numbers(ushort4 nibbles) {
    UNROLL for (uint i = 0; i < 4; i++) {
        nibbles[i] = ushort(IQ4_NUMBERS[nibbles[i] & 0xF] | IQ4_NUMBERS[nibbles[i] >> 8] << 8);
    }
    return nibbles;
}
#endif

METAL_FUNC QuantPart iq4_part(ushort4 q, float scale) {
    return {{iq4_numbers(q & ushort4(0x0F0F)), iq4_numbers((q >> ushort4(4)) & ushort4(0x0F0F))},
            float2(scale),
            float2(-128.0f * scale)};
}

struct IQ4_NL {
    half d;
    ushort qs[8];  // as Q4_0

    static constant constexpr uint BLOCK = 32, SPAN = 16;

    static METAL_FUNC QuantPart part(device const IQ4_NL* b, uint i) {
        return iq4_part(eight_bytes(b->qs + 4 * i), float(b->d));
    }
};
static_assert(sizeof(IQ4_NL) == 18, "the file's layout");

struct IQ4_XS {
    half d;
    ushort scales_h;    // bits 2 s and 2 s + 1: the high bits of scale s, of 32 weights
    uchar scales_l[4];  // nibble s: its low bits
    uint2 qs[16];       // each 16 bytes: a sub-block as Q4_0's

    static constant constexpr uint BLOCK = 256, SPAN = 16;

    static METAL_FUNC QuantPart part(device const IQ4_XS* b, uint i) {
        const uint s = i / 2;
        const uint low = uint(b->scales_l[s / 2]) >> (4 * (s % 2)) & 0xF, high = uint(b->scales_h) >> (2 * s) & 3;
        return iq4_part(eight_bytes(b->qs + i), float(b->d) * (float(low | high << 4) - 32.0f));
    }
};
static_assert(sizeof(IQ4_XS) == 136, "the file's layout");

// The numbers of eight nibbles of FP4 (E2M1), which lie in the low bits of bytes, each doubled: 0 1 2 3 4 6 8 12, and
// negative with the fourth bit. Then each larger by 12. By arithmetic on four bytes of a word at a time.
METAL_FUNC ushort4 fp4_numbers(ushort4 nibbles) {
    uint2 words = as_type<uint2>(nibbles);
    const uint2 ones = uint2(0x01010101);
    const uint2 three = words & (ones * 7), large = (three >> uint2(2)) & ones;  // large: from 4 on
    const uint2 beyond = three & (large * 3);                                    // 4: 0 to 3, which counts twice
    const uint2 last = beyond & (beyond >> uint2(1)) & ones;                     // 12 is larger by 2 than 10
    const uint2 size = three + beyond + last * 2;
    const uint2 negative = ((words >> uint2(3)) & ones) * 0xFF;
    return as_type<ushort4>(ones * 12 + size - (size & negative) * 2);
}

METAL_FUNC ushort4 eight_bytes(device const uchar* p) {
    return ushort4(p[0], p[2], p[4], p[6]) | ushort4(p[1], p[3], p[5], p[7]) << ushort4(8);
}

METAL_FUNC QuantPart fp4_part(ushort4 q, float scale) {
    return {{fp4_numbers(q & ushort4(0x0F0F)), fp4_numbers((q >> ushort4(4)) & ushort4(0x0F0F))},
            float2(scale),
            float2(-12.0f * scale)};
}

struct MXFP4 {     // of 17 bytes, and so at any address
    uchar e;       // the scale is 2^(e - 127), for numbers that are not doubled
    uchar qs[16];  // as Q4_0

    static constant constexpr uint BLOCK = 32, SPAN = 16;

    // 2^(e - 128), also where it is subnormal.
    static METAL_FUNC float scale(uint e) { return as_type<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

    static METAL_FUNC QuantPart part(device const MXFP4* b, uint i) {
        return fp4_part(eight_bytes(b->qs + 8 * i), scale(b->e));
    }
};
static_assert(sizeof(MXFP4) == 17, "the file's layout");

struct NVFP4 {
    uchar d[4];  // scales of 16 weights each, UE4M3
    uint qs[8];  // each 8 bytes: 16 weights as in Q4_0, low nibbles first

    static constant constexpr uint BLOCK = 64, SPAN = 8;

    // Half of a number with four bits of exponent and three of fraction; 0x7F is 0.
    static METAL_FUNC float scale(uint d) {
        const uint e = d >> 3 & 0xF, fraction = d & 7;
        const float normal = as_type<float>((e + 119) << 23 | fraction << 20), subnormal = float(fraction) / 1024;
        return d == 0x7F ? 0.0f : (e == 0 ? subnormal : normal);
    }

    static METAL_FUNC QuantPart part(device const NVFP4* b, uint i) {
        return fp4_part(eight_bytes(b->qs + 2 * i), scale(b->d[i]));
    }
};
static_assert(sizeof(NVFP4) == 36, "the file's layout");

// ---- one or two bits a weight

struct TQ2_0 {
    ushort qs[32];  // each half of 128 weights: bits 2 g and 2 g + 1 of byte j are weight 32 g + j, larger by 1
    half d;

    static constant constexpr uint BLOCK = 256, SPAN = 32;

    static METAL_FUNC QuantPart part(device const TQ2_0* b, uint i) {
        const ushort4 q = eight_bytes(b->qs + 16 * (i / 8) + 4 * (i % 4)) >> ushort4(ushort(i % 8 / 4 * 4));
        const float d = float(b->d);
        return {{q & ushort4(0x0303), q & ushort4(0x0C0C)}, d * float2(1.0f, 1.0f / 4), float2(-d)};
    }
};
static_assert(sizeof(TQ2_0) == 66, "the file's layout");

struct TQ1_0 {
    // A byte has five weights of base 3, each larger by 1. It is the fraction 0.abcde, rounded up, times 256: so times
    // 3^n its first digit is weight n. Bytes 0 to 31 hold weights 32 n + j, bytes 32 to 47 weights 160 + 16 n + j.
    // Bytes 48 to 51 have four, 240 + 4 n + j.
    ushort qs[26];
    half d;

    static constant constexpr uint BLOCK = 256, SPAN = 8;

    // The first digits of the bytes of q times those of power.
    static METAL_FUNC ushort4 digits(ushort4 q, ushort4 power) {
        const ushort4 low = (q & ushort4(0xFF)) * power & ushort4(0xFF),
                      high = (q >> ushort4(8)) * power & ushort4(0xFF);
        return (low * ushort4(3) >> ushort4(8)) | (high * ushort4(3) & ushort4(0xFF00));
    }
    static METAL_FUNC ushort power(uint n) { return ushort(n < 2 ? (n == 0 ? 1 : 3) : n == 2 ? 9 : n == 3 ? 27 : 81); }

    // Eight weights from 8 run on.
    static METAL_FUNC ushort4 run(device const TQ1_0* b, uint run) {
        if (run < 20) return digits(eight_bytes(b->qs + 4 * (run % 4)), ushort4(power(run / 4)));
        if (run < 30) return digits(eight_bytes(b->qs + 16 + 4 * (run % 2)), ushort4(power(run / 2 - 10)));
        const ushort4 q = ushort4(b->qs[24], b->qs[25], b->qs[24], b->qs[25]);
        const uint n = 2 * run - 60;
        return digits(q, ushort4(power(n), power(n), power(n + 1), power(n + 1)));
    }

    static METAL_FUNC QuantPart part(device const TQ1_0* b, uint i) {
        const float d = float(b->d);
        return {{run(b, 2 * i), run(b, 2 * i + 1)}, float2(d), float2(-d)};
    }
};
static_assert(sizeof(TQ1_0) == 54, "the file's layout");

struct Q2_0 {
    half d;
    ushort qs[8];  // eight consecutive weights each, from the low bits on, larger by 1

    static constant constexpr uint BLOCK = 64, SPAN = 8;

    static METAL_FUNC ushort4 quants(ushort eight) {
        const ushort4 pairs = ushort4(eight) >> ushort4(0, 4, 8, 12);
        return (pairs & ushort4(3)) | ((pairs << ushort4(6)) & ushort4(0x0300));
    }

    static METAL_FUNC QuantPart part(device const Q2_0* b, uint i) {
        const float d = float(b->d);
        return {{quants(b->qs[2 * i]), quants(b->qs[2 * i + 1])}, float2(d), float2(-d)};
    }
};
static_assert(sizeof(Q2_0) == 18, "the file's layout");

struct Q1_0 {
    half d;
    ushort qs[8];  // bit i: weight i is d, else -d

    static constant constexpr uint BLOCK = 128, SPAN = 8;

    static METAL_FUNC ushort4 quants(ushort eight) {
        const ushort4 pairs = ushort4(eight) >> ushort4(0, 2, 4, 6);
        return (pairs & ushort4(1)) | ((pairs << ushort4(7)) & ushort4(0x0100));
    }

    static METAL_FUNC QuantPart part(device const Q1_0* b, uint i) {
        const float d = float(b->d);
        return {{quants(b->qs[i] & 0xFF), quants(b->qs[i] >> 8)}, float2(2.0f * d), float2(-d)};
    }
};
static_assert(sizeof(Q1_0) == 18, "the file's layout");
