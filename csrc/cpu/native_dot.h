// Dot products of quantised rows with one vector of activations.
#pragma once

#include "native_activations.h"

namespace zinc {
namespace {

#if defined(NATIVE_AVX512)

// The dot product of one row, not yet added up: lanes 0 to 7 belong to the low plane, 8 to 15 to the high one.
struct DotSum {
    vf products{};
    f32x8 offsets{};

    INLINE float total() const {
        const __m512 v = (__m512)products;
        return sum_lanes((f32x8)_mm512_castps512_ps256(v) + offsets + 256.0f * (f32x8)_mm512_extractf32x8_ps(v, 1));
    }
};

template <class Q> struct GroupScales : Affine<GROUP / Q::SUB> {
    using Affine<GROUP / Q::SUB>::scale;

    INLINE void multiply(const float *by) {
        for (int i = 0; i < GROUP / Q::SUB; i += 8) store(scale + i, load<f32x8>(scale + i) * load<f32x8>(by + i));
        // From here on in memory: a broadcast from there is free, one out of a register costs a shuffle.
        __asm__("" : "+m"(scale));
    }
    INLINE vf of_block(int j) const {
        if constexpr (Q::SUB == 32) return splat(scale[j]);
        const int p = 2 * j, q = 2 * j + 1;
        return (vf)_mm512_permutexvar_ps(_mm512_set_epi32(q, q, q, q, p, p, p, p, q, q, q, q, p, p, p, p),
                                         _mm512_load_ps(scale));
    }
};

template <class Q> INLINE void prepare_scales(GroupScales<Q> &a, const Activations &x, int g) {
    a.multiply(x.scales + g * (GROUP / Q::SUB));
}

template <class Q>
INLINE void dot_block(const uint8_t *group, const GroupScales<Q> &a, const Activations &x, int g, int j, DotSum &sum) {
    const __m512i planes = _mm512_loadu_si512(x.values + (g * GROUP_BLOCKS + j) * 2 * BLOCK);
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)Q::quants(group, j), planes);
    sum.products += (vf)_mm512_cvtepi32_ps(dot) * a.of_block(j);
}

#else

struct DotSum {
    vf products{};
    f32x8 offsets{};

    INLINE float total() const { return sum_lanes(products) + sum_lanes(offsets); }
};

template <class Q> using GroupScales = Affine<GROUP / Q::SUB>;
template <class Q> INLINE void prepare_scales(GroupScales<Q> &, const Activations &, int) {}

template <class Q>
INLINE void dot_block(const uint8_t *group, const GroupScales<Q> &a, const Activations &x, int g, int j, DotSum &sum) {
    const float *values = reinterpret_cast<const float *>(x.values) + g * GROUP + j * BLOCK;
    uint8_t quants[BLOCK];
    store(quants, Q::quants(group, j));
    for (int s = 0; s < BLOCK / Q::SUB; s++) {
        vf dot{};
#pragma GCC unroll 8
        for (int i = s * Q::SUB; i < (s + 1) * Q::SUB; i += W)
            dot += convert<vf>(convert<vi>(load<vu8>(quants + i))) * load<vf>(values + i);
        sum.products += dot * a.scale[j * (BLOCK / Q::SUB) + s];
    }
}

#endif

// N_BLOCKS of group g for ROWS rows side by side; 0 is a partial group of n_blocks.
template <int ROWS, int N_BLOCKS, class Q>
INLINE void dot_group(const uint8_t *w, size_t row_bytes, const Activations &x, int g, int n_blocks, DotSum *sum) {
    constexpr int SUBS = GROUP / Q::SUB;
    GroupScales<Q> a[ROWS];
    const uint8_t *group = w + size_t(g) * Q::GROUP_BYTES;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        Q::affine(group + r * row_bytes, N_BLOCKS ? N_BLOCKS : n_blocks, a[r]);
        for (int i = 0; i < SUBS; i += 8)
            sum[r].offsets += load<f32x8>(a[r].offset + i) * load<f32x8>(x.sums + g * SUBS + i);
        prepare_scales<Q>(a[r], x, g);
    }
    for (int j = 0; j < (N_BLOCKS ? N_BLOCKS : n_blocks); j++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) dot_block<Q>(group + r * row_bytes, a[r], x, g, j, sum[r]);
}

// out[r] = row r of W · x for ROWS rows at once, which keeps that many streams of memory and sums in flight.
template <int ROWS, Quantised Q>
INLINE void dot_rows(const uint8_t *w, size_t row_bytes, const Activations &x, uint32_t k, float *out) {
    DotSum sum[ROWS];
    const int full = int(k / GROUP), rest = int(k % GROUP / BLOCK);
    for (int g = 0; g < full; g++) dot_group<ROWS, GROUP_BLOCKS, Q>(w, row_bytes, x, g, GROUP_BLOCKS, sum);
    if (rest) dot_group<ROWS, 0, Q>(w, row_bytes, x, full, rest, sum);
    for (int r = 0; r < ROWS; r++) out[r] = sum[r].total();
}

template <int ROWS, class T>
    requires(!Quantised<T>)
INLINE void dot_rows(const uint8_t *w, size_t row_bytes, const float *x, uint32_t k, float *out) {
    vf sum[ROWS][2] = {};
    uint32_t i = 0;
    for (; i + 2 * W <= k; i += 2 * W)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *at = w + r * row_bytes + size_t(i) * T::BYTES;
            sum[r][0] += T::lanes(at) * load<vf>(x + i);
            sum[r][1] += T::lanes(at + W * T::BYTES) * load<vf>(x + i + W);
        }
    for (int r = 0; r < ROWS; r++) {
        out[r] = sum_lanes(sum[r][0] + sum[r][1]);
        for (uint32_t j = i; j < k; j++) out[r] += T::one(w + r * row_bytes + size_t(j) * T::BYTES) * x[j];
    }
}

}  // namespace
}  // namespace zinc
