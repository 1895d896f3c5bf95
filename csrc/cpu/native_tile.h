// Matrix products by register tiles: a panel of rows, packed so that a vector holds the same column of W rows, times a
// few tokens at once. One tile in float32 for every instruction set, one in integers where there is VNNI.
#pragma once

#include <utility>

#include "native_activations.h"

namespace zinc {
namespace {

// A float panel is [k][PANEL]; a tile is PANEL rows by up to TILE_TOKENS tokens, sized to the registers.
#if defined(NATIVE_AVX512) || defined(NATIVE_NEON)
constexpr int PANEL_VECTORS = 4;
#else
constexpr int PANEL_VECTORS = 2;
#endif
constexpr int PANEL = PANEL_VECTORS * W, TILE_TOKENS = 6;

template <int TOKENS>
INLINE void float_tile(const float *panel, const float *x, size_t x_stride, int k, float *y, size_t y_stride) {
    vf sum[TOKENS][PANEL_VECTORS];
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < PANEL_VECTORS; v++) sum[t][v] = load<vf>(y + t * y_stride + v * W);
    for (int i = 0; i < k; i++) {
        vf w[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++) w[v] = load<vf>(panel + size_t(i) * PANEL + v * W);
        for (int t = 0; t < TOKENS; t++)
            for (int v = 0; v < PANEL_VECTORS; v++) sum[t][v] += w[v] * splat(x[t * x_stride + i]);
    }
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < PANEL_VECTORS; v++) store(y + t * y_stride + v * W, sum[t][v]);
}

// Calls tile<TOKENS>(first) over n tokens, in runs of at most TILE_TOKENS that are as even as they can be.
template <class Tile> INLINE void for_token_runs(size_t n, Tile &&tile) {
    const size_t runs = (n + TILE_TOKENS - 1) / TILE_TOKENS;
    for (size_t r = 0; r < runs; r++) {
        const size_t first = n * r / runs;
        switch (n * (r + 1) / runs - first) {
        case 1: tile.template operator()<1>(first); break;
        case 2: tile.template operator()<2>(first); break;
        case 3: tile.template operator()<3>(first); break;
        case 4: tile.template operator()<4>(first); break;
        case 5: tile.template operator()<5>(first); break;
        default: tile.template operator()<6>(first); break;
        }
    }
}

// y[n][y_stride] += x[n][x_stride] times a panel of k columns.
inline void multiply_panel(const float *panel, const float *x, size_t x_stride, size_t n, int k, float *y, size_t y_stride) {
    for_token_runs(n, [&]<int TOKENS>(size_t first) {
        float_tile<TOKENS>(panel, x + first * x_stride, x_stride, k, y + first * y_stride, y_stride);
    });
}

// Lanes 0, S, 2S ... of two vectors in turn: a[0] b[0] a[1] b[1] ... within each run of RUN lanes, from its low or high half.
template <int RUN, bool HIGH, class V, size_t... I> INLINE V zip(V a, V b, std::index_sequence<I...>) {
    constexpr int LANES = sizeof...(I);
    return __builtin_shufflevector(a, b, (int(I / RUN * RUN + (HIGH ? RUN / 2 : 0) + I % RUN / 2 + (I % 2 ? LANES : 0)))...);
}

// Transposes N vectors in place, seen as N x N matrices side by side: each run of N lanes is one.
template <int N, class V> INLINE void transpose(V *rows) {
    constexpr auto lanes = std::make_index_sequence<sizeof(V) / 4>();
    for (int round = 1; round < N; round *= 2) {
        V next[N];
#pragma GCC unroll 8
        for (int i = 0; i < N / 2; i++) {
            next[2 * i] = zip<N, false>(rows[i], rows[i + N / 2], lanes);
            next[2 * i + 1] = zip<N, true>(rows[i], rows[i + N / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) rows[i] = next[i];
    }
}

// rows[PANEL][stride] to panel[k][PANEL]; k rounded up to W is readable and writable.
inline void pack_panel(const float *rows, size_t stride, int k, float *panel) {
    for (int r = 0; r < PANEL; r += W)
        for (int i = 0; i < k; i += W) {
            vf block[W];
            for (int j = 0; j < W; j++) block[j] = load<vf>(rows + (r + j) * stride + i);
            transpose<W>(block);
            for (int j = 0; j < W; j++) store(panel + size_t(i + j) * PANEL + r, block[j]);
        }
}

#if defined(NATIVE_AVX512)

// An integer panel: 32 rows of unsigned quants, [k / 4][2][16 rows][4], and per SUB weights their scales and offsets.
constexpr int INT_PANEL = 32;
constexpr size_t INT_PANEL_BLOCK = BLOCK * INT_PANEL;  // bytes of 32 columns

struct IntPanel {
    uint8_t *quants;
    float *scales;   // [subs][32]
    float *offsets;  // [subs][32]
};

template <class Q> INLINE void pack_block(const uint8_t *const *groups, int j, uint8_t *out) {
    for (int half = 0; half < 2; half++) {
        const uint8_t *const *row = groups + half * 16;
        vi v[8];
        for (int r = 0; r < 8; r++)
            v[r] = (vi)_mm512_mask_blend_epi64(0xf0, (__m512i)Q::quants(row[r], j), (__m512i)Q::quants(row[r + 8], j));
        transpose<8>(v);
        for (int quad = 0; quad < 8; quad++) store(out + (quad * 2 + half) * 64, v[quad]);
    }
}

// Packs n rows from w on; rows past n repeat the last one.
template <class Q> void pack_quants(const uint8_t *w, size_t row_bytes, int n, uint32_t k, const IntPanel &panel) {
    constexpr int SUBS = GROUP / Q::SUB;
    const int blocks = int(k / BLOCK);
    for (int g = 0; g * GROUP_BLOCKS < blocks; g++) {
        const int n_blocks = blocks - g * GROUP_BLOCKS < GROUP_BLOCKS ? blocks - g * GROUP_BLOCKS : GROUP_BLOCKS;
        const uint8_t *groups[INT_PANEL];
        for (int r = 0; r < INT_PANEL; r++) {
            groups[r] = w + size_t(r < n ? r : n - 1) * row_bytes + size_t(g) * Q::GROUP_BYTES;
            Affine<SUBS> a;
            Q::affine(groups[r], n_blocks, a);
            for (int s = 0; s < SUBS; s++) {
                panel.scales[(g * SUBS + s) * INT_PANEL + r] = a.scale[s];
                panel.offsets[(g * SUBS + s) * INT_PANEL + r] = a.offset[s];
            }
        }
        for (int j = 0; j < n_blocks; j++)
            pack_block<Q>(groups, j, panel.quants + (g * GROUP_BLOCKS + j) * INT_PANEL_BLOCK);
    }
}

// One plane of SUB columns: sums[v][t] += quants · x.
template <int SUB, int TOKENS>
INLINE void add_plane(const uint8_t *quants, const uint8_t *x, size_t x_stride, __m512i (&sums)[2][TOKENS]) {
#pragma GCC unroll 8
    for (int quad = 0; quad < SUB / 4; quad++) {
        const __m512i w0 = _mm512_load_si512(quants + quad * 128), w1 = _mm512_load_si512(quants + quad * 128 + 64);
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; t++) {
            const __m512i four = _mm512_set1_epi32(load<int>(x + t * x_stride + quad * 4));
            sums[0][t] = _mm512_dpbusd_epi32(sums[0][t], w0, four);
            sums[1][t] = _mm512_dpbusd_epi32(sums[1][t], w1, four);
        }
    }
}

// y[t][32] = a panel of k columns times tokens [first, first + TOKENS).
template <int SUB, int TOKENS>
INLINE void int_tile(const IntPanel &panel, const Activations &x, size_t first, uint32_t k, float *y, size_t y_stride) {
    __m512 result[2][TOKENS] = {};
    const uint8_t *planes = x.values + first * x.value_bytes;
    for (size_t s = 0; s < k / SUB; s++) {
        const uint8_t *quants = panel.quants + s * SUB * INT_PANEL;
        const uint8_t *low = planes + s * SUB / BLOCK * 2 * BLOCK + s * SUB % BLOCK;
        __m512i sums[2][TOKENS] = {};
        add_plane<SUB>(quants, low + BLOCK, x.value_bytes, sums);
        for (int v = 0; v < 2; v++)
            for (int t = 0; t < TOKENS; t++) sums[v][t] = _mm512_slli_epi32(sums[v][t], 8);
        add_plane<SUB>(quants, low, x.value_bytes, sums);
        for (int v = 0; v < 2; v++) {
            const __m512 scale = _mm512_load_ps(panel.scales + s * INT_PANEL + v * 16);
            const __m512 offset = _mm512_load_ps(panel.offsets + s * INT_PANEL + v * 16);
            for (int t = 0; t < TOKENS; t++) {
                const size_t at = (first + t) * x.n_subs + s;
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[at]));
                result[v][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[v][t]), both, result[v][t]);
                result[v][t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sums[at]), result[v][t]);
            }
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(y + t * y_stride + v * 16, result[v][t]);
}

#endif

}  // namespace
}  // namespace zinc
