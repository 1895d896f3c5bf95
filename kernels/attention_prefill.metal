// Attention for many queries: tiles of them by tiles of keys, on 8x8 matrices.
#include "attention_tiles.h"

// The shape of a threadgroup of attention_prefill. A simdgroup owns 8 query rows and DIM / SPLIT columns of the head.
// SPLIT simdgroups share a head that is too wide for the registers of one. Each computes a summand of every score.
template <uint DIM_, uint QUERIES_, uint KEYS_, uint SPLIT_>
struct PrefillShape {
    static constant constexpr uint DIM = DIM_;
    static constant constexpr uint QUERIES = QUERIES_;  // rows of a threadgroup
    static constant constexpr uint KEYS = KEYS_;        // keys of a tile
    static constant constexpr uint SPLIT = SPLIT_;
    static constant constexpr uint SIMDGROUPS = QUERIES / 8 * SPLIT;
    static constant constexpr uint THREADS = SIMDGROUPS * SIMD;
    static constant constexpr uint FRAGMENTS = DIM / 8 / SPLIT, VALUE_FRAGMENTS = FRAGMENTS;
    // Rows are padded by a float4, so that the 8 rows of a fragment lie in different banks.
    static constant constexpr uint ROW4 = DIM / 4 + 1;
    static constant constexpr uint ROW = 4 * ROW4;
    static constant constexpr uint SCORE_ROW = KEYS + 4;
    static_assert(THREADS == ATTENTION_PREFILL_THREADS, "as launched");
    static_assert(QUERIES <= KEYS, "the tile of keys also stages the queries and the result");
    static_assert(DIM % (8 * SPLIT) == 0 && KEYS % 8 == 0, "whole fragments");
    static_assert(KV_PAGE % KEYS == 0, "a tile of keys lies in one page");
};

// Threadgroups by (head, tile of queries). Each takes every n_tg.y-th tile, so that the grid decides only the speed.
// With `singles` it leaves the first rows, which are runs of one row, to attention_decode.
// Grid: (n_head, ceil(T / QUERIES)). Threads: ATTENTION_PREFILL_THREADS.
template <class KV, class Shape>
kernel void
attention_prefill(constant AttentionParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                  device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                  device const float4* q [[buffer(4)]], device const typename KV::Unit* k_cache [[buffer(5)]],
                  device const typename KV::Unit* v_cache [[buffer(6)]], device const float4* gate [[buffer(7)]],
                  device const float* sinks [[buffer(8)]], device float4* out [[buffer(9)]], GRID_IDS) {
    TG_ARRAY(float4, tile4, Shape::KEYS * Shape::ROW4);
    TG_ARRAY(float, scores, Shape::SIMDGROUPS * 8 * Shape::SCORE_ROW);
    TG_ARRAY(float, diagonals, Shape::SIMDGROUPS * 64);

    const uint head = tg.x;
    const uint dim4 = p.head_dim / 4;
    const uint head_units = p.head_dim / KV::ELEMENTS;
    const ulong q_stride = ulong(p.n_head) * dim4;
    const ulong kv_stride = ulong(p.n_head_kv) * head_units;
    const ulong kv_column = head / (p.n_head / p.n_head_kv) * head_units;

    threadgroup float* tile = (threadgroup float*)tile4;
    const uint my_rows = sg / Shape::SPLIT * 8;  // of the tile, for this simdgroup
    const uint cols = sg % Shape::SPLIT * (8 * Shape::FRAGMENTS);
    threadgroup float* my_scores = scores + sg * 8 * Shape::SCORE_ROW;
    threadgroup const float* row_scores = scores + my_rows * Shape::SPLIT * Shape::SCORE_ROW;
    threadgroup float* diagonal = diagonals + sg * 64;
    diagonal[lane] = 0.0f;
    diagonal[lane + SIMD] = 0.0f;

    for (TilePlace<Shape::QUERIES> at = {p.singles ? step->n_single : 0, tg.y, 1}; at.find(step, rows);
         at.tile += n_tg.y) {
        const uint first = at.run + at.tile * Shape::QUERIES;
        const uint n_rows = min(uint(Shape::QUERIES), rows[at.run].end - first);
        const uint pos = rows[at.run].pos + at.tile * Shape::QUERIES;
        device const uint* table = pages + rows[at.run].pages;
        // This lane's row; rows past the run's last repeat it, so that each has a key.
        const uint last = pos + rows[at.run].end - first - 1;
        const KeyRange row_keys = visible_keys(p, pos + min(my_rows + lane / 4, n_rows - 1), last);
        const KeyRange keys = {visible_keys(p, pos, last).begin, visible_keys(p, pos + n_rows - 1, last).end};
        const ulong q_start = first * q_stride + head * dim4;

        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage_tile<Shape, Shape::QUERIES, CacheF32>(tile4, q + q_start, q_stride, {0, n_rows}, dim4, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        TileRows<Shape> share;
        share.load_queries(tile + my_rows * Shape::ROW + cols);
        RowSoftmax<Shape> softmax;
        softmax.begin(sink_score(p, sinks, head), p.has_sinks != 0, lane);

        for (uint key = keys.begin / Shape::KEYS * Shape::KEYS; key < keys.end; key += Shape::KEYS) {
            const ulong kv_start = cache_row(table, key) * kv_stride + kv_column;
            const KeyRange staged = in_tile(keys, key);
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been used
            stage_tile<Shape, Shape::KEYS, KV>(tile4, k_cache + kv_start, kv_stride, staged, dim4, tid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            share.score(tile + cols, my_scores);
            threadgroup_barrier(mem_flags::mem_threadgroup);  // all scores are there, the keys have been used
            stage_tile<Shape, Shape::KEYS, KV>(tile4, v_cache + kv_start, kv_stride, staged, dim4, tid);
            const float factor = softmax.take(row_scores, p.scale * LOG2_E, in_tile(row_keys, key), lane);
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the values are there, the scores have been used
            softmax.store_weights(my_scores, lane);
            if (simd_any(factor != 1.0f)) share.scale_rows(factor, diagonal, lane);
            share.accumulate(my_scores, tile + cols);
        }

        share.scale_rows(1.0f / softmax.total(), diagonal, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        share.store(tile + my_rows * Shape::ROW + cols);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = tid; i < n_rows * dim4; i += Shape::THREADS) {
            const uint row = i / dim4, col = i % dim4;
            out[q_start + row * q_stride + col] =
                gated(p, gate, ulong(first + row) * p.n_head + head, col, tile4[row * Shape::ROW4 + col]);
        }
    }
}

typedef PrefillShape<32, ATTENTION_PREFILL_QUERIES, 32, 1> Prefill32;
typedef PrefillShape<64, ATTENTION_PREFILL_QUERIES, 32, 1> Prefill64;
typedef PrefillShape<96, ATTENTION_PREFILL_QUERIES, 32, 1> Prefill96;
typedef PrefillShape<128, ATTENTION_PREFILL_QUERIES, 32, 1> Prefill128;
typedef PrefillShape<256, ATTENTION_PREFILL_QUERIES_256, 16, 2> Prefill256;
typedef PrefillShape<512, ATTENTION_PREFILL_QUERIES_512, 8, 4> Prefill512;  // 16 keys exceed threadgroup memory

#define PREFILL(kv, KV, dim) KERNEL("attention_prefill_" kv "_" #dim, attention_prefill<KV, Prefill##dim>)
HEAD_CLASSES(PREFILL)
