// Causal attention over the KV cache, softmax computed on line: row t of a step sees positions 0 .. pos + t. Heads are
// grouped: n_head / n_head_kv query heads share a key and value head. Rows start at multiples of 16 bytes (q, out,
// float caches) or 8 (half caches), which a head_dim that is a multiple of 8 gives.
//
// Both kernels come in classes of head_dim: an instance named _128 serves every head_dim in (96, 128].
#include "common.h"
#include "shapes.h"

// Below every score, and finite: fast math may assume that no value is infinite.
constant constexpr float LOWEST_SCORE = -1e38f;
constant constexpr float LOG2_E = 1.44269504088896341f;  // exp(x) = exp2(x * LOG2_E); exp2 is the hardware's

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

// The sum over each aligned run of LANES lanes, in all of them.
template <uint LANES>
METAL_FUNC float lanes_sum(float value) {
    UNROLL for (ushort mask = 1; mask < LANES; mask <<= 1) value += simd_shuffle_xor(value, mask);
    return value;
}

// Sums across the SIMD / LANES key groups of a simdgroup; every group gets the result.
template <uint PIECES, uint LANES>
METAL_FUNC void merge_groups(thread SoftmaxSum<PIECES>& s) {
    s.raise_max(simd_max(s.max_score));
    UNROLL for (ushort mask = LANES; mask < SIMD; mask <<= 1) {
        s.sum += simd_shuffle_xor(s.sum, mask);
        UNROLL for (uint j = 0; j < PIECES; j++) s.acc[j] += simd_shuffle_xor(s.acc[j], mask);
    }
}

// One threadgroup of up to DECODE_MAX_SIMDGROUPS per (head, row). LANES lanes share a key, so that a simdgroup scores
// SIMD / LANES keys with log2(LANES) shuffles; each such group keeps KEYS loads in flight and a softmax of its own, and
// all of them meet once, at the end.
template <class KV, uint PIECES, uint LANES>
kernel void attention_decode(constant AttentionParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                             device const float4* q [[buffer(2)]], device const vec<KV, 4>* k_cache [[buffer(3)]],
                             device const vec<KV, 4>* v_cache [[buffer(4)]], device float4* out [[buffer(5)]],
                             GRID_IDS) {
    constexpr uint KEYS = 4;
    constexpr uint GROUPS = SIMD / LANES;
    TG_ARRAY(float, part_max, DECODE_MAX_SIMDGROUPS);
    TG_ARRAY(float, part_sum, DECODE_MAX_SIMDGROUPS);
    TG_ARRAY(float4, part_acc, DECODE_MAX_SIMDGROUPS * PIECES * LANES);

    const uint head = tg.x;
    const uint t = tg.y;
    if (t >= step->n_tokens) return;
    const uint n_kv = step->pos + t + 1;
    const uint dim4 = p.head_dim / 4;
    const uint kv_head = head / (p.n_head / p.n_head_kv);
    const ulong q_row = (ulong(t) * p.n_head + head) * dim4;
    const uint group = lane / LANES;

    // Pieces past the end of the head repeat its last one with a zero query: no branch in the loop, no row overrun.
    float4 query[PIECES];
    uint piece[PIECES];
    UNROLL for (uint j = 0; j < PIECES; j++) {
        const uint i = lane % LANES + j * LANES;
        piece[j] = min(i, dim4 - 1);
        query[j] = i < dim4 ? q[q_row + i] * (p.scale * LOG2_E) : float4(0.0f);
    }

    SoftmaxSum<PIECES> s;
    s.clear();
    for (uint first = sg * GROUPS * KEYS; first < n_kv; first += n_sg * GROUPS * KEYS) {
        float score[KEYS];
        ulong row[KEYS];
        bool in_range[KEYS];
        float new_max = s.max_score;
        UNROLL for (uint u = 0; u < KEYS; u++) {
            const uint key = first + u * GROUPS + group;
            in_range[u] = key < n_kv;
            row[u] = (ulong(min(key, n_kv - 1)) * p.n_head_kv + kv_head) * dim4;
            float part = 0.0f;
            UNROLL for (uint j = 0; j < PIECES; j++) part += dot(query[j], float4(k_cache[row[u] + piece[j]]));
            score[u] = lanes_sum<LANES>(part);
            if (in_range[u]) new_max = max(new_max, score[u]);
        }
        s.raise_max(new_max);
        UNROLL for (uint u = 0; u < KEYS; u++) {
            const float weight = in_range[u] ? metal::exp2(score[u] - s.max_score) : 0.0f;
            s.sum += weight;
            UNROLL for (uint j = 0; j < PIECES; j++) s.acc[j] += weight * float4(v_cache[row[u] + piece[j]]);
        }
    }
    merge_groups<PIECES, LANES>(s);

    if (lane == 0) {
        part_max[sg] = s.max_score;
        part_sum[sg] = s.sum;
    }
    if (group == 0) {
        UNROLL for (uint j = 0; j < PIECES; j++) part_acc[(sg * PIECES + j) * LANES + lane] = s.acc[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float max_all = LOWEST_SCORE;
    for (uint i = 0; i < n_sg; i++) max_all = max(max_all, part_max[i]);
    for (uint i = tid; i < dim4; i += n_sg * SIMD) {
        float sum = 0.0f;
        float4 acc = float4(0.0f);
        for (uint other = 0; other < n_sg; other++) {
            const float weight = metal::exp2(part_max[other] - max_all);
            sum += weight * part_sum[other];
            acc += weight * part_acc[other * PIECES * LANES + i];
        }
        out[q_row + i] = acc / sum;
    }
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
};

// Copies a tile of ROWS head vectors into threadgroup memory as floats; rows from n_rows on and columns past the head
// are zero and not read: beyond the last token the cache holds anything, NaN included.
template <class Shape, uint ROWS, class Vec>
METAL_FUNC void stage_tile(threadgroup float4* tile, device const Vec* source, ulong row_stride, uint n_rows, uint dim4,
                           uint tid) {
    for (uint i = tid; i < ROWS * (Shape::DIM / 4); i += Shape::THREADS) {
        const uint row = i / (Shape::DIM / 4);
        const uint col = i % (Shape::DIM / 4);
        const bool inside = row < n_rows && col < dim4;
        tile[row * Shape::ROW4 + col] = inside ? float4(source[row * row_stride + col]) : float4(0.0f);
    }
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

    // Takes the scores of the next tile, of which the row sees the first n_visible; returns the factor for what was
    // accumulated before. parts: the SPLIT parts of the scores, one after the other.
    METAL_FUNC float take(threadgroup const float* parts, float scale, uint n_visible, uint lane) {
        float new_max = max_score;
        UNROLL for (uint c = 0; c < COLUMNS; c++) {
            const uint col = 4 * c + lane % 4;
            weight[c] = 0.0f;
            for (uint part = 0; part < Shape::SPLIT; part++)
                weight[c] += parts[(part * 8 + lane / 4) * Shape::SCORE_ROW + col];
            weight[c] *= scale;
            if (col < n_visible) new_max = max(new_max, weight[c]);
        }
        new_max = max(new_max, simd_shuffle_xor(new_max, 1));
        new_max = max(new_max, simd_shuffle_xor(new_max, 2));
        const float factor = metal::exp2(max_score - new_max);
        max_score = new_max;
        sum *= factor;
        UNROLL for (uint c = 0; c < COLUMNS; c++) {
            weight[c] = 4 * c + lane % 4 < n_visible ? metal::exp2(weight[c] - max_score) : 0.0f;
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
                              device const float4* q [[buffer(2)]], device const vec<KV, 4>* k_cache [[buffer(3)]],
                              device const vec<KV, 4>* v_cache [[buffer(4)]], device float4* out [[buffer(5)]],
                              GRID_IDS) {
    TG_ARRAY(float4, tile4, Shape::KEYS * Shape::ROW4);
    TG_ARRAY(float, scores, Shape::SIMDGROUPS * 8 * Shape::SCORE_ROW);
    TG_ARRAY(float, diagonals, Shape::SIMDGROUPS * 64);

    const uint head = tg.x;
    const uint dim4 = p.head_dim / 4;
    const ulong q_stride = ulong(p.n_head) * dim4;
    const ulong kv_stride = ulong(p.n_head_kv) * dim4;
    const ulong kv_column = head / (p.n_head / p.n_head_kv) * dim4;

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
        const uint n_kv = step->pos + first + n_rows;
        const uint row_end = step->pos + first + rows + lane / 4 + 1;  // what this lane's row sees ends here
        const ulong q_start = first * q_stride + head * dim4;

        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage_tile<Shape, Shape::QUERIES>(tile4, q + q_start, q_stride, n_rows, dim4, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        PrefillRows<Shape> share;
        share.load_queries(tile + rows * Shape::ROW + cols);
        RowSoftmax<Shape> softmax;
        softmax.clear();

        for (uint key = 0; key < n_kv; key += Shape::KEYS) {
            const ulong kv_start = key * kv_stride + kv_column;
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been used
            stage_tile<Shape, Shape::KEYS>(tile4, k_cache + kv_start, kv_stride, n_kv - key, dim4, tid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            share.score(tile + cols, my_scores);
            threadgroup_barrier(mem_flags::mem_threadgroup);  // all scores are there, the keys have been used
            stage_tile<Shape, Shape::KEYS>(tile4, v_cache + kv_start, kv_stride, n_kv - key, dim4, tid);
            const uint n_visible = row_end > key ? row_end - key : 0;
            const float factor = softmax.take(row_scores, p.scale * LOG2_E, n_visible, lane);
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
            const uint row = i / dim4;
            out[q_start + row * q_stride + i % dim4] = tile4[row * Shape::ROW4 + i % dim4];
        }
    }
}

KERNEL("attention_decode_f32_32", attention_decode<float, 1, 8>)
KERNEL("attention_decode_f32_64", attention_decode<float, 2, 8>)
KERNEL("attention_decode_f32_96", attention_decode<float, 3, 8>)
KERNEL("attention_decode_f32_128", attention_decode<float, 4, 8>)
KERNEL("attention_decode_f32_256", attention_decode<float, 4, 16>)
KERNEL("attention_decode_f16_32", attention_decode<half, 1, 8>)
KERNEL("attention_decode_f16_64", attention_decode<half, 2, 8>)
KERNEL("attention_decode_f16_96", attention_decode<half, 3, 8>)
KERNEL("attention_decode_f16_128", attention_decode<half, 4, 8>)
KERNEL("attention_decode_f16_256", attention_decode<half, 4, 16>)

typedef PrefillShape<32, 32, 32, 1> Prefill32;
typedef PrefillShape<64, 32, 32, 1> Prefill64;
typedef PrefillShape<96, 32, 32, 1> Prefill96;
typedef PrefillShape<128, 32, 32, 1> Prefill128;
typedef PrefillShape<256, 16, 16, 2> Prefill256;

KERNEL("attention_prefill_f32_32", attention_prefill<float, Prefill32>)
KERNEL("attention_prefill_f32_64", attention_prefill<float, Prefill64>)
KERNEL("attention_prefill_f32_96", attention_prefill<float, Prefill96>)
KERNEL("attention_prefill_f32_128", attention_prefill<float, Prefill128>)
KERNEL("attention_prefill_f32_256", attention_prefill<float, Prefill256>)
KERNEL("attention_prefill_f16_32", attention_prefill<half, Prefill32>)
KERNEL("attention_prefill_f16_64", attention_prefill<half, Prefill64>)
KERNEL("attention_prefill_f16_96", attention_prefill<half, Prefill96>)
KERNEL("attention_prefill_f16_128", attention_prefill<half, Prefill128>)
KERNEL("attention_prefill_f16_256", attention_prefill<half, Prefill256>)
