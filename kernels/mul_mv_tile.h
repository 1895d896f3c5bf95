// Sixteen rows of weights and one vector of activations, or N of them, by a threadgroup, on a matrix unit for halves
// (NVIDIA's). Converting quants to floats takes its other units longer than reading them from memory.
//
// Simdgroups divide the columns in strips of 256. Lane 4 g + t has the shares t of rows g and g + 8 (mul_mv_shares.h).
// Activations are two halves each, high and low bits, which are 22 bits together. Column 2 t of the unit's right matrix
// has the high ones that lane t of a row meets, column 2 t + 1 the low ones, and the rest of a column is zero. So every
// lane gets the products of its own share, which it scales itself, whatever the type. Weights are decoded once for the
// N vectors.
#pragma once

#include "matmul_epilogue.h"
#include "mul_mv_shares.h"
#include "quant_dot.h"
#include "shapes.h"

constant constexpr uint TILE_SIMDGROUPS = MUL_MV_TILE_SIMDGROUPS, STRIP = 256;
constant constexpr uint FEW_TILE_SIMDGROUPS = MUL_FEW_TILE_SIMDGROUPS;  // of a threadgroup with more vectors
constant constexpr uint FEW_TILE_ROWS = TILE_ROWS / FEW_TILE_SIMDGROUPS;
static_assert(uint(STRIP) == uint(MOE_FEW_SHARE_COLUMNS), "the host divides the columns of experts by it");
static_assert(uint(FOLDED_NORMS) == 0, "a tile multiplies x as it is");
constant constexpr uint LOW_RUNS = 34, NO_RUNS = 68, ALL_RUNS = 80;  // in TileRoom::x: banks differ

// What a simdgroup stages: a strip of its rows, and the activations of N vectors that they meet.
template <class B, uint N>
struct TileRoom {
    // With what alignment adds; an odd number, so that the banks of eight rows differ.
    static constant constexpr uint SIXTEENS = (LaneShare<B>::BYTES + 30) / 16 | 1;
    uint4 x[N][ALL_RUNS];  // runs of 8: high halves, low halves from LOW_RUNS on, zeros from NO_RUNS on
    float sums[N][SIMD];   // of the runs
    float scale[N];        // that the halves lack
    uint4 rows[TILE_ROWS][SIXTEENS];
};

// A lane's run of the activations of a strip; zeros past the last column.
struct XRun {
    float4 v[2];
};

METAL_FUNC XRun load_run(device const float* x, uint column, uint k) {
    XRun run = {{float4(0.0f), float4(0.0f)}};
    if (column < k) {
        run.v[0] = ((device const float4*)(x + column))[0];
        run.v[1] = ((device const float4*)(x + column))[1];
    }
    return run;
}

// Stages a strip of activations, scaled by a power of two so that halves hold them; returns the factor that undoes it.
METAL_FUNC float stage_run(threadgroup uint4* x, threadgroup float* sums, XRun run, uint lane) {
    float largest = 0.0f, sum = 0.0f;
    UNROLL for (uint i = 0; i < 8; i++) {
        const float v = run.v[i / 4][i % 4];
        largest = max(largest, abs(v));
        sum += v;
    }
    const uint exponent = max(simd_max(as_type<uint>(largest)) >> 23, 32u);
    const float scale = as_type<float>((268 - exponent) << 23);
    uint high[4], low[4];
    UNROLL for (uint i = 0; i < 4; i++) {
        const float a = run.v[i / 2][i % 2] * scale, b = run.v[i / 2][i % 2 + 2] * scale;
        high[i] = two_halves(a, b);
        low[i] = two_halves(a - half_in(high[i]), b - half_in(high[i] >> 16));
    }
    x[lane] = uint4(high[0], high[1], high[2], high[3]);
    x[LOW_RUNS + lane] = uint4(low[0], low[1], low[2], low[3]);
    sums[lane] = sum;
    return as_type<float>((exponent - 14) << 23);
}

// Rows g and g + 8 of a tile, and how far a lane is in them.
struct TileRows {
    device const uchar* at[2];
    uint row_bytes;
};

// Copies a strip of the rows: four lanes a row, 16 bytes each at a time. Addresses are rounded down to 16. Where the
// row goes on behind the strip, whole sixteens take the fewest instructions.
template <class B, uint N>
METAL_FUNC void copy_strip(threadgroup TileRoom<B, N>& room, TileRows rows, uint strip, uint lane) {
    constexpr uint BYTES = LaneShare<B>::BYTES, MOST = TileRoom<B, N>::SIXTEENS;
    const uint begin = strip * BYTES, mine = 16 * (lane % 4);
    if (begin + 16 * MOST <= rows.row_bytes) {
        UNROLL for (uint h = 0; h < 2; h++) {
            device const uchar* from = rows.at[h] + begin;
            const uint before = uint(ulong(from)) % 16;
            threadgroup uchar* to = (threadgroup uchar*)room.rows[8 * h + lane / 4] + mine;
            UNROLL for (uint i = 0; i < 16 * MOST; i += 64) {
                if (i + mine < before + BYTES) copy_sixteen(to + i, from + mine - before + i);
            }
        }
    } else {
        const uint bytes = min(BYTES, rows.row_bytes - begin);
        UNROLL for (uint h = 0; h < 2; h++) {
            device const uchar* from = rows.at[h] + begin;
            const uint before = uint(ulong(from)) % 16, end = before + bytes;
            threadgroup uchar* to = (threadgroup uchar*)room.rows[8 * h + lane / 4];
            UNROLL_BY(1)
            for (uint at = mine; at < end; at += 64) copy_sixteen(to + at, from - before + at, min(end - at, 16u));
        }
    }
    end_copies();
}

// A lane's shares of rows g and g + 8.
template <class B>
struct TileShares {
    RowShare<LaneShare<B>::GROUPS> of[2];

    template <uint N>
    METAL_FUNC void load(threadgroup const TileRoom<B, N>& room, TileRows rows, uint strip, uint k, uint lane) {
        const uint t = lane % 4, column = strip * STRIP + 64 * t;
        const uint n = column >= k ? 0 : (column + 32 >= k ? 1 : 2);  // half shares that are there
        UNROLL for (uint h = 0; h < 2; h++) {
            const uint before = ulong(rows.at[h] + strip * LaneShare<B>::BYTES) % 16;
            LaneShare<B>::load((threadgroup const uchar*)room.rows[8 * h + lane / 4], before, t, n, of[h]);
        }
    }

    // The products with vector v.
    template <uint N>
    METAL_FUNC float2 multiply(threadgroup const TileRoom<B, N>& room, uint v, uint lane) const {
        typedef LaneShare<B> S;
        const uint g = lane / 4, t = lane % 4;
        float sums[S::GROUPS];
        float4 products[S::GROUPS];
        UNROLL for (uint j = 0; j < S::GROUPS; j++) {
            sums[j] = 0.0f;
            products[j] = float4(0.0f);
        }
        threadgroup const uint4* x = room.x[v] + (g / 2 == t ? g % 2 * LOW_RUNS + S::first(t) : NO_RUNS);
        UNROLL for (uint r = 0; r < 8; r++) {
            const uint4 run = x[S::run(r)];
            multiply_halves(products[S::group(r)], of[0].runs[r].first, of[1].runs[r].first, uint2(run.x, run.y));
            multiply_halves(products[S::group(r)], of[0].runs[r].second, of[1].runs[r].second, uint2(run.z, run.w));
            sums[S::group(r)] += room.sums[v][S::first(t) + S::run(r)];
        }
        float2 result;
        UNROLL for (uint h = 0; h < 2; h++) {
            float scaled = 0.0f, offset = 0.0f;
            UNROLL for (uint j = 0; j < S::GROUPS; j++) {
                scaled += of[h].scale[j] * (products[j][2 * h] + products[j][2 * h + 1]);
                if (S::HAS_OFFSET) offset += of[h].offset[j] * sums[j];
            }
            result[h] = scaled * (room.scale[v] * S::UNIT) + offset;
        }
        return result;
    }
};

// The vectors of a tile, and their places in the output.
template <uint N>
struct TileVectors {
    device const float* at[N];
    uint token[N];
};

// The products of rows g and g + 8 with each vector, this lane's share.
template <uint N>
struct TileProducts {
    float2 of[N];
};

// Multiplies strips i, i + n, ... of the rows. The next strip is copied while one is multiplied.
template <class B, uint N>
METAL_FUNC TileProducts<N> multiply_tile(threadgroup TileRoom<B, N>& room, TileRows rows, TileVectors<N> x, uint k,
                                         uint i, uint n, uint lane) {
    const uint n_strips = (k + STRIP - 1) / STRIP;
    TileProducts<N> sums;
    XRun runs[N];
    if (i < n_strips) copy_strip(room, rows, i, lane);
    UNROLL for (uint v = 0; v < N; v++) {
        sums.of[v] = float2(0.0f);
        if (lane < ALL_RUNS - NO_RUNS) room.x[v][NO_RUNS + lane] = uint4(0);
        runs[v] = load_run(x.at[v], i * STRIP + lane * RUN, k);
    }
    for (uint strip = i; strip < n_strips; strip += n) {
        UNROLL for (uint v = 0; v < N; v++) {
            const float scale = stage_run(room.x[v], room.sums[v], runs[v], lane);
            if (lane == 0) room.scale[v] = scale;
            runs[v] = load_run(x.at[v], (strip + n) * STRIP + lane * RUN, k);
        }
        wait_for_copies<0>();
        simdgroup_barrier(mem_flags::mem_threadgroup);
        TileShares<B> shares;
        shares.load(room, rows, strip, k, lane);
        simdgroup_barrier(mem_flags::mem_threadgroup);  // all lanes have their shares
        if (strip + n < n_strips) copy_strip(room, rows, strip + n, lane);
        UNROLL_BY(1)  // registers are enough for one vector at a time
        for (uint v = 0; v < N; v++) {
            const float2 products = shares.multiply(room, v, lane);
            UNROLL for (uint j = 0; j < N; j++) {
                if (j == v) sums.of[j] += products;
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    return sums;
}

template <class B, uint N, uint SIMDGROUPS>
struct TileMemory {
    TileRoom<B, N> rooms[SIMDGROUPS];
    float sums[N][SIMDGROUPS][TILE_ROWS];
};

// One for all products of a type that a kernel may choose among.
template <class B, uint N, uint SIMDGROUPS>
METAL_FUNC threadgroup TileMemory<B, N, SIMDGROUPS>& tile_memory() {
    typedef TileMemory<B, N, SIMDGROUPS> Memory;
    TG_ARRAY(Memory, memory, 1);
    return memory[0];
}

// How the simdgroups of a threadgroup share tiles: `splits` of them divide the columns of one, and others take the
// next.
struct TileShare {
    uint splits, beside, part;  // the tile of a simdgroup in its threadgroup, and its part of the columns

    METAL_FUNC void divide(uint k, uint simdgroups, uint sg) {
        splits = simdgroups;
        while (splits > 1 && (splits - 1) * STRIP >= k) splits /= 2;
        beside = sg / splits;
        part = sg % splits;
    }
};

// Sixteen rows of one matrix, or eight of one and eight of another, from row `first` of it on.
template <uint N>
METAL_FUNC TileRows tile_rows(Matrices<N> w, uint first, uint m, uint row_bytes, uint lane) {
    TileRows rows;
    rows.row_bytes = row_bytes;
    UNROLL for (uint h = 0; h < 2; h++) rows.at[h] = w.row(8 * h + lane / 4, TILE_ROWS, first, m, row_bytes);
    return rows;
}

// The products of the tiles of threadgroup `group` with N vectors, of which n are there.
template <uint SIMDGROUPS, class B, uint N, class Epilogue, class P>
METAL_FUNC void mul_tiles(constant P& p, Matrices<Epilogue::MATRICES> w, TileVectors<N> x, uint n, Epilogue out,
                          TileShare share, uint group, uint sg, uint lane) {
    threadgroup TileMemory<B, N, SIMDGROUPS>& memory = tile_memory<B, N, SIMDGROUPS>();
    const uint outputs = TILE_ROWS / Epilogue::MATRICES, n_rows = SIMDGROUPS / share.splits * outputs;
    const uint first = group * n_rows;
    const TileRows rows = tile_rows(w, first + share.beside * outputs, p.m, p.row_bytes, lane);
    const TileProducts<N> sums = multiply_tile(memory.rooms[sg], rows, x, p.k, share.part, share.splits, lane);
    UNROLL for (uint v = 0; v < N; v++) {
        UNROLL for (uint h = 0; h < 2; h++) {
            const float sum = quad_sum(sums.of[v][h]);
            if (lane % 4 == 0) memory.sums[v][sg][8 * h + lane / 4] = sum;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (uint v = 0; v < N; v++) {
        for (uint i = sg * SIMD + lane; i < n_rows && v < n && first + i < p.m; i += SIMDGROUPS * SIMD) {
            const uint row = first + i, from = i / outputs * share.splits;
            float a = 0.0f, b = 0.0f;
            for (uint s = from; s < from + share.splits; s++) {
                a += memory.sums[v][s][i % outputs];
                b += memory.sums[v][s][TILE_ROWS - outputs + i % outputs];
            }
            out.put({x.token[v], row, ulong(x.token[v]) * p.m + row}, a, b);
        }
    }
}

// W x for the sixteen rows of threadgroup `group`, as mul_mv_rows.
template <uint SIMDGROUPS, class B, class Epilogue, class P>
METAL_FUNC void mul_mv_tile(constant P& p, Matrices<Epilogue::MATRICES> w, device const float* x, Epilogue out,
                            uint group, uint sg, uint lane) {
    mul_tiles<SIMDGROUPS, B>(p, w, TileVectors<1>{{x}, {0}}, 1, out, TileShare{SIMDGROUPS, 0, sg}, group, sg, lane);
}

// W X^T for the sixteen rows of threadgroup `group` and the two rows of X from `begin` on, but none from `end` on.
template <class B, class Epilogue, class P>
METAL_FUNC void mul_few_by_tile(constant P& p, Matrices<Epilogue::MATRICES> w, device const float* x, Epilogue out,
                                uint group, uint begin, uint end, uint sg, uint lane) {
    const uint last = min(begin + 1, end - 1);
    const TileVectors<2> both{{x + ulong(begin) * p.k, x + ulong(last) * p.k}, {begin, last}};
    mul_tiles<FEW_TILE_SIMDGROUPS, B>(p, w, both, min(end - begin, 2u), out, TileShare{FEW_TILE_SIMDGROUPS, 0, sg},
                                      group, sg, lane);
}
