// Sixteen rows of weights and one vector of activations, by a threadgroup, on a matrix unit for halves (NVIDIA's).
// Converting quants to floats takes its other units longer than reading them from memory.
//
// Simdgroups divide the columns in strips of 256. Lane 4 g + t has the shares t of rows g and g + 8 (mul_mv_shares.h).
// Activations are two halves each, high and low bits, which are 22 bits together. Column 2 t of the unit's right matrix
// has the high ones that lane t of a row meets, column 2 t + 1 the low ones, and the rest of a column is zero. So every
// lane gets the products of its own share, which it scales itself, whatever the type.
#pragma once

#include "matmul_epilogue.h"
#include "mul_mv_shares.h"
#include "quant_dot.h"
#include "shapes.h"

constant constexpr uint TILE_ROWS = 16, TILE_SIMDGROUPS = MUL_MV_TILE_SIMDGROUPS, STRIP = 256;
static_assert(uint(FOLDED_NORMS) == 0, "a tile multiplies x as it is");
constant constexpr uint LOW_RUNS = 34, NO_RUNS = 68, ALL_RUNS = 80;  // in TileRoom::x: banks differ

// What a simdgroup stages: a strip of its rows, and the activations that they meet.
template <class B>
struct TileRoom {
    static constant constexpr uint SIXTEENS = (LaneShare<B>::BYTES + 30) / 16;  // with what alignment adds
    uint4 x[ALL_RUNS];  // runs of 8: high halves, low halves from LOW_RUNS on, zeros from NO_RUNS on
    float sums[SIMD];   // of the runs
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
        low[i] = two_halves((a - half_in(high[i])) * 2048.0f, (b - half_in(high[i] >> 16)) * 2048.0f);
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

// Copies a strip of the rows: four lanes a row, 16 bytes each at a time. Addresses are rounded down to 16.
template <class B>
METAL_FUNC void copy_strip(threadgroup TileRoom<B>& room, TileRows rows, uint strip, uint lane) {
    const uint begin = strip * LaneShare<B>::BYTES, bytes = min(LaneShare<B>::BYTES, rows.row_bytes - begin);
    UNROLL for (uint h = 0; h < 2; h++) {
        device const uchar* from = rows.at[h] + begin;
        const uint before = ulong(from) % 16, end = before + bytes;
        UNROLL for (uint i = 0; i < TileRoom<B>::SIXTEENS; i += 4) {
            const uint n = i + lane % 4;
            if (16 * n < end) {
                copy_sixteen((threadgroup uchar*)(room.rows[8 * h + lane / 4] + n), from - before + 16 * n,
                             min(end - 16 * n, 16u));
            }
        }
    }
    end_copies();
}

// The two products of a lane: its shares of a strip, of rows g and g + 8, times factor.
template <class B>
METAL_FUNC float2 multiply_strip(threadgroup const TileRoom<B>& room, TileRows rows, uint strip, uint k, float x_scale,
                                 float factor, uint lane) {
    typedef LaneShare<B> S;
    const uint g = lane / 4, t = lane % 4, column = strip * STRIP + 64 * t;
    const uint n = column >= k ? 0 : (column + 32 >= k ? 1 : 2);  // half shares that are there
    RowShare<S::GROUPS> shares[2];
    UNROLL for (uint h = 0; h < 2; h++) {
        const uint before = ulong(rows.at[h] + strip * S::BYTES) % 16;
        S::load((threadgroup const uchar*)room.rows[8 * h + g], before, t, n, shares[h]);
    }
    float sums[S::GROUPS];
    float4 products[S::GROUPS];
    UNROLL for (uint j = 0; j < S::GROUPS; j++) {
        sums[j] = 0.0f;
        products[j] = float4(0.0f);
    }
    threadgroup const uint4* x = room.x + (g / 2 == t ? g % 2 * LOW_RUNS + S::first(t) : NO_RUNS);
    UNROLL for (uint r = 0; r < 8; r++) {
        const uint4 run = x[S::run(r)];
        multiply_halves(products[S::group(r)], shares[0].runs[r].first, shares[1].runs[r].first, uint2(run.x, run.y));
        multiply_halves(products[S::group(r)], shares[0].runs[r].second, shares[1].runs[r].second, uint2(run.z, run.w));
        sums[S::group(r)] += room.sums[S::first(t) + S::run(r)];
    }
    float2 result;
    UNROLL for (uint h = 0; h < 2; h++) {
        float scaled = 0.0f, offset = 0.0f;
        UNROLL for (uint j = 0; j < S::GROUPS; j++) {
            scaled += shares[h].scale[j] * (products[j][2 * h] + products[j][2 * h + 1] * (1.0f / 2048));
            offset += shares[h].offset[j] * sums[j];
        }
        result[h] = factor * (scaled * (x_scale * S::UNIT) + offset);
    }
    return result;
}

// sums += the products of rows g and g + 8 with x, this lane's share. Simdgroup i of n takes strips i, i + n, ...
template <class B>
METAL_FUNC void add_tile(thread float2& sums, threadgroup TileRoom<B>& room, TileRows rows, device const float* x,
                         uint k, float factor, uint i, uint n, uint lane) {
    const uint n_strips = (k + STRIP - 1) / STRIP;
    if (lane < ALL_RUNS - NO_RUNS) room.x[NO_RUNS + lane] = uint4(0);
    if (i < n_strips) copy_strip(room, rows, i, lane);
    XRun run = load_run(x, i * STRIP + lane * RUN, k);
    for (uint strip = i; strip < n_strips; strip += n) {
        const float x_scale = stage_run(room.x, room.sums, run, lane);
        run = load_run(x, (strip + n) * STRIP + lane * RUN, k);
        wait_for_copies<0>();
        simdgroup_barrier(mem_flags::mem_threadgroup);
        sums += multiply_strip(room, rows, strip, k, x_scale, factor, lane);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (strip + n < n_strips) copy_strip(room, rows, strip + n, lane);
    }
}

// Row i of the sixteen of a threadgroup: of one matrix, or the first eight of one and eight of another.
template <uint N>
METAL_FUNC device const uchar* tile_row(Matrices<N> w, uint i, uint group, uint m, uint row_bytes) {
    return w.row(i, TILE_ROWS, group * (TILE_ROWS / N), m, row_bytes);
}

// The sums of a lane's rows, over the lanes of a row: for the lane with t = 0.
METAL_FUNC void put_sums(threadgroup float* scratch, float2 sums, uint sg, uint lane) {
    UNROLL for (uint h = 0; h < 2; h++) {
        const float sum = quad_sum(sums[h]);
        if (lane % 4 == 0) scratch[sg * TILE_ROWS + 8 * h + lane / 4] = sum;
    }
}

// The sum of row i over the simdgroups.
METAL_FUNC float sum_of_row(threadgroup const float* scratch, uint i) {
    float sum = 0.0f;
    UNROLL for (uint s = 0; s < TILE_SIMDGROUPS; s++) sum += scratch[s * TILE_ROWS + i];
    return sum;
}

template <class B>
struct TileMemory {
    TileRoom<B> rooms[TILE_SIMDGROUPS];
    float scratch[TILE_SIMDGROUPS * TILE_ROWS];
};

// One for all products of a type that a kernel may choose among.
template <class B>
METAL_FUNC threadgroup TileMemory<B>& tile_memory() {
    TG_ARRAY(TileMemory<B>, memory, 1);
    return memory[0];
}

// W x for the sixteen rows of threadgroup `group`, as mul_mv_rows.
template <class B, class Epilogue, class P>
METAL_FUNC void mul_mv_tile(constant P& p, Matrices<Epilogue::MATRICES> w, device const float* x, Epilogue out,
                            uint group, uint sg, uint lane) {
    threadgroup TileMemory<B>& memory = tile_memory<B>();
    const uint outputs = TILE_ROWS / Epilogue::MATRICES;
    TileRows rows;
    rows.row_bytes = p.row_bytes;
    UNROLL for (uint h = 0; h < 2; h++) rows.at[h] = tile_row(w, 8 * h + lane / 4, group, p.m, p.row_bytes);
    float2 sums = float2(0.0f);
    add_tile(sums, memory.rooms[sg], rows, x, p.k, 1.0f, sg, TILE_SIMDGROUPS, lane);
    put_sums(memory.scratch, sums, sg, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint i = sg * SIMD + lane, row = group * outputs + i;
    if (i < outputs && row < p.m) {
        out.put({0, row, row}, sum_of_row(memory.scratch, i), sum_of_row(memory.scratch, TILE_ROWS - outputs + i));
    }
}
