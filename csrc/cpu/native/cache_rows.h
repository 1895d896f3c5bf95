// What kernels need that normalise and rotate vectors, and store them in the K/V cache.
#pragma once

#include "cpu/native/norm.h"
#include "cpu/native/quants.h"

namespace zinc {
namespace {

using f64x8 = double __attribute__((vector_size(64)));
using i64x8 = int64_t __attribute__((vector_size(64)));

// Sine and cosine of 8 angles, to float32 precision. They are computed in double: angles of a million keep their
// precision.
INLINE void sincos(const float* angle, float* sine, float* cosine) {
    f64x8 x;
    for (int i = 0; i < 8; i++) x[i] = double(angle[i]);
    const f64x8 shift = 0x1.8p52 - f64x8{};
    const f64x8 n = (x * 0.63661977236758134308 + shift) - shift;  // nearest multiple of pi / 2
    const f64x8 r = (x - n * 0x1.921fb54442d18p0) - n * 0x1.1a62633145c07p-54, z = r * r;
    const f64x8 s =
        r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 - z * (1.0 / 39916800)))));
    const f64x8 c =
        1.0 + z * (-0.5 + z * (1.0 / 24 +
                               z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
    const i64x8 quadrant = bits_as<i64x8>(n + shift);
    const f64x8 sin_part = (quadrant & 1) != 0 ? c : s, cos_part = (quadrant & 1) != 0 ? s : c;
    for (int i = 0; i < 8; i++) {
        sine[i] = float(quadrant[i] & 2 ? -sin_part[i] : sin_part[i]);
        cosine[i] = float((quadrant[i] + 1) & 2 ? -cos_part[i] : cos_part[i]);
    }
}

// The sines and cosines of a position, times the magnitude. Both have room for n_pairs, rounded up to 8.
INLINE void rotations(float position, const float* freqs, uint32_t n_pairs, float magnitude, float* sine,
                      float* cosine) {
    for (uint32_t i = 0; i < n_pairs; i += 8) {
        float angle[8] = {};
        for (uint32_t j = i; j < n_pairs && j < i + 8; j++) angle[j - i] = position * freqs[j];
        sincos(angle, sine + i, cosine + i);
    }
    for (uint32_t i = 0; i < n_pairs; i++) {
        sine[i] *= magnitude;
        cosine[i] *= magnitude;
    }
}

// The factor of q at a position.
template <class P>
INLINE float q_scale(const P& p, uint32_t position) {
    if (p.temperature == 0) return 1.0f;
    return 1.0f + p.temperature * std::log(float(1 + position / p.temperature_length));
}

// n floats as a row of a type that a cache may have.
template <class T>
INLINE void store_row(uint8_t* out, const float* x, uint32_t n);

template <>
INLINE void store_row<F32>(uint8_t* out, const float* x, uint32_t n) {
    std::memcpy(out, x, n * sizeof(float));
}

template <>
INLINE void store_row<F16>(uint8_t* out, const float* x, uint32_t n) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(out);
    uint32_t i = 0;
    for (; i + W <= n; i += W) store_half(halves + i, load<vf>(x + i));
    for (; i < n; i++) halves[i] = float_to_half(x[i]);
}

// The largest magnitude of each block becomes 127.
template <>
INLINE void store_row<Q8_0>(uint8_t* out, const float* x, uint32_t n) {
    for (uint32_t first = 0; first < n; first += BLOCK, out += Q8_0::BYTES) {
        float largest = 0;
        for (uint32_t i = first; i < first + BLOCK; i++)
            largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
        // Far below the smallest half scale, the reciprocal is not a float either.
        const float quants = largest > 1e-30f ? 127.0f / largest : 0.0f;
        store(out, float_to_half(largest / 127.0f));
        for (int i = 0; i < BLOCK; i += W) {
            const vf shift = splat(0x1.8p23f);  // rounds to nearest even
            const vi rounded = convert<vi>((load<vf>(x + first + i) * quants + shift) - shift);
            store(out + 2 + i, convert<vi8>(rounded));
        }
    }
}

}  // namespace
}  // namespace zinc
