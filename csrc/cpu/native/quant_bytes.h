// A block of quants in a register, a byte each, on their way to floats.
#pragma once

#include "cpu/native/quant_weights.h"

namespace zinc {
namespace {

// Bytes i W to i W + W - 1 as 32-bit integers.
INLINE vi widen(Bytes bytes, int i) {
#if defined(NATIVE_AVX512) || defined(NATIVE_AVX2)
    const auto all = (__m256i)bytes;
    const __m128i half = i * W < 16 ? _mm256_castsi256_si128(all) : _mm256_extracti128_si256(all, 1);
#if defined(NATIVE_AVX512)
    return (vi)_mm512_cvtepu8_epi32(half);
#else
    return (vi)_mm256_cvtepu8_epi32(i * W % 16 ? _mm_srli_si128(half, 8) : half);
#endif
#else
    uint8_t each[BLOCK];
    store(each, bytes);
    return widen(each + i * W);
#endif
}

// Quants as weights. An array of N scales serves the block, each an equal share of it.
template <int N>
INLINE Weights weights_of(Bytes quants, const float* scale, const float* offset) {
    Weights w;
    UNROLL for (int i = 0; i < BLOCK / W; i++) {
        const int share = i * W * N / BLOCK;
        w.lanes[i] = convert<vf>(widen(quants, i)) * scale[share] + offset[share];
    }
    return w;
}

}  // namespace
}  // namespace zinc
