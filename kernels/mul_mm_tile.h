// Y = X W^T in tiles of MUL_MM_ROWS rows of W by MUL_MM_TOKENS tokens. Per step, two parts of every row and the
// activations that meet them are staged, decoded, in threadgroup memory, and each of the four simdgroups multiplies a
// quarter of the tile. Columns go by parts, not in the order of the row: a sum does not mind.
//
// Staged values lie as 8x8 matrices, one after the other: for each run of eight columns, eight rows by eight rows. A
// run of a row is then two vectors in one place, and the lanes that load a matrix meet in no bank.
#pragma once

#include "matmul_epilogue.h"
#include "quant_dot.h"
#include "shapes.h"

constant constexpr uint MATRIX = 64;  // values of an 8x8 matrix
constant constexpr uint TILE_W = MUL_MM_ROWS * MUL_MM_COLUMNS;
constant constexpr uint TILE_X = MUL_MM_TOKENS * MUL_MM_COLUMNS;
constant constexpr uint TILE_Y = MUL_MM_ROWS * MUL_MM_TOKENS;

template <class T>
using Four = vec<T, 4>;

// The threadgroup memory of a tile whose values are staged as T.
#define MUL_MM_TILE(T, name) TG_ARRAY(Four<T>, name, (TILE_W + TILE_X) / 4)

// Which rows of X and Y are the tokens of a tile, 1 to MUL_MM_TOKENS of them: those that follow each other,
struct Consecutive {
    uint first, n;

    METAL_FUNC uint x_row(uint i) const { return first + i; }
    METAL_FUNC uint y_row(uint i) const { return first + i; }
};

// or those that a list of rows of Y names. x_div neighbours among these share a row of X.
struct Gathered {
    device const int* slots;
    uint n, x_div;

    METAL_FUNC uint x_row(uint i) const { return uint(slots[i]) / x_div; }
    METAL_FUNC uint y_row(uint i) const { return uint(slots[i]); }
};

// 8x8 matrices of results: rows of weights by tokens, a quarter of the tile in each simdgroup.
struct Quarter {
    static constant constexpr uint ROWS = MUL_MM_ROWS / 16, TOKENS = MUL_MM_TOKENS / 16;
    simdgroup_float8x8 sums[ROWS][TOKENS];
    uint row, token;  // where the quarter begins in the tile

    METAL_FUNC void begin(uint sg) {
        row = sg / 2 * (MUL_MM_ROWS / 2);
        token = sg % 2 * (MUL_MM_TOKENS / 2);
        UNROLL for (uint i = 0; i < ROWS; i++) {
            UNROLL for (uint j = 0; j < TOKENS; j++) sums[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
    }

    // sums += W X^T of a step.
    template <class T>
    METAL_FUNC void multiply(threadgroup const T* w, threadgroup const T* x) {
        for (uint run = 0; run < MUL_MM_COLUMNS / RUN; run++) {
            simdgroup_matrix<T, 8, 8> a[ROWS], b[TOKENS];
            UNROLL for (uint i = 0; i < ROWS; i++) {
                simdgroup_load(a[i], w + (run * MUL_MM_ROWS + row) * RUN + i * MATRIX, 8);
            }
            UNROLL for (uint j = 0; j < TOKENS; j++) {
                simdgroup_load(b[j], x + (run * MUL_MM_TOKENS + token) * RUN + j * MATRIX, 8, ulong2(0), true);
            }
            UNROLL for (uint i = 0; i < ROWS; i++) {
                UNROLL for (uint j = 0; j < TOKENS; j++) {
                    simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
                }
            }
        }
    }

    // To y[token][row] of the tile.
    METAL_FUNC void store(threadgroup float* y) {
        UNROLL for (uint i = 0; i < ROWS; i++) {
            UNROLL for (uint j = 0; j < TOKENS; j++) {
                threadgroup float* to = y + (token + 8 * j) * MUL_MM_ROWS + row + 8 * i;
                simdgroup_store(sums[i][j], to, MUL_MM_ROWS, ulong2(0), true);
            }
        }
    }
};

// Eight activations from a column on, zero past the k that a row has.
template <class Q>
METAL_FUNC void load_run(device const float* row, uint column, uint k, thread float4* x) {
    if (Q::is_whole(k)) {
        device const float4* run = (device const float4*)(row + column);
        x[0] = run[0];
        x[1] = run[1];
    } else {
        UNROLL for (uint c = 0; c < RUN; c++) x[c / 4][c % 4] = column + c < k ? row[column + c] : 0.0f;
    }
}

// Tile tile_row of the rows of W, for the tokens of a tile. Params have k, m and row_bytes. T is the type in which
// values are staged. Rows and tokens outside the matrices are staged as copies of the last ones and their results
// dropped; a simdgroup whose quarter has no token leaves the multiplier to the others.
template <class Q, class T, class Tokens, class Params, class Epilogue>
METAL_FUNC void mul_mm_tile(constant Params& p, Tokens tokens, uint tile_row, Matrices<Epilogue::MATRICES> weights,
                            device const float* x, Epilogue out, threadgroup Four<T>* tile, uint tid, uint sg) {
    const uint n_rows = MUL_MM_ROWS / Epilogue::MATRICES, first_row = tile_row * n_rows;

    // This thread stages one part of a row and one run of a token.
    const uint w_row = tid / 2, w_part = tid % 2, x_row = tid / 4, x_run = tid % 4;
    device const uchar* w_from = weights.row(w_row, MUL_MM_ROWS, first_row, p.m, p.row_bytes);
    device const float* x_from = x + ulong(tokens.x_row(min(x_row, tokens.n - 1))) * p.k;
    threadgroup Four<T>* w_to = tile + (w_part * 2 * MUL_MM_ROWS + w_row) * (RUN / 4);
    threadgroup Four<T>* x_to = tile + (TILE_W + (x_run * MUL_MM_TOKENS + x_row) * RUN) / 4;

    Quarter quarter;
    quarter.begin(sg);
    const uint n_steps = (p.k + MUL_MM_COLUMNS - 1) / MUL_MM_COLUMNS;
    for (uint step = 0; step < n_steps; step++) {
        float4 w[4], xs[2];
        Q::weights(w_from, 2 * step + w_part, p.k, w);
        load_run<Q>(x_from, run_column<Q>(2 * step + x_run / 2, x_run % 2), p.k, xs);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the step before has been multiplied
        UNROLL for (uint i = 0; i < 4; i++) w_to[i / 2 * (MUL_MM_ROWS * RUN / 4) + i % 2] = Four<T>(w[i]);
        UNROLL for (uint i = 0; i < 2; i++) x_to[i] = Four<T>(xs[i]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (quarter.token < tokens.n) quarter.multiply((threadgroup const T*)tile, (threadgroup const T*)tile + TILE_W);
    }

    static_assert(TILE_Y * sizeof(float) <= (TILE_W + TILE_X) * sizeof(T), "results pass through the same memory");
    threadgroup float* y = (threadgroup float*)tile;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    quarter.store(y);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = tid; i < n_rows * tokens.n; i += MUL_MM_THREADS) {
        const uint row = first_row + i % n_rows, token = tokens.y_row(i / n_rows);
        threadgroup const float* sums = y + i / n_rows * MUL_MM_ROWS + i % n_rows;
        if (row < p.m) out.put({token, row, ulong(token) * p.m + row}, sums[0], sums[MUL_MM_ROWS - n_rows]);
    }
}
