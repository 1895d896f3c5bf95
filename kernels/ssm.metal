// The gated delta rule (Gated DeltaNet) of a recurrent layer, with the short causal convolution before it and the gated
// norm after it. ssm_step computes all three for runs of one row; ssm_conv1d, ssm_delta and ssm_norm for any runs.
// recurrent.h says what slots hold. The state of a head is S transposed.
#include "ssm_chunk.h"

// ---- Heads and gates ------------------------------------------------------------------------------------------------

METAL_FUNC uint n_channels(constant SsmParams& p) { return 2 * p.n_k_head * p.d_k + p.n_v_head * p.d_v; }

METAL_FUNC Ring ring(constant SsmParams& p) { return Ring{p.d_conv, n_channels(p)}; }

// The head of q and k that a v head uses.
METAL_FUNC uint k_head_of(constant SsmParams& p, uint v_head) { return v_head / p.repeat % p.n_k_head; }

// Several v heads share a k head: the first of them stores its inputs.
METAL_FUNC bool owns_k_head(constant SsmParams& p, uint v_head) {
    return v_head % p.repeat == 0 && v_head / p.repeat < p.n_k_head;
}

// Where the alpha, or beta, of a v head lies.
METAL_FUNC ulong gate_at(constant SsmParams& p, uint t, uint v_head) {
    return ulong(t) * (p.n_v_head / p.repeat * p.gate_step) + v_head / p.repeat * p.gate_step + v_head % p.repeat;
}

METAL_FUNC float sigmoid(float x) { return 1.0f / (1.0f + precise::exp(-x)); }

// What gives the gates of a head for one token.
struct Logits {
    float alpha;
    float beta;
};

// The gates of a head for one token: the state decays by `decay`, and learns by `beta`.
struct Gates {
    float decay;
    float beta;

    METAL_FUNC void set(float alpha, float beta_logit, float a, float dt_bias) {
        decay = precise::exp(a * softplus(alpha + dt_bias));
        beta = sigmoid(beta_logit);
    }
};

// ---- The inputs of older files ------------------------------------------------------------------------------------

// A row of x holds, for each k head, its q and k, then v and z of its v heads. They become heads of [q | k | v], and z.
// A thread per element.
// Grid: (ceil((channels + d_inner) / ELEMENTWISE_COLUMNS), T). Threads: ELEMENTWISE_THREADS.
template <class T>
kernel void ssm_ungroup(constant SsmParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                        device const T* x [[buffer(2)]], device T* qkv [[buffer(3)]], device T* z [[buffer(4)]],
                        GRID_IDS) {
    if (tg.y >= step->n_tokens) return;
    const uint channels = n_channels(p), d_inner = p.n_v_head * p.d_v, n_qk = p.n_k_head * p.d_k;
    const uint d_values = d_inner / p.n_k_head, width = 2 * (p.d_k + d_values);  // of a k head
    device const T* row = x + ulong(tg.y) * p.n_k_head * width;
    const uint end = min((tg.x + 1) * ELEMENTWISE_COLUMNS, channels + d_inner);
    for (uint i = tg.x * ELEMENTWISE_COLUMNS + tid; i < end; i += n_sg * SIMD) {
        const bool is_qk = i < 2 * n_qk;
        const uint j = is_qk ? i : i - 2 * n_qk, size = is_qk ? n_qk : d_inner;  // of all q, k, v or z
        const uint each = is_qk ? p.d_k : d_values, part = j / size, at = j % size;
        const T value = row[at / each * width + (is_qk ? 0 : 2 * p.d_k) + part * each + at % each];
        if (i < channels)
            qkv[ulong(tg.y) * channels + i] = value;
        else
            z[ulong(tg.y) * d_inner + i - channels] = value;
    }
}

KERNEL("ssm_ungroup", ssm_ungroup<float>)

// ---- Convolution ----------------------------------------------------------------------------------------------------

// q, k and v heads in the order of the channels.
METAL_FUNC uint head_begin(constant SsmParams& p, uint head) {
    return head < 2 * p.n_k_head ? head * p.d_k : 2 * p.n_k_head * p.d_k + (head - 2 * p.n_k_head) * p.d_v;
}

// The factor by which the delta rule scales a head of q or k to length 1, from the sum of its squares. q is also
// divided by sqrt(d_k). eps is under the root, as in the model's own code, and not a least length.
METAL_FUNC float qk_scale(constant SsmParams& p, float squares, bool is_q) {
    const float inverse = precise::rsqrt(squares + p.l2_eps);
    return is_q ? inverse * precise::rsqrt(float(p.d_k)) : inverse;
}

// A threadgroup per (head, tile of tokens), a simdgroup per token. It only reads the rings; ssm_delta stores them.
// Grid: (2 n_k_head + n_v_head, ceil(T / SSM_CONV_TOKENS)). Threads: SSM_CONV_THREADS.
template <class T>
kernel void ssm_conv1d(constant SsmParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device const Row* rows [[buffer(2)]], device const T* qkv [[buffer(3)]],
                       device const T* conv_w [[buffer(4)]], device const T* conv_state [[buffer(5)]],
                       device T* out [[buffer(6)]], GRID_IDS) {
    constexpr uint PER_LANE = SSM_MAX_HEAD / SIMD;
    const uint channels = n_channels(p);
    const uint begin = head_begin(p, tg.x);
    const bool is_qk = tg.x < 2 * p.n_k_head;
    const uint dim = is_qk ? p.d_k : p.d_v;

    const uint end = min(step->n_tokens, (tg.y + 1) * SSM_CONV_TOKENS);
    for (uint t = tg.y * SSM_CONV_TOKENS + sg; t < end; t += n_sg) {
        RunRow row;
        row.load(rows + t);
        ConvInput input;
        input.set(ring(p), qkv, channels, conv_state, row.slot, row.pos, t, t - row.begin);
        float y[PER_LANE];
        float squares = 0.0f;
        UNROLL for (uint j = 0; j < PER_LANE; j++) {
            if (j * SIMD >= dim) continue;
            y[j] = silu(input.convolve(conv_w, begin + j * SIMD + lane));
            squares += y[j] * y[j];
        }
        const float scale = is_qk ? qk_scale(p, simd_sum(squares), tg.x < p.n_k_head) : 1.0f;
        UNROLL for (uint j = 0; j < PER_LANE; j++) {
            if (j * SIMD < dim) out[ulong(t) * channels + begin + j * SIMD + lane] = y[j] * scale;
        }
    }
}

KERNEL("ssm_conv1d", ssm_conv1d<float>)

// ---- The delta rule -------------------------------------------------------------------------------------------------

template <uint LANES>
METAL_FUNC void normalise_qk(constant SsmParams& p, thread Token<LANES>& token) {
    const float q_scale = qk_scale(p, lanes_sum<LANES>(dot_pieces(token.q, token.q)), true);
    const float k_scale = qk_scale(p, lanes_sum<LANES>(dot_pieces(token.k, token.k)), false);
    UNROLL for (uint j = 0; j < PIECES; j++) {
        token.q[j] *= q_scale;
        token.k[j] *= k_scale;
    }
}

// The rule for one token: S *= decay; d = (v - S^T k) beta; S += k d^T; o = S^T q. Both products are taken of the old S
// in one pass. The new S^T q is the old S^T q plus d (k·q).
template <uint LANES>
METAL_FUNC void update(thread Columns<LANES>& columns, thread const Token<LANES>& token, Gates gates, thread float* o) {
    const float kq = lanes_sum<LANES>(dot_pieces(token.k, token.q));
    UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) {
        thread float4* s = columns.s[c];
        const float sk = gates.decay * lanes_sum<LANES>(dot_pieces(s, token.k));
        const float sq = gates.decay * lanes_sum<LANES>(dot_pieces(s, token.q));
        const float d = (token.v[c] - sk) * gates.beta;
        UNROLL for (uint j = 0; j < PIECES; j++) s[j] = s[j] * gates.decay + token.k[j] * d;
        o[c] = sq + d * kq;
    }
}

// The bindings of ssm_delta, and the part of them that its threadgroup (block of columns, v head) works on.
template <class Vec, uint D_K>
struct DeltaTask {
    device const float* raw;  // the inputs of the convolution
    device const Vec* qkv;    // its results
    device const float* alpha;
    device const float* beta;
    float a;
    float dt_bias;
    device float* conv_state;
    device Vec* state;
    device float* out;
    uint head;
    uint block;

    using Sizes = ChunkSizes<D_K>;
    static constant constexpr uint EIGHTS = Sizes::EIGHTS;

    // alpha and beta of the token of row t, or of the last row before `end`.
    METAL_FUNC Logits logits_of(constant SsmParams& p, uint t, uint end) {
        const ulong i = gate_at(p, min(t, end - 1), head);
        return Logits{alpha[i], beta[i]};
    }

    // Stores inputs in the ring. All blocks of a head share the channels of the head.
    METAL_FUNC void store_inputs(constant SsmParams& p, RunRow row, uint tid) {
        const uint n = row.end - row.begin;
        ConvInput input;
        input.set(ring(p), raw, n_channels(p), conv_state, row.slot, row.pos + n - 1, row.end - 1, n - 1);
        device float* to = input.ring.of(conv_state, row.slot_out);
        const uint n_stored = input.n_stored(row.slot != row.slot_out, n);
        const uint n_threads = (p.d_v + Sizes::COLUMNS - 1) / Sizes::COLUMNS * SSM_DELTA_THREADS;
        const uint n_qk = owns_k_head(p, head) ? 2 * p.d_k : 0;
        for (uint i = block / Sizes::COLUMNS * SSM_DELTA_THREADS + tid; i < n_qk + p.d_v; i += n_threads) {
            uint channel = k_head_of(p, head) * p.d_k + i;
            if (i >= p.d_k) channel += (p.n_k_head - 1) * p.d_k;
            if (i >= n_qk) channel = head_begin(p, 2 * p.n_k_head + head) + i - n_qk;
            input.store(to, channel, n_stored);
        }
    }

    // Computes the outputs of a chunk, [column][token] in memory.d, from its staged tiles. S goes on.
    METAL_FUNC void chunk(thread StateColumns<D_K>& columns, ChunkMemory<D_K> m, float decay, float beta, uint sg,
                          uint lane) {
        const uint mine = sg * EIGHTS * Sizes::WORK;
        threadgroup float* d = m.d + mine;
        threadgroup float* o = m.o + mine;
        threadgroup float* written = m.written + mine;
        ChunkDecays<Sizes::TOKENS> decays;
        decays.set(decay, lane);
        multiply_tokens<D_K>(m, sg);
        columns.products(m.k, d);
        columns.products(m.q, o);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // products of tokens, and of the columns
        if (sg == 0) invert<D_K>(m.kk, decays, beta, lane);
        if (sg == 1) weigh<D_K>(m.qk, decays, lane);
        const uint i = lane % Sizes::TOKENS;
        for (uint c = lane / Sizes::TOKENS; c < 8 * EIGHTS; c += SIMD / Sizes::TOKENS) {
            threadgroup float& x = d[c / 8 * Sizes::WORK + Sizes::place(8, c % 8, i)];
            const uint column = sg * 8 * EIGHTS + c;
            const float v = column < Sizes::COLUMNS ? m.v[i * Sizes::COLUMNS + column] : 0.0f;
            x = beta * (v - decays.since_begin * x);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // T, the weights, and what T is to be multiplied by
        UNROLL for (uint c = 0; c < EIGHTS; c++) {
            mix_tokens<D_K>(d + c * Sizes::WORK, m.kk, written + c * Sizes::WORK);
            mix_tokens<D_K>(written + c * Sizes::WORK, m.qk, d + c * Sizes::WORK);
        }
        for (uint c = lane / Sizes::TOKENS; c < 8 * EIGHTS; c += SIMD / Sizes::TOKENS) {
            const uint at = c / 8 * Sizes::WORK + Sizes::place(8, c % 8, i);
            d[at] += decays.since_begin * o[at];
            written[at] *= decays.until_end;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        columns.add(m.k, written, decays.of_all);
    }

    // Writes a simdgroup's outputs of the n tokens from row t on.
    METAL_FUNC void write(constant SsmParams& p, threadgroup const float* o, uint t, uint n, uint first, uint n_columns,
                          uint lane) {
        for (uint at = lane; at < n * 8 * EIGHTS; at += SIMD) {
            const uint c = at % (8 * EIGHTS), i = at / (8 * EIGHTS);
            if (c >= n_columns) continue;
            const float x = o[c / 8 * Sizes::WORK + Sizes::place(8, c % 8, i)];
            out[(ulong(t + i) * p.n_v_head + head) * p.d_v + block + first + c] = x;
        }
    }

    // The run of rows [row.begin, row.end).
    METAL_FUNC void run(constant SsmParams& p, RunRow row, ChunkMemory<D_K> m, uint tid, uint sg, uint lane) {
        const uint dim4 = p.d_k / 4, first = sg * 8 * EIGHTS;  // column of the block
        device const Vec* q = qkv + k_head_of(p, head) * dim4;
        device const Vec* k = q + p.n_k_head * dim4;
        device const float* v = (device const float*)qkv + 2 * p.n_k_head * p.d_k + head * p.d_v + block;
        const uint n_block = min(uint(Sizes::COLUMNS), p.d_v - block),
                   n_columns = n_block > first ? n_block - first : 0;
        const ulong slot_columns = ulong(p.n_v_head) * p.d_v, channels = n_channels(p);
        device Vec* my_state = state + (ulong(head) * p.d_v + block + first) * dim4;
        threadgroup float* own = m.q + first * D_K;

        NextChunk<D_K> next;
        next.load(q, k, v, channels, dim4, n_block, row.begin, row.end, tid);
        Logits next_logits = logits_of(p, row.begin + lane % Sizes::TOKENS, row.end);
        StateColumns<D_K> columns;
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the run before has been written
        columns.load(my_state + row.slot * slot_columns * dim4, dim4, row.pos == 0 ? 0 : n_columns, own, lane);
        store_inputs(p, row, tid);
        for (uint t = row.begin; t < row.end; t += Sizes::TOKENS) {
            const uint n = min(uint(Sizes::TOKENS), row.end - t);
            const bool inside = lane % Sizes::TOKENS < n;
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the last chunk has been used
            next.store(m, tid);
            Gates gates;
            gates.set(next_logits.alpha, next_logits.beta, a, dt_bias);
            next.load(q, k, v, channels, dim4, n_block, t + Sizes::TOKENS, row.end, tid);
            next_logits = logits_of(p, t + Sizes::TOKENS + lane % Sizes::TOKENS, row.end);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            chunk(columns, m, inside ? gates.decay : 1.0f, inside ? gates.beta : 0.0f, sg, lane);
            write(p, m.d + sg * EIGHTS * Sizes::WORK, t, n, first, n_columns, lane);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the tiles have been used
        columns.store(my_state + row.slot_out * slot_columns * dim4, dim4, n_columns, own, lane);
    }
};

// Threadgroups by (block of columns, v head, z), to which runs are dealt. The state is read once and written once in a
// run. The ring is stored here and not by ssm_conv1d, where tiles of one run would have to wait for each other.
// Grid: (ceil(d_v D_K / SSM_DELTA_FLOATS), n_v_head, any number). Threads: SSM_DELTA_THREADS.
template <class Vec, uint D_K>
kernel void ssm_delta(constant SsmParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                      device const Row* rows [[buffer(2)]], device const float* raw [[buffer(3)]],
                      device const Vec* qkv [[buffer(4)]], device const float* alpha [[buffer(5)]],
                      device const float* beta [[buffer(6)]], device const float* a [[buffer(7)]],
                      device const float* dt_bias [[buffer(8)]], device float* conv_state [[buffer(9)]],
                      device Vec* state [[buffer(10)]], device float* out [[buffer(11)]], GRID_IDS) {
    using Sizes = ChunkSizes<D_K>;
    TG_ARRAY(float4, tiles, Sizes::STAGED / 4);
    TG_ARRAY(float, values, Sizes::TOKENS* Sizes::COLUMNS);
    TG_ARRAY(float, squares, 2 * Sizes::SQUARE);
    TG_ARRAY(float, work, 3 * Sizes::ALL_WORK);
    threadgroup float* q_tile = (threadgroup float*)tiles;
    const ChunkMemory<D_K> memory = {q_tile,
                                     q_tile + Sizes::TILE,
                                     values,
                                     squares,
                                     squares + Sizes::SQUARE,
                                     work,
                                     work + Sizes::ALL_WORK,
                                     work + 2 * Sizes::ALL_WORK};
    const uint block = tg.x * Sizes::COLUMNS;  // the first column of the threadgroup
    if (block >= p.d_v) return;
    DeltaTask<Vec, D_K> task = {raw, qkv, alpha, beta, a[tg.y], dt_bias[tg.y], conv_state, state, out, tg.y, block};
    DealtRuns runs;
    runs.set(step, rows, tg.z, n_tg.z);
    RunRow row;
    while (runs.next(row)) task.run(p, row, memory, tid, sg, lane);
}

#define SSM_DELTA(d_k) KERNEL("ssm_delta_" #d_k, ssm_delta<float4, d_k>)
SSM_CLASSES(SSM_DELTA)

// ---- The gated norm -------------------------------------------------------------------------------------------------

// The factor of RMSNorm for a head of outputs, computed by a simdgroup.
template <class Pointer>
METAL_FUNC float norm_scale(constant SsmParams& p, Pointer o, uint lane) {
    float squares = 0.0f;
    for (uint i = lane; i < p.d_v; i += SIMD) squares += o[i] * o[i];
    return precise::rsqrt(simd_sum(squares) / float(p.d_v) + p.norm_eps);
}

// A simdgroup per (head, row).
// Grid: (ceil(n_v_head / n_sg), T). Threads: SSM_NORM_THREADS.
template <class T>
kernel void ssm_norm(constant SsmParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const T* o [[buffer(2)]], device const T* z [[buffer(3)]],
                     device const T* norm_w [[buffer(4)]], device T* out [[buffer(5)]], GRID_IDS) {
    const uint head = tg.x * n_sg + sg;
    if (head >= p.n_v_head || tg.y >= step->n_tokens) return;
    const ulong begin = (ulong(tg.y) * p.n_v_head + head) * p.d_v;
    const float scale = norm_scale(p, o + begin, lane);
    for (uint i = lane; i < p.d_v; i += SIMD) out[begin + i] = o[begin + i] * scale * (norm_w[i] * silu(z[begin + i]));
}

KERNEL("ssm_norm", ssm_norm<float>)

// ---- Runs of one row, all in one ------------------------------------------------------------------------------------

// Convolution of the channels of a v head, [q | k | v], into x, and n_kept inputs of each into the ring `to`. No v head
// reads the entry of the ring that is written in place.
METAL_FUNC void convolve_head(constant SsmParams& p, ConvInput input, device const float* conv_w, device float* to,
                              uint n_kept, threadgroup float* x, uint head, uint tid, uint n_threads) {
    for (uint i = tid; i < 2 * p.d_k + p.d_v; i += n_threads) {
        const bool is_v = i >= 2 * p.d_k;
        uint channel = k_head_of(p, head) * p.d_k + i;
        if (i >= p.d_k) channel += (p.n_k_head - 1) * p.d_k;
        if (is_v) channel = head_begin(p, 2 * p.n_k_head + head) + i - 2 * p.d_k;
        x[i] = silu(input.convolve(conv_w, channel));
        if (is_v || owns_k_head(p, head)) input.store(to, channel, n_kept);
    }
}

// A threadgroup per (v head, row). Its row and the step are one wait for memory. All other inputs are a second one: the
// state is asked for first.
// Grid: (n_v_head, T). Threads: SSM_STEP_THREADS.
template <class Vec, uint D_K>
kernel void ssm_step(constant SsmParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const Row* rows [[buffer(2)]], device const float* qkv [[buffer(3)]],
                     device const float* z [[buffer(4)]], device const float* alpha [[buffer(5)]],
                     device const float* beta [[buffer(6)]], device const float* conv_w [[buffer(7)]],
                     device const float* a [[buffer(8)]], device const float* dt_bias [[buffer(9)]],
                     device const float* norm_w [[buffer(10)]], device float* conv_state [[buffer(11)]],
                     device Vec* state [[buffer(12)]], device float* out [[buffer(13)]], GRID_IDS) {
    constexpr uint LANES = Lanes<D_K>::N;
    TG_ARRAY(float4, x4, 3 * SSM_MAX_HEAD / 4);  // [q | k | v]
    TG_ARRAY(float, o, SSM_MAX_HEAD);
    TG_ARRAY(float, o_gate, SSM_MAX_HEAD);
    const uint head = tg.x;
    RunRow row;
    row.load(rows + tg.y);
    if (tg.y >= step->n_tokens) return;
    const uint dim4 = p.d_k / 4;
    const uint group_column = lane / LANES * GROUP_COLUMNS;
    const ulong slot_size = ulong(p.n_v_head) * p.d_v * dim4;
    device Vec* head_state = state + ulong(head) * p.d_v * dim4;
    threadgroup float* x = (threadgroup float*)x4;

    uint first = sg * Lanes<D_K>::COLUMNS;
    device const Vec* old_state = head_state + row.slot * slot_size;
    Columns<LANES> columns;
    if (first < p.d_v) columns.load(old_state + (first + group_column) * dim4, dim4, lane, row.pos == 0);
    const ulong row_head = ulong(tg.y) * p.n_v_head + head;
    const ulong gate = gate_at(p, tg.y, head);
    const float head_alpha = alpha[gate], head_beta = beta[gate], head_a = a[head], head_bias = dt_bias[head];
    const ulong begin = row_head * p.d_v;
    for (uint i = tid; i < p.d_v; i += n_sg * SIMD) o_gate[i] = norm_w[i] * silu(z[begin + i]);

    ConvInput input;
    input.set(ring(p), qkv, n_channels(p), conv_state, row.slot, row.pos, tg.y, 0);
    device float* to = input.ring.of(conv_state, row.slot_out);
    const uint n_kept = input.n_stored(row.slot != row.slot_out, 1);
    convolve_head(p, input, conv_w, to, n_kept, x, head, tid, n_sg * SIMD);
    Gates gates;
    gates.set(head_alpha, head_beta, head_a, head_bias);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    Token<LANES> token;
    token.load_qk(x4, x4 + dim4, dim4, lane);
    normalise_qk(p, token);
    while (first < p.d_v) {
        const uint column = first + group_column;
        token.load_v(x + 2 * p.d_k + column);
        float group_o[GROUP_COLUMNS];
        update(columns, token, gates, group_o);
        columns.store(head_state + row.slot_out * slot_size + column * dim4, dim4, lane);
        if (lane % LANES == 0) {
            UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) o[column + c] = group_o[c];
        }
        first += n_sg * Lanes<D_K>::COLUMNS;
        if (first < p.d_v) columns.load(old_state + (first + group_column) * dim4, dim4, lane, row.pos == 0);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const float scale = norm_scale(p, (threadgroup const float*)o, lane);
    for (uint i = tid; i < p.d_v; i += n_sg * SIMD) out[begin + i] = o[i] * scale * o_gate[i];
}

#define SSM_STEP(d_k) KERNEL("ssm_step_" #d_k, ssm_step<float4, d_k>)
SSM_CLASSES(SSM_STEP)
