// Y = X W^T for 8, 16 or 32 rows of activations by 8x8 matrices. A tile is FEW_ROWS rows of W times all of X. A
// simdgroup works alone: it brings a chunk of the columns of its rows to threadgroup memory of its own, then multiplies
// them with activations from device memory. So there is no barrier of the threadgroup until the end. Simdgroups that
// share a tile divide its columns, and their sums are added in order.
#pragma once

#include "mul_few_raw.h"

// How the weights of a type come: as they are where quants in half precision are fast and Raw knows the type, else as
// floats.
constant constexpr bool RAW_QUANTS = PER_DEVICE(false, true);

template <class Q, uint R>
struct StageOf {
    typedef StagedWeights<Q, float> Staged;
    typedef WeightStage<Staged, R> Stage;
};
template <uint R>
struct StageOf<Plain<F16>, R> {
    typedef StagedWeights<Plain<F16>, typename conditional<RAW_QUANTS, half, float>::type> Staged;
    typedef WeightStage<Staged, R> Stage;
};
template <bool RAW, class B, uint R>
struct StageOfQuants {
    typedef StagedWeights<Quantised<B>, float> Staged;
    typedef WeightStage<Staged, R> Stage;
};
template <class B, uint R>
struct StageOfQuants<true, B, R> {
    typedef RawQuants<B> Staged;
    typedef RawStage<Staged, R> Stage;
};
template <class B, uint R>
struct StageOf<Quantised<B>, R> : StageOfQuants<RAW_QUANTS && Raw<B>::KNOWN, B, R> {};

// The sizes of a tile of R rows of weights by N of activations, the simdgroups of a threadgroup, and the memory of one:
// the chunk with its scales and offsets, then the sums, [N][R].
template <class Q, uint R_, uint N_>
struct FewShape : StageOf<Q, R_> {
    static constant constexpr uint R = R_, N = N_, SIMDGROUPS = FEW_SIMDGROUPS * FEW_ROWS / R;
    static constant constexpr uint CHUNK = R * StageOf<Q, R_>::Staged::ROW_BYTES / 4;
    static constant constexpr uint FLOATS = CHUNK > R* N ? CHUNK : R* N;
};

#define MUL_FEW_TILE(Shape, name) TG_ARRAY(float4, name, Shape::SIMDGROUPS* Shape::FLOATS / 4)

// sum += scale of the row * product, element by element.
METAL_FUNC void add_scaled(thread simdgroup_float8x8& sum, thread simdgroup_float8x8& scale,
                           thread simdgroup_float8x8& product) {
    UNROLL for (uint i = 0; i < 2; i++) sum.thread_elements()[i] +=
        scale.thread_elements()[i] * product.thread_elements()[i];
}

// Loads a number for each row of a matrix: all columns have it.
METAL_FUNC void load_for_rows(thread simdgroup_float8x8& m, threadgroup const float* source) {
    simdgroup_load(m, source, 0, ulong2(0), true);
}

// The sums of a simdgroup.
template <class Shape>
struct TileSums {
    typedef typename Shape::Staged Staged;
    typedef typename Shape::Stage Stage;
    typedef simdgroup_matrix<typename Staged::T, 8, 8> Left;
    static constant constexpr uint ROWS = Shape::R / MATRIX_ROWS, TOKENS = Shape::N / 8, DEEP = Staged::GROUP / 8;
    simdgroup_float8x8 of[TOKENS][ROWS];

    METAL_FUNC void clear() {
        UNROLL for (uint t = 0; t < TOKENS; t++) {
            UNROLL for (uint i = 0; i < ROWS; i++) of[t][i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
    }

    // Adds the products of a group with the activations of n tokens, from x on, `stride` floats from one to the next.
    METAL_FUNC void multiply(thread const Stage& stage, uint group, device const float* x, uint stride, uint n_tokens) {
        Left a[ROWS][DEEP];
        UNROLL for (uint i = 0; i < ROWS; i++) stage.left(a[i], group, i);
        UNROLL for (uint t = 0; t < TOKENS; t++) {
            simdgroup_float8x8 b[DEEP];
            load_columns_transposed(b, x, stride, 8 * t, n_tokens);
            if (Staged::SCALED) {
                simdgroup_float8x8 products[ROWS];
                multiply_all(products, a, b);
                add(stage, group, of[t], products);
            } else {
                multiply_accumulate_all(of[t], a, b);
            }
            if (Staged::OFFSET) add_offsets(stage, group, of[t], b);
        }
    }

    METAL_FUNC void add(thread const Stage& stage, uint group, thread simdgroup_float8x8 (&sums)[ROWS],
                        thread simdgroup_float8x8 (&products)[ROWS]) {
        UNROLL for (uint i = 0; i < ROWS; i++) {
            simdgroup_float8x8 scale;
            load_for_rows(scale, stage.scales_of(group) + i * MATRIX_ROWS);
            add_scaled(sums[i], scale, products[i]);
        }
    }

    // Adds the offset of the row times the sum of a token's activations, in every row the same.
    METAL_FUNC void add_offsets(thread const Stage& stage, uint group, thread simdgroup_float8x8 (&sums)[ROWS],
                                thread simdgroup_float8x8 (&b)[DEEP]) {
        simdgroup_float8x8 of_x;
        sum_columns(of_x, b);
        UNROLL for (uint i = 0; i < ROWS; i++) {
            simdgroup_float8x8 offset;
            load_for_rows(offset, stage.offsets_of(group) + i * MATRIX_ROWS);
            add_scaled(sums[i], offset, of_x);
        }
    }

    // To y[token][row].
    METAL_FUNC void store(threadgroup float* y) {
        UNROLL for (uint t = 0; t < TOKENS; t++) {
            UNROLL for (uint i = 0; i < ROWS; i++) {
                simdgroup_store(of[t][i], y + 8 * t * Shape::R + 8 * i, Shape::R, ulong2(0), true);
            }
        }
    }
};

// The sums of a simdgroup's columns of its tile: every k_split-th chunk. x has Shape::N rows, or FEW_ANY_ROWS is 1.
template <class Shape, class Epilogue>
METAL_FUNC void few_sums(constant MulFewParams& p, uint n_tokens, Matrices<Epilogue::MATRICES> weights,
                         device const float* x, threadgroup float* memory, uint first, uint share, uint lane) {
    typedef typename Shape::Staged Staged;
    typename Shape::Stage stage;
    stage.begin(p, weights, first, memory, lane);
    TileSums<Shape> sums;
    sums.clear();
    const uint n_chunks = (p.k + Staged::COLUMNS - 1) / Staged::COLUMNS;
    if (share < n_chunks) stage.load(share);
    for (uint chunk = share; chunk < n_chunks; chunk += p.k_split) {
        simdgroup_barrier(mem_flags::mem_threadgroup);  // the chunk before has been multiplied
        stage.stage(chunk, chunk + p.k_split, n_chunks);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (uint group = 0; group < Staged::GROUPS; group += 2) {  // two without a branch between them
            const uint column = stage.column(chunk, group), next = stage.column(chunk, group + 1);
            if (next < p.k) {
                sums.multiply(stage, group, x + column, p.k, n_tokens);
                sums.multiply(stage, group + 1, x + next, p.k, n_tokens);
            } else if (column < p.k) {
                sums.multiply(stage, group, x + column, p.k, n_tokens);
            }
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    sums.store(memory);
}

// The products of the tiles of a threadgroup, with their epilogue, for Shape::N of all tokens: less at the end only if
// FEW_ANY_ROWS is 1 or rows are not whole blocks.
template <class Q, class Shape, class Epilogue>
METAL_FUNC void mul_few_tiles(constant MulFewParams& p, uint all_tokens, Matrices<Epilogue::MATRICES> weights,
                              device const float* all_x, Epilogue out, threadgroup float4* memory, uint3 tg, uint tid,
                              uint sg, uint lane) {
    const uint begin = tg.y * Shape::N;
    if (begin > 0 && begin >= all_tokens) return;  // the whole threadgroup
    const uint n_tokens = min(all_tokens - begin, uint(Shape::N));
    device const float* x = all_x + ulong(begin) * p.k;
    const uint n_rows = Shape::R / Epilogue::MATRICES, n_tiles = Shape::SIMDGROUPS / p.k_split;
    const uint first = tg.x * n_tiles * n_rows, end = min(first + n_tiles * n_rows, p.m);
    if (!Q::is_whole(p.k)) {
        for (uint row = first + sg; row < end; row += Shape::SIMDGROUPS) {
            for (uint t = begin; t < begin + n_tokens; t += 2) {
                mul_few_rows<Q, Epilogue::MATRICES, 2>(p, weights, all_x, out, row, t, all_tokens, lane);
            }
        }
        return;
    }
    threadgroup float* floats = (threadgroup float*)memory;
    const uint of_group = first + sg / p.k_split * n_rows;
    if (of_group < end && n_tokens > 0) {
        few_sums<Shape, Epilogue>(p, n_tokens, weights, x, floats + sg * Shape::FLOATS, of_group, sg % p.k_split, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint rows = end - first;
    for (uint i = tid; i < rows * n_tokens; i += Shape::SIMDGROUPS * SIMD) {
        const uint row = i % rows, token = i / rows;
        threadgroup const float* y =
            floats + row / n_rows * p.k_split * Shape::FLOATS + token * Shape::R + row % n_rows;
        float a = 0.0f, b = 0.0f;
        for (uint part = 0; part < p.k_split; part++) {
            a += y[part * Shape::FLOATS];
            b += y[part * Shape::FLOATS + Shape::R - n_rows];
        }
        const uint to = begin + token;
        out.put({to, first + row, ulong(to) * p.m + first + row}, a, b);
    }
}
