// One struct per tensor type of quant_types.h, for the native kernels. Quantised weights come in groups of 256: one K
// block, or eight blocks of 32. A struct decodes the scales of a group, and with them the 32 weights of a block, as
// floats. Layouts are ggml's; python/zincmetal/gguf/quants.py is the oracle.
#pragma once

#include "cpu/native/simd.h"
#include "quant_types.h"

namespace zinc {
namespace {

constexpr int BLOCK = 32, GROUP = 256, GROUP_BLOCKS = GROUP / BLOCK;

// The weights of a block.
struct Weights {
    vf lanes[BLOCK / W];
};

// Keeps scales in memory: a broadcast from memory is free, a broadcast from a register costs a shuffle.
template <class S>
INLINE void settle(S& scales) {
    __asm__("" : "+m"(scales));
}

INLINE const int8_t* signed_bytes(const uint8_t* p) { return reinterpret_cast<const int8_t*>(p); }

// W four-bit quants, the low or the high nibbles of W bytes, as weights: (quant - ZERO) * scale + offset.
template <int ZERO>
INLINE vf nibbles(const uint8_t* p, bool high, float scale, float offset) {
#if defined(NATIVE_AVX512)
    // All sixteen possible weights, looked up by nibble. The lookup ignores higher bits of an index.
    const vf quants = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vf every = ZERO ? (quants - float(ZERO)) * scale : quants * scale + offset;
    return (vf)_mm512_permutexvar_ps((__m512i)(high ? widen(p) >> 4 : widen(p)), (__m512)every);
#else
    const vf quants = convert<vf>(high ? widen(p) >> 4 : widen(p) & 15);
    return ZERO ? (quants - float(ZERO)) * scale : quants * scale + offset;
#endif
}

// W five-bit quants, one in each of W bytes, as weights.
INLINE vf five_bits(const uint8_t* p, float scale, float offset) {
#if defined(NATIVE_AVX512)
    const vf quants = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vf lower = quants * scale + offset, upper = lower + 16 * scale;
    return (vf)_mm512_permutex2var_ps((__m512)lower, (__m512i)widen(p), (__m512)upper);
#else
    return convert<vf>(widen(p)) * scale + offset;
#endif
}

using Bytes = uint8_t __attribute__((vector_size(BLOCK)));

// Moves the bits from `from` on of every byte to `to` and keeps the bits in `mask`.
INLINE Bytes move_bits(Bytes bytes, int from, int to, int mask) {
    const auto x = (uint16_t __attribute__((vector_size(BLOCK))))bytes;
    return (Bytes)(from < to ? x << (to - from) : x >> (from - to)) & uint8_t(mask);
}

// Adds `step` to the lanes whose `test` has a bit in common with `bit`.
INLINE vf add_where(vf weights, vi test, vi bit, float step) { return (test & bit) != 0 ? weights + step : weights; }

// 1, 2, 4, ... from bit `first` on.
INLINE vi bit_lanes(int first) {
    vi bits;
    UNROLL for (int i = 0; i < W; i++) bits[i] = int32_t(1u << (first + i));
    return bits;
}

// Blocks of 32 that start with a half scale and, with MIN, a half minimum. Without MIN quant ZERO stands for weight 0.
template <int BLOCK_BYTES, bool MIN, int ZERO>
struct Blocks32 {
    static constexpr int BYTES = BLOCK_BYTES, GROUP_BYTES = GROUP_BLOCKS * BYTES;

    // The first two halves of each block as floats. The second is used only with MIN.
    struct Scales {
        alignas(64) float header[2 * GROUP_BLOCKS];
        float scale(int j) const { return header[2 * j]; }
        float offset(int j) const { return MIN ? header[2 * j + 1] : 0; }
    };

    static INLINE void scales(const uint8_t* group, int n_blocks, Scales& s) {
#if defined(NATIVE_AVX512)
        const __m256i at =
            _mm256_setr_epi32(0, BYTES, 2 * BYTES, 3 * BYTES, 4 * BYTES, 5 * BYTES, 6 * BYTES, 7 * BYTES);
        const __mmask8 there = __mmask8((1u << n_blocks) - 1);
        const __m256i headers = _mm256_mmask_i32gather_epi32(_mm256_setzero_si256(), there, at, group, 1);
        _mm512_store_ps(s.header, _mm512_cvtph_ps(headers));
#else
        uint16_t halves[2 * GROUP_BLOCKS] = {};
        for (int b = 0; b < n_blocks; b++) std::memcpy(halves + 2 * b, group + b * BYTES, 4);
        for (int i = 0; i < 2 * GROUP_BLOCKS; i += W) store(s.header + i, load_half(halves + i));
#endif
    }

  protected:
    // Lanes i of block j: 16 bytes of nibbles. The low nibbles are the first 16 weights, the high nibbles the rest.
    static INLINE vf lanes(const uint8_t* qs, int i, const Scales& s, int j) {
        return nibbles<ZERO>(qs + i * W % 16, i * W >= 16, s.scale(j), s.offset(j));
    }
};

struct Q4_0 : Blocks32<18, false, 8> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = lanes(group + j * BYTES + 2, i, s, j);
        return w;
    }
};

struct Q4_1 : Blocks32<20, true, 0> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = lanes(group + j * BYTES + 4, i, s, j);
        return w;
    }
};

// A fifth bit per weight, in a word before the nibbles.
template <int BLOCK_BYTES, bool MIN, int ZERO, int BITS_AT>
struct FiveBits : Blocks32<BLOCK_BYTES, MIN, ZERO> {
    using Base = Blocks32<BLOCK_BYTES, MIN, ZERO>;
    static INLINE Weights weights(const uint8_t* group, int j, const typename Base::Scales& s) {
        const uint8_t* bits = group + j * BLOCK_BYTES + BITS_AT;
        const vi fifth = load<int32_t>(bits) - vi{};
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] =
            add_where(Base::lanes(bits + 4, i, s, j), fifth, bit_lanes(i * W), 16 * s.scale(j));
        return w;
    }
};

struct Q5_0 : FiveBits<22, false, 16, 2> {};
struct Q5_1 : FiveBits<24, true, 0, 4> {};

struct Q8_0 : Blocks32<34, false, 0> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] =
            convert<vf>(widen(signed_bytes(group + j * BYTES + 2 + i * W))) * s.scale(j);
        return w;
    }
};

// Blocks of 256 in eight parts of 32, each with a scale and an offset.
struct KScales {
    alignas(64) float scale[8];
    alignas(64) float offset[8];
};

// d, dmin (half), then eight 6-bit scales and eight 6-bit minima in 12 bytes.
INLINE void k_scales(const uint8_t* block, KScales& s) {
    const float d = half_to_float(load<uint16_t>(block)), dmin = half_to_float(load<uint16_t>(block + 2));
    const uint32_t first = load<uint32_t>(block + 4), second = load<uint32_t>(block + 8),
                   third = load<uint32_t>(block + 12);
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
    const uint64_t scales = (first & six) | uint64_t((third & four) | (first >> 2 & two)) << 32;
    const uint64_t minima = (second & six) | uint64_t((third >> 4 & four) | (second >> 2 & two)) << 32;
    store(s.scale, floats_of_bytes(scales) * d);
    store(s.offset, floats_of_bytes(minima) * -dmin);
}

struct Q4_K {
    static constexpr int GROUP_BYTES = 144;
    using Scales = KScales;
    static INLINE void scales(const uint8_t* group, int, Scales& s) { k_scales(group, s); }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] =
            nibbles<0>(group + 16 + j / 2 * 32 + i * W, j % 2, s.scale[j], s.offset[j]);
        return w;
    }
};

struct Q5_K {
    static constexpr int GROUP_BYTES = 176;
    using Scales = KScales;
    static INLINE void scales(const uint8_t* group, int, Scales& s) { k_scales(group, s); }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const Bytes four = move_bits(load<Bytes>(group + 48 + j / 2 * 32), j % 2 * 4, 0, 0x0f);
        const Bytes fifth = move_bits(load<Bytes>(group + 16), j, 4, 0x10);  // bit j of a byte belongs to part j
        uint8_t quants[BLOCK];
        store(quants, four | fifth);
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = five_bits(quants + i * W, s.scale[j], s.offset[j]);
        return w;
    }
};

struct Q6_K {
    static constexpr int GROUP_BYTES = 210;
    struct Scales {
        alignas(64) float scale[16];  // per 16 weights
    };
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const float d = half_to_float(load<uint16_t>(group + 208));
        for (int i = 0; i < 16; i += W) store(s.scale + i, convert<vf>(widen(signed_bytes(group + 192 + i))) * d);
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const int half = j / 4, pair = j % 4;
        const Bytes low = load<Bytes>(group + half * 64 + pair % 2 * 32), high = load<Bytes>(group + 128 + half * 32);
        const Bytes six = move_bits(low, pair / 2 * 4, 0, 0x0f) | move_bits(high, pair * 2, 4, 0x30);
        int8_t quants[BLOCK];
        store(quants, six - uint8_t(32));
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] =
            convert<vf>(widen(quants + i * W)) * s.scale[2 * j + i * W / 16];
        return w;
    }
};

// ---- types that are their own weights ------------------------------------------------------------------------------

struct F32 {
    static constexpr int BYTES = 4;
    static INLINE vf lanes(const uint8_t* p) { return load<vf>(p); }
    static INLINE float one(const uint8_t* p) { return load<float>(p); }
};

struct F16 {
    static constexpr int BYTES = 2;
    static INLINE vf lanes(const uint8_t* p) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
    static INLINE float one(const uint8_t* p) { return half_to_float(load<uint16_t>(p)); }
};

struct BF16 {
    static constexpr int BYTES = 2;
    static INLINE vf lanes(const uint8_t* p) { return load_bfloat(reinterpret_cast<const uint16_t*>(p)); }
    static INLINE float one(const uint8_t* p) { return bits_as<float>(uint32_t(load<uint16_t>(p)) << 16); }
};

// The list of types gives the layout of their weights; a native struct has its own layout.
template <class B>
using Quantised = B;
template <class B>
using Plain = B;

template <class T>
concept Grouped = requires { T::GROUP_BYTES; };

// Bytes of a row of n weights.
template <class T>
constexpr size_t row_bytes(uint32_t n) {
    if constexpr (Grouped<T>)
        return size_t(n) * T::GROUP_BYTES / GROUP;
    else
        return size_t(n) * T::BYTES;
}

// `count` weights of a row, from column `first` on, as floats. Quantised weights: whole blocks of one group.
template <class T>
INLINE void dequantise(const uint8_t* row, uint32_t first, uint32_t count, float* out) {
    if constexpr (Grouped<T>) {
        const uint8_t* group = row + size_t(first / GROUP) * T::GROUP_BYTES;
        const int block = int(first % GROUP / BLOCK), n_blocks = int(count / BLOCK);
        typename T::Scales scales;
        T::scales(group, block + n_blocks, scales);
        settle(scales);
        for (int j = 0; j < n_blocks; j++) store(out + j * BLOCK, T::weights(group, block + j, scales));
    } else {
        const uint8_t* at = row + size_t(first) * T::BYTES;
        uint32_t i = 0;
        for (; i + W <= count; i += W) store(out + i, T::lanes(at + i * T::BYTES));
        for (; i < count; i++) out[i] = T::one(at + i * T::BYTES);
    }
}

}  // namespace
}  // namespace zinc
