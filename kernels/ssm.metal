// The gated delta rule (Gated DeltaNet) of a recurrent layer, with the short causal convolution before it and the gated
// norm after it. ssm_step computes all three for one token; ssm_conv1d, ssm_delta and ssm_norm compute them for many.
//
// conv_state is a ring [d_conv, channels]: the inputs of position p lie in slot p % d_conv. state is [n_v_head, d_v,
// d_k]: a column of S is contiguous. Before position 0 both count as zero, for any content of the memory.
#include "reduce.h"
#include "shapes.h"

// ---- Gates ----------------------------------------------------------------------------------------------------------

METAL_FUNC float sigmoid(float x) { return 1.0f / (1.0f + precise::exp(-x)); }

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

// The gates of a head for one token: the state decays by `decay`, and learns by `beta`.
struct Gates {
    float decay;
    float beta;

    METAL_FUNC void set(float alpha, float beta_logit, float a, float dt_bias) {
        decay = precise::exp(a * softplus(alpha + dt_bias));
        beta = sigmoid(beta_logit);
    }
};

// ---- Convolution ----------------------------------------------------------------------------------------------------

METAL_FUNC uint n_channels(constant SsmParams& p) { return 2 * p.n_k_head * p.d_k + p.n_v_head * p.d_v; }

// The inputs of a step, and of the tokens just before it.
struct ConvInput {
    device const float* qkv;         // [T, channels]
    device const float* conv_state;  // the ring
    device const float* conv_w;      // [channels, d_conv], the last tap for the token itself
    uint channels;
    uint d_conv;
    uint pos;

    // silu of the convolution of one channel at row t. `newest` is the slot of row t in the ring.
    METAL_FUNC float silu_conv(uint channel, uint t, uint newest) {
        device const float* w = conv_w + ulong(channel) * d_conv + (d_conv - 1);
        float sum = 0.0f;
        UNROLL for (uint back = 0; back < SSM_MAX_CONV; back++) {
            if (back >= d_conv || back > pos + t) continue;  // no tap; before the sequence
            float x;
            if (back <= t) {
                x = qkv[ulong(t - back) * channels + channel];
            } else {
                const uint slot = newest >= back ? newest - back : newest + d_conv - back;
                x = conv_state[ulong(slot) * channels + channel];
            }
            sum += w[-int(back)] * x;
        }
        return silu(sum);
    }
};

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

// A threadgroup per (head, tile of tokens), a simdgroup per token. Only the first tile uses the ring. It reads all the
// inputs that it needs before it writes the newest inputs there. out may not be qkv.
// Grid: (2 n_k_head + n_v_head, ceil(T / SSM_CONV_TOKENS)). Threads: SSM_CONV_THREADS.
template <class T>
kernel void ssm_conv1d(constant SsmParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device const T* qkv [[buffer(2)]], device const T* conv_w [[buffer(3)]],
                       device T* conv_state [[buffer(4)]], device T* out [[buffer(5)]], GRID_IDS) {
    constexpr uint PER_LANE = SSM_MAX_HEAD / SIMD;
    static_assert(SSM_CONV_TOKENS >= SSM_MAX_CONV, "only the first tile looks back past the step");
    const uint n_tokens = step->n_tokens;
    const uint channels = n_channels(p);
    const uint begin = head_begin(p, tg.x);
    const bool is_qk = tg.x < 2 * p.n_k_head;
    const uint dim = is_qk ? p.d_k : p.d_v;
    ConvInput input = {qkv, conv_state, conv_w, channels, p.d_conv, step->pos};

    const uint end = min(n_tokens, (tg.y + 1) * SSM_CONV_TOKENS);
    for (uint t = tg.y * SSM_CONV_TOKENS + sg; t < end; t += n_sg) {
        const uint newest = (step->pos + t) % p.d_conv;
        float y[PER_LANE];
        float squares = 0.0f;
        UNROLL for (uint j = 0; j < PER_LANE; j++) {
            if (j * SIMD >= dim) continue;
            y[j] = input.silu_conv(begin + j * SIMD + lane, t, newest);
            squares += y[j] * y[j];
        }
        const float scale = is_qk ? qk_scale(p, simd_sum(squares), tg.x < p.n_k_head) : 1.0f;
        UNROLL for (uint j = 0; j < PER_LANE; j++) {
            if (j * SIMD < dim) out[ulong(t) * channels + begin + j * SIMD + lane] = y[j] * scale;
        }
    }

    if (tg.y > 0) return;
    threadgroup_barrier(mem_flags::mem_device);
    for (uint t = n_tokens - min(n_tokens, p.d_conv); t < n_tokens; t++) {
        const ulong slot = (step->pos + t) % p.d_conv;
        for (uint i = tid; i < dim; i += n_sg * SIMD)
            conv_state[slot * channels + begin + i] = qkv[ulong(t) * channels + begin + i];
    }
}

KERNEL("ssm_conv1d", ssm_conv1d<float>)

// ---- The delta rule -------------------------------------------------------------------------------------------------
//
// Columns of S are independent of each other. A group of LANES lanes shares GROUP_COLUMNS columns. A lane holds PIECES
// float4 of each column: its own and every LANES-th after it. So a column is read in whole lines and summed in
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

    METAL_FUNC void normalise_qk(constant SsmParams& p) {
        const float q_scale = qk_scale(p, lanes_sum<LANES>(dot_pieces(q, q)), true);
        const float k_scale = qk_scale(p, lanes_sum<LANES>(dot_pieces(k, k)), false);
        UNROLL for (uint j = 0; j < PIECES; j++) {
            q[j] *= q_scale;
            k[j] *= k_scale;
        }
    }
};

// A lane's share of a group's columns of S, in registers from load to store.
template <uint LANES>
struct Columns {
    float4 s[GROUP_COLUMNS][PIECES];

    METAL_FUNC void clear() {
        UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) {
            UNROLL for (uint j = 0; j < PIECES; j++) s[c][j] = float4(0.0f);
        }
    }

    METAL_FUNC void load(device const float4* from, uint dim4, uint lane) {
        UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) {
            UNROLL for (uint j = 0; j < PIECES; j++) {
                const uint i = lane % LANES + j * LANES;
                s[c][j] = i < dim4 ? from[c * dim4 + i] : float4(0.0f);
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

    // The rule for one token: S *= decay; d = (v - S^T k) beta; S += k d^T; o = S^T q. Both products are taken of the
    // old S in one pass: the new S^T q is the old S^T q plus d (k·q).
    METAL_FUNC void update(thread const Token<LANES>& token, Gates gates, thread float* o) {
        const float kq = lanes_sum<LANES>(dot_pieces(token.k, token.q));
        UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) {
            const float sk = gates.decay * lanes_sum<LANES>(dot_pieces(s[c], token.k));
            const float sq = gates.decay * lanes_sum<LANES>(dot_pieces(s[c], token.q));
            const float d = (token.v[c] - sk) * gates.beta;
            UNROLL for (uint j = 0; j < PIECES; j++) s[c][j] = s[c][j] * gates.decay + token.k[j] * d;
            o[c] = sq + d * kq;
        }
    }
};

// A few tokens, shared by the simdgroups of ssm_delta. While they work on a tile, each thread loads the next tile into
// registers: a single token is too little work to wait for memory.
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
    float alpha;  // of token lane % TOKENS
    float beta;

    // Loads the tokens of [t, n_tokens) that fit the tile. q, k, v: of the head (v: of the first column), at row 0.
    // Values outside are not read.
    METAL_FUNC void load(constant SsmParams& p, device const float4* q, device const float4* k,
                         device const float* v_row, uint n_columns, uint t, uint n_tokens, uint tid) {
        const ulong channels = n_channels(p);
        UNROLL for (uint n = 0; n < QK4_PER_THREAD; n++) {
            const uint token = (tid + n * SSM_DELTA_THREADS) / QK4;
            const uint i = (tid + n * SSM_DELTA_THREADS) % HEAD4;
            const bool is_q = (tid + n * SSM_DELTA_THREADS) % QK4 < HEAD4;
            const bool inside = t + token < n_tokens && i < p.d_k / 4;
            qk[n] = inside ? (is_q ? q : k)[(t + token) * (channels / 4) + i] : float4(0.0f);
        }
        UNROLL for (uint n = 0; n < V_PER_THREAD; n++) {
            const uint token = (tid + n * SSM_DELTA_THREADS) / COLUMNS;
            const uint column = (tid + n * SSM_DELTA_THREADS) % COLUMNS;
            const bool inside = t + token < n_tokens && column < n_columns;
            v[n] = inside ? v_row[(t + token) * channels + column] : 0.0f;
        }
    }

    METAL_FUNC void load_gates(constant SsmParams& p, device const float* all_alpha, device const float* all_beta,
                               uint head, uint t, uint n_tokens, uint lane) {
        const ulong i = ulong(min(t + lane % TOKENS, n_tokens - 1)) * p.n_v_head + head;
        alpha = all_alpha[i];
        beta = all_beta[i];
    }

    METAL_FUNC void store(threadgroup float4* all_qk, threadgroup float* all_v, uint tid) {
        UNROLL for (uint n = 0; n < QK4_PER_THREAD; n++) all_qk[tid + n * SSM_DELTA_THREADS] = qk[n];
        UNROLL for (uint n = 0; n < V_PER_THREAD; n++) {
            if (tid + n * SSM_DELTA_THREADS < V) all_v[tid + n * SSM_DELTA_THREADS] = v[n];
        }
    }
};

// Threadgroups by (block of columns, v head). The state is read once and written once.
// Grid: (ceil(d_v D_K / SSM_DELTA_FLOATS), n_v_head). Threads: SSM_DELTA_THREADS.
template <class Vec, uint D_K>
kernel void ssm_delta(constant SsmParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                      device const Vec* qkv [[buffer(2)]], device const float* alpha [[buffer(3)]],
                      device const float* beta [[buffer(4)]], device const float* a [[buffer(5)]],
                      device const float* dt_bias [[buffer(6)]], device Vec* state [[buffer(7)]],
                      device float* out [[buffer(8)]], GRID_IDS) {
    using Tile = TokenTile<D_K>;
    constexpr uint LANES = Lanes<D_K>::N;
    TG_ARRAY(float4, tile_qk, Tile::TOKENS * Tile::QK4);
    TG_ARRAY(float, tile_v, Tile::V);
    const uint head = tg.y;
    const uint n_tokens = step->n_tokens;
    const uint block = tg.x * Tile::COLUMNS;  // the first column of the threadgroup
    if (block >= p.d_v || n_tokens == 0) return;

    const uint dim4 = p.d_k / 4;
    device const Vec* q = qkv + head % p.n_k_head * dim4;
    device const Vec* k = q + p.n_k_head * dim4;
    device const float* v = (device const float*)qkv + 2 * p.n_k_head * p.d_k + head * p.d_v + block;
    const uint column = sg * Lanes<D_K>::COLUMNS + lane / LANES * GROUP_COLUMNS;  // of the block: the group's first
    const bool has_columns = block + column < p.d_v;
    device Vec* my_state = state + (ulong(head) * p.d_v + block + column) * dim4;

    Tile next;
    next.load(p, q, k, v, p.d_v - block, 0, n_tokens, tid);
    next.load_gates(p, alpha, beta, head, 0, n_tokens, lane);
    Columns<LANES> columns;
    columns.clear();
    if (has_columns && step->pos > 0) columns.load(my_state, dim4, lane);
    for (uint t0 = 0; t0 < n_tokens; t0 += Tile::TOKENS) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been used
        next.store(tile_qk, tile_v, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        Gates lane_gates;
        lane_gates.set(next.alpha, next.beta, a[head], dt_bias[head]);
        next.load(p, q, k, v, p.d_v - block, t0 + Tile::TOKENS, n_tokens, tid);
        next.load_gates(p, alpha, beta, head, t0 + Tile::TOKENS, n_tokens, lane);
        if (!has_columns) continue;
        for (uint i = 0; i < min(uint(Tile::TOKENS), n_tokens - t0); i++) {
            Token<LANES> token;
            token.load_qk(tile_qk + i * Tile::QK4, tile_qk + i * Tile::QK4 + Tile::HEAD4, Tile::HEAD4, lane);
            token.load_v(tile_v + i * Tile::COLUMNS + column);
            const Gates gates = {simd_shuffle(lane_gates.decay, i), simd_shuffle(lane_gates.beta, i)};
            float o[GROUP_COLUMNS];
            columns.update(token, gates, o);
            if (lane % LANES == 0) {
                device float* to = out + (ulong(t0 + i) * p.n_v_head + head) * p.d_v + block + column;
                UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) to[c] = o[c];
            }
        }
    }
    if (has_columns) columns.store(my_state, dim4, lane);
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

// ---- One token, all in one ------------------------------------------------------------------------------------------

// Convolution of the channels of v head tg.x, [q | k | v], into x. Several v heads share a k head: the first of
// them stores its inputs. The ring has d_conv slots, and no v head reads the slot that is written.
METAL_FUNC void convolve_head(constant SsmParams& p, ConvInput input, device float* conv_state, threadgroup float* x,
                              uint head, uint tid, uint n_threads) {
    const uint newest = input.pos % p.d_conv;
    const uint k_head = head % p.n_k_head;
    for (uint i = tid; i < 2 * p.d_k + p.d_v; i += n_threads) {
        const bool is_v = i >= 2 * p.d_k;
        uint channel = k_head * p.d_k + i;
        if (i >= p.d_k) channel += (p.n_k_head - 1) * p.d_k;
        if (is_v) channel = head_begin(p, 2 * p.n_k_head + head) + i - 2 * p.d_k;
        x[i] = input.silu_conv(channel, 0, newest);
        if (is_v || head == k_head) conv_state[ulong(newest) * input.channels + channel] = input.qkv[channel];
    }
}

// A threadgroup per v head. It loads its state first, even before it reads the step, then all other inputs: one wait
// for memory and not several.
// Grid: n_v_head. Threads: SSM_STEP_THREADS.
template <class Vec, uint D_K>
kernel void ssm_step(constant SsmParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const float* qkv [[buffer(2)]], device const float* z [[buffer(3)]],
                     device const float* alpha [[buffer(4)]], device const float* beta [[buffer(5)]],
                     device const float* conv_w [[buffer(6)]], device const float* a [[buffer(7)]],
                     device const float* dt_bias [[buffer(8)]], device const float* norm_w [[buffer(9)]],
                     device float* conv_state [[buffer(10)]], device Vec* state [[buffer(11)]],
                     device float* out [[buffer(12)]], GRID_IDS) {
    constexpr uint LANES = Lanes<D_K>::N;
    TG_ARRAY(float4, x4, 3 * SSM_MAX_HEAD / 4);  // [q | k | v]
    TG_ARRAY(float, o, SSM_MAX_HEAD);
    TG_ARRAY(float, o_gate, SSM_MAX_HEAD);
    const uint head = tg.x;
    const uint dim4 = p.d_k / 4;
    const uint group_column = lane / LANES * GROUP_COLUMNS;
    device Vec* head_state = state + ulong(head) * p.d_v * dim4;
    threadgroup float* x = (threadgroup float*)x4;

    uint first = sg * Lanes<D_K>::COLUMNS;
    Columns<LANES> columns;
    if (first < p.d_v) columns.load(head_state + (first + group_column) * dim4, dim4, lane);
    if (step->n_tokens == 0) return;
    const float head_alpha = alpha[head], head_beta = beta[head], head_a = a[head], head_bias = dt_bias[head];
    const uint begin = head * p.d_v;
    for (uint i = tid; i < p.d_v; i += n_sg * SIMD) o_gate[i] = norm_w[i] * silu(z[begin + i]);

    ConvInput input = {qkv, conv_state, conv_w, n_channels(p), p.d_conv, step->pos};
    convolve_head(p, input, conv_state, x, head, tid, n_sg * SIMD);
    Gates gates;
    gates.set(head_alpha, head_beta, head_a, head_bias);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    Token<LANES> token;
    token.load_qk(x4, x4 + dim4, dim4, lane);
    token.normalise_qk(p);
    while (first < p.d_v) {
        const uint column = first + group_column;
        if (step->pos == 0) columns.clear();
        token.load_v(x + 2 * p.d_k + column);
        float group_o[GROUP_COLUMNS];
        columns.update(token, gates, group_o);
        columns.store(head_state + column * dim4, dim4, lane);
        if (lane % LANES == 0) {
            UNROLL for (uint c = 0; c < GROUP_COLUMNS; c++) o[column + c] = group_o[c];
        }
        first += n_sg * Lanes<D_K>::COLUMNS;
        if (first < p.d_v) columns.load(head_state + (first + group_column) * dim4, dim4, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const float scale = norm_scale(p, (threadgroup const float*)o, lane);
    for (uint i = tid; i < p.d_v; i += n_sg * SIMD) out[begin + i] = o[i] * scale * o_gate[i];
}

#define SSM_STEP(d_k) KERNEL("ssm_step_" #d_k, ssm_step<float4, d_k>)
SSM_CLASSES(SSM_STEP)
