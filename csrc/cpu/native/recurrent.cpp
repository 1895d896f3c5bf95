// Native kernels of the gated delta rule with its convolution and norm. kernels/ssm.metal describes each kernel.
#include "cpu/native/recurrent.h"

namespace zinc {
namespace {

// ---- gates --------------------------------------------------------------------------------------------------------

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// The head of q and k that a v head uses.
uint32_t k_head_of(const SsmParams& p, uint32_t v_head) { return v_head / p.repeat % p.n_k_head; }

// Several v heads share a k head: the first of them stores its inputs.
bool owns_k_head(const SsmParams& p, uint32_t v_head) {
    return v_head % p.repeat == 0 && v_head / p.repeat < p.n_k_head;
}

// Decay and learning rate of one head for W tokens at a time.
struct Gates {
    const float *alpha, *beta;  // of the head, at row 0
    uint32_t stride;
    float a, dt_bias;
    float decays[W], rates[W];

    // The arrays are of all heads.
    Gates(const SsmParams& p, uint32_t head, const float* alphas, const float* betas, const float* as,
          const float* dt_biases)
        : stride(p.n_v_head / p.repeat * p.gate_step), a(as[head]), dt_bias(dt_biases[head]) {
        const uint32_t at = head / p.repeat * p.gate_step + head % p.repeat;
        alpha = alphas + at;
        beta = betas + at;
    }

    // Of rows [t, min(t + W, end)).
    void compute(uint32_t t, uint32_t end) {
        vf x{}, y{};
        for (uint32_t i = 0; i < W && t + i < end; i++) {
            x[i] = alpha[size_t(t + i) * stride];
            y[i] = beta[size_t(t + i) * stride];
        }
        store(decays, exp(a * softplus(x + dt_bias)));
        store(rates, sigmoid(y));
    }
};

// ---- convolution --------------------------------------------------------------------------------------------------

uint32_t n_channels(const SsmParams& p) { return 2 * p.n_k_head * p.d_k + p.n_v_head * p.d_v; }

// The factor that scales a head of q or k to length 1. q is also divided by sqrt(d_k).
float qk_scale(const SsmParams& p, float squares, bool is_q) {
    const float length = std::sqrt(squares + p.l2_eps);
    return 1.0f / (is_q ? length * std::sqrt(float(p.d_k)) : length);
}

// The first channel of a head of q, k or v, in the order of the channels.
size_t head_begin(const SsmParams& p, uint32_t head) {
    const uint32_t n_qk = 2 * p.n_k_head;
    return head < n_qk ? size_t(head) * p.d_k : size_t(n_qk) * p.d_k + size_t(head - n_qk) * p.d_v;
}

// The inputs of channels from `first` on.
ConvInputs inputs_of(const SsmParams& p, const float* qkv, float* rings, size_t first) {
    const size_t channels = n_channels(p);
    return {p.d_conv, channels, channels, qkv + first, rings + first};
}

// The convolution of a head of q, k or v.
Convolution convolution_of(const SsmParams& p, const float* qkv, const float* conv_w, float* rings, uint32_t head) {
    const size_t first = head_begin(p, head);
    return {inputs_of(p, qkv, rings, first), conv_w + first * p.d_conv, head < 2 * p.n_k_head ? p.d_k : p.d_v};
}

void ssm_conv1d(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SsmParams>();
    const uint32_t n = l.buffer<const Step>(1)->n_tokens;
    const Row* rows = l.buffer<const Row>(2);
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t head = uint32_t(i % l.grid[0]);
        const Range groups = piece((n + CONV_TOKENS - 1) / CONV_TOKENS, i / l.grid[0], l.grid[1]);
        if (groups.begin == groups.end) continue;
        const uint32_t last = groups.end * CONV_TOKENS < n ? groups.end * CONV_TOKENS : n;
        const Convolution conv =
            convolution_of(p, l.buffer<const float>(3), l.buffer<const float>(4), l.buffer<float>(5), head);
        for (uint32_t t = groups.begin * CONV_TOKENS; t < last; t++) {
            float* out = l.buffer<float>(6) + (conv.inputs.row(t) - l.buffer<const float>(3));
            conv.silu_conv(rows[t], t, nullptr, out);
            if (head >= 2 * p.n_k_head) continue;
            const float scale = qk_scale(p, dot(out, out, p.d_k), head < p.n_k_head);
            for (uint32_t c = 0; c < p.d_k; c += W) store(out + c, load<vf>(out + c) * scale);
        }
    }
}

// ---- the delta rule -----------------------------------------------------------------------------------------------

constexpr uint32_t COLUMNS = 4;  // of S, worked on together: they share the loads of q and k

struct Token {
    const float *q, *k;
    float kq;  // k·q
    float decay, rate;
};

// The rule for one token on COLUMNS columns of S, each [d_k]: S *= decay; d = (v - S^T k) rate; S += k d^T; o = S^T q.
// Both products are taken of the old S in one pass. The new S^T q is the old S^T q plus d (k·q).
INLINE void update_columns(float* s, uint32_t d_k, const Token& token, const float* v, float* o) {
    vf sk[COLUMNS] = {}, sq[COLUMNS] = {};
    for (uint32_t i = 0; i < d_k; i += W) {
        const vf q = load<vf>(token.q + i), k = load<vf>(token.k + i);
        UNROLL for (uint32_t c = 0; c < COLUMNS; c++) {
            const vf column = load<vf>(s + c * d_k + i);
            sk[c] += column * k;
            sq[c] += column * q;
        }
    }
    const f32x4 d = (load<f32x4>(v) - sums_of_lanes(sk) * token.decay) * token.rate;
    store(o, sums_of_lanes(sq) * token.decay + d * token.kq);
    for (uint32_t i = 0; i < d_k; i += W) {
        const vf k = load<vf>(token.k + i);
        UNROLL for (uint32_t c = 0; c < COLUMNS; c++)
            store(s + c * d_k + i, load<vf>(s + c * d_k + i) * token.decay + k * d[c]);
    }
}

// Rows [begin, end) of a run on n columns of a head. q, v and o are of row `begin`. Not inlined: the loop needs all
// registers.
__attribute__((noinline)) void delta_rows(const SsmParams& p, Gates& gates, uint32_t begin, uint32_t end,
                                          const float* q, const float* v, uint32_t n, float* o, float* state) {
    const size_t channels = n_channels(p), d_inner = size_t(p.n_v_head) * p.d_v, to_k = size_t(p.n_k_head) * p.d_k;
    const uint32_t d_k = p.d_k;
    for (uint32_t t = 0; t < end - begin; t++, q += channels, v += channels, o += d_inner) {
        if (t % W == 0) gates.compute(begin + t, end);
        const float* k = q + to_k;
        if (begin + t + PREFETCH_TOKENS < end) {
            prefetch(q + PREFETCH_TOKENS * channels, d_k);
            prefetch(k + PREFETCH_TOKENS * channels, d_k);
            prefetch(v + PREFETCH_TOKENS * channels, n);
            prefetch(o + PREFETCH_TOKENS * d_inner, n);
        }
        const Token token{q, k, dot(k, q, d_k), gates.decays[t % W], gates.rates[t % W]};
        for (uint32_t c = 0; c < n; c += COLUMNS) update_columns(state + c * d_k, d_k, token, v + c, o + c);
    }
}

// Columns [columns.begin, columns.end) COLUMNS of a head, in one run.
void delta_run(const NativeLaunch& l, const SsmParams& p, const Row& run, uint32_t head, Range columns) {
    const size_t channels = n_channels(p), d_inner = size_t(p.n_v_head) * p.d_v;
    const uint32_t first = columns.begin * COLUMNS, n = (columns.end - columns.begin) * COLUMNS;
    float* state = begin_state(l.buffer<float>(10), run, d_inner, size_t(head) * p.d_v + first, n, p.d_k);
    const float* q = l.buffer<const float>(4) + run.begin * channels + size_t(k_head_of(p, head)) * p.d_k;
    const float* v = l.buffer<const float>(4) + run.begin * channels + head_begin(p, 2 * p.n_k_head + head) + first;
    float* o = l.buffer<float>(11) + run.begin * d_inner + size_t(head) * p.d_v + first;
    Gates gates(p, head, l.buffer<const float>(5), l.buffer<const float>(6), l.buffer<const float>(7),
                l.buffer<const float>(8));
    delta_rows(p, gates, run.begin, run.end, q, v, n, o, state);
}

// Piece x of `pieces` of a head's inputs.
void store_inputs(const NativeLaunch& l, const SsmParams& p, const Row& run, uint32_t head, uint32_t x,
                  uint32_t pieces) {
    const auto store_head = [&](uint32_t conv_head, uint32_t dim) {
        const Range range = piece(dim, x, pieces);
        const size_t first = head_begin(p, conv_head) + range.begin;
        inputs_of(p, l.buffer<const float>(3), l.buffer<float>(9), first).keep_run(run, range.end - range.begin);
    };
    store_head(2 * p.n_k_head + head, p.d_v);
    if (!owns_k_head(p, head)) return;
    store_head(k_head_of(p, head), p.d_k);
    store_head(p.n_k_head + k_head_of(p, head), p.d_k);
}

// Work is numbered with z fastest, so that neighbours are equally long.
void ssm_delta(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SsmParams>();
    const Step step = *l.buffer<const Step>(1);
    const Row* rows = l.buffer<const Row>(2);
    const uint32_t width = l.grid[0], n_z = l.grid[2];
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t z = uint32_t(i % n_z), x = uint32_t(i / n_z % width), head = uint32_t(i / n_z / width);
        for_runs(step, rows, z, n_z, [&](const Row& row) {
            delta_run(l, p, row, head, piece(p.d_v / COLUMNS, x, width));
            store_inputs(l, p, row, head, x, width);
        });
    }
}

// ---- the gated norm -----------------------------------------------------------------------------------------------

// out = RMSNorm(o) * weight * silu(z) of one head.
INLINE void gated_norm(const SsmParams& p, const float* o, const float* z, const float* weight, float* out) {
    const float scale = 1.0f / std::sqrt(dot(o, o, p.d_v) / float(p.d_v) + p.norm_eps);
    for (uint32_t i = 0; i < p.d_v; i += W)
        store(out + i, load<vf>(o + i) * scale * load<vf>(weight + i) * silu(load<vf>(z + i)));
}

void ssm_norm(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SsmParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    for (uint64_t i = begin; i < end && i / l.grid[0] < n_tokens; i++) {
        const Range heads = piece(p.n_v_head, i % l.grid[0], l.grid[0]);
        for (uint32_t head = heads.begin; head < heads.end; head++) {
            const size_t at = (i / l.grid[0] * p.n_v_head + head) * p.d_v;
            gated_norm(p, l.buffer<const float>(2) + at, l.buffer<const float>(3) + at, l.buffer<const float>(4),
                       l.buffer<float>(5) + at);
        }
    }
}

// ---- the inputs of older files ------------------------------------------------------------------------------------

void ssm_ungroup(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SsmParams>();
    const size_t channels = n_channels(p), d_inner = size_t(p.n_v_head) * p.d_v, d_values = d_inner / p.n_k_head;
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    for (uint64_t i = begin; i < end && i / l.grid[0] < n_tokens; i++) {
        const size_t t = i / l.grid[0];
        const Range heads = piece(p.n_k_head, i % l.grid[0], l.grid[0]);
        float *q = l.buffer<float>(3) + t * channels, *k = q + size_t(p.n_k_head) * p.d_k;
        float *v = k + size_t(p.n_k_head) * p.d_k, *z = l.buffer<float>(4) + t * d_inner;
        for (size_t head = heads.begin; head < heads.end; head++) {
            const float* x = l.buffer<const float>(2) + (t * p.n_k_head + head) * 2 * (p.d_k + d_values);
            std::memcpy(q + head * p.d_k, x, p.d_k * sizeof(float));
            std::memcpy(k + head * p.d_k, x + p.d_k, p.d_k * sizeof(float));
            std::memcpy(v + head * d_values, x + 2 * p.d_k, d_values * sizeof(float));
            std::memcpy(z + head * d_values, x + 2 * p.d_k + d_values, d_values * sizeof(float));
        }
    }
}

// ---- runs of one row, all in one ----------------------------------------------------------------------------------

void step_head(const NativeLaunch& l, const SsmParams& p, const Row& row, uint32_t t, uint32_t head) {
    float q[SSM_MAX_HEAD], k[SSM_MAX_HEAD], v[SSM_MAX_HEAD], o[SSM_MAX_HEAD];
    const uint32_t k_head = k_head_of(p, head);
    // In place, no v head reads the entry that is stored.
    const auto convolve = [&](uint32_t conv_head, float* out, bool is_owner) {
        const Convolution conv =
            convolution_of(p, l.buffer<const float>(3), l.buffer<const float>(7), l.buffer<float>(11), conv_head);
        conv.silu_conv(row, t, nullptr, out);
        if (is_owner) conv.inputs.keep(row, t, conv.n);
    };
    convolve(k_head, q, owns_k_head(p, head));
    convolve(p.n_k_head + k_head, k, owns_k_head(p, head));
    convolve(2 * p.n_k_head + head, v, true);
    const float q_scale = qk_scale(p, dot(q, q, p.d_k), true), k_scale = qk_scale(p, dot(k, k, p.d_k), false);
    for (uint32_t i = 0; i < p.d_k; i += W) {
        store(q + i, load<vf>(q + i) * q_scale);
        store(k + i, load<vf>(k + i) * k_scale);
    }

    Gates gates(p, head, l.buffer<const float>(5), l.buffer<const float>(6), l.buffer<const float>(8),
                l.buffer<const float>(9));
    gates.compute(t, t + 1);
    const Token token{q, k, dot(k, q, p.d_k), gates.decays[0], gates.rates[0]};
    const size_t first = size_t(head) * p.d_v;
    float* state = begin_state(l.buffer<float>(12), row, size_t(p.n_v_head) * p.d_v, first, p.d_v, p.d_k);
    for (uint32_t c = 0; c < p.d_v; c += COLUMNS) update_columns(state + c * p.d_k, p.d_k, token, v + c, o + c);
    const size_t at = (size_t(t) * p.n_v_head + head) * p.d_v;
    gated_norm(p, o, l.buffer<const float>(4) + at, l.buffer<const float>(10), l.buffer<float>(13) + at);
}

void ssm_step(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SsmParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    for (uint64_t i = begin; i < end && i / l.grid[0] < n_tokens; i++) {
        const uint32_t t = uint32_t(i / l.grid[0]);
        step_head(l, p, l.buffer<const Row>(2)[t], t, uint32_t(i % l.grid[0]));
    }
}

}  // namespace

// One native kernel serves every class of d_k.
#define SSM(d_k) {"ssm_delta_" #d_k, ssm_delta, 1}, {"ssm_step_" #d_k, ssm_step, 1},

NATIVE_TABLE(recurrent) = {
    SSM_CLASSES(SSM){"ssm_conv1d", ssm_conv1d, 1}, {"ssm_norm", ssm_norm, 1}, {"ssm_ungroup", ssm_ungroup, 1}, {}};

}  // namespace zinc
