// The pieces from which native structs of quantised types are made. Quantised weights come in groups of 256: one K
// block, or eight blocks of 32. A struct decodes the scales of a group, and with them the 32 weights of a block, as
// floats.
#pragma once

#include "cpu/native/simd.h"

namespace zinc {
namespace {

constexpr int BLOCK = 32, GROUP = 256, GROUP_BLOCKS = GROUP / BLOCK;

// The weights of a block.
struct Weights {
    vf lanes[BLOCK / W];
};

// Keeps scales in memory: a broadcast from memory is free, a broadcast from a register costs a shuffle. Volatile: GCC
// 12 took functions with such an operand for functions without effects, and left out calls that decode weights.
template <class S>
INLINE void settle(S& scales) {
    __asm__ volatile("" : "+m"(scales));
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

}  // namespace
}  // namespace zinc
