// The gated delta rule for some tokens at a time, on 8x8 matrices (the WY form of arXiv 2412.06464, section 3.3).
//
// A token i has k, q (units of length d_k), v, a decay a and a rate b. With r(i, j) = a(j+1) ... a(i), the decay
// between two tokens of the chunk, and g(i) = a(0) ... a(i), what a token writes into the state, d, is found from
//     d(i) + b(i) sum over j < i of r(i, j) (k(j) k(i)) d(j)  =  b(i) (v(i) - g(i) S^T k(i))
// for all tokens at once: D = T B, T the inverse of a lower triangular matrix. Then
//     o(i) = g(i) S^T q(i) + sum over j <= i of r(i, j) (k(j) q(i)) d(j),
//     S = g(last) S + sum over j of r(last, j) k(j) d(j)^T.
// Columns of S are independent: each simdgroup has eight of them, or twice eight, and all share T. Tokens past the end
// are zeros that do not decay.
#pragma once

#include "recurrent.h"

// Sizes. Of a staged tile of q or k, a run of eight elements lies as TOKENS by eight; a pad behind it keeps those who
// store in different banks.
template <uint D_K>
struct ChunkSizes {
    static constant constexpr uint TOKENS = D_K == 128 ? 16 : 8, BLOCKS = TOKENS / 8;
    static constant constexpr uint RUNS = D_K / 8, RUN = 8 * TOKENS + 8, TILE = RUNS * RUN;
    static constant constexpr uint COLUMNS = SSM_DELTA_FLOATS / D_K, SIMDGROUPS = SSM_DELTA_THREADS / SIMD;
    static constant constexpr uint EIGHTS = COLUMNS / 8 > SIMDGROUPS ? COLUMNS / 8 / SIMDGROUPS : 1;  // of a simdgroup
    static constant constexpr uint SQUARE = TOKENS * TOKENS, WORK = 8 * TOKENS, ALL_WORK = SIMDGROUPS * EIGHTS * WORK;
    static constant constexpr uint DEEP = 4;
    static constant constexpr uint STAGED = 2 * TILE > SSM_DELTA_FLOATS ? 2 * TILE : SSM_DELTA_FLOATS;  // or S
    static constant constexpr uint QUADS = TOKENS * D_K / 4 / SSM_DELTA_THREADS;  // of q, and of k, that a thread loads
    static constant constexpr uint VALUES = (TOKENS * COLUMNS + SSM_DELTA_THREADS - 1) / SSM_DELTA_THREADS;

    // The place of an element of rows by eight, one block of eight columns after the other.
    static METAL_FUNC uint place(uint rows, uint row, uint column) {
        return column / 8 * (8 * rows) + row * 8 + column % 8;
    }
};

// The threadgroup memory of a chunk.
template <uint D_K>
struct ChunkMemory {
    threadgroup float* q;   // a tile
    threadgroup float* k;   // a tile
    threadgroup float* v;   // [TOKENS][COLUMNS]
    threadgroup float* kk;  // k(j) k(i), and then T
    threadgroup float* qk;  // k(j) q(i), and then the weights of d
    threadgroup float* d;   // of all simdgroups, EIGHTS of WORK each, as the next two
    threadgroup float* o;
    threadgroup float* written;
};

// What a thread loads of the next chunk while the threadgroup works on this one.
template <uint D_K>
struct NextChunk {
    typedef ChunkSizes<D_K> Sizes;
    float4 q[Sizes::QUADS], k[Sizes::QUADS];
    float v[Sizes::VALUES];

    // Loads the tokens of rows [t, end). Pointers: of the head (of v: of the first column), at row 0. Rows lie
    // `channels` floats apart. Values outside are zero and not read.
    METAL_FUNC void load(device const float4* q_head, device const float4* k_head, device const float* v_row,
                         ulong channels, uint dim4, uint n_columns, uint t, uint end, uint tid) {
        UNROLL for (uint n = 0; n < Sizes::QUADS; n++) {
            const uint at = tid + n * SSM_DELTA_THREADS, token = at / (D_K / 4), i = at % (D_K / 4);
            const bool inside = t + token < end && i < dim4;
            const ulong from = (t + token) * (channels / 4) + i;
            q[n] = inside ? q_head[from] : float4(0.0f);
            k[n] = inside ? k_head[from] : float4(0.0f);
        }
        UNROLL for (uint n = 0; n < Sizes::VALUES; n++) {
            const uint at = tid + n * SSM_DELTA_THREADS, token = at / Sizes::COLUMNS, column = at % Sizes::COLUMNS;
            const bool inside = token < Sizes::TOKENS && t + token < end && column < n_columns;
            v[n] = inside ? v_row[(t + token) * channels + column] : 0.0f;
        }
    }

    METAL_FUNC void store(ChunkMemory<D_K> to, uint tid) const {
        UNROLL for (uint n = 0; n < Sizes::QUADS; n++) {
            const uint at = tid + n * SSM_DELTA_THREADS, token = at / (D_K / 4), i = at % (D_K / 4);
            const uint place = i / 2 * Sizes::RUN + token * 8 + i % 2 * 4;
            *(threadgroup float4*)(to.q + place) = q[n];
            *(threadgroup float4*)(to.k + place) = k[n];
        }
        UNROLL for (uint n = 0; n < Sizes::VALUES; n++) {
            const uint at = tid + n * SSM_DELTA_THREADS;
            if (at < Sizes::TOKENS * Sizes::COLUMNS) to.v[at] = v[n];
        }
    }
};

// The decays of a chunk. Lane l has those of token l % TOKENS.
template <uint TOKENS>
struct ChunkDecays {
    float token;        // a
    float since_begin;  // g
    float until_end;    // r(last, token)
    float of_all;       // g(last)

    METAL_FUNC void set(float decay, uint lane) {
        token = decay;
        since_begin = until_end = of_all = 1.0f;
        UNROLL for (uint i = 0; i < TOKENS; i++) {
            const float a = simd_shuffle(decay, ushort(i));
            of_all *= a;
            if (i <= lane % TOKENS) since_begin *= a;
            if (i > lane % TOKENS) until_end *= a;
        }
    }
};

// Replaces k(j) q(i) by the weight of d(j) in o(i), zero for j > i. By one simdgroup, a lane per j.
template <uint D_K>
METAL_FUNC void weigh(threadgroup float* qk, thread const ChunkDecays<ChunkSizes<D_K>::TOKENS>& decays, uint lane) {
    constexpr uint TOKENS = ChunkSizes<D_K>::TOKENS;
    const uint j = lane % TOKENS;
    float between = 1.0f;
    UNROLL for (uint i = 0; i < TOKENS; i++) {
        const float a = simd_shuffle(decays.token, ushort(i));
        if (i > j) between *= a;
        threadgroup float& at = qk[ChunkSizes<D_K>::place(TOKENS, i, j)];
        if (lane < TOKENS) at = i < j ? 0.0f : between * at;
    }
}

// Replaces k(j) k(i) by T. By one simdgroup, a lane per column.
template <uint D_K>
METAL_FUNC void invert(threadgroup float* kk, thread const ChunkDecays<ChunkSizes<D_K>::TOKENS>& decays, float beta,
                       uint lane) {
    typedef ChunkSizes<D_K> Sizes;
    constexpr uint TOKENS = Sizes::TOKENS;
    const uint j = lane % TOKENS;
    float between = 1.0f;
    UNROLL for (uint i = 0; i < TOKENS; i++) {
        const float a = simd_shuffle(decays.token, ushort(i)), b = simd_shuffle(beta, ushort(i));
        if (i > j) between *= a;
        if (lane < TOKENS && i > j) kk[Sizes::place(TOKENS, i, j)] *= b * between;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float t[TOKENS];
    UNROLL for (uint i = 0; i < TOKENS; i++) {
        t[i] = i == j ? 1.0f : 0.0f;
        UNROLL for (uint l = 0; l < i; l++) t[i] -= kk[Sizes::place(TOKENS, i, l)] * t[l];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (uint i = 0; i < TOKENS; i++) {
        if (lane < TOKENS) kk[Sizes::place(TOKENS, i, j)] = t[i];
    }
}

// A simdgroup's columns of S, eight by D_K: EIGHTS times.
template <uint D_K>
struct StateColumns {
    typedef ChunkSizes<D_K> Sizes;
    static constant constexpr uint EIGHTS = Sizes::EIGHTS, BLOCKS = Sizes::BLOCKS, DEEP = Sizes::DEEP;
    static constant constexpr uint QUADS = EIGHTS * 8 * (D_K / 4) / SIMD;  // of a lane
    simdgroup_float8x8 s[EIGHTS][Sizes::RUNS / DEEP][1][DEEP];

    static METAL_FUNC uint place(uint column, uint i) { return i / 2 * (64 * EIGHTS) + column * 8 + i % 2 * 4; }

    // The first n columns are read, others are zero. own: memory of the simdgroup.
    METAL_FUNC void load(device const float4* from, uint dim4, uint n, threadgroup float* own, uint lane) {
        if (n != 0) {
            UNROLL for (uint e = 0; e < QUADS; e++) {
                const uint at = lane + e * SIMD, column = at / (D_K / 4), i = at % (D_K / 4);
                const bool inside = column < n && i < dim4;
                *(threadgroup float4*)(own + place(column, i)) = inside ? from[column * dim4 + i] : float4(0.0f);
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
        UNROLL for (uint c = 0; c < EIGHTS; c++) {
            UNROLL for (uint run = 0; run < Sizes::RUNS; run++) {
                thread simdgroup_float8x8& to = s[c][run / DEEP][0][run % DEEP];
                to = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
                if (n != 0) simdgroup_load(to, own + run * (64 * EIGHTS) + 64 * c, 8);
            }
        }
    }

    // Writes the first n columns.
    METAL_FUNC void store(device float4* to, uint dim4, uint n, threadgroup float* own, uint lane) const {
        if (n == 0) return;
        UNROLL for (uint c = 0; c < EIGHTS; c++) {
            UNROLL for (uint run = 0; run < Sizes::RUNS; run++) {
                simdgroup_store(s[c][run / DEEP][0][run % DEEP], own + run * (64 * EIGHTS) + 64 * c, 8);
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL for (uint e = 0; e < QUADS; e++) {
            const uint at = lane + e * SIMD, column = at / (D_K / 4), i = at % (D_K / 4);
            if (column < n && i < dim4) to[column * dim4 + i] = *(threadgroup const float4*)(own + place(column, i));
        }
    }

    // to = the products of the columns with all tokens of a tile.
    METAL_FUNC void products(threadgroup const float* tile, threadgroup float* to) {
        UNROLL for (uint c = 0; c < EIGHTS; c++) {
            UNROLL for (uint b = 0; b < BLOCKS; b++) {
                simdgroup_float8x8 sum[1] = {make_filled_simdgroup_matrix<float, 8, 8>(0.0f)};
                UNROLL for (uint g = 0; g < Sizes::RUNS / DEEP; g++) {
                    simdgroup_float8x8 x[DEEP];
                    load_right(x, tile + g * DEEP * Sizes::RUN + 64 * b, Sizes::RUN);
                    multiply_accumulate_all(sum, s[c][g], x);
                }
                simdgroup_store(sum[0], to + c * Sizes::WORK + 64 * b, 8);
            }
        }
    }

    // S = decay S + what the tokens write.
    METAL_FUNC void add(threadgroup const float* k, threadgroup const float* d, float decay) {
        UNROLL for (uint c = 0; c < EIGHTS; c++) {
            simdgroup_float8x8 left[1][BLOCKS];
            load_left(left, d + c * Sizes::WORK, 64);
            UNROLL for (uint run = 0; run < Sizes::RUNS; run++) {
                simdgroup_float8x8 right[BLOCKS], sum[1] = {s[c][run / DEEP][0][run % DEEP]};
                UNROLL for (uint i = 0; i < 2; i++) sum[0].thread_elements()[i] *= decay;
                load_right_rows(right, k + run * Sizes::RUN, 64);
                multiply_accumulate_all(sum, left, right);
                s[c][run / DEEP][0][run % DEEP] = sum[0];
            }
        }
    }
};

// The products of all tokens with each other, k k^T and q k^T: a simdgroup has eight columns of one of them.
template <uint D_K>
METAL_FUNC void multiply_tokens(ChunkMemory<D_K> m, uint sg) {
    typedef ChunkSizes<D_K> Sizes;
    constexpr uint BLOCKS = Sizes::BLOCKS, DEEP = Sizes::DEEP;
    if (sg >= 2 * BLOCKS) return;
    const uint block = sg % BLOCKS;
    threadgroup const float* rows = sg < BLOCKS ? m.k : m.q;
    simdgroup_float8x8 sums[BLOCKS];
    UNROLL for (uint i = 0; i < BLOCKS; i++) sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    UNROLL for (uint g = 0; g < Sizes::RUNS / DEEP; g++) {
        simdgroup_float8x8 left[BLOCKS][DEEP], right[DEEP];
        load_left(left, rows + g * DEEP * Sizes::RUN, Sizes::RUN);
        load_right(right, m.k + g * DEEP * Sizes::RUN + 64 * block, Sizes::RUN);
        multiply_accumulate_all(sums, left, right);
    }
    threadgroup float* to = (sg < BLOCKS ? m.kk : m.qk) + block * (8 * Sizes::TOKENS);
    UNROLL for (uint i = 0; i < BLOCKS; i++) simdgroup_store(sums[i], to + 64 * i, 8);
}

// to = x W^T for eight columns of all tokens, W a square matrix of tokens.
template <uint D_K>
METAL_FUNC void mix_tokens(threadgroup const float* x, threadgroup const float* weights, threadgroup float* to) {
    typedef ChunkSizes<D_K> Sizes;
    constexpr uint BLOCKS = Sizes::BLOCKS;
    simdgroup_float8x8 left[1][BLOCKS], sums[BLOCKS][1];
    load_left(left, x, 64);
    UNROLL for (uint b = 0; b < BLOCKS; b++) {
        simdgroup_float8x8 right[BLOCKS];
        load_right(right, weights + 64 * b, 8 * Sizes::TOKENS);
        sums[b][0] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        multiply_accumulate_all(sums[b], left, right);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // all lanes have loaded: to may be x
    UNROLL for (uint b = 0; b < BLOCKS; b++) simdgroup_store(sums[b][0], to + 64 * b, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
}
