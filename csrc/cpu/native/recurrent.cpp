// Native kernels of the gated delta rule with its convolution and norm. kernels/ssm.metal describes each kernel. Head
// sizes are multiples of 32, so that vectors have no tails.
#include "shapes.h"
#include "cpu/native/register.h"

namespace zinc {
namespace {

INLINE float dot(const float* a, const float* b, uint32_t n) {
    vf sum{};
    for (uint32_t i = 0; i < n; i += W) sum += load<vf>(a + i) * load<vf>(b + i);
    return sum_lanes(sum);
}

// ---- gates --------------------------------------------------------------------------------------------------------

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). log1p(u) = 2 atanh(u / (2 + u)) by its series.
INLINE vf softplus(vf x) {
    const vf u = exp(x < 0 ? x : -x), s = u / (2.0f + u), z = s * s;
    vf series = z * (1.0f / 17) + 1.0f / 15;
    UNROLL for (int n = 13; n > 0; n -= 2) series = series * z + 1.0f / float(n);
    return (x > 0 ? x : vf{}) + 2.0f * s * series;
}

// Decay and learning rate of one head for W tokens at a time.
struct Gates {
    const float *alpha, *beta;  // of the head, at row 0
    uint32_t stride;
    float a, dt_bias;
    float decays[W], rates[W];

    // Rows [t, min(t + W, end)).
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

// One head's channels: their inputs, now and before, and their taps.
struct HeadInput {
    const SsmParams& p;
    const float* qkv;   // of the head, at row 0
    float* conv_state;  // of the head, in slot 0
    uint32_t channels, dim, pos;
    float taps[SSM_MAX_CONV][SSM_MAX_HEAD];  // taps[back]: for the input of `back` positions ago

    HeadInput(const SsmParams& params, const Step& step, const float* all_qkv, const float* conv_w, float* ring,
              uint32_t head)
        : p(params), channels(n_channels(p)), pos(step.pos) {
        const uint32_t n_qk = 2 * p.n_k_head;
        const size_t begin = head < n_qk ? size_t(head) * p.d_k : size_t(n_qk) * p.d_k + size_t(head - n_qk) * p.d_v;
        dim = head < n_qk ? p.d_k : p.d_v;
        qkv = all_qkv + begin;
        conv_state = ring + begin;
        for (uint32_t c = 0; c < dim; c++)
            for (uint32_t back = 0; back < p.d_conv; back++)
                taps[back][c] = conv_w[(begin + c) * p.d_conv + p.d_conv - 1 - back];
    }

    float* slot(uint32_t position) const { return conv_state + size_t(position % p.d_conv) * channels; }
    const float* row(uint32_t t) const { return qkv + size_t(t) * channels; }

    // out[dim] = silu of the convolution at row t.
    void silu_conv(uint32_t t, float* out) const {
        const float* x[SSM_MAX_CONV];
        uint32_t n = 0;  // taps that meet a position of the sequence
        for (; n < p.d_conv && n <= pos + t; n++) x[n] = n <= t ? row(t - n) : slot(pos + t - n);
        for (uint32_t c = 0; c < dim; c += W) {
            vf sum{};
            for (uint32_t back = 0; back < n; back++) sum += load<vf>(taps[back] + c) * load<vf>(x[back] + c);
            store(out + c, silu(sum));
        }
    }

    void keep(uint32_t t) const { std::memcpy(slot(pos + t), row(t), dim * sizeof(float)); }
};

// Tokens are divided in whole groups of SSM_MAX_CONV. Only the first piece looks back past the step, so only it has the
// ring.
void ssm_conv1d(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SsmParams>();
    const Step step = *l.buffer<const Step>(1);
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t head = uint32_t(i % l.grid[0]), y = uint32_t(i / l.grid[0]), n = step.n_tokens;
        const Range groups = piece((n + SSM_MAX_CONV - 1) / SSM_MAX_CONV, y, l.grid[1]);
        if (groups.begin == groups.end) continue;
        const uint32_t last = groups.end * SSM_MAX_CONV < n ? groups.end * SSM_MAX_CONV : n;
        const HeadInput input(p, step, l.buffer<const float>(2), l.buffer<const float>(3), l.buffer<float>(4), head);
        for (uint32_t t = groups.begin * SSM_MAX_CONV; t < last; t++) {
            float* out = l.buffer<float>(5) + (input.row(t) - l.buffer<const float>(2));
            input.silu_conv(t, out);
            if (head >= 2 * p.n_k_head) continue;
            const float scale = qk_scale(p, dot(out, out, p.d_k), head < p.n_k_head);
            for (uint32_t c = 0; c < p.d_k; c += W) store(out + c, load<vf>(out + c) * scale);
        }
        if (y > 0) continue;
        for (uint32_t t = n < p.d_conv ? 0 : n - p.d_conv; t < n; t++) input.keep(t);
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
// Both products are taken of the old S in one pass: the new S^T q is the old S^T q plus d (k·q).
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

constexpr uint32_t PREFETCH_TOKENS = 2;  // ahead: rows lie too far apart for the hardware to foresee

INLINE void prefetch(const float* x, uint32_t n) {
    for (uint32_t i = 0; i < n; i += 64 / sizeof(float)) __builtin_prefetch(x + i);
}

void ssm_delta(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SsmParams>();
    const Step step = *l.buffer<const Step>(1);
    if (step.n_tokens == 0) return;
    const size_t channels = n_channels(p), d_inner = size_t(p.n_v_head) * p.d_v;
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t head = uint32_t(i / l.grid[0]), k_head = head % p.n_k_head;
        const Range columns = piece(p.d_v / COLUMNS, i % l.grid[0], l.grid[0]);
        const uint32_t first = columns.begin * COLUMNS, n = (columns.end - columns.begin) * COLUMNS;
        float* state = l.buffer<float>(7) + (size_t(head) * p.d_v + first) * p.d_k;
        if (step.pos == 0) std::memset(state, 0, size_t(n) * p.d_k * sizeof(float));
        const float* q = l.buffer<const float>(2) + size_t(k_head) * p.d_k;
        const float* v = l.buffer<const float>(2) + 2 * size_t(p.n_k_head) * p.d_k + size_t(head) * p.d_v + first;
        float* o = l.buffer<float>(8) + size_t(head) * p.d_v + first;
        Gates gates{l.buffer<const float>(3) + head,
                    l.buffer<const float>(4) + head,
                    p.n_v_head,
                    l.buffer<const float>(5)[head],
                    l.buffer<const float>(6)[head],
                    {},
                    {}};
        for (uint32_t t = 0; t < step.n_tokens; t++, q += channels, v += channels, o += d_inner) {
            if (t % W == 0) gates.compute(t, step.n_tokens);
            const float* k = q + size_t(p.n_k_head) * p.d_k;
            if (t + PREFETCH_TOKENS < step.n_tokens) {
                prefetch(q + PREFETCH_TOKENS * channels, p.d_k);
                prefetch(k + PREFETCH_TOKENS * channels, p.d_k);
                prefetch(v + PREFETCH_TOKENS * channels, n);
                prefetch(o + PREFETCH_TOKENS * d_inner, n);
            }
            const Token token{q, k, dot(k, q, p.d_k), gates.decays[t % W], gates.rates[t % W]};
            for (uint32_t c = 0; c < n; c += COLUMNS) update_columns(state + c * p.d_k, p.d_k, token, v + c, o + c);
        }
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

// ---- one token, all in one ----------------------------------------------------------------------------------------

void step_head(const NativeLaunch& l, const SsmParams& p, const Step& step, uint32_t head) {
    float q[SSM_MAX_HEAD], k[SSM_MAX_HEAD], v[SSM_MAX_HEAD], o[SSM_MAX_HEAD];
    const uint32_t k_head = head % p.n_k_head;
    // Several v heads share a k head. The first of them stores its inputs, in a slot that no v head reads.
    const auto convolve = [&](uint32_t conv_head, float* out, bool is_owner) {
        const HeadInput input(p, step, l.buffer<const float>(2), l.buffer<const float>(6), l.buffer<float>(10),
                              conv_head);
        input.silu_conv(0, out);
        if (is_owner) input.keep(0);
    };
    convolve(k_head, q, head == k_head);
    convolve(p.n_k_head + k_head, k, head == k_head);
    convolve(2 * p.n_k_head + head, v, true);
    const float q_scale = qk_scale(p, dot(q, q, p.d_k), true), k_scale = qk_scale(p, dot(k, k, p.d_k), false);
    for (uint32_t i = 0; i < p.d_k; i += W) {
        store(q + i, load<vf>(q + i) * q_scale);
        store(k + i, load<vf>(k + i) * k_scale);
    }

    Gates gates{l.buffer<const float>(4) + head,
                l.buffer<const float>(5) + head,
                p.n_v_head,
                l.buffer<const float>(7)[head],
                l.buffer<const float>(8)[head],
                {},
                {}};
    gates.compute(0, 1);
    const Token token{q, k, dot(k, q, p.d_k), gates.decays[0], gates.rates[0]};
    float* state = l.buffer<float>(11) + size_t(head) * p.d_v * p.d_k;
    if (step.pos == 0) std::memset(state, 0, size_t(p.d_v) * p.d_k * sizeof(float));
    for (uint32_t c = 0; c < p.d_v; c += COLUMNS) update_columns(state + c * p.d_k, p.d_k, token, v + c, o + c);
    gated_norm(p, o, l.buffer<const float>(3) + size_t(head) * p.d_v, l.buffer<const float>(9),
               l.buffer<float>(12) + size_t(head) * p.d_v);
}

void ssm_step(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SsmParams>();
    const Step step = *l.buffer<const Step>(1);
    if (step.n_tokens == 0) return;
    for (uint64_t head = begin; head < end; head++) step_head(l, p, step, uint32_t(head));
}

}  // namespace

// One native kernel serves every class of d_k.
#define SSM(d_k) {"ssm_delta_" #d_k, ssm_delta, 1}, {"ssm_step_" #d_k, ssm_step, 1},

NATIVE_TABLE(recurrent) = {SSM_CLASSES(SSM){"ssm_conv1d", ssm_conv1d, 1}, {"ssm_norm", ssm_norm, 1}, {}};

}  // namespace zinc
