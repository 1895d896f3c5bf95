// Native structs of the types whose quants stand for numbers of a small table, and of those of one or two bits.
#pragma once

#include <array>

#include "cpu/native/quant_weights.h"

namespace zinc {
namespace {

// Sixteen numbers, by nibble.
using Table = int8_t[16];
alignas(16) constexpr Table IQ4 = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The bytes of a word as integers. (GCC splits __builtin_convertvector here, lane by lane.)
INLINE i32x8 ints_of_bytes(uint64_t eight) {
#if defined(NATIVE_AVX512) || defined(NATIVE_AVX2)
    return (i32x8)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(eight)));
#else
    return convert<i32x8>(floats_of_bytes(eight));
#endif
}

using Bytes16 = uint8_t __attribute__((vector_size(16)));

// A block of 32 weights in 16 bytes: numbers of a table times a scale. Low nibbles come first.
INLINE Weights table_weights(const Table& table, Bytes16 qs, float scale) {
    Weights w;
#if defined(NATIVE_AVX512)
    const vf every = convert<vf>(widen(table)) * scale;
    const vi bytes = (vi)_mm512_cvtepu8_epi32((__m128i)qs);  // the lookup ignores higher bits of an index
    w.lanes[0] = (vf)_mm512_permutexvar_ps((__m512i)bytes, (__m512)every);
    w.lanes[1] = (vf)_mm512_permutexvar_ps((__m512i)(bytes >> 4), (__m512)every);
#elif defined(NATIVE_AVX2)
    const __m128i all = _mm_load_si128((const __m128i*)table), four = _mm_set1_epi8(0xF);
    const __m128i low = _mm_shuffle_epi8(all, _mm_and_si128((__m128i)qs, four));
    const __m128i high = _mm_shuffle_epi8(all, _mm_and_si128(_mm_srli_epi16((__m128i)qs, 4), four));
    w.lanes[0] = convert<vf>((vi)_mm256_cvtepi8_epi32(low)) * scale;
    w.lanes[1] = convert<vf>((vi)_mm256_cvtepi8_epi32(_mm_srli_si128(low, 8))) * scale;
    w.lanes[2] = convert<vf>((vi)_mm256_cvtepi8_epi32(high)) * scale;
    w.lanes[3] = convert<vf>((vi)_mm256_cvtepi8_epi32(_mm_srli_si128(high, 8))) * scale;
#else
    alignas(16) int8_t numbers[BLOCK];
#if defined(NATIVE_NEON)
    const int8x16_t all = vld1q_s8(table);
    vst1q_s8(numbers, vqtbl1q_s8(all, vandq_u8((uint8x16_t)qs, vdupq_n_u8(0xF))));
    vst1q_s8(numbers + 16, vqtbl1q_s8(all, vshrq_n_u8((uint8x16_t)qs, 4)));
#else
    for (int i = 0; i < BLOCK / 2; i++) {
        numbers[i] = table[qs[i] & 0xF];
        numbers[BLOCK / 2 + i] = table[qs[i] >> 4];
    }
#endif
    UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = convert<vf>(widen(numbers + i * W)) * scale;
#endif
    return w;
}

struct IQ4_NL : Blocks32<18, false, 0> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        return table_weights(IQ4, load<Bytes16>(group + j * BYTES + 2), s.scale(j));
    }
};

struct IQ4_XS {
    static constexpr int GROUP_BYTES = 136;
    struct Scales {
        alignas(32) float scale[GROUP_BLOCKS];
    };

    // Eight 6-bit scales, each larger by 32: two high bits of each in a word, then low nibbles in four bytes.
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const uint32_t high = load<uint16_t>(group + 2), low = load<uint32_t>(group + 4);
        const uint64_t six = spread_bits(low, 0x0F0F0F0F0F0F0F0F) | spread_bits(high, 0x3030303030303030);
        store(s.scale, (floats_of_bytes(six) - 32.0f) * half_to_float(load<uint16_t>(group)));
    }

    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        return table_weights(IQ4, load<Bytes16>(group + 8 + 16 * j), s.scale[j]);
    }
};

// ---- four-bit floats

alignas(16) constexpr Table FP4 = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled

struct MXFP4 {
    static constexpr int BYTES = 17, GROUP_BYTES = GROUP_BLOCKS * BYTES;
    struct Scales {
        alignas(32) float scale[GROUP_BLOCKS];
    };

    // 2^(e - 128), also where it is subnormal; e is the first byte of a block.
    static INLINE void scales(const uint8_t* group, int n_blocks, Scales& s) {
        uint64_t bytes = 0;
        for (int b = 0; b < n_blocks; b++) bytes |= uint64_t(group[b * BYTES]) << (8 * b);
        const i32x8 e = ints_of_bytes(bytes);
        const i32x8 bits = e < 2 ? (i32x8{} + 0x00200000) << (e & 1) : (e - 1) << 23;
        store(s.scale, bits);
    }

    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        return table_weights(FP4, load<Bytes16>(group + j * BYTES + 1), s.scale[j]);
    }
};

// Half of a number with four bits of exponent and three of fraction, by byte; 0x7F is 0.
constexpr float half_of_ue4m3(uint32_t d) {
    const uint32_t e = d >> 3 & 0xF;
    if (d == 0x7F) return 0;
    float half = float(e == 0 ? d & 7 : 8 + (d & 7));  // times 2^10
    for (uint32_t i = 1; i < e; i++) half *= 2;
    return half * 0x1p-10f;
}
constexpr auto UE4M3_HALVES = [] {
    std::array<float, 256> halves{};
    for (uint32_t d = 0; d < 256; d++) halves[d] = half_of_ue4m3(d);
    return halves;
}();

struct NVFP4 {
    static constexpr int BYTES = 36, GROUP_BYTES = GROUP / 64 * BYTES;
    struct Scales {
        alignas(64) float scale[GROUP / 16];
    };

    static INLINE void scales(const uint8_t* group, int n_blocks, Scales& s) {
        for (int i = 0; i < 2 * n_blocks; i++) s.scale[i] = UE4M3_HALVES[group[i / 4 * BYTES + i % 4]];
    }

    // Two runs of 16 weights, of eight bytes each: their nibbles are put in the order of a block of 32.
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        using Words = uint64_t __attribute__((vector_size(16)));
        const Bytes16 qs = load<Bytes16>(group + j / 2 * BYTES + 4 + j % 2 * 16);
        const Words low = (Words)(qs & uint8_t(0xF)), high = (Words)(qs >> 4);
        const Words first = __builtin_shufflevector(low, high, 0, 2), second = __builtin_shufflevector(low, high, 1, 3);
        Weights w = table_weights(FP4, (Bytes16)(first | second << 4), 1.0f);
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] *= s.scale[2 * j + i * W / 16];
        return w;
    }
};

// ---- one or two bits a weight

// A group with one scale at D_AT.
template <int BYTES, int D_AT>
struct OneScale {
    static constexpr int GROUP_BYTES = BYTES;
    struct Scales {
        float d;
    };
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        s.d = half_to_float(load<uint16_t>(group + D_AT));
    }
};

// Weights of small numbers from 0 on that stand for numbers from -1 on, times a scale.
INLINE Weights ternary(const uint8_t* numbers, float scale) {
    Weights w;
    UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = convert<vf>(widen(numbers + i * W)) * scale - scale;
    return w;
}

struct TQ2_0 : OneScale<66, 64> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        uint8_t numbers[BLOCK];
        store(numbers, move_bits(load<Bytes>(group + j / 4 * 32), j % 4 * 2, 0, 3));
        return ternary(numbers, s.d);
    }
};

// Digits of base 3, five or four of a byte: see kernels/quant_table_blocks.h. All are unpacked with the scale.
struct TQ1_0 {
    static constexpr int GROUP_BYTES = 54;
    struct Scales {
        float d;
        alignas(32) uint8_t numbers[GROUP];
    };

    // The first digits of bytes times a power of 3.
    template <class V>
    static INLINE V digits(V bytes, int power) {
        const V moved = bytes * uint8_t(power);
        return ((V)(moved > 85) & 1) + ((V)(moved > 170) & 1);  // 3 moved / 256
    }

    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const Bytes first = load<Bytes>(group);
        const Bytes16 second = load<Bytes16>(group + 32);
        int power = 1;
        UNROLL for (int n = 0; n < 5; n++, power *= 3) {
            store(s.numbers + 32 * n, digits(first, power));
            store(s.numbers + 160 + 16 * n, digits(second, power));
        }
        const uint32_t four = load<uint32_t>(group + 48);
        const Bytes16 last = (Bytes16)(four - (uint32_t __attribute__((vector_size(16)))){});
        store(s.numbers + 240, digits(last * Bytes16{1, 1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 9, 27, 27, 27, 27}, 1));
        s.d = half_to_float(load<uint16_t>(group + 52));
    }

    static INLINE Weights weights(const uint8_t*, int j, const Scales& s) {
        return ternary(s.numbers + BLOCK * j, s.d);
    }
};

// Blocks of N weights that start with a half scale.
template <int N, int BLOCK_BYTES>
struct Blocks {
    static constexpr int BYTES = BLOCK_BYTES, EACH = N / BLOCK, GROUP_BYTES = GROUP / N * BYTES;
    struct Scales {
        float d[GROUP / N];
    };
    static INLINE void scales(const uint8_t* group, int n_blocks, Scales& s) {
        for (int i = 0; i * EACH < n_blocks; i++) s.d[i] = half_to_float(load<uint16_t>(group + i * BYTES));
    }
};

struct Q2_0 : Blocks<64, 18> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        // Four weights a byte: each gets a byte of a word.
        const i32x8 four = ints_of_bytes(load<uint64_t>(group + j / 2 * BYTES + 2 + j % 2 * 8));
        uint8_t numbers[BLOCK];
        store(numbers, (four | four << 6 | four << 12 | four << 18) & 0x03030303);
        return ternary(numbers, s.d[j / 2]);
    }
};

struct Q1_0 : Blocks<128, 18> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const vi bits = load<int32_t>(group + j / 4 * BYTES + 2 + j % 4 * 4) - vi{};
        const float d = s.d[j / 4];
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = (bits & bit_lanes(i * W)) != 0 ? splat(d) : splat(-d);
        return w;
    }
};

}  // namespace
}  // namespace zinc
