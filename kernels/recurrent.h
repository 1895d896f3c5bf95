// Shared pieces of recurrent layers: rows of runs, rings of a convolution's inputs, and columns of a state.
//
// A run begins with the states of its slot and leaves its states in slot_out. It moves if these differ. No run touches
// a slot that another run writes; several may begin with one slot. conv_state is [n_slots, d_conv, channels], a ring in
// each slot: the inputs of position p are its entry p % d_conv. A state is [n_slots, heads, d_v, d_k]: a column of d_k
// floats is contiguous. Before position 0 both count as zero, for any content of the memory.
#pragma once

#include "reduce.h"
#include "shapes.h"

// log(1 + e^x) = max(x, 0) + log1p(u), u = e^-|x|, to float precision for every x. log1p(u) = 2 atanh(u / (2 + u)) by
// its series (the argument is at most 1/3). Fast math finds no cancellation in it.
METAL_FUNC float softplus(float x) {
    const float u = precise::exp(-metal::abs(x));
    const float s = u / (2.0f + u);
    const float z = s * s;
    float series = 1.0f / 17;
    series = series * z + 1.0f / 15;
    series = series * z + 1.0f / 13;
    series = series * z + 1.0f / 11;
    series = series * z + 1.0f / 9;
    series = series * z + 1.0f / 7;
    series = series * z + 1.0f / 5;
    series = series * z + 1.0f / 3;
    series = series * z + 1.0f;
    return max(x, 0.0f) + 2.0f * s * series;
}

// What the kernels here use of a row.
struct RunRow {
    uint pos;
    uint begin;
    uint end;
    uint slot;
    uint slot_out;

    METAL_FUNC void load(device const Row* row) {
        pos = row->pos;
        begin = row->begin;
        end = row->end;
        slot = row->slot;
        slot_out = row->slot_out;
    }
};

// Deals the runs of a step to the z of a grid. z takes run i if (i - n_single) mod the grid's z is z: so long runs,
// which come after the single ones, begin first.
struct DealtRuns {
    device const Row* rows;
    uint n_tokens;
    uint n_single;
    uint z;
    uint n_z;
    uint begin;   // of the next long run
    uint n_long;  // long runs so far
    uint single;  // the next single run that z takes

    METAL_FUNC void set(device const Step* step, device const Row* all_rows, uint at, uint size) {
        rows = all_rows;
        n_tokens = step->n_tokens;
        n_single = step->n_single;
        z = at;
        n_z = size;
        begin = n_single;
        n_long = 0;
        single = (n_single + z) % n_z;
    }

    // Loads the first row of the next run of z. Returns false if there is none.
    METAL_FUNC bool next(thread RunRow& row) {
        while (begin < n_tokens) {
            row.load(rows + begin);
            begin = row.end;
            if (n_long++ % n_z == z) return true;
        }
        if (single >= n_single) return false;
        row.load(rows + single);
        single += n_z;
        return true;
    }
};

// ---- Convolution ----------------------------------------------------------------------------------------------------

// Sizes of the rings of a convolution.
struct Ring {
    uint d_conv;
    uint channels;

    // The ring of a slot.
    template <class Pointer>
    METAL_FUNC Pointer of(Pointer conv_state, uint slot) {
        return conv_state + ulong(slot) * d_conv * channels;
    }

    // The entry `back` entries before `newest`. back < d_conv.
    METAL_FUNC uint entry_before(uint newest, uint back) {
        return newest >= back ? newest - back : newest + d_conv - back;
    }
};

// The inputs of a row, and of the tokens before it.
struct ConvInput {
    Ring ring;
    device const float* row;      // inputs of the row
    uint stride;                  // floats from one row to the next
    device const float* entries;  // of the slot that its run begins with
    uint pos;
    uint n_before;  // rows of its run before it
    uint newest;    // the entry of its inputs in a ring

    // Of row t. `inputs` is those of row 0.
    METAL_FUNC void set(Ring sizes, device const float* inputs, uint row_stride, device const float* conv_state,
                        uint slot, uint position, uint t, uint rows_before) {
        ring = sizes;
        row = inputs + ulong(t) * row_stride;
        stride = row_stride;
        entries = ring.of(conv_state, slot);
        pos = position;
        n_before = rows_before;
        newest = position % ring.d_conv;
    }

    // The input of a channel `back` positions ago. back < d_conv and back <= pos.
    METAL_FUNC float at(uint channel, uint back) {
        if (back <= n_before) return (row - ulong(back) * stride)[channel];
        return entries[ulong(ring.entry_before(newest, back)) * ring.channels + channel];
    }

    // The convolution of a channel. conv_w: [channels, d_conv], the last tap for the token itself.
    METAL_FUNC float convolve(device const float* conv_w, uint channel) {
        device const float* w = conv_w + ulong(channel) * ring.d_conv + (ring.d_conv - 1);
        float sum = 0.0f;
        UNROLL for (uint back = 0; back < SSM_MAX_CONV; back++) {
            if (back >= ring.d_conv || back > pos) continue;  // no tap; before the sequence
            sum += w[-int(back)] * at(channel, back);
        }
        return sum;
    }

    // Stores the n newest inputs of a channel in the ring `to`.
    METAL_FUNC void store(device float* to, uint channel, uint n) {
        for (uint back = 0; back < n; back++)
            to[ulong(ring.entry_before(newest, back)) * ring.channels + channel] = at(channel, back);
    }

    // How many inputs of a channel a run of n rows stores in the ring of slot_out, this row being its last: its own,
    // and older ones if it moves.
    METAL_FUNC uint n_stored(bool moves, uint n) { return min(moves ? pos + 1 : n, ring.d_conv); }
};

// ---- Columns of a state ---------------------------------------------------------------------------------------------
//
// Columns of a state are independent of each other. A group of LANES lanes shares GROUP_COLUMNS columns. A lane holds
// PIECES float4 of each column: its own and every LANES-th after it. So a column is read in whole lines and summed in
// log2(LANES) shuffles. An instance named _128 serves every d_k in (64, 128].

constant constexpr uint PIECES = 4;
constant constexpr uint GROUP_COLUMNS = 2;

template <uint D_K>
struct Lanes {
    static constant constexpr uint N = D_K / (4 * PIECES);              // that share a column
    static constant constexpr uint COLUMNS = SIMD / N * GROUP_COLUMNS;  // of a simdgroup
    static_assert(32 % COLUMNS == 0, "a simdgroup has work for all of its columns or for none");
    static_assert(SSM_DELTA_THREADS / SIMD * COLUMNS * D_K == SSM_DELTA_FLOATS, "as launched");
};

METAL_FUNC float dot_pieces(thread const float4* a, thread const float4* b) {
    float4 sum = a[0] * b[0];
    UNROLL for (uint j = 1; j < PIECES; j++) sum += a[j] * b[j];
    return (sum.x + sum.y) + (sum.z + sum.w);
}

// One token's inputs for the columns of a group: a lane's share of q and k, and v of each column.
template <uint LANES>
struct Token {
    float4 q[PIECES];
    float4 k[PIECES];
    float v[GROUP_COLUMNS];

    // Elements past the end of the head are zero.
    template <class Pointer>
    METAL_FUNC void load_qk(Pointer q_head, Pointer k_head, uint dim4, uint lane) {
        UNROLL for (uint j = 0; j < PIECES; j++) {
            const uint i = lane % LANES + j * LANES;
            q[j] = i < dim4 ? float4(q_head[i]) : float4(0.0f);
            k[j] = i < dim4 ? float4(k_head[i]) : float4(0.0f);
        }
    }

    template <class Pointer>
    METAL_FUNC void load_v(Pointer columns) {
        UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) v[c] = columns[c];
    }
};

// A lane's share of a group's columns of S, in registers from load to store.
template <uint LANES>
struct Columns {
    float4 s[GROUP_COLUMNS][PIECES];

    // Columns that are zero are not read.
    METAL_FUNC void load(device const float4* from, uint dim4, uint lane, bool is_zero) {
        UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) {
            UNROLL for (uint j = 0; j < PIECES; j++) {
                const uint i = lane % LANES + j * LANES;
                s[c][j] = i < dim4 && !is_zero ? from[c * dim4 + i] : float4(0.0f);
            }
        }
    }

    METAL_FUNC void store(device float4* to, uint dim4, uint lane) {
        UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) {
            UNROLL for (uint j = 0; j < PIECES; j++) {
                const uint i = lane % LANES + j * LANES;
                if (i < dim4) to[c * dim4 + i] = s[c][j];
            }
        }
    }
};

// A few tokens, shared by the simdgroups of a threadgroup. While they work on a tile, each thread loads the next tile
// into registers. A single token is too little work to wait for memory.
template <uint D_K>
struct TokenTile {
    static constant constexpr uint TOKENS = SSM_DELTA_TILE / D_K;
    static constant constexpr uint HEAD4 = D_K / 4;
    static constant constexpr uint QK4 = 2 * HEAD4;  // q and k of a token
    static constant constexpr uint COLUMNS = SSM_DELTA_FLOATS / D_K;
    static constant constexpr uint V = TOKENS * COLUMNS;
    static constant constexpr uint QK4_PER_THREAD = TOKENS * QK4 / SSM_DELTA_THREADS;
    static constant constexpr uint V_PER_THREAD = (V + SSM_DELTA_THREADS - 1) / SSM_DELTA_THREADS;
    static_assert(TOKENS <= SIMD && TOKENS * QK4 % SSM_DELTA_THREADS == 0, "gates a lane each, q and k evenly");

    float4 qk[QK4_PER_THREAD];
    float v[V_PER_THREAD];

    // Loads the tokens of rows [t, end) that fit the tile. q, k, v: of the head (v: of the first column), at row 0.
    // Rows lie `channels` floats apart. Values outside are not read.
    METAL_FUNC void load(device const float4* q, device const float4* k, device const float* v_row, ulong channels,
                         uint dim4, uint n_columns, uint t, uint end, uint tid) {
        UNROLL for (uint n = 0; n < QK4_PER_THREAD; n++) {
            const uint token = (tid + n * SSM_DELTA_THREADS) / QK4;
            const uint i = (tid + n * SSM_DELTA_THREADS) % HEAD4;
            const bool is_q = (tid + n * SSM_DELTA_THREADS) % QK4 < HEAD4;
            const bool inside = t + token < end && i < dim4;
            qk[n] = inside ? (is_q ? q : k)[(t + token) * (channels / 4) + i] : float4(0.0f);
        }
        UNROLL for (uint n = 0; n < V_PER_THREAD; n++) {
            const uint token = (tid + n * SSM_DELTA_THREADS) / COLUMNS;
            const uint column = (tid + n * SSM_DELTA_THREADS) % COLUMNS;
            const bool inside = t + token < end && column < n_columns;
            v[n] = inside ? v_row[(t + token) * channels + column] : 0.0f;
        }
    }

    METAL_FUNC void store(threadgroup float4* all_qk, threadgroup float* all_v, uint tid) {
        UNROLL for (uint n = 0; n < QK4_PER_THREAD; n++) all_qk[tid + n * SSM_DELTA_THREADS] = qk[n];
        UNROLL for (uint n = 0; n < V_PER_THREAD; n++) {
            if (tid + n * SSM_DELTA_THREADS < V) all_v[tid + n * SSM_DELTA_THREADS] = v[n];
        }
    }
};
