// A tile of mul_few: FEW_ROWS rows of weights times up to N rows of activations, by 8x8 matrices. A simdgroup works
// alone, with threadgroup memory of its own. The columns of its rows come in chunks, and the columns of a chunk in
// groups. Here a chunk is staged as weights, in decoded parts.
#pragma once

#include "mul_few_rows.h"

constant constexpr uint FEW_PARTS = FEW_COLUMNS / PART;  // of a row, staged at a time
constant constexpr uint MATRIX_ROWS = 8;

// Weights, staged as T. Chunks have FEW_COLUMNS columns, by parts: two groups.
template <class Q_, class T_>
struct StagedWeights {
    typedef Q_ Q;
    typedef T_ T;
    static constant constexpr uint GROUP = FEW_COLUMNS / 2, GROUPS = 2;
    static constant constexpr bool SCALED = false, OFFSET = false;
    static constant constexpr uint COLUMNS = FEW_COLUMNS, ROW_BYTES = FEW_COLUMNS * sizeof(T);
};

// A simdgroup's chunk of the rows of a tile. A lane stages one part of every eighth row. Run h of part i of a row lies
// at FEW_PARTS h + i, and a group is a run of each part.
template <class Staged, uint R>
struct WeightStage {
    typedef typename Staged::Q Q;
    typedef typename Staged::T T;
    typedef vec<T, 4> Four;
    static constant constexpr uint ROWS = R / MATRIX_ROWS, GROUP = Staged::GROUP;
    static_assert(FEW_PARTS * MATRIX_ROWS == SIMD, "a lane for each");

    device const uchar* rows[ROWS];
    float4 parts[ROWS][4];
    threadgroup T* values;
    uint lane, k;

    template <class P, uint N>
    METAL_FUNC void begin(constant P& p, Matrices<N> w, uint first, threadgroup float* memory, uint lane_) {
        lane = lane_;
        k = p.k;
        values = (threadgroup T*)memory;
        UNROLL for (uint r = 0; r < ROWS; r++) {
            rows[r] = w.row(lane / FEW_PARTS + r * MATRIX_ROWS, R, first, p.m, p.row_bytes);
        }
    }

    // Loads a chunk into registers. The last may go beyond the blocks of a row: its part meets no activations.
    METAL_FUNC void load(uint chunk) {
        const uint i = FEW_PARTS * chunk + lane % FEW_PARTS, last = k / PART - 1;
        UNROLL for (uint r = 0; r < ROWS; r++) {
            Q::weights(rows[r], Q::BLOCK < FEW_COLUMNS ? min(i, last) : i, Q::BLOCK, parts[r]);  // of whole blocks
        }
    }

    METAL_FUNC uint place(uint i, uint h) const {
        return Q::SPAN <= 16 ? run_start<Q::SPAN>(i, h) / RUN : h * FEW_PARTS + i;
    }

    // Stages the chunk that is loaded, and loads the next.
    METAL_FUNC void stage(uint, uint next, uint n_chunks) {
        UNROLL for (uint h = 0; h < 2; h++) {
            const uint at = place(lane % FEW_PARTS, h), row = lane / FEW_PARTS;
            threadgroup T* to = values + at / FEW_PARTS * (R * GROUP) + row * GROUP + at % FEW_PARTS * RUN;
            UNROLL for (uint r = 0; r < ROWS; r++) {
                UNROLL for (uint j = 0; j < 2; j++) {
                    ((threadgroup Four*)(to + r * MATRIX_ROWS * GROUP))[j] = Four(parts[r][2 * h + j]);
                }
            }
        }
        if (next < n_chunks) load(next);
    }

    METAL_FUNC uint column(uint chunk, uint group) const {
        return Q::SPAN <= 16 ? FEW_COLUMNS * chunk + GROUP * group : run_column<Q>(FEW_PARTS * chunk, group);
    }

    // The columns of a group, of the i-th eight rows.
    template <class Left, uint N>
    METAL_FUNC void left(thread Left (&m)[N], uint group, uint i) const {
        load_columns(m, values + group * (R * GROUP) + i * MATRIX_ROWS * GROUP, GROUP);
    }

    // Weights have no scales.
    METAL_FUNC threadgroup const float* scales_of(uint) const { return (threadgroup const float*)values; }
    METAL_FUNC threadgroup const float* offsets_of(uint) const { return (threadgroup const float*)values; }
};
