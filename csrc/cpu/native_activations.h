// Activations made ready for products with quantised weights.
//
// Without VNNI they stay float32. With VNNI each block of 32 becomes 16-bit integers of its own scale, held as two planes
// of signed bytes, x = scale * (256 high + low): vpdpbusd multiplies unsigned quants with the planes exactly, and the
// error is that of rounding to 16 bits (1.5e-5 of the block's largest; 8 bits would be 4e-3).
#pragma once

#include "native_quants.h"

namespace zinc {
namespace {

// Activations made ready: per row of k, padded to whole groups, and per SUB of them what the scales and offsets multiply.
struct Activations {
    const uint8_t *values = nullptr;  // float[k], or per block of 32: low plane [32], high plane [32]
    const float *scales = nullptr;    // [groups * GROUP / SUB], with VNNI only
    const float *sums = nullptr;      // [groups * GROUP / SUB], of the values as the integers have them
    size_t value_bytes = 0;           // from one row to the next
    size_t n_subs = 0;

    Activations row(size_t t) const {
        return {values + t * value_bytes, scales + t * n_subs, sums + t * n_subs, value_bytes, n_subs};
    }
};

INLINE int groups_of(uint32_t k) { return int((k + GROUP - 1) / GROUP); }

#if defined(NATIVE_AVX512)

constexpr float LARGEST = 127 * 256 + 127;  // so that the high plane fits a signed byte

// One block of 32. A NaN or infinity anywhere makes its scale, and so every result, NaN.
template <int SUB> INLINE void split_planes(const float *x, uint8_t *planes, float *scales, float *sums) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
    // As integers, magnitudes sort with NaN on top.
    const int largest_bits = _mm512_reduce_max_epi32(_mm512_max_epi32(
        _mm512_and_si512(_mm512_castps_si512(a), no_sign), _mm512_and_si512(_mm512_castps_si512(b), no_sign)));
    const float largest = bits_as<float>(largest_bits);
    const float inverse = largest < 1e-30f ? 0.0f : LARGEST / largest;
    const float scale = largest < 1e-30f ? 0.0f : largest * (1.0f / LARGEST) + (largest - largest);
    const __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(inverse)));
    const __m512i qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, _mm512_set1_ps(inverse)));
    const __m512i half = _mm512_set1_epi32(128);
    _mm_storeu_si128((__m128i *)planes, _mm512_cvtepi32_epi8(qa));
    _mm_storeu_si128((__m128i *)(planes + 16), _mm512_cvtepi32_epi8(qb));
    _mm_storeu_si128((__m128i *)(planes + 32), _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(qa, half), 8)));
    _mm_storeu_si128((__m128i *)(planes + 48), _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(qb, half), 8)));
    if constexpr (SUB == 32) {
        scales[0] = scale;
        sums[0] = scale * float(_mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb)));
    } else {
        scales[0] = scales[1] = scale;
        sums[0] = scale * float(_mm512_reduce_add_epi32(qa));
        sums[1] = scale * float(_mm512_reduce_add_epi32(qb));
    }
}

template <class Q> Activations prepare(Scratch &scratch, const float *x, size_t rows, uint32_t k) {
    const size_t groups = groups_of(k), n_subs = groups * (GROUP / Q::SUB), value_bytes = groups * GROUP * 2;
    uint8_t *const values = scratch.take<uint8_t>(rows * (value_bytes + 2 * n_subs * sizeof(float)));
    float *const scales = reinterpret_cast<float *>(values + rows * value_bytes), *const sums = scales + rows * n_subs;
    for (size_t t = 0; t < rows; t++) {
        const size_t blocks = k / BLOCK, subs = blocks * (BLOCK / Q::SUB);
        float *const row_scales = scales + t * n_subs, *const row_sums = sums + t * n_subs;
        for (size_t b = 0; b < blocks; b++)
            split_planes<Q::SUB>(x + t * k + b * BLOCK, values + t * value_bytes + b * 2 * BLOCK,
                                 row_scales + b * (BLOCK / Q::SUB), row_sums + b * (BLOCK / Q::SUB));
        for (size_t s = subs; s < n_subs; s++) row_scales[s] = row_sums[s] = 0;
    }
    return {values, scales, sums, value_bytes, n_subs};
}

#else

template <class Q> Activations prepare(Scratch &scratch, const float *x, size_t rows, uint32_t k) {
    const size_t n_subs = groups_of(k) * (GROUP / Q::SUB);
    float *const sums = scratch.take<float>(rows * n_subs);
    for (size_t t = 0; t < rows; t++)
        for (size_t s = 0; s < n_subs; s++) {
            vf sum{};
            if ((s + 1) * Q::SUB <= k)
                for (int i = 0; i < Q::SUB; i += W) sum += load<vf>(x + t * k + s * Q::SUB + i);
            sums[t * n_subs + s] = sum_lanes(sum);
        }
    return {reinterpret_cast<const uint8_t *>(x), nullptr, sums, k * sizeof(float), n_subs};
}

#endif

}  // namespace
}  // namespace zinc
