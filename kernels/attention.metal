// Causal attention over the KV cache, softmax computed on line: row t of a step sees positions 0 .. pos + t, or the
// last `window` of them. Heads are grouped: n_head / n_head_kv query heads share a key and value head. Rows start at
// multiples of 16 bytes (q, gate, out, float caches) or 8 (half caches), which a head_dim that is a multiple of 8
// gives.
//
// All kernels but attention_merge come in classes of head_dim: an instance named _128 serves every one in (96, 128].
#include "kv_cache.h"
#include "reduce.h"

// Below every score, and finite: fast math may assume that no value is infinite.
constant constexpr float LOWEST_SCORE = -1e38f;
constant constexpr float LOG2_E = 1.44269504088896341f;  // exp(x) = exp2(x * LOG2_E); exp2 is the hardware's

// The positions that the row at `position` sees.
struct KeyRange {
    uint begin, end;
};

METAL_FUNC KeyRange visible_keys(constant AttentionParams& p, uint position) {
    const uint end = position + 1;
    return {p.window != 0 && p.window < end ? end - p.window : 0, end};
}

// Elements 4 i to 4 i + 3 of a head's output times the sigmoid of their gates. row: t * n_head + head.
METAL_FUNC float4 gated(constant AttentionParams& p, device const float4* gate, ulong row, uint i, float4 x) {
    if (p.gate_stride == 0) return x;
    return x / (1.0f + precise::exp(-gate[(row * p.gate_stride + p.head_dim) / 4 + i]));
}

// ---- Decode: few queries, bound by the bandwidth of the cache -------------------------------------------------------

constant constexpr uint DECODE_MAX_SIMDGROUPS = ATTENTION_DECODE_THREADS / SIMD;

// A softmax-weighted sum of the values seen so far: sum and acc are relative to exp2(max_score). A lane holds PIECES
// float4 of the head vector, every LANES-th from its own.
template <uint PIECES>
struct SoftmaxSum {
    float max_score;
    float sum;
    float4 acc[PIECES];

    METAL_FUNC void clear() {
        max_score = LOWEST_SCORE;
        sum = 0.0f;
        UNROLL for (uint j = 0; j < PIECES; j++) acc[j] = float4(0.0f);
    }

    METAL_FUNC void raise_max(float new_max) {
        const float scale = metal::exp2(max_score - new_max);
        max_score = new_max;
        sum *= scale;
        UNROLL for (uint j = 0; j < PIECES; j++) acc[j] *= scale;
    }
};

// Sums across the SIMD / LANES key groups of a simdgroup; every group gets the result.
template <uint PIECES, uint LANES>
METAL_FUNC void merge_groups(thread SoftmaxSum<PIECES>& s) {
    s.raise_max(simd_max(s.max_score));
    UNROLL for (ushort mask = LANES; mask < SIMD; mask <<= 1) {
        s.sum += simd_shuffle_xor(s.sum, mask);
        UNROLL for (uint j = 0; j < PIECES; j++) s.acc[j] += simd_shuffle_xor(s.acc[j], mask);
    }
}

// A query head and the keys and values that go with it, as one simdgroup reads them. LANES lanes share a key, so that a
// simdgroup scores GROUPS keys with log2(LANES) shuffles, and keeps KEYS times that many loads in flight.
template <class KV, uint PIECES, uint LANES>
struct DecodeHead {
    static constant constexpr uint KEYS = 4;
    static constant constexpr uint GROUPS = SIMD / LANES;
    static constant constexpr uint TILE = KEYS * GROUPS;
    static_assert(KV_PAGE % TILE == 0, "a tile of keys lies in one page");

    float4 query[PIECES];
    uint piece[PIECES];
    uint group;
    ulong row_units;    // of the cache, from one position to the next
    ulong head_offset;  // in units

    METAL_FUNC void load(constant AttentionParams& p, device const float4* q, uint t, uint head, uint lane) {
        const uint dim4 = p.head_dim / 4, head_units = p.head_dim / KV::ELEMENTS;
        const ulong q_row = (ulong(t) * p.n_head + head) * dim4;
        group = lane / LANES;
        row_units = ulong(p.n_head_kv) * head_units;
        head_offset = head / (p.n_head / p.n_head_kv) * head_units;
        // Pieces past the end of the head repeat its last one with a zero query: no branch in the loop, no row overrun.
        UNROLL for (uint j = 0; j < PIECES; j++) {
            const uint i = lane % LANES + j * LANES;
            piece[j] = min(i, dim4 - 1);
            query[j] = i < dim4 ? q[q_row + i] * (p.scale * LOG2_E) : float4(0.0f);
        }
    }

    // Adds the keys of the tile that starts at `first` as far as they are in range, each group to a sum of its own.
    METAL_FUNC void attend(thread SoftmaxSum<PIECES>& s, device const uint* pages,
                           device const typename KV::Unit* k_cache, device const typename KV::Unit* v_cache, uint first,
                           KeyRange range) {
        const ulong tile_row = cache_row(pages, first);
        float score[KEYS];
        ulong at[KEYS];
        bool in_range[KEYS];
        float new_max = s.max_score;
        UNROLL for (uint u = 0; u < KEYS; u++) {
            const uint key = first + u * GROUPS + group;
            in_range[u] = key >= range.begin && key < range.end;
            const uint readable = min(max(key, range.begin), range.end - 1);
            at[u] = (tile_row + (readable - first)) * row_units + head_offset;
            float part = 0.0f;
            UNROLL for (uint j = 0; j < PIECES; j++) part += dot(query[j], KV::quad(k_cache + at[u], piece[j]));
            score[u] = lanes_sum<LANES>(part);
            if (in_range[u]) new_max = max(new_max, score[u]);
        }
        s.raise_max(new_max);
        UNROLL for (uint u = 0; u < KEYS; u++) {
            const float weight = in_range[u] ? metal::exp2(score[u] - s.max_score) : 0.0f;
            s.sum += weight;
            UNROLL for (uint j = 0; j < PIECES; j++) s.acc[j] += weight * KV::quad(v_cache + at[u], piece[j]);
        }
    }
};

// The output of a head from n sums: part i is acc[i * part_stride ..], relative to exp2(max_score[i]).
METAL_FUNC void write_head(constant AttentionParams& p, threadgroup const float* max_score,
                           threadgroup const float* sum, threadgroup const float4* acc, uint n, uint part_stride,
                           device const float4* gate, device float4* out, ulong row, uint tid, uint n_threads) {
    float max_all = LOWEST_SCORE;
    for (uint i = 0; i < n; i++) max_all = max(max_all, max_score[i]);
    for (uint d = tid; d < p.head_dim / 4; d += n_threads) {
        float total = 0.0f;
        float4 x = float4(0.0f);
        for (uint i = 0; i < n; i++) {
            const float weight = metal::exp2(max_score[i] - max_all);
            total += weight * sum[i];
            x += weight * acc[i * part_stride + d];
        }
        out[row * (p.head_dim / 4) + d] = gated(p, gate, row, d, x / total);
    }
}

// One threadgroup of up to DECODE_MAX_SIMDGROUPS per (head, row), which divide the keys and meet once, at the end.
template <class KV, uint PIECES, uint LANES>
kernel void attention_decode(constant AttentionParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                             device const uint* pages [[buffer(2)]], device const float4* q [[buffer(3)]],
                             device const typename KV::Unit* k_cache [[buffer(4)]],
                             device const typename KV::Unit* v_cache [[buffer(5)]],
                             device const float4* gate [[buffer(6)]], device float4* out [[buffer(7)]], GRID_IDS) {
    typedef DecodeHead<KV, PIECES, LANES> Head;
    TG_ARRAY(float, part_max, DECODE_MAX_SIMDGROUPS);
    TG_ARRAY(float, part_sum, DECODE_MAX_SIMDGROUPS);
    TG_ARRAY(float4, part_acc, DECODE_MAX_SIMDGROUPS * PIECES * LANES);

    const uint head = tg.x;
    const uint t = tg.y;
    if (t >= step->n_tokens) return;
    const KeyRange range = visible_keys(p, step->pos + t);
    Head h;
    h.load(p, q, t, head, lane);
    SoftmaxSum<PIECES> s;
    s.clear();
    for (uint first = range.begin / Head::TILE * Head::TILE + sg * Head::TILE; first < range.end;
         first += n_sg * Head::TILE)
        h.attend(s, pages, k_cache, v_cache, first, range);
    merge_groups<PIECES, LANES>(s);

    if (lane == 0) {
        part_max[sg] = s.max_score;
        part_sum[sg] = s.sum;
    }
    if (lane < LANES) {
        UNROLL for (uint j = 0; j < PIECES; j++) part_acc[(sg * PIECES + j) * LANES + lane] = s.acc[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    write_head(p, part_max, part_sum, part_acc, n_sg, PIECES * LANES, gate, out, ulong(t) * p.n_head + head, tid,
               n_sg * SIMD);
}

// ---- Prefill: tiles of queries by tiles of keys, on 8x8 matrices ----------------------------------------------------

// What a threadgroup of attention_prefill is made of. A simdgroup owns 8 query rows and DIM / SPLIT columns of the
// head: heads too wide for the registers of one simdgroup are shared by SPLIT, which add their parts of each score.
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

// Copies a tile of ROWS head vectors into threadgroup memory as floats; rows out of range and columns past the head are
// zero and not read: beyond the last token the cache holds anything, NaN included. row_stride is in units.
template <class Shape, uint ROWS, class KV>
METAL_FUNC void stage_tile(threadgroup float4* tile, device const typename KV::Unit* source, ulong row_stride,
                           KeyRange range, uint dim4, uint tid) {
    for (uint i = tid; i < ROWS * (Shape::DIM / 4); i += Shape::THREADS) {
        const uint row = i / (Shape::DIM / 4);
        const uint col = i % (Shape::DIM / 4);
        const bool inside = row >= range.begin && row < range.end && col < dim4;
        tile[row * Shape::ROW4 + col] = inside ? KV::quad(source + row * row_stride, col) : float4(0.0f);
    }
}

// The part of a range that a tile of keys from `first` on holds, counted from there; its end may lie beyond the tile.
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
    // without knowing which lane holds which element. Zero off the diagonal is the caller's part.
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

// The running softmax of 8 rows, 4 lanes to a row; lane l holds every 4th score of row l / 4, from l % 4.
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

    // Takes the scores of the next tile, of which the row sees those in range; returns the factor for what was
    // accumulated before. parts: the SPLIT parts of the scores, one after the other.
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

// Threadgroups by (head, tile of queries); one takes every n_tg.y-th tile, so that the grid decides only the speed.
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
        // This lane's row; those past the step's do as its last, so that none is left without a key.
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

typedef PrefillShape<32, 32, 32, 1> Prefill32;
typedef PrefillShape<64, 32, 32, 1> Prefill64;
typedef PrefillShape<96, 32, 32, 1> Prefill96;
typedef PrefillShape<128, 32, 32, 1> Prefill128;
typedef PrefillShape<256, 16, 16, 2> Prefill256;

#define HEAD_CLASS(kv, KV, dim, PIECES, LANES)                                                                         \
    KERNEL("attention_decode_" kv "_" #dim, attention_decode<KV, PIECES, LANES>)                                       \
    KERNEL("attention_prefill_" kv "_" #dim, attention_prefill<KV, Prefill##dim>)
#define ATTENTION(kv, KV)                                                                                              \
    HEAD_CLASS(kv, KV, 32, 1, 8)                                                                                       \
    HEAD_CLASS(kv, KV, 64, 2, 8)                                                                                       \
    HEAD_CLASS(kv, KV, 96, 3, 8)                                                                                       \
    HEAD_CLASS(kv, KV, 128, 4, 8)                                                                                      \
    HEAD_CLASS(kv, KV, 256, 4, 16)

ATTENTION("f32", CacheF32)
ATTENTION("f16", CacheF16)
ATTENTION("q8_0", CacheQ8_0)
