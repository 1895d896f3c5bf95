// Dot products of the rows of a matrix with a few rows of activations at once: a weight is decoded once for all, and
// stays in a register.
#pragma once

#include "cpu/native/dot.h"
#include "cpu/native/strips.h"

namespace zinc {
namespace {

constexpr int MOST_TOGETHER = 8;  // rows of activations that meet a weight together: more would need more registers

// Rows of weights that are read side by side for N rows of activations: their sums stay in registers.
#if defined(NATIVE_AVX512) || defined(NATIVE_NEON)
template <int N>
constexpr int WEIGHT_ROWS = N <= 4 ? 4 : 2;
#else
template <int N>
constexpr int WEIGHT_ROWS = N <= 2 ? 2 : 1;
#endif

// Block j of a group of ROWS rows times TOKENS rows of activations.
template <int ROWS, int TOKENS, class Q>
INLINE void few_block(const uint8_t* group, size_t row_bytes, int j, const typename Q::Scales (&scales)[ROWS],
                      const float* const (&x)[TOKENS], size_t column, vf (&sum)[ROWS][TOKENS]) {
    Weights w[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) w[r] = Q::weights(group + r * row_bytes, j, scales[r]);
    UNROLL for (int i = 0; i < BLOCK / W; i++) {
        UNROLL for (int t = 0; t < TOKENS; t++) {
            const vf each = load<vf>(x[t] + column + j * BLOCK + i * W);
            UNROLL for (int r = 0; r < ROWS; r++) sum[r][t] += w[r].lanes[i] * each;
        }
    }
}

// N_BLOCKS blocks of a group of ROWS rows, whose columns begin at `column`; 0 stands for n_blocks, of a partial group.
template <int ROWS, int TOKENS, int N_BLOCKS, class Q>
INLINE void few_group(const uint8_t* group, size_t row_bytes, const float* const (&x)[TOKENS], size_t column,
                      int n_blocks, vf (&sum)[ROWS][TOKENS]) {
    typename Q::Scales scales[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        for (int i = 0; i < Q::GROUP_BYTES; i += 64) __builtin_prefetch(group + (ROWS + r) * row_bytes + i);
        Q::scales(group + r * row_bytes, N_BLOCKS ? N_BLOCKS : n_blocks, scales[r]);
        settle(scales[r]);
    }
    if constexpr (N_BLOCKS) {
        UNROLL for (int j = 0; j < N_BLOCKS; j++)
            few_block<ROWS, TOKENS, Q>(group, row_bytes, j, scales, x, column, sum);
    } else {
        for (int j = 0; j < n_blocks; j++) few_block<ROWS, TOKENS, Q>(group, row_bytes, j, scales, x, column, sum);
    }
}

template <int ROWS, int TOKENS, Grouped Q>
INLINE void few_rows(const uint8_t* w, size_t row_bytes, const float* const (&x)[TOKENS], uint32_t k,
                     vf (&sum)[ROWS][TOKENS], float (&)[ROWS][TOKENS]) {
    const int full = int(k / GROUP), rest = int(k % GROUP / BLOCK);
    for (int g = 0; g < full; g++)
        few_group<ROWS, TOKENS, WHOLE_GROUPS, Q>(w + size_t(g) * Q::GROUP_BYTES, row_bytes, x, size_t(g) * GROUP,
                                                 GROUP_BLOCKS, sum);
    if (rest)
        few_group<ROWS, TOKENS, 0, Q>(w + size_t(full) * Q::GROUP_BYTES, row_bytes, x, size_t(full) * GROUP, rest, sum);
}

template <int ROWS, int TOKENS, class T>
    requires(!Grouped<T>)
INLINE void few_rows(const uint8_t* w, size_t row_bytes, const float* const (&x)[TOKENS], uint32_t k,
                     vf (&sum)[ROWS][TOKENS], float (&rest)[ROWS][TOKENS]) {
    uint32_t i = 0;
    for (; i + W <= k; i += W) {
        vf weights[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) weights[r] = T::lanes(w + r * row_bytes + size_t(i) * T::BYTES);
        UNROLL for (int t = 0; t < TOKENS; t++) {
            const vf each = load<vf>(x[t] + i);
            UNROLL for (int r = 0; r < ROWS; r++) sum[r][t] += weights[r] * each;
        }
    }
    for (; i < k; i++) {
        for (int r = 0; r < ROWS; r++) {
            const float weight = T::one(w + r * row_bytes + size_t(i) * T::BYTES);
            for (int t = 0; t < TOKENS; t++) rest[r][t] += weight * x[t][i];
        }
    }
}

// y[t][STRIP], from row `first` of the strip on, for ROWS rows and TOKENS tokens.
template <class T, int ROWS, int TOKENS>
__attribute__((noinline)) void few_products(const Strip& strip, uint32_t first, const float* const (&x)[TOKENS],
                                            float* y) {
    vf sum[ROWS][TOKENS] = {};
    float rest[ROWS][TOKENS] = {};
    few_rows<ROWS, TOKENS, T>(strip.row(first), strip.row_bytes, x, strip.k, sum, rest);
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int t = 0; t < TOKENS; t++) y[t * STRIP + first + r] = sum_lanes(sum[r][t]) + rest[r][t];
    }
}

// y[N][STRIP] = the rows of a strip times the tokens, of which there are up to N. The last stands for those that lack:
// so every token meets the same code.
template <class T, int N>
void few_strip(const Strip& strip, const Tokens& tokens, float* y) {
    const float* x[N];
    for (int i = 0; i < N; i++) x[i] = tokens.x[std::min(size_t(i), tokens.n - 1)];
    uint32_t r = 0;
    for (; r + WEIGHT_ROWS<N> <= strip.n; r += WEIGHT_ROWS<N>) few_products<T, WEIGHT_ROWS<N>, N>(strip, r, x, y);
    for (; r < strip.n; r++) few_products<T, 1, N>(strip, r, x, y);
}

// As multiply_strips.
template <class T, int N, int MATRICES, class Finish>
void few_strips(const Strip (&strips)[MATRICES], const Tokens& tokens, Finish&& finish) {
    float* y[2] = {};
    for (int i = 0; i < MATRICES; i++) {
        y[i] = workspace().result[i].take<float>(N * STRIP);
        few_strip<T, N>(strips[i], tokens, y[i]);
    }
    for (size_t t = 0; t < tokens.n; t++)
        finish(t, strips[0].n, y[0] + t * STRIP, MATRICES == 2 ? y[1] + t * STRIP : nullptr);
}

}  // namespace
}  // namespace zinc
