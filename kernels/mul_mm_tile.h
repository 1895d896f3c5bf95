// Y = X W^T in tiles of MUL_MM_ROWS rows of W by some tokens. A step stages some parts of every row (see
// quant_blocks.h), decoded, and their activations in threadgroup memory. Then each of the four simdgroups multiplies a
// quarter of the tile. Columns go by parts, not in the order of the row: the order does not change the sum.
//
// Staged values lie as 8x8 matrices, one after the other: for each run of eight columns, eight rows by eight rows. So a
// run of a row is two vectors in one place, and the lanes that load a matrix use different banks.
#pragma once

#include "matmul_epilogue.h"
#include "quant_dot.h"
#include "shapes.h"

constant constexpr uint MATRIX = 64;  // values of an 8x8 matrix
constant constexpr uint TILE_PARTS = MUL_MM_COLUMNS / PART, TILE_RUNS = MUL_MM_COLUMNS / RUN;

// The four simdgroups' shares of a tile of MUL_MM_ROWS by TOKENS_: ACROSS_ of them lie side by side along the tokens,
// the others below. A simdgroup skips the 8x8 matrices of its results that have no token, SKIPPED_ at a time.
template <uint TOKENS_, uint ACROSS_, uint SKIPPED_>
struct TileShape {
    static constant constexpr uint TOKENS = TOKENS_, ACROSS = ACROSS_, SKIPPED = SKIPPED_;
    static constant constexpr uint DOWN = MUL_MM_THREADS / SIMD / ACROSS;
    static constant constexpr uint W_RUN = MUL_MM_ROWS * RUN + 4;  // two parts of a row then lie in different banks
    static constant constexpr uint X_RUN = TOKENS * RUN;
    static constant constexpr uint STAGED = (W_RUN + X_RUN) * TILE_RUNS, Y = MUL_MM_ROWS * TOKENS;
    static constant constexpr uint FLOATS = STAGED > Y ? STAGED : Y;
};

// The threadgroup memory of a tile: first the staged values, then the results.
#define MUL_MM_TILE(Shape, name) TG_ARRAY(float4, name, Shape::FLOATS / 4)

// Tokens of a tile, at least one, that are consecutive rows of X and Y.
struct Consecutive {
    uint first, n;

    METAL_FUNC uint x_row(uint i) const { return first + i; }
    METAL_FUNC uint y_row(uint i) const { return first + i; }
};

// Tokens of a tile picked by a list of row indices of Y; x_div neighbours share one row of X.
struct Gathered {
    device const int* slots;
    uint n, x_div;

    METAL_FUNC uint x_row(uint i) const { return uint(slots[i]) / x_div; }
    METAL_FUNC uint y_row(uint i) const { return uint(slots[i]); }
};

// 8x8 matrices of results: a simdgroup's share of the tile, rows of weights by tokens.
template <class Shape>
struct Share {
    static constant constexpr uint ROWS = MUL_MM_ROWS / Shape::DOWN / 8, TOKENS = Shape::TOKENS / Shape::ACROSS / 8;
    simdgroup_float8x8 sums[TOKENS][ROWS];
    uint row, token;  // the first of the share, in the tile
    uint used;        // its matrices along the tokens that have any token

    METAL_FUNC void begin(uint sg, uint n_tokens) {
        row = sg / Shape::ACROSS * (8 * ROWS);
        token = sg % Shape::ACROSS * (8 * TOKENS);
        used = n_tokens > token ? (n_tokens - token + 7) / 8 : 0;
        UNROLL for (uint j = 0; j < TOKENS; j++) {
            UNROLL for (uint i = 0; i < ROWS; i++) sums[j][i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
    }

    // sums += W X^T of a step.
    METAL_FUNC void multiply(threadgroup const float* w, threadgroup const float* x) {
        if (used == 0) return;
        for (uint run = 0; run < TILE_RUNS; run++) {
            simdgroup_float8x8 a[ROWS];
            UNROLL for (uint i = 0; i < ROWS; i++) {
                simdgroup_load(a[i], w + run * Shape::W_RUN + row * RUN + i * MATRIX, 8);
            }
            UNROLL for (uint j = 0; j < TOKENS; j += Shape::SKIPPED) {
                if (j == 0 || j < used) {
                    UNROLL for (uint s = j; s < j + Shape::SKIPPED; s++) {
                        simdgroup_float8x8 b;
                        simdgroup_load(b, x + run * Shape::X_RUN + token * RUN + s * MATRIX, 8, ulong2(0), true);
                        multiply_accumulate_each(sums[s], a, b);
                    }
                }
            }
        }
    }

    // To y[token][row] of the tile.
    METAL_FUNC void store(threadgroup float* y) {
        UNROLL for (uint j = 0; j < TOKENS; j++) {
            UNROLL for (uint i = 0; i < ROWS; i++) {
                threadgroup float* to = y + (token + 8 * j) * MUL_MM_ROWS + row + 8 * i;
                simdgroup_store(sums[j][i], to, MUL_MM_ROWS, ulong2(0), true);
            }
        }
    }
};

// Four activations from a column on, zero past the k that a row has.
template <class Q>
METAL_FUNC float4 load_four(device const float* row, uint column, uint k) {
    if (Q::is_whole(k)) return *(device const float4*)(row + column);
    float4 x;
    UNROLL for (uint c = 0; c < 4; c++) x[c] = column + c < k ? row[column + c] : 0.0f;
    return x;
}

// A thread's share of the staging of a step: a part of some rows, and some fours of columns of some tokens. Neighbours
// take other parts of the same rows. Run h of part i, of the parts of the step, lies at TILE_PARTS h + i. Rows and
// tokens go to threads so that the eight which store a vector at a time use different banks.
template <class Q, class Shape>
struct Stage {
    static constant constexpr uint ROWS = MUL_MM_ROWS * TILE_PARTS / MUL_MM_THREADS;
    static constant constexpr uint FOURS = TILE_RUNS / 4, TOKENS = Shape::TOKENS * 8 / MUL_MM_THREADS;
    static constant constexpr uint NEXT_ROW = MUL_MM_THREADS / TILE_PARTS, NEXT_TOKEN = MUL_MM_THREADS / 8;
    static_assert(ROWS * NEXT_ROW == MUL_MM_ROWS && TOKENS * NEXT_TOKEN == Shape::TOKENS, "all are staged");

    // True if the last step may go beyond the blocks of a row. Then it decodes any part, which meets zeros.
    static constant constexpr bool BEYOND = MUL_MM_COLUMNS > Q::BLOCK;

    device const uchar* w_rows[ROWS];
    device const float* x_rows[TOKENS];
    uint w_part, x_run, x_half;  // x_half: of a run
    threadgroup float4* w_to;
    threadgroup float4* x_to;
    float4 w[ROWS][4], x[TOKENS][FOURS];

    // The first row and token of a thread.
    static METAL_FUNC uint row(uint tid) {
        const uint i = tid / TILE_PARTS;
        return i / 4 * 4 + i % 2 * 2 + i / 2 % 2;
    }
    static METAL_FUNC uint token(uint tid) { return tid / 32 * 4 + tid / 2 % 4; }

    METAL_FUNC void begin(threadgroup float4* tile, uint tid) {
        w_part = tid % TILE_PARTS;
        x_run = tid / 8 % 4;
        x_half = tid % 2;
        w_to = tile + (w_part * Shape::W_RUN + row(tid) * RUN) / 4;
        x_to = tile + (TILE_RUNS * Shape::W_RUN + x_run * Shape::X_RUN + token(tid) * RUN) / 4 + x_half;
    }

    METAL_FUNC void load(uint step, uint k) {
        UNROLL for (uint t = 0; t < TOKENS; t++) {
            UNROLL for (uint i = 0; i < FOURS; i++) {
                const uint run = x_run + 4 * i, part = TILE_PARTS * step + run % TILE_PARTS;
                const uint column = run_column<Q>(part, run / TILE_PARTS) + 4 * x_half;
                x[t][i] = BEYOND && column >= k ? float4(0.0f) : load_four<Q>(x_rows[t], column, k);
            }
        }
        const uint last = (k + Q::BLOCK - 1) / Q::BLOCK * Q::PARTS - 1, part = TILE_PARTS * step + w_part;
        UNROLL for (uint r = 0; r < ROWS; r++) Q::weights(w_rows[r], BEYOND ? min(part, last) : part, k, w[r]);
    }

    METAL_FUNC void store() {
        UNROLL for (uint r = 0; r < ROWS; r++) {
            UNROLL for (uint i = 0; i < 4; i++) {
                w_to[(i / 2 * TILE_PARTS * Shape::W_RUN + r * NEXT_ROW * RUN) / 4 + i % 2] = w[r][i];
            }
        }
        UNROLL for (uint t = 0; t < TOKENS; t++) {
            UNROLL for (uint i = 0; i < FOURS; i++) x_to[(4 * i * Shape::X_RUN + t * NEXT_TOKEN * RUN) / 4] = x[t][i];
        }
    }
};

// Computes tile tile_row of the rows of W for the tokens of a tile. Params have k, m and row_bytes. Rows and tokens
// outside the matrices are staged as copies of the last row and token, and their results are dropped.
template <class Q, class Shape, class Tokens, class Params, class Epilogue>
METAL_FUNC void mul_mm_tile(constant Params& p, Tokens tokens, uint tile_row, Matrices<Epilogue::MATRICES> weights,
                            device const float* x, Epilogue out, threadgroup float4* tile, uint tid, uint sg) {
    const uint n_rows = MUL_MM_ROWS / Epilogue::MATRICES, first_row = tile_row * n_rows;
    typedef Stage<Q, Shape> Staging;
    Staging stage;
    stage.begin(tile, tid);
    UNROLL for (uint r = 0; r < Staging::ROWS; r++) {
        const uint row = Staging::row(tid) + r * Staging::NEXT_ROW;
        stage.w_rows[r] = weights.row(row, MUL_MM_ROWS, first_row, p.m, p.row_bytes);
    }
    UNROLL for (uint t = 0; t < Staging::TOKENS; t++) {
        const uint token = min(Staging::token(tid) + t * Staging::NEXT_TOKEN, tokens.n - 1);
        stage.x_rows[t] = x + ulong(tokens.x_row(token)) * p.k;
    }
    Share<Shape> share;
    share.begin(sg, tokens.n);
    threadgroup float* floats = (threadgroup float*)tile;

    const uint n_steps = (p.k + MUL_MM_COLUMNS - 1) / MUL_MM_COLUMNS;
    for (uint step = 0; step < n_steps; step++) {
        stage.load(step, p.k);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the step before has been multiplied
        stage.store();
        threadgroup_barrier(mem_flags::mem_threadgroup);
        share.multiply(floats, floats + TILE_RUNS * Shape::W_RUN);
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);
    share.store(floats);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = tid; i < n_rows * tokens.n; i += MUL_MM_THREADS) {
        const uint row = first_row + i % n_rows, token = tokens.y_row(i / n_rows);
        threadgroup const float* sums = floats + i / n_rows * MUL_MM_ROWS + i % n_rows;
        if (row < p.m) out.put({token, row, ulong(token) * p.m + row}, sums[0], sums[MUL_MM_ROWS - n_rows]);
    }
}
