// Y = X W^T in tiles of some rows of W by some tokens. A step stages some parts of every row (see quant_blocks.h),
// decoded, and their activations in threadgroup memory. Then each simdgroup multiplies its share of the tile. Columns
// go by parts, not in the order of the row: the order does not change the sum.
//
// Operands are halves, sums are floats. A weight is staged WEIGHT_SCALE times too large: then the weights that models
// have are normal halves. An operand beyond a half's range is an infinity, and so no sum with it is finite. Those sums
// are computed again, in floats. A tile of floats serves types that are not to be rounded, and exact products.
//
// Staged values lie as 8x8 matrices, one after the other: for each run of eight columns, eight rows by eight rows. So a
// run of a row is in one place, and the lanes that load a matrix use different banks.
#pragma once

#include "matmul_epilogue.h"
#include "quant_halves.h"
#include "shapes.h"

constant constexpr uint MAX_TILE_BYTES = PER_DEVICE(32, 48) * 1024;

// The operands of a type's products. Float matrices are few and small, and what they decide, such as the experts of a
// row, is not to be rounded.
template <class Q>
struct OperandOf {
    typedef half T;
    static constant constexpr uint COLUMNS = MUL_MM_COLUMNS;
};
template <>
struct OperandOf<Plain<F32>> {
    typedef float T;
    static constant constexpr uint COLUMNS = 32;
};

// What multiplies a tile: simdgroup matrices, or Metal 4's tensor operations (mul_mm_cooperative.h).
struct SimdgroupMatrices {};
struct TensorOperations {};

// A tile of ROWS of W by TOKENS, COLUMNS of either staged at a time as T. Of the simdgroups' shares, DOWN lie one below
// the other along the rows, ACROSS side by side along the tokens. A simdgroup skips the 8x8 matrices of its results
// that have no token, SKIPPED at a time.
template <class T_, uint THREADS_, uint ROWS_, uint TOKENS_, uint COLUMNS_, uint ACROSS_, uint SKIPPED_>
struct TileShape {
    typedef T_ T;
    typedef SimdgroupMatrices Multiplier;
    static constant constexpr uint THREADS = THREADS_, ROWS = ROWS_, TOKENS = TOKENS_, COLUMNS = COLUMNS_;
    static constant constexpr uint ACROSS = ACROSS_, DOWN = THREADS / SIMD / ACROSS, SKIPPED = SKIPPED_;
    static constant constexpr bool HALVES = sizeof(T) == 2;
    static constant constexpr uint PARTS = COLUMNS / PART, RUNS = COLUMNS / RUN;
    static constant constexpr uint DEEP = HALVES ? uint(MUL_MM_DEEP) : 1;  // runs that are multiplied at a time
    // Sizes are in vectors of 16 bytes from here on. A pad after a run of all rows keeps those who store in different
    // banks.
    static constant constexpr uint VECTORS = RUN * sizeof(T) / 16;  // of a run
    static constant constexpr uint W_RUN = ROWS * VECTORS + (HALVES ? 8 / PARTS : 1), X_RUN = TOKENS * VECTORS + 2;
    static constant constexpr uint STAGED = (W_RUN + X_RUN) * RUNS,
                                   BUFFERS = HALVES && 32 * STAGED <= MAX_TILE_BYTES ? 2 : 1, Y = ROWS * TOKENS / 4;
    static constant constexpr uint SIZE = BUFFERS * STAGED > Y ? BUFFERS* STAGED : Y;
    static_assert(16 * SIZE <= MAX_TILE_BYTES, "threadgroup memory");

    // The place of a run, `run` of the step, of a row or token.
    static METAL_FUNC uint w_place(uint row, uint run) { return run * W_RUN + row * VECTORS; }
    static METAL_FUNC uint x_place(uint token, uint run) { return RUNS * W_RUN + run * X_RUN + token * VECTORS; }
};

// The tile of mul_mm and mul_heads_mm.
template <class Q>
struct MulMmShape : TileShape<typename OperandOf<Q>::T, MUL_MM_THREADS, MUL_MM_ROWS, MUL_MM_TOKENS,
                              OperandOf<Q>::COLUMNS, 2, MUL_MM_TOKENS / 16> {};

// Of KERNEL_UNROLLED: NVIDIA's compiler gets as many registers as let two threadgroups of 256 run side by side.
constant constexpr uint TILE_STEPS = 4;

// The threadgroup memory of a tile: first the staged values, then the results.
#define MUL_MM_TILE(Shape, name) TG_ARRAY(uint4, name, Shape::SIZE)

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
    typedef typename Shape::T T;
    typedef simdgroup_matrix<T, 8, 8> Operand;
    static constant constexpr uint ROWS = Shape::ROWS / Shape::DOWN / 8, TOKENS = Shape::TOKENS / Shape::ACROSS / 8;
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
    METAL_FUNC void multiply(threadgroup const uint4* staged) {
        if (used == 0) return;
        const uint per_vector = 16 / sizeof(T);
        UNROLL for (uint run = 0; run < Shape::RUNS; run += Shape::DEEP) {
            Operand a[ROWS][Shape::DEEP];
            load_left(a, (threadgroup const T*)(staged + Shape::w_place(row, run)), Shape::W_RUN * per_vector);
            UNROLL for (uint j = 0; j < TOKENS; j += Shape::SKIPPED) {
                if (j == 0 || j < used) {
                    UNROLL for (uint s = j; s < j + Shape::SKIPPED; s++) {
                        Operand b[Shape::DEEP];
                        load_right(b, (threadgroup const T*)(staged + Shape::x_place(token + 8 * s, run)),
                                   Shape::X_RUN * per_vector);
                        multiply_accumulate_all(sums[s], a, b);
                    }
                }
            }
        }
    }

    // To y[token][row] of the tile.
    METAL_FUNC void store(threadgroup float* y) {
        UNROLL for (uint j = 0; j < TOKENS; j++) {
            UNROLL for (uint i = 0; i < ROWS; i++) {
                threadgroup float* to = y + (token + 8 * j) * Shape::ROWS + row + 8 * i;
                simdgroup_store(sums[j][i], to, Shape::ROWS, ulong2(0), true);
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

METAL_FUNC uint4 eight_halves(half4 a, half4 b) { return uint4(as_type<uint2>(a), as_type<uint2>(b)); }

// A part of a row of weights and some activations of a token, from device memory to vectors of 16 bytes of operands.
// Loaded: what a thread keeps of them while the step before is multiplied.
template <class Q, class T>
struct Operands;

template <class Q>
struct Operands<Q, half> {
    typedef Halves<Q> From;
    typedef typename From::Loaded Weights;
    static constant constexpr uint FOURS = 2;  // of activations, in a vector
    static METAL_FUNC Weights load(device const uchar* row, uint i, uint k) { return From::load(row, i, k); }
    static METAL_FUNC void convert(thread const Weights& part, thread uint4 (&w)[2]) {
        half4 fours[4];
        From::decode(part, fours);
        UNROLL for (uint h = 0; h < 2; h++) w[h] = eight_halves(fours[2 * h], fours[2 * h + 1]);
    }
    static METAL_FUNC uint4 convert(thread const float4 (&x)[FOURS]) { return eight_halves(half4(x[0]), half4(x[1])); }
};

template <class Q>
struct Operands<Q, float> {
    struct Weights {
        float4 fours[4];
    };
    static constant constexpr uint FOURS = 1;
    static METAL_FUNC Weights load(device const uchar* row, uint i, uint k) {
        Weights out;
        Q::weights(row, i, k, out.fours);
        return out;
    }
    static METAL_FUNC void convert(thread const Weights& part, thread uint4 (&w)[4]) {
        UNROLL for (uint i = 0; i < 4; i++) w[i] = as_type<uint4>(part.fours[i]);
    }
    static METAL_FUNC uint4 convert(thread const float4 (&x)[FOURS]) { return as_type<uint4>(x[0]); }
};

// A thread's share of the staging of a step: a part of some rows, and some vectors of some tokens. Neighbours take
// other parts of the same rows. Run h of part i, of the parts of the step, lies at PARTS h + i.
template <class Q, class Shape>
struct Stage {
    typedef Operands<Q, typename Shape::T> From;
    static constant constexpr uint SIZE = Shape::VECTORS, X_LANES = 4 * SIZE;  // lanes that share a token
    static constant constexpr uint NEXT_ROW = Shape::THREADS / Shape::PARTS, ROWS = Shape::ROWS / NEXT_ROW;
    static constant constexpr uint NEXT_TOKEN = Shape::THREADS / X_LANES, TOKENS = Shape::TOKENS / NEXT_TOKEN;
    static constant constexpr uint RUNS = Shape::RUNS / 4;
    static_assert(ROWS * NEXT_ROW == Shape::ROWS && TOKENS * NEXT_TOKEN == Shape::TOKENS, "all are staged");

    // True if the last step may go beyond the blocks of a row. Then it decodes any part, which meets zeros.
    static constant constexpr bool BEYOND = Shape::COLUMNS > Q::BLOCK;

    device const uchar* w_rows[ROWS];
    device const float* x_rows[TOKENS];
    uint row, part, token, run, vector;  // the first of each; vector: of the run
    uint n_tokens;
    typename From::Weights w[ROWS];
    float4 x[TOKENS][RUNS][From::FOURS];

    METAL_FUNC void begin(uint tid) {
        row = tid / Shape::PARTS;
        part = tid % Shape::PARTS;
        token = tid / X_LANES;
        run = tid / SIZE % 4;
        vector = tid % SIZE;
    }

    METAL_FUNC void load(uint step, uint k) {
        const uint first = Shape::PARTS * step, last = (k + Q::BLOCK - 1) / Q::BLOCK * Q::PARTS - 1;
        UNROLL for (uint r = 0; r < ROWS; r++) {
            w[r] = From::load(w_rows[r], BEYOND ? min(first + part, last) : first + part, k);
        }
        UNROLL for (uint t = 0; t < TOKENS; t++) {
            const bool has_token = token + t * NEXT_TOKEN < n_tokens;
            UNROLL for (uint i = 0; i < RUNS; i++) {
                const uint at = run + 4 * i;
                const uint column = run_column<Q>(first + at % Shape::PARTS, at / Shape::PARTS) + 4 * vector;
                UNROLL for (uint f = 0; f < From::FOURS; f++) {
                    x[t][i][f] = has_token && !(BEYOND && column >= k) ? load_four<Q>(x_rows[t], column + 4 * f, k)
                                                                       : float4(0.0f);
                }
            }
        }
    }

    METAL_FUNC void store(threadgroup uint4* staged) const {
        UNROLL for (uint r = 0; r < ROWS; r++) {
            uint4 weights[2 * SIZE];
            From::convert(w[r], weights);
            UNROLL for (uint i = 0; i < 2 * SIZE; i++) {
                staged[Shape::w_place(row + r * NEXT_ROW, part + i / SIZE * Shape::PARTS) + i % SIZE] = weights[i];
            }
        }
        UNROLL for (uint t = 0; t < TOKENS; t++) {
            UNROLL for (uint i = 0; i < RUNS; i++) {
                staged[Shape::x_place(token + t * NEXT_TOKEN, run + 4 * i) + vector] = From::convert(x[t][i]);
            }
        }
    }
};

// The product of a row of weights and a row of activations in floats, by one thread.
template <class Q>
METAL_FUNC float product_in_floats(device const uchar* row, device const float* x, uint k) {
    const uint n = (k + Q::BLOCK - 1) / Q::BLOCK * Q::PARTS;
    float sum = 0.0f;
    for (uint part = 0; part < n; part++) {
        float4 w[4];
        Q::weights(row, part, k, w);
        UNROLL for (uint i = 0; i < 4; i++) {
            sum += dot(w[i], load_four<Q>(x, run_column<Q>(part, i / 2) + i % 2 * 4, k));
        }
    }
    return sum;
}

// How a multiplier begins, adds a staged step to, and stores the sums of a tile: an overload each.
template <class Shape, class Sums>
METAL_FUNC void multiply_staged(thread Sums& share, threadgroup uint4* staged, SimdgroupMatrices) {
    share.multiply(staged);
}
template <class Shape, class Sums>
METAL_FUNC void store_sums(thread Sums& share, threadgroup float* y, SimdgroupMatrices) {
    share.store(y);
}

// Adds the products of all steps to sums, and leaves them in threadgroup memory as [token][row].
template <class Shape, class Staging, class Sums>
METAL_FUNC void sum_steps(thread Staging& stage, uint k, threadgroup uint4* tile, thread Sums& sums) {
    const typename Shape::Multiplier by = {};
    const uint n_steps = (k + Shape::COLUMNS - 1) / Shape::COLUMNS;
    stage.load(0, k);
    for (uint step = 0; step < n_steps; step++) {
        threadgroup uint4* staged = tile + (Shape::BUFFERS > 1 ? step % 2 * Shape::STAGED : 0);
        if (Shape::BUFFERS == 1) threadgroup_barrier(mem_flags::mem_threadgroup);  // the step before is multiplied
        stage.store(staged);
        if (step + 1 < n_steps) stage.load(step + 1, k);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        multiply_staged<Shape>(sums, staged, by);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    store_sums<Shape>(sums, (threadgroup float*)tile, by);
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <class Shape, class Staging>
METAL_FUNC void sum_tile(thread Staging& stage, uint k, threadgroup uint4* tile, uint sg, SimdgroupMatrices) {
    Share<Shape> share;
    share.begin(sg, stage.n_tokens);
    sum_steps<Shape>(stage, k, tile, share);
}

// Computes tile tile_row of the rows of W for the tokens of a tile. Params have k, m and row_bytes. Rows outside the
// matrix are staged as copies of the last row, and tokens as zeros. Their results are dropped.
template <class Q, class Shape, class Tokens, class Params, class Epilogue>
METAL_FUNC void mul_mm_tile(constant Params& p, Tokens tokens, uint tile_row, Matrices<Epilogue::MATRICES> weights,
                            device const float* x, Epilogue out, threadgroup uint4* tile, uint tid, uint sg) {
    const uint n_rows = Shape::ROWS / Epilogue::MATRICES, first_row = tile_row * n_rows;
    typedef Stage<Q, Shape> Staging;
    Staging stage;
    stage.begin(tid);
    stage.n_tokens = tokens.n;
    UNROLL for (uint r = 0; r < Staging::ROWS; r++) {
        stage.w_rows[r] = weights.row(stage.row + r * Staging::NEXT_ROW, Shape::ROWS, first_row, p.m, p.row_bytes);
    }
    UNROLL for (uint t = 0; t < Staging::TOKENS; t++) {
        const uint token = min(stage.token + t * Staging::NEXT_TOKEN, tokens.n - 1);
        stage.x_rows[t] = x + ulong(tokens.x_row(token)) * p.k;
    }
    sum_tile<Shape>(stage, p.k, tile, sg, typename Shape::Multiplier());

    for (uint i = tid; i < n_rows * tokens.n; i += Shape::THREADS) {
        const uint of_tile = i % n_rows, row = first_row + of_tile, token = tokens.y_row(i / n_rows);
        if (row >= p.m) continue;
        float sums[Epilogue::MATRICES];
        UNROLL for (uint j = 0; j < Epilogue::MATRICES; j++) {
            const uint at = of_tile + j * n_rows;
            sums[j] = ((threadgroup const float*)tile)[i / n_rows * Shape::ROWS + at];
            if (Shape::HALVES) sums[j] *= 1.0f / WEIGHT_SCALE;
            if (Shape::HALVES && !isfinite(sums[j])) {
                sums[j] = product_in_floats<Q>(weights.row(at, Shape::ROWS, first_row, p.m, p.row_bytes),
                                               x + ulong(tokens.x_row(i / n_rows)) * p.k, p.k);
            }
        }
        out.put({token, row, ulong(token) * p.m + row}, sums[0], sums[Epilogue::MATRICES - 1]);
    }
}
