// Attention over latent vectors (multi-head latent attention, arXiv 2405.04434, section 2.1, with its matrices
// absorbed). The cache of a layer has one row for each position, which all heads share: the latent vector, then a key
// that rotates. A key is the whole row, and its value is the latent vector. So the queries of a row of the step are
// n_head vectors that see the same keys, and a tile takes queries of all heads.
#include "attention_parts.h"
#include "attention_tiles.h"

// Bindings have a row of each head of each row of the step: query t * n_head + head.
template <uint LATENT_>
struct LatentShape {
    typedef float T;
    static constant constexpr uint LATENT = LATENT_, DIM = LATENT + LATENT_MAX_ROT;
    static constant constexpr uint QUERIES = ATTENTION_LATENT_QUERIES, KEYS = 8, SPLIT = 4, ROWS = 8;
    static constant constexpr uint SIMDGROUPS = QUERIES / ROWS * SPLIT, THREADS = SIMDGROUPS * SIMD;
    static constant constexpr uint FRAGMENTS = DIM / 8 / SPLIT, VALUE_FRAGMENTS = LATENT / 8 / SPLIT;
    static constant constexpr uint SCORE_ROW = KEYS + 4;
    static_assert(THREADS == ATTENTION_LATENT_THREADS, "as launched");
    static_assert(LATENT % (8 * SPLIT) == 0 && DIM % (8 * SPLIT) == 0, "whole fragments");
    static_assert(KV_PAGE % KEYS == 0 && ATTENTION_SPLIT_KEYS % KEYS == 0, "a tile of keys lies in one page and share");
};

// The place of four columns of a row, of rows by eight that lie as matrices.
template <class Shape>
METAL_FUNC uint place_of(uint row, uint col4) {
    return col4 / 2 * (8 * Shape::ROWS) + row * 8 + col4 % 2 * 4;
}

// Up to 8 queries, from `first` on, into the tile: latent parts, then the parts that rotate. Others are zero.
template <class Shape>
METAL_FUNC void stage_queries(constant LatentParams& p, threadgroup float* tile, device const float4* q,
                              device const float4* q_rot, ulong first, uint n, uint tid) {
    const uint latent4 = p.latent / 4, rot4 = p.n_rot / 4;
    for (uint i = tid; i < Shape::ROWS * (Shape::DIM / 4); i += Shape::THREADS) {
        const uint row = i / (Shape::DIM / 4), col = i % (Shape::DIM / 4);
        float4 x = float4(0.0f);
        if (row < n && col < latent4) x = q[(first + row) * latent4 + col];
        if (row < n && col >= latent4 && col < latent4 + rot4) x = q_rot[(first + row) * rot4 + col - latent4];
        store_quad(tile + place_of<Shape>(row, col), x);
    }
}

// Threadgroups by (tile of queries, share of the keys). Each takes every n_tg.x-th tile of the step, so that the grid's
// x decides only the speed. With PARTS all rows of the step are runs of one row, and out takes the results of n_split
// shares for attention_merge: see part_at. Otherwise out is [T, n_head, latent].
// Grid: (ceil(T n_head / ATTENTION_LATENT_QUERIES), n_split). Threads: ATTENTION_LATENT_THREADS.
template <class KV, class Shape, bool PARTS>
kernel void attention_latent(constant LatentParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                             device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                             device const float4* q [[buffer(4)]], device const float4* q_rot [[buffer(5)]],
                             device const typename KV::Unit* cache [[buffer(6)]], device float4* out [[buffer(7)]],
                             GRID_IDS) {
    typedef TileSizes<Shape> Sizes;
    TG_ARRAY(float4, tile4, Sizes::TILE / 4);
    TG_ARRAY(float, scores, Shape::SIMDGROUPS* Sizes::SCORES);
    TG_ARRAY(float, weights, Shape::SIMDGROUPS* Sizes::SCORES);
    TG_ARRAY(float, diagonals, Shape::SIMDGROUPS * 64);

    const uint latent4 = p.latent / 4, row_units = (p.latent + p.n_rot) / KV::ELEMENTS;
    threadgroup float* tile = (threadgroup float*)tile4;
    const uint my_rows = sg / Shape::SPLIT * Shape::ROWS;  // of the tile, for this simdgroup
    const uint key_run = sg % Shape::SPLIT * Shape::FRAGMENTS, value_run = sg % Shape::SPLIT * Shape::VALUE_FRAGMENTS;
    threadgroup float* my_scores = scores + sg * Sizes::SCORES;
    threadgroup const float* row_scores = scores + sg / Shape::SPLIT * Shape::SPLIT * Sizes::SCORES;
    threadgroup float* my_weights = weights + sg * Sizes::SCORES;
    threadgroup float* diagonal = diagonals + sg * 64;
    diagonal[lane] = 0.0f;
    diagonal[lane + SIMD] = 0.0f;

    for (TilePlace<Shape::QUERIES> at = {0, tg.x, p.n_head}; at.find(step, rows); at.tile += n_tg.x) {
        const uint first = at.tile * Shape::QUERIES;  // of the run's queries
        const uint n = min(uint(Shape::QUERIES), (rows[at.run].end - at.run) * p.n_head - first);
        const ulong query = ulong(at.run) * p.n_head + first;
        const uint pos = rows[at.run].pos;
        device const uint* table = pages + rows[at.run].pages;
        KeyRange keys = {0, pos + (first + n - 1) / p.n_head + 1};
        if (PARTS) {
            KeyParts parts = key_parts(keys, p.n_split);
            if (tg.y >= parts.n) continue;
            keys = parts.part(tg.y);
        }
        // This lane's query. Those past the tile's last repeat it, so that each has a key.
        const uint mine = min(my_rows + lane / 4, n - 1);
        const KeyRange row_keys = {keys.begin, min(keys.end, pos + (first + mine) / p.n_head + 1)};

        TileRows<Shape> share;
        for (uint row = 0; row < Shape::QUERIES; row += Shape::ROWS) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            stage_queries<Shape>(p, tile, q, q_rot, query + row, n > row ? n - row : 0, tid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (my_rows == row) share.load_queries(tile + key_run * (8 * Shape::ROWS));
        }
        RowSoftmax<Shape> softmax;
        softmax.begin(LOWEST_SCORE, false, lane);

        for (uint key = keys.begin / Shape::KEYS * Shape::KEYS; key < keys.end; key += Shape::KEYS) {
            device const typename KV::Unit* from = cache + cache_row(table, key) * row_units;
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been used
            stage_tile<Shape, KV>(tile, from, row_units, in_tile(keys, key), latent4 + p.n_rot / 4, tid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            share.score(tile + key_run * Sizes::RUN, my_scores);
            threadgroup_barrier(mem_flags::mem_threadgroup);  // all scores are there
            const float factor = softmax.take(row_scores, p.scale * LOG2_E, in_tile(row_keys, key), lane);
            softmax.store_weights(my_weights, lane);
            if (simd_any(factor != 1.0f)) share.scale(factor, diagonal, lane);
            share.accumulate(my_weights, tile + value_run * Sizes::RUN);
        }

        const float total = softmax.total();
        if (!PARTS) share.scale(1.0f / total, diagonal, lane);
        for (uint row = 0; row < Shape::QUERIES; row += Shape::ROWS) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (my_rows == row) share.store(tile + value_run * (8 * Shape::ROWS));
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint i = tid; i < min(n - min(n, row), 8u) * latent4; i += Shape::THREADS) {
                const ulong to = query + row + i / latent4;
                const ulong begin = PARTS ? part_at(to, p.n_split, tg.y, latent4) : to * latent4;
                out[begin + i % latent4] =
                    *(threadgroup const float4*)(tile + place_of<Shape>(i / latent4, i % latent4));
            }
        }
        if (PARTS && sg % Shape::SPLIT == 0 && lane % 4 == 0 && my_rows + lane / 4 < n) {
            out[part_at(query + mine, p.n_split, tg.y, latent4) + latent4] =
                float4(softmax.reference - HEADROOM, total, 0.0f, 0.0f);
        }
    }
}

#define LATENT(kv, KV, latent)                                                                                         \
    KERNEL("attention_latent_" kv "_" #latent, attention_latent<KV, LatentShape<latent>, false>)                       \
    KERNEL("attention_latent_split_" kv "_" #latent, attention_latent<KV, LatentShape<latent>, true>)
LATENT_CLASSES_OF(LATENT, "f32", CacheF32)
LATENT_CLASSES_OF(LATENT, "f16", CacheF16)
LATENT_CLASSES_OF(LATENT, "q8_0", CacheQ8_0)
