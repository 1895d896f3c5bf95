// Dot products of the rows of a matrix with one vector of activations.
#pragma once

#include "cpu/native/quants.h"

namespace zinc {
namespace {

// The number of rows that are read side by side.
#if defined(NATIVE_AVX512)
constexpr int ROWS = 4;
#else
constexpr int ROWS = 2;
#endif

constexpr uint32_t STRIP = 64;  // rows whose products are kept until the epilogue

// The blocks of a full group, each with unrolled code. 0 on machines with few vector instructions: more code, no gain.
#if defined(NATIVE_AVX512) || defined(NATIVE_AVX2) || defined(NATIVE_NEON)
constexpr int WHOLE_GROUPS = GROUP_BLOCKS;
#else
constexpr int WHOLE_GROUPS = 0;
#endif

// Block j of a group of ROWS rows.
template <int ROWS, class Q>
INLINE void dot_block(const uint8_t* group, size_t row_bytes, int j, const typename Q::Scales (&scales)[ROWS],
                      const float* x, vf (&sum)[ROWS][2]) {
    UNROLL for (int r = 0; r < ROWS; r++) {
        const Weights w = Q::weights(group + r * row_bytes, j, scales[r]);
        UNROLL for (int i = 0; i < BLOCK / W; i++) sum[r][i % 2] += w.lanes[i] * load<vf>(x + j * BLOCK + i * W);
    }
}

// A group of ROWS rows, N_BLOCKS blocks of it; 0 stands for n_blocks, of a partial group. Prefetches this group of the
// next ROWS rows: the hardware does not see several rows as one stream.
template <int ROWS, int N_BLOCKS, class Q>
INLINE void dot_group(const uint8_t* group, size_t row_bytes, const float* x, int n_blocks, vf (&sum)[ROWS][2]) {
    typename Q::Scales scales[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        for (int i = 0; i < Q::GROUP_BYTES; i += 64) __builtin_prefetch(group + (ROWS + r) * row_bytes + i);
        Q::scales(group + r * row_bytes, N_BLOCKS ? N_BLOCKS : n_blocks, scales[r]);
        settle(scales[r]);
    }
    if constexpr (N_BLOCKS) {  // every block then has its bits at a constant place
        UNROLL for (int j = 0; j < N_BLOCKS; j++) dot_block<ROWS, Q>(group, row_bytes, j, scales, x, sum);
    } else {
        for (int j = 0; j < n_blocks; j++) dot_block<ROWS, Q>(group, row_bytes, j, scales, x, sum);
    }
}

// out[r] = row r of W · x for ROWS rows at once, which keeps that many sums in flight.
template <int ROWS, Grouped Q>
INLINE void dot_rows(const uint8_t* w, size_t row_bytes, const float* x, uint32_t k, float* out) {
    vf sum[ROWS][2] = {};
    const int full = int(k / GROUP), rest = int(k % GROUP / BLOCK);
    for (int g = 0; g < full; g++)
        dot_group<ROWS, WHOLE_GROUPS, Q>(w + size_t(g) * Q::GROUP_BYTES, row_bytes, x + g * GROUP, GROUP_BLOCKS, sum);
    if (rest) dot_group<ROWS, 0, Q>(w + size_t(full) * Q::GROUP_BYTES, row_bytes, x + full * GROUP, rest, sum);
    UNROLL for (int r = 0; r < ROWS; r++) out[r] = sum_lanes(sum[r][0] + sum[r][1]);
}

template <int ROWS, class T>
    requires(!Grouped<T>)
INLINE void dot_rows(const uint8_t* w, size_t row_bytes, const float* x, uint32_t k, float* out) {
    vf sum[ROWS][2] = {};
    uint32_t i = 0;
    for (; i + 2 * W <= k; i += 2 * W) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            const uint8_t* at = w + r * row_bytes + size_t(i) * T::BYTES;
            for (int b = 0; b < 2 * W * T::BYTES; b += 64) __builtin_prefetch(at + ROWS * row_bytes + b);
            sum[r][0] += T::lanes(at) * load<vf>(x + i);
            sum[r][1] += T::lanes(at + W * T::BYTES) * load<vf>(x + i + W);
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        out[r] = sum_lanes(sum[r][0] + sum[r][1]);
        for (uint32_t j = i; j < k; j++) out[r] += T::one(w + r * row_bytes + size_t(j) * T::BYTES) * x[j];
    }
}

}  // namespace
}  // namespace zinc
