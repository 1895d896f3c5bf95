// Products of a strip of a matrix's rows with the rows of any activations. Every weight is unpacked once for all rows.
#pragma once

#include <algorithm>

#include "cpu/native/dot.h"
#include "cpu/native/register.h"
#include "cpu/native/tile.h"

namespace zinc {
namespace {

constexpr size_t FEW_TOKENS = 24;     // up to here, unpacking costs so much that a panel is not worth its packing
constexpr uint32_t PANEL_PART = 128;  // columns of a panel, which then stays in the L1 cache
constexpr uint32_t DOT_ROWS = 16;     // rows that dot products take at a time; whole vectors of them
constexpr uint32_t DOT_PART = 256;    // columns of theirs: with the tokens of a tile they stay in the L1 cache

// Rows of W, quantised or not: the first row of a strip, and the number of rows.
struct Strip {
    const uint8_t* w;
    size_t row_bytes;
    uint32_t n, k;

    const uint8_t* row(uint32_t i) const { return w + size_t(std::min(i, n - 1)) * row_bytes; }
};

// n rows of activations. Their number in the whole step decides the method: dividing a step among threads changes no
// bit of the result.
struct Tokens {
    const float* const* x;
    size_t n;
    bool few;

    Tokens(const float* const* rows, size_t count, size_t in_all) : x(rows), n(count), few(in_all <= FEW_TOKENS) {}
};

// Columns [c, c + count) of n rows of a strip as floats, `stride` apart.
template <class T>
void unpack(const Strip& strip, uint32_t first, uint32_t n, uint32_t c, uint32_t count, float* out, size_t stride) {
    for (uint32_t i = 0; i < n; i++) dequantise<T>(strip.row(first + i), c, count, out + i * stride);
}

// ---- many tokens: panels

// y[n][STRIP] += a panel of columns [c, c + count) times every token. Prefetches the tokens of the next tile: rows that
// lie a power of two apart fall out of the cache between two panels. Not inlined: all types share one.
__attribute__((noinline)) void panel_tokens(const float* panel, const Tokens& tokens, uint32_t c, uint32_t count,
                                            float* y) {
    const Listed x{tokens.x, c};
    for_token_runs(tokens.n, [&]<int TOKENS>(size_t t) {
        for (size_t next = t + TOKENS; next < std::min(t + 2 * TOKENS, tokens.n); next++)
            for (uint32_t i = 0; i < count; i += 16) __builtin_prefetch(x.row(next) + i);
        float_tile<TOKENS>(panel, x, t, int(count), y + t * STRIP, STRIP);
    });
}

// y[n][STRIP] += the columns [c, c + count) of PANEL rows from `first` on.
template <class T>
void panel_products(const Strip& strip, uint32_t first, uint32_t c, uint32_t count, const Tokens& tokens, float* y) {
    float* const panel = workspace().panel.take<float>(PANEL_PART * PANEL);
    float* const unpacked = workspace().weights.take<float>(PANEL_PART * PANEL);
    unpack<T>(strip, first, PANEL, c, count, unpacked, PANEL_PART);
    pack_panel(unpacked, PANEL_PART, int(count), panel);
    panel_tokens(panel, tokens, c, count, y + first);
}

// ---- few tokens: dot products

// sums[TOKENS][DOT_ROWS] += PANEL_VECTORS rows of weights, DOT_PART apart, times rows [first, first + TOKENS) of x.
template <int TOKENS>
INLINE void dot_tile(const float* weights, const Listed& x, size_t first, uint32_t count, vf* sums) {
    vf sum[TOKENS][PANEL_VECTORS];
    const float* rows[TOKENS];
    UNROLL for (int t = 0; t < TOKENS; t++) {
        rows[t] = x.row(first + t);
        UNROLL for (int r = 0; r < PANEL_VECTORS; r++) sum[t][r] = sums[t * DOT_ROWS + r];
    }
    for (uint32_t i = 0; i < count; i += W) {
        vf w[PANEL_VECTORS];
        UNROLL for (int r = 0; r < PANEL_VECTORS; r++) w[r] = load<vf>(weights + r * DOT_PART + i);
        UNROLL for (int t = 0; t < TOKENS; t++) {
            const vf each = load<vf>(rows[t] + i);
            UNROLL for (int r = 0; r < PANEL_VECTORS; r++) sum[t][r] += w[r] * each;
        }
    }
    UNROLL for (int t = 0; t < TOKENS; t++) {
        UNROLL for (int r = 0; r < PANEL_VECTORS; r++) sums[t * DOT_ROWS + r] = sum[t][r];
    }
}

// A vector with the sums of the lanes of W vectors. It is a transposition with an addition at every step.
INLINE vf sum_each(const vf* vectors) {
    constexpr auto lanes = std::make_index_sequence<W>();
    vf v[W];
    UNROLL for (int i = 0; i < W; i++) v[i] = vectors[i];
    UNROLL for (int n = W / 2; n > 0; n /= 2) {
        UNROLL for (int i = 0; i < W / 2; i++) if (i < n) v[i] =
            zip<W, false>(v[i], v[i + n], lanes) + zip<W, true>(v[i], v[i + n], lanes);
    }
    return v[0];
}

// sums[n][DOT_ROWS] += the weights of DOT_ROWS rows, DOT_PART apart, from column c on, times every token.
__attribute__((noinline)) void dot_tokens(const float* weights, const Tokens& tokens, uint32_t c, uint32_t count,
                                          vf* sums) {
    for_token_runs(tokens.n, [&]<int TOKENS>(size_t t) {
        for (uint32_t r = 0; r < DOT_ROWS; r += PANEL_VECTORS)
            dot_tile<TOKENS>(weights + r * DOT_PART, {tokens.x, c}, t, count, sums + t * DOT_ROWS + r);
    });
}

// y[n][STRIP] = DOT_ROWS rows from `first` on times every token; columns in whole vectors.
template <class T>
void dot_products(const Strip& strip, uint32_t first, uint32_t k, const Tokens& tokens, float* y) {
    float* const weights = workspace().weights.take<float>(DOT_ROWS * DOT_PART);
    vf* const sums = workspace().sums.take<vf>(tokens.n * DOT_ROWS);
    std::memset(static_cast<void*>(sums), 0, tokens.n * DOT_ROWS * sizeof(vf));
    for (uint32_t c = 0; c < k; c += DOT_PART) {
        const uint32_t count = std::min(k - c, DOT_PART);
        unpack<T>(strip, first, DOT_ROWS, c, count, weights, DOT_PART);
        dot_tokens(weights, tokens, c, count, sums);
    }
    for (size_t t = 0; t < tokens.n; t++)
        for (uint32_t r = 0; r < DOT_ROWS; r += W) store(y + t * STRIP + first + r, sum_each(sums + t * DOT_ROWS + r));
}

// ---- either

// y[n tokens][STRIP] = the rows of a strip times every token. Rows past the strip's are undefined.
template <class T>
__attribute__((noinline)) void multiply_strip(const Strip& strip, const Tokens& tokens, float* y) {
    const uint32_t dot_columns = tokens.few ? strip.k / W * W : 0;
    if (tokens.few)
        for (uint32_t r = 0; r < strip.n; r += DOT_ROWS) dot_products<T>(strip, r, dot_columns, tokens, y);
    else
        std::memset(y, 0, tokens.n * STRIP * sizeof(float));
    for (uint32_t r = 0; r < strip.n; r += PANEL)
        for (uint32_t c = dot_columns; c < strip.k; c += PANEL_PART)
            panel_products<T>(strip, r, c, std::min(strip.k - c, PANEL_PART), tokens, y);
}

// Computes the products of a strip of MATRICES matrices, and passes them to finish(token, n, y0, y1).
template <class T, int MATRICES, class Finish>
void multiply_strips(const Strip (&strips)[MATRICES], const Tokens& tokens, Finish&& finish) {
    float* y[2] = {};
    for (int i = 0; i < MATRICES; i++) {
        y[i] = workspace().result[i].take<float>(tokens.n * STRIP);
        multiply_strip<T>(strips[i], tokens, y[i]);
    }
    for (size_t t = 0; t < tokens.n; t++)
        finish(t, strips[0].n, y[0] + t * STRIP, MATRICES == 2 ? y[1] + t * STRIP : nullptr);
}

// ---- the grid

// Threadgroups [begin, end) of a grid with x fastest, as blocks: calls block(xs, ys) for ranges of both. Whole lines go
// together, so that rows (along y) fill strips for any number of rows in a threadgroup of the MSL kernel.
template <class Block>
void for_blocks(uint64_t begin, uint64_t end, uint32_t width, Block&& block) {
    while (begin < end) {
        const uint64_t x = begin % width, whole = x == 0 ? (end - begin) / width : 0;
        const uint64_t n = whole ? whole * width : std::min(end - begin, width - x);
        const uint64_t last = begin + n - 1;
        block(Range{uint32_t(x), uint32_t(last % width + 1)},
              Range{uint32_t(begin / width), uint32_t(last / width + 1)});
        begin += n;
    }
}

// The pieces of n things that belong to a range of the grid.
INLINE Range pieces(uint32_t n, Range of, uint32_t in) {
    return {piece(n, of.begin, in).begin, piece(n, of.end - 1, in).end};
}

}  // namespace
}  // namespace zinc
