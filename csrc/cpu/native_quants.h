// One struct per quantised type, for the native kernels. Weights come in groups of 256: one K block, or eight blocks of
// 32. A struct says what the quants of a block of 32 are, as unsigned bytes, and for each SUB of them which scale and
// offset turn them into weights: w = scale * quant + offset. Layouts are ggml's; python/zincmetal/quants.py is the oracle.
#pragma once

#include "native_simd.h"

namespace zinc {
namespace {

// The 32 quants of a block. With VNNI they stand twice, for the two planes of the activations (native_dot.h).
#if defined(NATIVE_AVX512)
using Bytes = uint8_t __attribute__((vector_size(64)));
#else
using Bytes = uint8_t __attribute__((vector_size(32)));
#endif
constexpr int BLOCK = 32, GROUP = 256, GROUP_BLOCKS = GROUP / BLOCK;

INLINE Bytes bytes32(const uint8_t *p) {
#if defined(NATIVE_AVX512)
    return (Bytes)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
#else
    return load<Bytes>(p);
#endif
}

// 16 bytes: their low nibbles, then their high ones.
INLINE Bytes nibble_halves(const uint8_t *p) {
#if defined(NATIVE_AVX512)
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
    const __m512i shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    return (Bytes)_mm512_and_si512(_mm512_srlv_epi64(all, shift), _mm512_set1_epi8(15));
#else
    Bytes both;
    std::memcpy(&both, p, 16);
    std::memcpy(reinterpret_cast<uint8_t *>(&both) + 16, p, 16);
    const Bytes high_half = {0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,
                             0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    return (both & 15 & ~high_half) | (both >> 4 & high_half);
#endif
}

// Bit i of the 32 as 16 in byte i.
INLINE Bytes fifth_bits(const uint8_t *p) {
    const uint32_t bits = load<uint32_t>(p);
#if defined(NATIVE_AVX512)
    return (Bytes)_mm512_maskz_set1_epi8(bits | uint64_t(bits) << 32, 16);
#else
    Bytes spread;
    const uint64_t ones = 0x0101010101010101u, diagonal = 0x8040201008040201u;
    for (int i = 0; i < 4; i++) {
        const uint64_t picked = (bits >> 8 * i & 0xff) * ones & diagonal;  // byte j is non-zero where bit j is set
        const uint64_t sixteen = (((picked & 0x7f * ones) + 0x7f * ones) | picked) >> 3 & ones << 4;
        std::memcpy(reinterpret_cast<uint8_t *>(&spread) + 8 * i, &sixteen, 8);
    }
    return spread;
#endif
}

// What turns the quants of a group into weights; entries beyond the blocks that are there are 0.
template <int N> struct Affine {
    alignas(64) float scale[N];
    alignas(64) float offset[N];
};

// Blocks of 32 that start with a half scale and, with MIN, a half minimum; else quant ZERO stands for weight 0.
template <int BLOCK_BYTES, bool MIN, int ZERO> struct Blocks32 {
    static constexpr int BYTES = BLOCK_BYTES, GROUP_BYTES = GROUP_BLOCKS * BYTES, SUB = 32;

    static INLINE void affine(const uint8_t *group, int n_blocks, Affine<GROUP / SUB> &a) {
        i32x8 header{};
        if (n_blocks == GROUP_BLOCKS) {
#if defined(NATIVE_AVX512) || defined(NATIVE_AVX2)
            const __m256i index = _mm256_setr_epi32(0, BYTES, 2 * BYTES, 3 * BYTES, 4 * BYTES, 5 * BYTES, 6 * BYTES, 7 * BYTES);
            header = (i32x8)_mm256_i32gather_epi32((const int *)group, index, 1);
#else
            for (int b = 0; b < GROUP_BLOCKS; b++) header[b] = load<int32_t>(group + b * BYTES);
#endif
        } else {
            for (int b = 0; b < n_blocks; b++) header[b] = load<int32_t>(group + b * BYTES);
        }
        const f32x8 scale = floats(header & 0xffff);
        store(a.scale, scale);
        store(a.offset, MIN ? floats(header >> 16 & 0xffff) : scale * float(-ZERO));
    }

  private:
    static INLINE f32x8 floats(i32x8 halves) {
#if defined(NATIVE_AVX512)
        return (f32x8)_mm256_cvtph_ps(_mm256_cvtepi32_epi16((__m256i)halves));
#else
        return float_of_half_bits<f32x8>(halves);
#endif
    }
};

struct Q4_0 : Blocks32<18, false, 8> {
    static INLINE Bytes quants(const uint8_t *group, int j) { return nibble_halves(group + j * BYTES + 2); }
};

struct Q4_1 : Blocks32<20, true, 0> {
    static INLINE Bytes quants(const uint8_t *group, int j) { return nibble_halves(group + j * BYTES + 4); }
};

struct Q5_0 : Blocks32<22, false, 16> {
    static INLINE Bytes quants(const uint8_t *group, int j) {
        return nibble_halves(group + j * BYTES + 6) | fifth_bits(group + j * BYTES + 2);
    }
};

struct Q5_1 : Blocks32<24, true, 0> {
    static INLINE Bytes quants(const uint8_t *group, int j) {
        return nibble_halves(group + j * BYTES + 8) | fifth_bits(group + j * BYTES + 4);
    }
};

struct Q8_0 : Blocks32<34, false, 128> {
    static INLINE Bytes quants(const uint8_t *group, int j) { return bytes32(group + j * BYTES + 2) ^ 0x80; }
};

// d, dmin (half), then eight 6-bit scales and eight 6-bit minima in 12 bytes.
INLINE void k_affine(const uint8_t *block, Affine<8> &a) {
    const float d = half_to_float(load<uint16_t>(block)), dmin = half_to_float(load<uint16_t>(block + 2));
    const uint32_t first = load<uint32_t>(block + 4), second = load<uint32_t>(block + 8), third = load<uint32_t>(block + 12);
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
    const uint64_t scales = (first & six) | uint64_t((third & four) | (first >> 2 & two)) << 32;
    const uint64_t minima = (second & six) | uint64_t((third >> 4 & four) | (second >> 2 & two)) << 32;
    using u8x8 = uint8_t __attribute__((vector_size(8)));
    store(a.scale, convert<f32x8>(convert<i32x8>(bits_as<u8x8>(scales))) * d);
    store(a.offset, convert<f32x8>(convert<i32x8>(bits_as<u8x8>(minima))) * -dmin);
}

struct Q4_K {
    static constexpr int GROUP_BYTES = 144, SUB = 32;
    static INLINE void affine(const uint8_t *group, int, Affine<8> &a) { k_affine(group, a); }
    static INLINE Bytes quants(const uint8_t *group, int j) {
        const Bytes pair = bytes32(group + 16 + j / 2 * 32);
        return (j % 2 ? pair >> 4 : pair) & 15;
    }
};

struct Q5_K {
    static constexpr int GROUP_BYTES = 176, SUB = 32;
    static INLINE void affine(const uint8_t *group, int, Affine<8> &a) { k_affine(group, a); }
    static INLINE Bytes quants(const uint8_t *group, int j) {
        const Bytes pair = bytes32(group + 48 + j / 2 * 32), high = bytes32(group + 16);
        return ((j % 2 ? pair >> 4 : pair) & 15) | ((j < 4 ? high << (4 - j) : high >> (j - 4)) & 16);
    }
};

struct Q6_K {
    static constexpr int GROUP_BYTES = 210, SUB = 16;
    static INLINE void affine(const uint8_t *group, int, Affine<16> &a) {
        const float d = half_to_float(load<uint16_t>(group + 208));
        const int8_t *scales = reinterpret_cast<const int8_t *>(group + 192);
        for (int i = 0; i < 16; i++) {
            a.scale[i] = d * scales[i];
            a.offset[i] = -32.0f * a.scale[i];
        }
    }
    static INLINE Bytes quants(const uint8_t *group, int j) {
        const int half = j / 4, pair = j % 4;
        const Bytes low = bytes32(group + half * 64 + pair % 2 * 32), high = bytes32(group + 128 + half * 32);
        const Bytes top = pair < 3 ? high << (4 - 2 * pair) : high >> 2;
        return ((pair < 2 ? low : low >> 4) & 15) | (top & 0x30);
    }
};

// ---- types that are their own weights ------------------------------------------------------------------------------

struct F32 {
    static constexpr int BYTES = 4;
    static INLINE vf lanes(const uint8_t *p) { return load<vf>(p); }
    static INLINE float one(const uint8_t *p) { return load<float>(p); }
};

struct F16 {
    static constexpr int BYTES = 2;
    static INLINE vf lanes(const uint8_t *p) { return load_half(reinterpret_cast<const uint16_t *>(p)); }
    static INLINE float one(const uint8_t *p) { return half_to_float(load<uint16_t>(p)); }
};

struct BF16 {
    static constexpr int BYTES = 2;
    static INLINE vf lanes(const uint8_t *p) { return load_bfloat(reinterpret_cast<const uint16_t *>(p)); }
    static INLINE float one(const uint8_t *p) { return bits_as<float>(uint32_t(load<uint16_t>(p)) << 16); }
};

template <class Q>
concept Quantised = requires { Q::SUB; };

// `count` weights of a row, from column `first` on, as floats; quantised ones in whole groups or the row's last blocks.
template <class T> INLINE void dequantise(const uint8_t *row, uint32_t first, uint32_t count, float *out) {
    if constexpr (Quantised<T>) {
        const uint8_t *group = row + size_t(first / GROUP) * T::GROUP_BYTES;
        Affine<GROUP / T::SUB> a;
        T::affine(group, int(count / BLOCK), a);
        for (uint32_t j = 0; j < count / BLOCK; j++) {
            uint8_t quants[sizeof(Bytes)];
            store(quants, T::quants(group, int(j)));
            for (int i = 0; i < BLOCK; i += W) {
                const int s = int(j) * (BLOCK / T::SUB) + i / T::SUB;
                store(out + j * BLOCK + i, convert<vf>(convert<vi>(load<vu8>(quants + i))) * a.scale[s] + a.offset[s]);
            }
        }
    } else {
        const uint8_t *at = row + size_t(first) * T::BYTES;
        uint32_t i = 0;
        for (; i + W <= count; i += W) store(out + i, T::lanes(at + i * T::BYTES));
        for (; i < count; i++) out[i] = T::one(at + i * T::BYTES);
    }
}

}  // namespace
}  // namespace zinc
