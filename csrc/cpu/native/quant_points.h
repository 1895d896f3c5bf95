// Native structs of the types with a grid. The bytes of points, of quant_grids.h, are quants: a weight is quant * scale
// + offset, and its mirror image where a sign bit is set.
#pragma once

#include "cpu/native/quant_bytes.h"
#include "quant_grids.h"

namespace zinc {
namespace {

// A scale and an offset for N equal shares of a group.
template <int N>
struct GridScales {
    alignas(64) float scale[N];
    alignas(64) float offset[N];

    INLINE void put(int i, f32x8 scales, f32x8 offsets) {
        store(scale + i, scales);
        store(offset + i, offsets);
    }
};

// The nibbles of four bytes, the low one of each first, as bytes.
INLINE uint64_t spread_nibbles(uint32_t four) {
    uint64_t x = four;
    x = (x | x << 16) & 0x0000FFFF0000FFFF;
    x = (x | x << 8) & 0x00FF00FF00FF00FF;
    return (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
}

// The bytes of a word as four numbers of 16 bits.
INLINE uint64_t spread_bytes(uint32_t four) {
#if defined(__BMI2__)
    return _pdep_u64(four, 0x00FF00FF00FF00FF);
#else
    const uint64_t x = (four | uint64_t(four) << 16) & 0x0000FFFF0000FFFF;
    return (x | x << 8) & 0x00FF00FF00FF00FF;
#endif
}

// Four times N bits, from bit 8 on of four numbers of 16 bits.
template <int N>
INLINE uint64_t spread_high(uint64_t bits) {
    constexpr uint64_t places = 0x0001000100010001 * (((1 << N) - 1) << 8);
#if defined(__BMI2__)
    return _pdep_u64(bits, places);
#else
    return (bits << 8 | bits << (24 - N) | bits << (40 - 2 * N) | bits << (56 - 3 * N)) & places;
#endif
}

using u32x8 = uint32_t __attribute__((vector_size(32)));
using u64x4 = uint64_t __attribute__((vector_size(32)));

// The points of 32 weights: four of eight values, by four numbers of 16 bits.
INLINE Bytes points_of_eight(const u64* table, uint64_t at) {
    return (Bytes)u64x4{table[at & 0xFFFF], table[at >> 16 & 0xFFFF], table[at >> 32 & 0xFFFF], table[at >> 48]};
}

// Eight of four values, by two times four numbers.
INLINE Bytes points_of_four(const u32* table, uint64_t first, uint64_t second) {
    const auto at = [](uint64_t four, int i) { return four >> (16 * i) & 0xFFFF; };
    return (Bytes)u32x8{table[at(first, 0)],  table[at(first, 1)],  table[at(first, 2)],  table[at(first, 3)],
                        table[at(second, 0)], table[at(second, 1)], table[at(second, 2)], table[at(second, 3)]};
}

// 255 in the bytes whose bit is set.
INLINE Bytes bytes_where(uint32_t bits) {
#if defined(NATIVE_AVX512)
    return (Bytes)_mm256_movm_epi8(bits);
#elif defined(NATIVE_AVX2)
    const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i eight = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), places);
    return (Bytes)_mm256_cmpeq_epi8(_mm256_and_si256(spread, eight), eight);
#else
    uint64_t words[4];
    UNROLL for (int i = 0; i < 4; i++) {
        const uint64_t byte = bits >> (8 * i) & 0xFF;
        const uint64_t one = byte * 0x0101010101010101 & 0x8040201008040201;
        const uint64_t lower = (one & 0x7F7F7F7F7F7F7F7F) + 0x7F7F7F7F7F7F7F7F;  // sets the top bit of a byte
        words[i] = ((one | lower) >> 7 & 0x0101010101010101) * 255;
    }
    return load<Bytes>(words);
#endif
}

// 64 + magnitude, or 64 - magnitude where a bit is set.
INLINE Bytes mirrored(Bytes points, uint32_t signs) {
    const Bytes minus = bytes_where(signs);
    return (points ^ (minus & uint8_t(127))) - minus;
}

// Adds to each byte of seven signs an eighth, which makes the number of minus signs even.
INLINE u32x8 eight_signs(u32x8 seven) {
    u32x8 parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return seven | (parity & 0x01010101) << 7;
}

// The signs of eight words of four times seven.
INLINE u32x8 signs_of_words(u32x8 words) {
    const u32x8 pairs = (words & 0x3FFF) | (words & 0x0FFFC000) << 2;
    return eight_signs((pairs & 0x007F007F) | (pairs & 0x3F803F80) << 1);
}

// Eight scales d (1/2 + scale), from i on, and the offsets of weights 64 + magnitude.
template <int N>
INLINE void half_scales(float d, uint64_t scales, GridScales<N>& s, int i) {
    const f32x8 scale = (floats_of_bytes(scales) + 0.5f) * d;
    s.put(i, scale, scale * -64.0f);
}

// With the signs of each block, which are cheaper to decode eight at a time.
template <int N>
struct SignedScales : GridScales<N> {
    alignas(32) uint32_t signs[8];
};

// Words of signs and, in the top nibbles, scales.
INLINE void scales_of_words(u32x8 words, float d, SignedScales<8>& s) {
    const f32x8 scale = (convert<f32x8>((i32x8)(words >> 28)) + 0.5f) * d;
    s.put(0, scale, scale * -64.0f);
    store(s.signs, signs_of_words(words));
}

struct IQ3_XXS {
    static constexpr int GROUP_BYTES = 98;
    using Scales = SignedScales<8>;
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        scales_of_words(load<u32x8>(group + 66), half_to_float(load<uint16_t>(group)) * 0.5f, s);
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const uint64_t first = spread_bytes(load<uint32_t>(group + 2 + 8 * j));
        const uint64_t second = spread_bytes(load<uint32_t>(group + 6 + 8 * j));
        const Bytes points = points_of_four(IQ3_XXS_GRID, first, second);
        return weights_of<1>(mirrored(points, s.signs[j]), s.scale + j, s.offset + j);
    }
};

struct IQ3_S {
    static constexpr int GROUP_BYTES = 110;
    using Scales = GridScales<8>;
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const float d = half_to_float(load<uint16_t>(group));
        const f32x8 scale = (floats_of_bytes(spread_nibbles(load<uint32_t>(group + 106))) * 4.0f + 2.0f) * d;
        s.put(0, scale, scale * -7.5f);
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const uint64_t first = spread_bytes(load<uint32_t>(group + 2 + 8 * j)) | spread_high<1>(group[66 + j]);
        const uint64_t second = spread_bytes(load<uint32_t>(group + 6 + 8 * j)) | spread_high<1>(group[66 + j] >> 4);
        const Bytes points = points_of_four(IQ3_S_GRID, first, second);
        const Bytes quants = points ^ (bytes_where(load<uint32_t>(group + 74 + 4 * j)) & uint8_t(15));
        return weights_of<1>(quants, s.scale + j, s.offset + j);
    }
};

struct IQ2_XXS {
    static constexpr int GROUP_BYTES = 66;
    using Scales = SignedScales<8>;
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const u32x8 first = load<u32x8>(group + 2), second = load<u32x8>(group + 34);  // every other is indices
        scales_of_words(__builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15),
                        half_to_float(load<uint16_t>(group)) * 0.25f, s);
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const uint32_t four = load<uint32_t>(group + 2 + 8 * j);
        const Bytes points = points_of_eight(IQ2_XXS_GRID, spread_bytes(four));
        return weights_of<1>(mirrored(points, s.signs[j]), s.scale + j, s.offset + j);
    }
};

// Sixteen scales in the nibbles of eight bytes.
INLINE void sixteen_half_scales(const uint8_t* group, const uint8_t* packed, GridScales<16>& s) {
    const float d = half_to_float(load<uint16_t>(group)) * 0.25f;
    half_scales(d, spread_nibbles(load<uint32_t>(packed)), s, 0);
    half_scales(d, spread_nibbles(load<uint32_t>(packed + 4)), s, 8);
}

struct IQ2_XS {
    static constexpr int GROUP_BYTES = 74;
    using Scales = SignedScales<16>;
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        sixteen_half_scales(group, group + 66, s);
        // The upper seven bits of 32 numbers of 16.
        const Bytes first = load<Bytes>(group + 2), second = load<Bytes>(group + 34);
        const Bytes upper =
            __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35,
                                    37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
        store(s.signs, eight_signs((u32x8)upper >> 1 & 0x7F7F7F7F));
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const Bytes points = points_of_eight(IQ2_XS_GRID, load<uint64_t>(group + 2 + 8 * j) & 0x01FF01FF01FF01FF);
        return weights_of<2>(mirrored(points, s.signs[j]), s.scale + 2 * j, s.offset + 2 * j);
    }
};

struct IQ2_S {
    static constexpr int GROUP_BYTES = 82;
    using Scales = SignedScales<16>;
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        sixteen_half_scales(group, group + 74, s);
        store(s.signs, load<u32x8>(group + 34));
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const uint64_t at = spread_bytes(load<uint32_t>(group + 2 + 4 * j)) | spread_high<2>(group[66 + j]);
        const Bytes points = points_of_eight(IQ2_S_GRID, at);
        return weights_of<2>(mirrored(points, s.signs[j]), s.scale + 2 * j, s.offset + 2 * j);
    }
};

// Four points of an IQ1 type, of words as iq1_quants of the kernels takes them, by four numbers of 16 bits.
INLINE Bytes ternary_points(uint64_t at) {
    u64x4 x = {IQ1_GRID[at & 0xFFFF], IQ1_GRID[at >> 16 & 0xFFFF], IQ1_GRID[at >> 32 & 0xFFFF], IQ1_GRID[at >> 48]};
    x = (x | x << 12) & 0x0F0F0F0F;
    return (Bytes)((x | x << 30) & 0x0303030303030303);
}

struct IQ1_S {
    static constexpr int GROUP_BYTES = 50;
    using Scales = GridScales<8>;
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        using u16x8 = uint16_t __attribute__((vector_size(16)));
        const i32x8 high = convert<i32x8>(load<u16x8>(group + 34));
        const f32x8 scale = convert<f32x8>((high >> 11 & 14) + 1) * half_to_float(load<uint16_t>(group));
        s.put(0, scale, scale * (-0.875f - convert<f32x8>(high >> 15) * 0.25f));
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const uint64_t low = spread_bytes(load<uint32_t>(group + 2 + 4 * j));
        const uint64_t high = spread_high<3>(load<uint16_t>(group + 34 + 2 * j));
        return weights_of<1>(ternary_points(low | high), s.scale + j, s.offset + j);
    }
};

struct IQ1_M {
    static constexpr int GROUP_BYTES = 56;
    struct Scales {
        alignas(64) float scale[16];
        alignas(64) float offset[32];  // per point
    };
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const uint64_t words = load<uint64_t>(group + 48);
        const uint64_t bits =
            (words >> 12 & 0xF) | (words >> 24 & 0xF0) | (words >> 36 & 0xF00) | (words >> 48 & 0xF000);
        const float d = half_to_float(uint16_t(bits));
        const i32x8 places = {0, 3, 6, 9, 16, 19, 22, 25};
        for (int i = 0; i < 2; i++) {
            const i32x8 three = (int32_t(words >> (32 * i)) - i32x8{}) >> places & 7;
            store(s.scale + 8 * i, convert<f32x8>(2 * three + 1) * d);
        }
        for (int i = 0; i < 4; i++) {
            const uint64_t minus = spread_nibbles(load<uint32_t>(group + 32 + 4 * i)) >> 3 & 0x0101010101010101;
            const f32x4 four = load<f32x4>(s.scale + 4 * i);
            const f32x8 scale = __builtin_shufflevector(four, four, 0, 0, 1, 1, 2, 2, 3, 3);
            store(s.offset + 8 * i, scale * (floats_of_bytes(minus) * -0.25f - 0.875f));
        }
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const uint64_t low = spread_bytes(load<uint32_t>(group + 4 * j));
        const uint64_t high = spread_high<4>(load<uint16_t>(group + 32 + 2 * j)) & 0x0700070007000700;
        const Bytes points = ternary_points(low | high);
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) {
            const int at = i * W;
            w.lanes[i] = convert<vf>(widen(points, i)) * s.scale[2 * j + at / 16] + offsets(s.offset + 4 * j + at / 8);
        }
        return w;
    }

  private:
    // The offsets of W weights.
    static INLINE vf offsets(const float* of_points) {
        if constexpr (W <= 8) return splat(of_points[0]);
        vf offset;
        UNROLL for (int i = 0; i < W; i++) offset[i] = of_points[i / 8];
        return offset;
    }
};

}  // namespace
}  // namespace zinc
