// Mamba2 (arXiv 2405.21060): a short causal convolution, a recurrence whose state decays by one number for each head,
// and a norm of groups, gated before it. mamba2_step computes the first two for runs of one row; mamba2_conv1d and
// mamba2_scan for any runs. mamba2_norm ends both: its groups may span all heads. recurrent.h says what slots hold.
//
// For each token and head: S *= exp(dt a); S += dt x B^T; o = S C + d x, where dt = softplus(dt + bias). A row of S is
// contiguous in memory. In the words of recurrent.h the row of an element of x is a column, B is k and C is q.
#include "recurrent.h"

METAL_FUNC uint d_inner(constant Mamba2Params& p) { return p.n_head * p.d_head; }
METAL_FUNC uint conv_channels(constant Mamba2Params& p) { return d_inner(p) + 2 * p.n_group * p.d_state; }
METAL_FUNC uint row_width(constant Mamba2Params& p) { return d_inner(p) + conv_channels(p) + p.n_head; }
METAL_FUNC Ring conv_ring(constant Mamba2Params& p) { return Ring{p.d_conv, conv_channels(p)}; }

// A head of the step, and its group.
struct Head {
    uint x;         // its first channel of x
    uint b;         // the first channel of B of its group
    uint c;         // and of C
    bool is_first;  // of its group: this head stores the inputs of B and C

    METAL_FUNC void set(constant Mamba2Params& p, uint head) {
        const uint per_group = p.n_head / p.n_group;
        x = head * p.d_head;
        b = d_inner(p) + head / per_group * p.d_state;
        c = b + p.n_group * p.d_state;
        is_first = head % per_group == 0;
    }

    // Channel i of [x | B | C].
    METAL_FUNC uint channel(constant Mamba2Params& p, uint i) {
        if (i < p.d_head) return x + i;
        const uint j = i - p.d_head;
        return j < p.d_state ? b + j : c + (j - p.d_state);
    }
};

// Numbers of a head that do not depend on the token.
struct Rates {
    float a;
    float d;
    float dt_bias;
};

// How a token changes the state of a head: it decays, and takes up dt x.
struct Pace {
    float decay;
    float dt;

    METAL_FUNC void set(float raw_dt, Rates rates) {
        dt = softplus(raw_dt + rates.dt_bias);
        decay = precise::exp(dt * rates.a);
    }
};

// One token on a lane's columns. The lanes of a group have all of o.
template <uint LANES>
METAL_FUNC void advance(thread Columns<LANES>& columns, thread const Token<LANES>& token, Pace pace, float d,
                        thread float* o) {
    UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) {
        thread float4* s = columns.s[c];
        const float x = pace.dt * token.v[c];
        UNROLL for (uint j = 0; j < PIECES; j++) s[j] = s[j] * pace.decay + token.k[j] * x;
        o[c] = lanes_sum<LANES>(dot_pieces(s, token.q)) + d * token.v[c];
    }
}

// ---- Convolution ----------------------------------------------------------------------------------------------------

// A thread per channel, for a tile of tokens. It only reads the rings; mamba2_scan stores them.
// Grid: (ceil(channels / MAMBA2_CONV_THREADS), ceil(T / SSM_CONV_TOKENS)). Threads: MAMBA2_CONV_THREADS.
template <class T>
kernel void mamba2_conv1d(constant Mamba2Params& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                          device const Row* rows [[buffer(2)]], device const T* inputs [[buffer(3)]],
                          device const T* conv_w [[buffer(4)]], device const T* conv_b [[buffer(5)]],
                          device const T* conv_state [[buffer(6)]], device T* out [[buffer(7)]], GRID_IDS) {
    const uint channels = conv_channels(p);
    const uint channel = tg.x * MAMBA2_CONV_THREADS + tid;
    if (channel >= channels) return;
    const float bias = conv_b[channel];
    const uint end = min(step->n_tokens, (tg.y + 1) * SSM_CONV_TOKENS);
    for (uint t = tg.y * SSM_CONV_TOKENS; t < end; t++) {
        RunRow row;
        row.load(rows + t);
        ConvInput input;
        input.set(conv_ring(p), inputs + d_inner(p), row_width(p), conv_state, row.slot, row.pos, t, t - row.begin);
        out[ulong(t) * channels + channel] = silu(input.convolve(conv_w, channel) + bias);
    }
}

KERNEL("mamba2_conv1d", mamba2_conv1d<float>)

// ---- The recurrence -------------------------------------------------------------------------------------------------

// The bindings of mamba2_scan, and the part of them that its threadgroup (block of columns, head) works on.
template <class Vec, uint D_K>
struct ScanTask {
    device const float* raw;  // rows of the step's inputs
    device const Vec* xbc;    // results of the convolution
    Rates rates;
    device float* conv_state;
    device Vec* state;
    device float* out;
    uint head;
    uint block;

    using Tile = TokenTile<D_K>;
    static constant constexpr uint LANES = Lanes<D_K>::N;
    static_assert(MAMBA2_HEAD_MULTIPLE % Lanes<D_K>::COLUMNS == 0, "a simdgroup has work for all of its columns");

    // dt of the token of row t, or of the last row before `end`.
    METAL_FUNC float dt_of(constant Mamba2Params& p, uint t, uint end) {
        return raw[ulong(min(t, end - 1)) * row_width(p) + d_inner(p) + conv_channels(p) + head];
    }

    // Stores inputs in the ring. All blocks of a head share the channels of the head.
    METAL_FUNC void store_inputs(constant Mamba2Params& p, Head at, RunRow row, uint tid) {
        const uint n = row.end - row.begin;
        ConvInput input;
        input.set(conv_ring(p), raw + d_inner(p), row_width(p), conv_state, row.slot, row.pos + n - 1, row.end - 1,
                  n - 1);
        device float* to = input.ring.of(conv_state, row.slot_out);
        const uint n_stored = input.n_stored(row.slot != row.slot_out, n);
        const uint n_threads = (p.d_head + Tile::COLUMNS - 1) / Tile::COLUMNS * SSM_DELTA_THREADS;
        const uint n_own = p.d_head + (at.is_first ? 2 * p.d_state : 0);
        for (uint i = block / Tile::COLUMNS * SSM_DELTA_THREADS + tid; i < n_own; i += n_threads)
            input.store(to, at.channel(p, i), n_stored);
    }

    // The run of rows [row.begin, row.end).
    METAL_FUNC void run(constant Mamba2Params& p, RunRow row, threadgroup float4* tile_qk, threadgroup float* tile_v,
                        uint tid, uint sg, uint lane) {
        Head at;
        at.set(p, head);
        const uint dim4 = p.d_state / 4;
        device const Vec* q = xbc + at.c / 4;
        device const Vec* k = xbc + at.b / 4;
        device const float* x = (device const float*)xbc + at.x + block;
        const uint column = sg * Lanes<D_K>::COLUMNS + lane / LANES * GROUP_COLUMNS;  // of the block: the group's first
        const bool has_columns = block + column < p.d_head;
        const ulong slot_columns = d_inner(p), channels = conv_channels(p);
        device Vec* my_state = state + (ulong(at.x) + block + column) * dim4;

        Tile next;
        next.load(q, k, x, channels, dim4, p.d_head - block, row.begin, row.end, tid);
        float next_dt = dt_of(p, row.begin + lane % Tile::TOKENS, row.end);
        Columns<LANES> columns;
        columns.load(my_state + row.slot * slot_columns * dim4, dim4, lane, row.pos == 0 || !has_columns);
        store_inputs(p, at, row, tid);
        for (uint t0 = row.begin; t0 < row.end; t0 += Tile::TOKENS) {
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been used
            next.store(tile_qk, tile_v, tid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            Pace lane_pace;
            lane_pace.set(next_dt, rates);
            next.load(q, k, x, channels, dim4, p.d_head - block, t0 + Tile::TOKENS, row.end, tid);
            next_dt = dt_of(p, t0 + Tile::TOKENS + lane % Tile::TOKENS, row.end);
            if (!has_columns) continue;
            for (uint i = 0; i < min(uint(Tile::TOKENS), row.end - t0); i++) {
                Token<LANES> token;
                token.load_qk(tile_qk + i * Tile::QK4, tile_qk + i * Tile::QK4 + Tile::HEAD4, Tile::HEAD4, lane);
                token.load_v(tile_v + i * Tile::COLUMNS + column);
                const Pace pace = {simd_shuffle(lane_pace.decay, i), simd_shuffle(lane_pace.dt, i)};
                float o[GROUP_COLUMNS];
                advance(columns, token, pace, rates.d, o);
                if (lane % LANES == 0) {
                    device float* to = out + ulong(t0 + i) * d_inner(p) + at.x + block + column;
                    UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) to[c] = o[c];
                }
            }
        }
        if (has_columns) columns.store(my_state + row.slot_out * slot_columns * dim4, dim4, lane);
    }
};

// Threadgroups by (block of columns, head, z), to which runs are dealt. The state is read once and written once in a
// run. The ring is stored here, as by ssm_delta.
// Grid: (ceil(d_head D_K / SSM_DELTA_FLOATS), n_head, any number). Threads: SSM_DELTA_THREADS.
template <class Vec, uint D_K>
kernel void mamba2_scan(constant Mamba2Params& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                        device const Row* rows [[buffer(2)]], device const float* raw [[buffer(3)]],
                        device const Vec* xbc [[buffer(4)]], device const float* a [[buffer(5)]],
                        device const float* d [[buffer(6)]], device const float* dt_bias [[buffer(7)]],
                        device float* conv_state [[buffer(8)]], device Vec* state [[buffer(9)]],
                        device float* out [[buffer(10)]], GRID_IDS) {
    using Tile = TokenTile<D_K>;
    TG_ARRAY(float4, tile_qk, Tile::TOKENS * Tile::QK4);
    TG_ARRAY(float, tile_v, Tile::V);
    const uint block = tg.x * Tile::COLUMNS;  // the first column of the threadgroup
    if (block >= p.d_head) return;
    const Rates rates = {a[tg.y], d[tg.y], dt_bias[tg.y]};
    ScanTask<Vec, D_K> task = {raw, xbc, rates, conv_state, state, out, tg.y, block};
    DealtRuns runs;
    runs.set(step, rows, tg.z, n_tg.z);
    RunRow row;
    while (runs.next(row)) task.run(p, row, tile_qk, tile_v, tid, sg, lane);
}

#define MAMBA2_SCAN(d_state) KERNEL("mamba2_scan_" #d_state, mamba2_scan<float4, d_state>)
SSM_CLASSES(MAMBA2_SCAN)

// ---- Runs of one row: convolution and recurrence --------------------------------------------------------------------

// A threadgroup per (head, row). Its row and the step are one wait for memory. All other inputs are a second one: the
// state is asked for first. Heads of a group compute its B and C again, which costs less than another dispatch. No head
// reads the entry of the ring that is written in place.
// Grid: (n_head, T). Threads: MAMBA2_STEP_THREADS.
template <class Vec, uint D_K>
kernel void mamba2_step(constant Mamba2Params& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                        device const Row* rows [[buffer(2)]], device const float* inputs [[buffer(3)]],
                        device const float* conv_w [[buffer(4)]], device const float* conv_b [[buffer(5)]],
                        device const float* a [[buffer(6)]], device const float* d [[buffer(7)]],
                        device const float* dt_bias [[buffer(8)]], device float* conv_state [[buffer(9)]],
                        device Vec* state [[buffer(10)]], device float* out [[buffer(11)]], GRID_IDS) {
    constexpr uint LANES = Lanes<D_K>::N;
    TG_ARRAY(float4, xbc4, 3 * SSM_MAX_HEAD / 4);  // [x | B | C]
    RunRow row;
    row.load(rows + tg.y);
    if (tg.y >= step->n_tokens) return;
    const uint dim4 = p.d_state / 4, x4 = p.d_head / 4;
    const uint group_column = lane / LANES * GROUP_COLUMNS;
    const ulong slot_size = ulong(d_inner(p)) * dim4;
    Head head;
    head.set(p, tg.x);
    device Vec* head_state = state + ulong(head.x) * dim4;
    device const Vec* old_state = head_state + row.slot * slot_size;
    threadgroup float* xbc = (threadgroup float*)xbc4;

    uint first = sg * Lanes<D_K>::COLUMNS;
    Columns<LANES> columns;
    if (first < p.d_head) columns.load(old_state + (first + group_column) * dim4, dim4, lane, row.pos == 0);
    const Rates rates = {a[tg.x], d[tg.x], dt_bias[tg.x]};
    Pace pace;
    pace.set(inputs[ulong(tg.y) * row_width(p) + d_inner(p) + conv_channels(p) + tg.x], rates);
    ConvInput input;
    input.set(conv_ring(p), inputs + d_inner(p), row_width(p), conv_state, row.slot, row.pos, tg.y, 0);
    device float* to = input.ring.of(conv_state, row.slot_out);
    const uint n_stored = input.n_stored(row.slot != row.slot_out, 1);
    for (uint i = tid; i < p.d_head + 2 * p.d_state; i += n_sg * SIMD) {
        const uint channel = head.channel(p, i);
        xbc[i] = silu(input.convolve(conv_w, channel) + conv_b[channel]);
        if (i < p.d_head || head.is_first) input.store(to, channel, n_stored);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    Token<LANES> token;
    token.load_qk(xbc4 + x4 + dim4, xbc4 + x4, dim4, lane);
    device float* out_head = out + ulong(tg.y) * d_inner(p) + head.x;
    while (first < p.d_head) {
        const uint column = first + group_column;
        token.load_v(xbc + column);
        float o[GROUP_COLUMNS];
        advance(columns, token, pace, rates.d, o);
        columns.store(head_state + row.slot_out * slot_size + column * dim4, dim4, lane);
        if (lane % LANES == 0) {
            UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) out_head[column + c] = o[c];
        }
        first += n_sg * Lanes<D_K>::COLUMNS;
        if (first < p.d_head) columns.load(old_state + (first + group_column) * dim4, dim4, lane, row.pos == 0);
    }
}

#define MAMBA2_STEP(d_state) KERNEL("mamba2_step_" #d_state, mamba2_step<float4, d_state>)
SSM_CLASSES(MAMBA2_STEP)

// ---- The norm of groups ---------------------------------------------------------------------------------------------

// out = RMSNorm(o silu(z)) weight, the mean square being that of a group. z is the first part of a row of inputs.
// A threadgroup per (group, row).
// Grid: (n_group, T). Threads: MAMBA2_NORM_THREADS.
template <class T>
kernel void mamba2_norm(constant Mamba2Params& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                        device const T* o [[buffer(2)]], device const T* inputs [[buffer(3)]],
                        device const T* norm_w [[buffer(4)]], device T* out [[buffer(5)]], GRID_IDS) {
    TG_ARRAY(float, scratch, SIMD);
    if (tg.y >= step->n_tokens) return;
    const uint n = d_inner(p) / p.n_group, first = tg.x * n;
    device const T* o_row = o + ulong(tg.y) * d_inner(p) + first;
    device const T* z = inputs + ulong(tg.y) * row_width(p) + first;
    device T* out_row = out + ulong(tg.y) * d_inner(p) + first;
    float squares = 0.0f;
    for (uint i = tid; i < n; i += n_sg * SIMD) {
        const float y = o_row[i] * silu(z[i]);
        out_row[i] = y;
        squares += y * y;
    }
    const float mean = threadgroup_sum(squares, scratch, sg, lane, n_sg) / float(n);
    const float scale = precise::rsqrt(mean + p.norm_eps);
    for (uint i = tid; i < n; i += n_sg * SIMD) out_row[i] *= scale * norm_w[first + i];
}

KERNEL("mamba2_norm", mamba2_norm<float>)
