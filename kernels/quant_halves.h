// Weights as halves, for products of halves: see mul_mm_tile.h. Halves<Q> loads a part of a row as it is, and decodes
// it later: other work takes the time of the load.
#pragma once

#include "quant_dot.h"

// Weights in half precision are this much too large: a half has its full precision from 2^-14 on.
constant constexpr uint WEIGHT_SCALE = 256;

// Two bytes of a word of four, the lower or the upper two, as halves, less ZERO.
template <uint ZERO = 0>
METAL_FUNC half2 two_bytes(uint four, bool upper) {
    // A byte below the exponent of 1024 is a half that is larger by 1024.
    const half minus = half(-1024.0f - float(ZERO));
    return fma(as_type<half2>(spread_bytes(four, upper, 0x64)), half2(half(1.0f)), half2(minus));
}

// w[2 h] and w[2 h + 1] are run h: scale * (quant - ZERO) + offset. quants: eight bytes of each run. scale and offset:
// a run each, times WEIGHT_SCALE.
template <uint ZERO = 0>
METAL_FUNC void decode_halves(thread const uint2 (&quants)[2], half2 scale, half2 offset, thread half4* w) {
    UNROLL for (uint h = 0; h < 2; h++) {
        const half2 scales = half2(scale[h]), offsets = half2(offset[h]);
        UNROLL for (uint i = 0; i < 2; i++) {
            w[2 * h + i] = half4(fma(two_bytes<ZERO>(quants[h][i], false), scales, offsets),
                                 fma(two_bytes<ZERO>(quants[h][i], true), scales, offsets));
        }
    }
}

template <class Q>
struct Halves;

template <class B>
struct HalvesOfBlock {
    typedef QuantPart Loaded;
    static METAL_FUNC Loaded load(device const B* b, uint i) { return B::part(b, i); }
    static METAL_FUNC void decode(thread const Loaded& p, thread half4* w) {
        const uint2 quants[2] = {as_type<uint2>(p.quants[0]), as_type<uint2>(p.quants[1])};
        const float scaling = WEIGHT_SCALE;
        decode_halves(quants, half2(scaling * p.scale), half2(scaling * p.offset), w);
    }
};

// Scales and offsets of a pair of sub-blocks, for quants less ZERO, times WEIGHT_SCALE. Half of the quants are below
// ZERO, so that offsets are small, and so is what rounding changes. low: what the rounding of the minima took.
template <uint ZERO>
METAL_FUNC void k_scales(uint2 start, uint2 end, uint pair, thread half2& scale, thread half2& offset) {
    const uint bytes = KScales::bytes(start, end, pair);
    const half2 none = half2(half(0.0f)), scaling = half2(half(float(WEIGHT_SCALE)), half(-float(WEIGHT_SCALE)));
    const half2 d = fma(as_type<half2>(start.x), scaling, none), dx = half2(d.x), dy = half2(d.y);
    const half2 scales = two_bytes(bytes, false), minima = two_bytes(bytes, true);
    const half2 high = fma(minima, dy, none), low = fma(minima, dy, -high);
    scale = fma(scales, dx, none);
    const half2 sum = fma(fma(scales, half2(half(float(ZERO))), none), dx, high);
    offset = fma(low, half2(half(1.0f)), sum);
}

template <>
struct HalvesOfBlock<Q4_K> {
    struct Loaded {
        uint2 start, end, q;
        uint pair;
    };
    static METAL_FUNC Loaded load(device const Q4_K* b, uint i) {
        return {b->scales.words[0], b->scales.words[1], b->qs[i], i / 4};
    }
    static METAL_FUNC void decode(thread const Loaded& p, thread half4* w) {
        half2 scale, offset;
        k_scales<8>(p.start, p.end, p.pair, scale, offset);
        const uint2 quants[2] = {p.q & uint2(0x0F0F0F0F), (p.q >> uint2(4)) & uint2(0x0F0F0F0F)};
        decode_halves<8>(quants, scale, offset, w);
    }
};

template <>
struct HalvesOfBlock<Q5_K> {
    struct Loaded {
        uint2 start, end, q, high;
        uint pair;
    };
    static METAL_FUNC Loaded load(device const Q5_K* b, uint i) {
        return {b->scales.words[0], b->scales.words[1], b->qs[i], b->qh[i % 4], i / 4};
    }
    static METAL_FUNC void decode(thread const Loaded& p, thread half4* w) {
        half2 scale, offset;
        k_scales<16>(p.start, p.end, p.pair, scale, offset);
        const uint2 high = p.high >> uint2(2 * p.pair);
        const uint2 quants[2] = {(p.q & uint2(0x0F0F0F0F)) | ((high << uint2(4)) & uint2(0x10101010)),
                                 ((p.q >> uint2(4)) & uint2(0x0F0F0F0F)) | ((high << uint2(3)) & uint2(0x10101010))};
        decode_halves<16>(quants, scale, offset, w);
    }
};

template <>
struct HalvesOfBlock<Q8_0> {
    struct Loaded {
        half d;
        ushort4 q[2];
    };
    static METAL_FUNC Loaded load(device const Q8_0* b, uint i) {
        return {b->d, {eight_bytes(b->qs + 4 * i), eight_bytes(b->qs + 8 + 4 * i)}};
    }
    static METAL_FUNC void decode(thread const Loaded& p, thread half4* w) {
        const uint2 signs = uint2(0x80808080);  // flipping the sign bit adds 128
        const uint2 quants[2] = {as_type<uint2>(p.q[0]) ^ signs, as_type<uint2>(p.q[1]) ^ signs};
        const half2 scale = fma(half2(p.d), half2(half(float(WEIGHT_SCALE))), half2(half(0.0f)));
        decode_halves<128>(quants, scale, half2(half(0.0f)), w);
    }
};

template <class B>
struct Halves<Quantised<B>> {
    typedef HalvesOfBlock<B> Of;
    typedef typename Of::Loaded Loaded;
    static METAL_FUNC Loaded load(device const uchar* row, uint i, uint) {
        return Of::load((device const B*)row + i / Quantised<B>::PARTS, i % Quantised<B>::PARTS);
    }
    static METAL_FUNC void decode(thread const Loaded& p, thread half4* w) { Of::decode(p, w); }
};

template <class B>
struct Halves<Plain<B>> {
    struct Loaded {
        float4 w[4];
    };
    static METAL_FUNC Loaded load(device const uchar* row, uint i, uint k) {
        Loaded out;
        Plain<B>::weights(row, i, k, out.w);
        return out;
    }
    static METAL_FUNC void decode(thread const Loaded& p, thread half4* w) {
        const float scaling = WEIGHT_SCALE;
        UNROLL for (uint j = 0; j < 4; j++) w[j] = half4(scaling * p.w[j]);
    }
};
