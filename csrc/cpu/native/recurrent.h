// Shared pieces of recurrent layers: rings of a convolution's inputs, columns of a state, and runs. kernels/recurrent.h
// says what slots hold. Sizes of heads are multiples of 16, so that vectors have no tails.
#pragma once

#include "shapes.h"
#include "cpu/native/register.h"

namespace zinc {
namespace {

INLINE float dot(const float* a, const float* b, uint32_t n) {
    vf sum{};
    for (uint32_t i = 0; i < n; i += W) sum += load<vf>(a + i) * load<vf>(b + i);
    return sum_lanes(sum);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). log1p(u) = 2 atanh(u / (2 + u)) by its series.
INLINE vf softplus(vf x) {
    const vf u = exp(x < 0 ? x : -x), s = u / (2.0f + u), z = s * s;
    vf series = z * (1.0f / 17) + 1.0f / 15;
    UNROLL for (int n = 13; n > 0; n -= 2) series = series * z + 1.0f / float(n);
    return (x > 0 ? x : vf{}) + 2.0f * s * series;
}

// ---- convolution --------------------------------------------------------------------------------------------------

// Some channels of the inputs of all rows, and of the tokens before them.
struct ConvInputs {
    uint32_t d_conv;
    size_t channels;    // of an entry of a ring
    size_t stride;      // floats from one row to the next
    const float* rows;  // the first of the channels, at row 0
    float* rings;       // in entry 0 of slot 0

    float* entry(uint32_t slot, uint32_t position) const {
        return rings + (size_t(slot) * d_conv + position % d_conv) * channels;
    }
    const float* row(uint32_t t) const { return rows + size_t(t) * stride; }

    // `back` positions before that of row t, which is row `r`. back < d_conv and back <= r.pos.
    const float* before(const Row& r, uint32_t t, uint32_t back) const {
        return back <= t - r.begin ? row(t - back) : entry(r.slot, r.pos - back);
    }

    // Stores the newest inputs of a run, n channels, in the ring of slot_out: its own, and older ones if it moves.
    // Row t is the last of the run, and r its position.
    void keep(const Row& r, uint32_t t, uint32_t n) const {
        const uint32_t stored = r.slot == r.slot_out ? t - r.begin + 1 : r.pos + 1;
        for (uint32_t back = 0; back < stored && back < d_conv; back++)
            std::memcpy(entry(r.slot_out, r.pos - back), before(r, t, back), n * sizeof(float));
    }

    // The same for a whole run, which begins with row `run`.
    void keep_run(const Row& run, uint32_t n) const {
        Row last = run;
        last.pos += run.end - run.begin - 1;
        keep(last, run.end - 1, n);
    }
};

// Some channels, at most SSM_MAX_HEAD, with their taps.
struct Convolution {
    ConvInputs inputs;
    uint32_t n;
    float taps[SSM_MAX_CONV][SSM_MAX_HEAD];  // taps[back]: for the input of `back` positions ago

    // w: [n, d_conv] of these channels.
    Convolution(const ConvInputs& of, const float* w, uint32_t count) : inputs(of), n(count) {
        for (uint32_t c = 0; c < n; c++)
            for (uint32_t back = 0; back < of.d_conv; back++) taps[back][c] = w[c * of.d_conv + of.d_conv - 1 - back];
    }

    // out[n] = silu(bias + the convolution at row t, which is row `r`). bias: [n], or null for none.
    void silu_conv(const Row& r, uint32_t t, const float* bias, float* out) const {
        const float* x[SSM_MAX_CONV];
        uint32_t met = 0;  // taps that meet a position of the sequence
        for (; met < inputs.d_conv && met <= r.pos; met++) x[met] = inputs.before(r, t, met);
        for (uint32_t c = 0; c < n; c += W) {
            vf sum{};
            for (uint32_t back = 0; back < met; back++) sum += load<vf>(taps[back] + c) * load<vf>(x[back] + c);
            store(out + c, silu(bias ? sum + load<vf>(bias + c) : sum));
        }
    }
};

constexpr uint32_t CONV_TOKENS = 8;  // divided no further: each piece reads its channels' taps

// ---- states -------------------------------------------------------------------------------------------------------

// Columns [at, at + n) of the states of all heads, [n_slots, columns, d_k], in slot_out: made equal to what the run
// begins with.
INLINE float* begin_state(float* states, const Row& run, size_t columns, size_t at, uint32_t n, uint32_t d_k) {
    float* state = states + (run.slot_out * columns + at) * d_k;
    const size_t bytes = size_t(n) * d_k * sizeof(float);
    if (run.pos == 0)
        std::memset(state, 0, bytes);
    else if (run.slot != run.slot_out)
        std::memcpy(state, states + (run.slot * columns + at) * d_k, bytes);
    return state;
}

// Calls f(row) for the first row of each run that is dealt to z of n_z.
template <class F>
INLINE void for_runs(const Step& step, const Row* rows, uint32_t z, uint32_t n_z, F&& f) {
    uint32_t n_long = 0;
    for (uint32_t t = step.n_single; t < step.n_tokens; t = rows[t].end)
        if (n_long++ % n_z == z) f(rows[t]);
    for (uint32_t t = (step.n_single + z) % n_z; t < step.n_single; t += n_z) f(rows[t]);
}

constexpr uint32_t PREFETCH_TOKENS = 2;  // ahead: rows lie too far apart for the hardware to foresee

INLINE void prefetch(const float* x, uint32_t n) {
    for (uint32_t i = 0; i < n; i += 64 / sizeof(float)) __builtin_prefetch(x + i);
}

}  // namespace
}  // namespace zinc
