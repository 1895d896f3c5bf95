// A part: a lane's share of a block, in the one form that every quantised type decodes to.
//
// A part is 16 weights, in two runs of eight consecutive weights that lie SPAN apart. Formats pair the low and the high
// bits of their bytes in this way. Part i of a block holds the weights from run_start(i, 0) and from run_start(i, 1)
// on. A weight is scale * quant + offset with an unsigned quant, under any name in the format.
#pragma once

#include "common.h"

struct QuantPart {
    ushort4 quants[2];  // per run: eight bytes, the even weights in the low bytes
    float2 scale;       // per run
    float2 offset;      // per run
};

METAL_FUNC ushort4 eight_bytes(device const ushort* p) { return ushort4(p[0], p[1], p[2], p[3]); }
METAL_FUNC ushort4 eight_bytes(device const uint* p) { return as_type<ushort4>(uint2(p[0], p[1])); }
METAL_FUNC ushort4 eight_bytes(device const uint2* p) { return as_type<ushort4>(*p); }

// Eight bytes of two nibbles. The high nibbles stay in place, 16 times too large, and the scale corrects for it. That
// saves a shift, and two instructions a weight decide the speed.
METAL_FUNC QuantPart nibble_part(ushort4 q, float2 scale, float2 offset) {
    return {{q & ushort4(0x0F0F), q & ushort4(0xF0F0)}, scale * float2(1.0f, 1.0f / 16), offset};
}

// Eight bytes of two nibbles, with higher bits for either run, already at bit 4 of their bytes.
METAL_FUNC QuantPart nibble_part(ushort4 q, ushort4 high0, ushort4 high1, float2 scale, float2 offset) {
    return {{(q & ushort4(0x0F0F)) | high0, ((q >> ushort4(4)) & ushort4(0x0F0F)) | high1}, scale, offset};
}

// Bit i of the byte `bits` becomes bit 4 of byte i: the fifth bits of eight quants.
METAL_FUNC ushort4 fifth_bits(ushort bits) {
    const ushort4 b = ushort4(bits & 0xFF) >> ushort4(0, 2, 4, 6);
    return ((b << ushort4(4)) | (b << ushort4(11))) & ushort4(0x1010);
}
