// Tiles of queries by tiles of keys, on 8x8 matrices. A Shape has the sizes of a threadgroup:
//   DIM, KEYS        columns of a staged row, and rows of a tile of keys
//   SPLIT            simdgroups that share 8 queries: each owns FRAGMENTS * 8 columns of them, VALUE_FRAGMENTS * 8 of
//   the
//                    result, and computes a summand of every score
//   ROW, ROW4        floats from one staged row to the next, and float4s
//   SCORE_ROW        floats from one row of scores to the next
//   THREADS          of the threadgroup
#pragma once

#include "attention.h"

// Copies a tile of ROWS head vectors into threadgroup memory as floats. Rows out of range and columns past the head are
// zero and not read. Beyond the last token the cache may hold any bits, NaN included. row_stride is in units.
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
struct TileRows {
    simdgroup_float8x8 q[Shape::FRAGMENTS];
    simdgroup_float8x8 o[Shape::VALUE_FRAGMENTS];

    METAL_FUNC void load_queries(threadgroup const float* rows) {
        UNROLL for (uint f = 0; f < Shape::FRAGMENTS; f++) simdgroup_load(q[f], rows + 8 * f, Shape::ROW);
        UNROLL for (uint f = 0; f < Shape::VALUE_FRAGMENTS; f++) o[f] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
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
            UNROLL for (uint f = 0; f < Shape::VALUE_FRAGMENTS; f++) {
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
        UNROLL for (uint f = 0; f < Shape::VALUE_FRAGMENTS; f++) simdgroup_multiply(o[f], d, o[f]);
    }

    METAL_FUNC void store(threadgroup float* rows) {
        UNROLL for (uint f = 0; f < Shape::VALUE_FRAGMENTS; f++) simdgroup_store(o[f], rows + 8 * f, Shape::ROW);
    }
};

// The running softmax of 8 rows, 4 lanes to a row. Lane l holds every 4th score of row l / 4, from l % 4 on.
template <class Shape>
struct RowSoftmax {
    static constant constexpr uint COLUMNS = Shape::KEYS / 4;
    float max_score;
    float sum;  // of this lane's columns; all 4 together in total()
    float weight[COLUMNS];

    // Begins with a sink, whose weight one of the row's lanes holds, or with nothing.
    METAL_FUNC void begin(float sink, bool has_sink, uint lane) {
        max_score = sink;
        sum = has_sink && lane % 4 == 0 ? 1.0f : 0.0f;
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

// The place of a tile of queries. A tile has up to QUERIES queries of one run.
template <uint QUERIES>
struct TilePlace {
    uint run;      // the first row of a run
    uint tile;     // counted from this row on, over the runs
    uint queries;  // of a row of the step

    // Moves to the run that has the tile. Returns false if the step has no such tile.
    METAL_FUNC bool find(device const Step* step, device const Row* rows) {
        while (run < step->n_tokens) {
            const uint end = rows[run].end, n_tiles = ((end - run) * queries + QUERIES - 1) / QUERIES;
            if (tile < n_tiles) return true;
            tile -= n_tiles;
            run = end;
        }
        return false;
    }
};
