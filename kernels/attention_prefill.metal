// Attention for many queries: tiles of them by tiles of keys, on 8x8 matrices.
#include "attention.h"

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
    static constant constexpr uint FRAGMENTS = DIM / 8 / SPLIT;
    // Rows are padded by a float4, so that the 8 rows of a fragment lie in different banks.
    static constant constexpr uint ROW4 = DIM / 4 + 1;
    static constant constexpr uint ROW = 4 * ROW4;
    static constant constexpr uint SCORE_ROW = KEYS + 4;
    static_assert(THREADS == ATTENTION_PREFILL_THREADS, "as launched");
    static_assert(QUERIES <= KEYS, "the tile of keys also stages the queries and the result");
    static_assert(DIM % (8 * SPLIT) == 0 && KEYS % 8 == 0, "whole fragments");
    static_assert(KV_PAGE % KEYS == 0, "a tile of keys lies in one page");
};

// Copies a tile of ROWS head vectors into threadgroup memory as floats. Rows out of range and columns past the head are
// zero and not read: beyond the last token the cache may hold any bits, NaN included. row_stride is in units.
template <class Shape, uint ROWS, class KV>
METAL_FUNC void stage_tile(threadgroup float4* tile, device const typename KV::Unit* source, ulong row_stride,
                           KeyRange range, uint dim4, uint tid) {
    for (uint i = tid; i < ROWS * (Shape::DIM / 4); i += Shape::THREADS) {
        const uint row = i / (Shape::DIM / 4);
        const uint col = i % (Shape::DIM / 4);
        const bool inside = row >= range.begin && row < range.end && col < dim4;
        tile[row * Shape::ROW4 + col] = inside ? KV::value(KV::quad(source + row * row_stride, col)) : float4(0.0f);
    }
}

// The section of a range in a tile of keys from `first` on, counted from `first`. Its end may lie beyond the tile.
METAL_FUNC KeyRange in_tile(KeyRange range, uint first) {
    return {range.begin > first ? range.begin - first : 0, range.end > first ? range.end - first : 0};
}

// One simdgroup's share of the queries and of the result.
template <class Shape>
struct PrefillRows {
    simdgroup_float8x8 q[Shape::FRAGMENTS];
    simdgroup_float8x8 o[Shape::FRAGMENTS];

    METAL_FUNC void load_queries(threadgroup const float* rows) {
        UNROLL for (uint f = 0; f < Shape::FRAGMENTS; f++) {
            simdgroup_load(q[f], rows + 8 * f, Shape::ROW);
            o[f] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }

    // scores = this share of Q K^T
    METAL_FUNC void score(threadgroup const float* keys, threadgroup float* scores) {
        for (uint b = 0; b < Shape::KEYS / 8; b++) {
            simdgroup_float8x8 s = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            UNROLL for (uint f = 0; f < Shape::FRAGMENTS; f++) {
                simdgroup_float8x8 k;
                simdgroup_load(k, keys + b * 8 * Shape::ROW + 8 * f, Shape::ROW, ulong2(0, 0), true);
                simdgroup_multiply_accumulate(s, q[f], k, s);
            }
            simdgroup_store(s, scores + 8 * b, Shape::SCORE_ROW);
        }
    }

    // O += weights V
    METAL_FUNC void accumulate(threadgroup const float* weights, threadgroup const float* values) {
        for (uint b = 0; b < Shape::KEYS / 8; b++) {
            simdgroup_float8x8 w;
            simdgroup_load(w, weights + 8 * b, Shape::SCORE_ROW);
            UNROLL for (uint f = 0; f < Shape::FRAGMENTS; f++) {
                simdgroup_float8x8 v;
                simdgroup_load(v, values + b * 8 * Shape::ROW + 8 * f, Shape::ROW);
                simdgroup_multiply_accumulate(o[f], w, v, o[f]);
            }
        }
    }

    // Multiplies row r by the factor that lane 4r holds. A product with a diagonal matrix is the only way to do that
    // without knowing which lane holds which element. The caller sets zero off the diagonal.
    METAL_FUNC void scale_rows(float factor, threadgroup float* diagonal, uint lane) {
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (lane % 4 == 0) diagonal[lane / 4 * 9] = factor;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_float8x8 d;
        simdgroup_load(d, diagonal, 8);
        UNROLL for (uint f = 0; f < Shape::FRAGMENTS; f++) simdgroup_multiply(o[f], d, o[f]);
    }

    METAL_FUNC void store(threadgroup float* rows) {
        UNROLL for (uint f = 0; f < Shape::FRAGMENTS; f++) simdgroup_store(o[f], rows + 8 * f, Shape::ROW);
    }
};

// The running softmax of 8 rows, 4 lanes to a row. Lane l holds every 4th score of row l / 4, from l % 4 on.
template <class Shape>
struct RowSoftmax {
    static constant constexpr uint COLUMNS = Shape::KEYS / 4;
    float max_score;
    float sum;  // of this lane's columns; all 4 together in total()
    float weight[COLUMNS];

    METAL_FUNC void clear() {
        max_score = LOWEST_SCORE;
        sum = 0.0f;
    }

    // Takes the scores of the next tile. The row sees the keys in range. Returns the factor by which the sums so far
    // shrink. parts: the SPLIT summands of the scores, one after the other.
    METAL_FUNC float take(threadgroup const float* parts, float scale, KeyRange range, uint lane) {
        float new_max = max_score;
        UNROLL for (uint c = 0; c < COLUMNS; c++) {
            const uint col = 4 * c + lane % 4;
            weight[c] = 0.0f;
            for (uint part = 0; part < Shape::SPLIT; part++)
                weight[c] += parts[(part * 8 + lane / 4) * Shape::SCORE_ROW + col];
            weight[c] *= scale;
            if (col >= range.begin && col < range.end) new_max = max(new_max, weight[c]);
        }
        new_max = max(new_max, simd_shuffle_xor(new_max, 1));
        new_max = max(new_max, simd_shuffle_xor(new_max, 2));
        const float factor = metal::exp2(max_score - new_max);
        max_score = new_max;
        sum *= factor;
        UNROLL for (uint c = 0; c < COLUMNS; c++) {
            const uint col = 4 * c + lane % 4;
            weight[c] = col >= range.begin && col < range.end ? metal::exp2(weight[c] - max_score) : 0.0f;
            sum += weight[c];
        }
        return factor;
    }

    METAL_FUNC void store_weights(threadgroup float* weights, uint lane) {
        UNROLL for (uint c = 0; c < COLUMNS; c++) weights[lane / 4 * Shape::SCORE_ROW + 4 * c + lane % 4] = weight[c];
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    METAL_FUNC float total() {
        const float pair = sum + simd_shuffle_xor(sum, 1);
        return pair + simd_shuffle_xor(pair, 2);
    }
};

// Threadgroups by (head, tile of queries). Each takes every n_tg.y-th tile, so that the grid decides only the speed.
// Grid: (n_head, ceil(T / QUERIES)). Threads: ATTENTION_PREFILL_THREADS.
template <class KV, class Shape>
kernel void attention_prefill(constant AttentionParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                              device const uint* pages [[buffer(2)]], device const float4* q [[buffer(3)]],
                              device const typename KV::Unit* k_cache [[buffer(4)]],
                              device const typename KV::Unit* v_cache [[buffer(5)]],
                              device const float4* gate [[buffer(6)]], device float4* out [[buffer(7)]], GRID_IDS) {
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
    const uint rows = sg / Shape::SPLIT * 8;  // of the tile, for this simdgroup
    const uint cols = sg % Shape::SPLIT * (8 * Shape::FRAGMENTS);
    threadgroup float* my_scores = scores + sg * 8 * Shape::SCORE_ROW;
    threadgroup const float* row_scores = scores + rows * Shape::SPLIT * Shape::SCORE_ROW;
    threadgroup float* diagonal = diagonals + sg * 64;
    diagonal[lane] = 0.0f;
    diagonal[lane + SIMD] = 0.0f;

    for (uint first = tg.y * Shape::QUERIES; first < step->n_tokens; first += n_tg.y * Shape::QUERIES) {
        const uint n_rows = min(uint(Shape::QUERIES), step->n_tokens - first);
        // This lane's row; rows past the step's last repeat it, so that each has a key.
        const KeyRange row_keys = visible_keys(p, step->pos + first + min(rows + lane / 4, n_rows - 1));
        const KeyRange keys = {visible_keys(p, step->pos + first).begin, step->pos + first + n_rows};
        const ulong q_start = first * q_stride + head * dim4;

        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage_tile<Shape, Shape::QUERIES, CacheF32>(tile4, q + q_start, q_stride, {0, n_rows}, dim4, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        PrefillRows<Shape> share;
        share.load_queries(tile + rows * Shape::ROW + cols);
        RowSoftmax<Shape> softmax;
        softmax.clear();

        for (uint key = keys.begin / Shape::KEYS * Shape::KEYS; key < keys.end; key += Shape::KEYS) {
            const ulong kv_start = cache_row(pages, key) * kv_stride + kv_column;
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
        share.store(tile + rows * Shape::ROW + cols);
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

#define PREFILL(kv, KV, dim) KERNEL("attention_prefill_" kv "_" #dim, attention_prefill<KV, Prefill##dim>)
HEAD_CLASSES(PREFILL)
