// Rows that a block which drafts reads one position later (models/mtp.py). They lie at the places of their positions,
// beside the keys and values.
#include "kv_cache.h"

// Makes x[t] the kept row of the position of row t. T is the type that it is kept in.
// Grid: (ceil(n / ELEMENTWISE_COLUMNS), T). Threads: ELEMENTWISE_THREADS.
template <class T>
kernel void keep_rows(constant ElementwiseParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                      device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                      device const float* x [[buffer(4)]], device T* kept [[buffer(5)]], GRID_IDS) {
    if (tg.y >= step->n_tokens) return;
    const ulong from = ulong(tg.y) * p.n, to = cache_row(pages + rows[tg.y].pages, rows[tg.y].pos) * p.n;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i < p.n) kept[to + i] = T(x[from + i]);
    }
}

// out[t] = [x[t] | the kept row of the position before row t]. Before the first position that is zero.
// Grid: (ceil(n / ELEMENTWISE_COLUMNS), T). Threads: ELEMENTWISE_THREADS.
template <class T>
kernel void pair_rows(constant ElementwiseParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                      device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                      device const T* kept [[buffer(4)]], device const float* x [[buffer(5)]],
                      device float* out [[buffer(6)]], GRID_IDS) {
    if (tg.y >= step->n_tokens) return;
    const uint pos = rows[tg.y].pos;
    const ulong from = cache_row(pages + rows[tg.y].pages, pos == 0 ? 0 : pos - 1) * p.n;
    const ulong row = ulong(tg.y) * p.n;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i >= p.n) continue;
        out[2 * row + i] = x[row + i];
        out[2 * row + p.n + i] = pos == 0 ? 0.0f : float(kept[from + i]);
    }
}

#define KEPT_ROWS(type, T)                                                                                             \
    KERNEL("keep_rows_" type, keep_rows<T>)                                                                            \
    KERNEL("pair_rows_" type, pair_rows<T>)

KEPT_ROWS("f32", float)
KEPT_ROWS("f16", half)
