// Tiles of queries by tiles of keys, on 8x8 matrices. A Shape has the sizes of a threadgroup:
//   T                of the operands: half or float; sums are floats
//   DIM, KEYS        columns of a staged row, and rows of a tile of keys
//   ROWS             queries of a simdgroup: one or more matrices, one below the other
//   SPLIT            simdgroups that share these queries: each owns FRAGMENTS * 8 columns of them, VALUE_FRAGMENTS * 8
//                    of the result, and computes a summand of every score
//   SCORE_ROW        floats from one row of scores to the next
//   THREADS          of the threadgroup
// A staged tile lies as 8x8 matrices, one after the other: for each run of eight columns, KEYS rows by eight. A pad
// behind a run keeps those who store in different banks.
#pragma once

#include "attention.h"

constant constexpr uint TILE_PAD = 8;  // elements

template <class Shape>
struct TileSizes {
    static constant constexpr uint RUN = 8 * Shape::KEYS + TILE_PAD;  // elements from one run to the next
    static constant constexpr uint TILE = Shape::DIM / 8 * RUN;
    static constant constexpr uint MATRICES = Shape::ROWS / 8;
    static constant constexpr uint LANES = SIMD / Shape::ROWS;               // that share a row
    static constant constexpr uint SCORES = Shape::ROWS * Shape::SCORE_ROW;  // of a simdgroup
};

// Four elements of a head vector in the cache, to a tile.
template <class KV>
struct StagedQuad {
    static METAL_FUNC void copy(threadgroup float* to, device const typename KV::Unit* head, uint i) {
        *(threadgroup float4*)to = KV::value(KV::quad(head, i));
    }
    static METAL_FUNC void copy(threadgroup half* to, device const typename KV::Unit* head, uint i) {
        *(threadgroup half4*)to = half4(KV::value(KV::quad(head, i)));
    }
};
template <>
struct StagedQuad<CacheF16> {
    static METAL_FUNC void copy(threadgroup float* to, device const half4* head, uint i) {
        *(threadgroup float4*)to = float4(head[i]);
    }
    static METAL_FUNC void copy(threadgroup half* to, device const half4* head, uint i) {
        copy_eight((threadgroup uint2*)to, (device const uint2*)(head + i));
    }
};

template <class T>
METAL_FUNC void store_quad(threadgroup T* to, float4 x) {
    *(threadgroup vec<T, 4>*)to = vec<T, 4>(x);
}

// Copies a tile of head vectors into threadgroup memory. Rows out of range and columns past the head are zero and not
// read. Beyond the last token the cache may hold any bits, NaN included. row_stride is in units.
template <class Shape, class KV>
METAL_FUNC void stage_tile(threadgroup typename Shape::T* tile, device const typename KV::Unit* source,
                           ulong row_stride, KeyRange range, uint dim4, uint tid) {
    typedef typename Shape::T T;
    for (uint i = tid; i < Shape::KEYS * (Shape::DIM / 4); i += Shape::THREADS) {
        const uint row = i / (Shape::DIM / 4), col = i % (Shape::DIM / 4);
        threadgroup T* to = tile + col / 2 * TileSizes<Shape>::RUN + row * 8 + col % 2 * 4;
        if (row >= range.begin && row < range.end && col < dim4) {
            StagedQuad<KV>::copy(to, source + row * row_stride, col);
        } else {
            store_quad(to, float4(0.0f));
        }
    }
    end_copies();
}

// The section of a range in a tile of keys from `first` on, counted from `first`. Its end may lie beyond the tile.
METAL_FUNC KeyRange in_tile(KeyRange range, uint first) {
    return {range.begin > first ? range.begin - first : 0, range.end > first ? range.end - first : 0};
}

// One simdgroup's share of the queries and of the result.
template <class Shape>
struct TileRows {
    typedef typename Shape::T T;
    typedef TileSizes<Shape> Sizes;
    typedef simdgroup_matrix<T, 8, 8> Operand;
    static constant constexpr uint M = Sizes::MATRICES, DEEP = Shape::FRAGMENTS % 4 == 0 ? 4 : 3;
    static_assert(Shape::FRAGMENTS % DEEP == 0, "runs are multiplied some at a time");
    Operand q[Shape::FRAGMENTS / DEEP][M][DEEP];
    simdgroup_float8x8 o[Shape::VALUE_FRAGMENTS][M];

    // queries: from the first run of the share on, ROWS by eight each, without pads.
    METAL_FUNC void load_queries(threadgroup const T* queries) {
        UNROLL for (uint g = 0; g < Shape::FRAGMENTS / DEEP; g++) {
            load_left(q[g], queries + g * DEEP * 8 * Shape::ROWS, 8 * Shape::ROWS);
        }
        UNROLL for (uint f = 0; f < Shape::VALUE_FRAGMENTS; f++) {
            UNROLL for (uint m = 0; m < M; m++) o[f][m] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }

    // scores = this share of Q K^T. keys: the tile, from the first run of the share on.
    METAL_FUNC void score(threadgroup const T* keys, threadgroup float* scores) {
        simdgroup_float8x8 s[Shape::KEYS / 8][M];
        UNROLL for (uint b = 0; b < Shape::KEYS / 8; b++) {
            UNROLL for (uint m = 0; m < M; m++) s[b][m] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
        UNROLL for (uint g = 0; g < Shape::FRAGMENTS / DEEP; g++) {
            UNROLL for (uint b = 0; b < Shape::KEYS / 8; b++) {
                Operand k[DEEP];
                load_right(k, keys + g * DEEP * Sizes::RUN + 64 * b, Sizes::RUN);
                multiply_accumulate_all(s[b], q[g], k);
            }
        }
        UNROLL for (uint b = 0; b < Shape::KEYS / 8; b++) {
            UNROLL for (uint m = 0; m < M; m++) {
                simdgroup_store(s[b][m], scores + m * 8 * Shape::SCORE_ROW + 8 * b, Shape::SCORE_ROW);
            }
        }
    }

    // O += weights V. values: the tile, from the first run of the share on.
    METAL_FUNC void accumulate(threadgroup const T* weights, threadgroup const T* values) {
        Operand w[M][Shape::KEYS / 8];
        load_left(w, weights, 8 * Shape::ROWS);
        UNROLL for (uint f = 0; f < Shape::VALUE_FRAGMENTS; f++) {
            Operand v[Shape::KEYS / 8];
            load_right_rows(v, values + f * Sizes::RUN, 64);
            multiply_accumulate_all(o[f], w, v);
        }
    }

    // Stores the result as it lies in the tile, without pads.
    METAL_FUNC void store(threadgroup float* tile) {
        UNROLL for (uint f = 0; f < Shape::VALUE_FRAGMENTS; f++) {
            UNROLL for (uint m = 0; m < M; m++) simdgroup_store(o[f][m], tile + f * 8 * Shape::ROWS + 64 * m, 8);
        }
    }

    // Multiplies each row by the factor that its lanes hold. diagonals: M matrices, which are zero off the diagonal.
    METAL_FUNC void scale(float factor, threadgroup float* diagonals, uint lane) {
        const uint row = lane / Sizes::LANES;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (lane % Sizes::LANES == 0) diagonals[row / 8 * 64 + row % 8 * 9] = factor;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        scale_rows(o, diagonals);
    }
};

// The largest number of the lanes that share a row.
template <class Shape>
METAL_FUNC float largest_of_row(float x) {
    UNROLL for (uint step = 1; step < TileSizes<Shape>::LANES; step *= 2) x = max(x, simd_shuffle_xor(x, ushort(step)));
    return x;
}

// The running softmax of a simdgroup's rows. Lane l holds every LANES-th score of row l / LANES, from l % LANES on.
//
// Weights are relative to a score that is at most SLACK below the largest so far: so sums seldom have to be scaled, in
// units of log 2. The largest weights are 2^HEADROOM and more, so that small ones are halves too.
constant constexpr float SLACK = 6.0f, HEADROOM = 8.0f;

template <class Shape>
struct RowSoftmax {
    typedef typename Shape::T T;
    static constant constexpr uint LANES = TileSizes<Shape>::LANES, COLUMNS = Shape::KEYS / LANES;
    float reference;
    float sum;  // of this lane's columns; all together in total()
    float weight[COLUMNS];

    // Begins with a sink, whose weight one of the row's lanes holds, or with nothing.
    METAL_FUNC void begin(float sink, bool has_sink, uint lane) {
        reference = sink;
        sum = has_sink && lane % LANES == 0 ? metal::exp2(HEADROOM) : 0.0f;
    }

    // Takes the scores of the next tile. The row sees the keys in range. Returns the factor by which the sums so far
    // shrink. parts: the SPLIT summands of the scores, one after the other.
    METAL_FUNC float take(threadgroup const float* parts, float scale, KeyRange range, uint lane) {
        float largest = LOWEST_SCORE;
        UNROLL for (uint c = 0; c < COLUMNS; c++) {
            const uint col = LANES * c + lane % LANES;
            weight[c] = 0.0f;
            for (uint part = 0; part < Shape::SPLIT; part++)
                weight[c] += parts[part * TileSizes<Shape>::SCORES + lane / LANES * Shape::SCORE_ROW + col];
            weight[c] *= scale;
            if (col >= range.begin && col < range.end) largest = max(largest, weight[c]);
        }
        largest = largest_of_row<Shape>(largest);
        const float before = reference;
        if (largest > reference + SLACK) reference = largest;
        const float factor = metal::exp2(before - reference);
        sum *= factor;
        UNROLL for (uint c = 0; c < COLUMNS; c++) {
            const uint col = LANES * c + lane % LANES;
            const bool seen = col >= range.begin && col < range.end;
            weight[c] = seen ? metal::exp2(weight[c] - reference + HEADROOM) : 0.0f;
            sum += weight[c];
        }
        return factor;
    }

    // Stores the weights as left matrices.
    METAL_FUNC void store_weights(threadgroup T* weights, uint lane) {
        UNROLL for (uint c = 0; c < COLUMNS; c++) {
            const uint col = LANES * c + lane % LANES;
            weights[col / 8 * (8 * Shape::ROWS) + lane / LANES * 8 + col % 8] = T(weight[c]);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    METAL_FUNC float total() const {
        float all = sum;
        UNROLL for (uint step = 1; step < LANES; step *= 2) all += simd_shuffle_xor(all, ushort(step));
        return all;
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
