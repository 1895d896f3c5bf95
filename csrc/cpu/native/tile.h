// Matrix products by register tiles: a panel of rows times a few tokens at once. The panel is packed so that a vector
// holds one column of W rows.
#pragma once

#include "cpu/native/simd.h"

namespace zinc {
namespace {

// A float panel is [k][PANEL]; a tile is PANEL rows by up to TILE_TOKENS tokens, sized to the registers.
#if defined(NATIVE_AVX512) || defined(NATIVE_NEON)
constexpr int PANEL_VECTORS = 4;
#else
constexpr int PANEL_VECTORS = 2;
#endif
constexpr int PANEL = PANEL_VECTORS * W, TILE_TOKENS = 6;

// The places of rows of activations, from a column on: at even distances, or at any addresses.
struct Strided {
    const float* x;
    size_t stride;
    const float* row(size_t i) const { return x + i * stride; }
};
struct Listed {
    const float* const* x;
    size_t column;
    const float* row(size_t i) const { return x[i] + column; }
};

// y[TOKENS][y_stride] += rows [first, first + TOKENS) of x times a panel of k columns.
template <int TOKENS, class Rows>
INLINE void float_tile(const float* panel, const Rows& x, size_t first, int k, float* y, size_t y_stride) {
    vf sum[TOKENS][PANEL_VECTORS];  // stays in registers as long as every loop over it is unrolled
    const float* rows[TOKENS];
    UNROLL for (int t = 0; t < TOKENS; t++) {
        rows[t] = x.row(first + t);
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) sum[t][v] = load<vf>(y + t * y_stride + v * W);
    }
    for (int i = 0; i < k; i++) {
        vf w[PANEL_VECTORS];
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) w[v] = load<vf>(panel + size_t(i) * PANEL + v * W);
        UNROLL for (int t = 0; t < TOKENS; t++) {
            const vf each = splat(rows[t][i]);
            UNROLL for (int v = 0; v < PANEL_VECTORS; v++) sum[t][v] += w[v] * each;
        }
    }
    UNROLL for (int t = 0; t < TOKENS; t++) {
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) store(y + t * y_stride + v * W, sum[t][v]);
    }
}

// Calls tile<TOKENS>(first) over n tokens, in runs of at most TILE_TOKENS, as even as possible.
template <class Tile>
INLINE void for_token_runs(size_t n, Tile&& tile) {
    const size_t runs = (n + TILE_TOKENS - 1) / TILE_TOKENS;
    for (size_t r = 0; r < runs; r++) {
        const size_t first = n * r / runs;
        switch (n * (r + 1) / runs - first) {
        case 1:
            tile.template operator()<1>(first);
            break;
        case 2:
            tile.template operator()<2>(first);
            break;
        case 3:
            tile.template operator()<3>(first);
            break;
        case 4:
            tile.template operator()<4>(first);
            break;
        case 5:
            tile.template operator()<5>(first);
            break;
        default:
            tile.template operator()<6>(first);
            break;
        }
    }
}

// y[n][y_stride] += x[n][x_stride] times a panel of k columns.
inline void multiply_panel(const float* panel, const float* x, size_t x_stride, size_t n, int k, float* y,
                           size_t y_stride) {
    for_token_runs(n, [&]<int TOKENS>(size_t first) {
        float_tile<TOKENS>(panel, Strided{x, x_stride}, first, k, y + first * y_stride, y_stride);
    });
}

// a[0] b[0] a[1] b[1] ... from the low or the high half of each run of RUN lanes.
template <int RUN, bool HIGH, class V, size_t... I>
INLINE V zip(V a, V b, std::index_sequence<I...>) {
    constexpr int LANES = sizeof...(I);
    return __builtin_shufflevector(a, b,
                                   (int(I / RUN * RUN + (HIGH ? RUN / 2 : 0) + I % RUN / 2 + (I % 2 ? LANES : 0)))...);
}

// Transposes N vectors in place, seen as N x N matrices side by side: each run of N lanes is one.
template <int N, class V>
INLINE void transpose(V* rows) {
    constexpr auto lanes = std::make_index_sequence<sizeof(V) / 4>();
    UNROLL for (int round = 1; round < N; round *= 2) {
        V next[N];
        UNROLL for (int i = 0; i < N / 2; i++) {
            next[2 * i] = zip<N, false>(rows[i], rows[i + N / 2], lanes);
            next[2 * i + 1] = zip<N, true>(rows[i], rows[i + N / 2], lanes);
        }
        UNROLL for (int i = 0; i < N; i++) rows[i] = next[i];
    }
}

// rows[PANEL][stride] to panel[k][PANEL]; k rounded up to W is readable and writable.
inline void pack_panel(const float* rows, size_t stride, int k, float* panel) {
    for (int r = 0; r < PANEL; r += W)
        for (int i = 0; i < k; i += W) {
            vf block[W];
            UNROLL for (int j = 0; j < W; j++) block[j] = load<vf>(rows + (r + j) * stride + i);
            transpose<W>(block);
            UNROLL for (int j = 0; j < W; j++) store(panel + size_t(i + j) * PANEL + r, block[j]);
        }
}

}  // namespace
}  // namespace zinc
