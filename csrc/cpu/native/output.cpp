// Native kernels that end a plan: the scale and cap of logits, and their arg max for greedy outputs.
#include "cpu/native/register.h"

namespace zinc {
namespace {

INLINE bool is_finite(float x) { return (bits_as<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// The largest of n values; NaN if one of them is not finite.
INLINE float largest(const float* x, uint32_t n) {
    vf top = splat(-HUGE_VALF);
    vi odd{};
    uint32_t i = 0;
    for (; i + W <= n; i += W) {
        const vf v = load<vf>(x + i);
        odd |= (bits_as<vi>(v) & 0x7f800000) == 0x7f800000;
        top = v > top ? v : top;
    }
    float best = -HUGE_VALF;
    bool finite = true;
    for (int lane = 0; lane < W; lane++) {
        best = top[lane] > best ? top[lane] : best;
        finite = finite && !odd[lane];
    }
    for (; i < n; i++) {
        best = x[i] > best ? x[i] : best;
        finite = finite && is_finite(x[i]);
    }
    return finite ? best : NAN;
}

// Scales and caps the logits in place. A logit that is not finite stays so.
void cap_logits(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<LogitParams>();
    for_lines(l, begin, end, [&](Line line) {
        if (line.y >= l.buffer<const Step>(1)->n_out) return;
        const Range columns = pieces(p.n, line.begin, line.end, l.grid[0]);
        float* row = l.buffer<float>(2) + size_t(line.y) * p.n + columns.begin;
        map_floats(columns.end - columns.begin, row, row, row, [&p](vf logit, vf) {
            const vf x = logit * p.scale;
            const vf capped = p.cap == 0 ? x : p.cap * (1.0f - 2.0f / (1.0f + exp(2.0f * x / p.cap)));  // tanh
            return (bits_as<vi>(logit) & 0x7f800000) == 0x7f800000 ? logit : capped;
        });
    });
}

void argmax_partial(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<ArgmaxParams>();
    for (uint64_t i = begin; i < end; i++) {  // an output's sections lie side by side
        const uint64_t out = i / l.grid[0];
        if (out >= l.buffer<const Step>(1)->n_out) return;
        const float* logits = l.buffer<const float>(2) + out * p.n;
        const Range part = piece(p.n, i % l.grid[0], l.grid[0]);
        const float best = largest(logits + part.begin, part.end - part.begin);
        uint32_t id = part.begin;
        while (is_finite(best) && logits[id] != best) id++;
        l.buffer<float>(3)[i] = best;
        l.buffer<int32_t>(4)[i] = part.begin < part.end ? int32_t(id) : -1;  // -1: no logits in this section
    }
}

// The id of the largest of n values, -1 if one is not finite. Sections without logits have the id -1.
INLINE int32_t best_of(const float* values, const int32_t* ids, uint32_t n) {
    float best = -HUGE_VALF;
    int32_t id = -1;
    for (uint32_t i = 0; i < n; i++) {
        if (ids[i] < 0) continue;
        if (!is_finite(values[i])) return -1;
        if (values[i] > best || (values[i] == best && ids[i] < id)) {
            best = values[i];
            id = ids[i];
        }
    }
    return id;
}

void argmax_final(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n_part = l.as<ArgmaxParams>().n_part;
    const Step& step = *l.buffer<const Step>(1);
    Choice* results = l.buffer<Choice>(5) + step.number % STEP_RING * MAX_OUT;
    for (uint64_t i = begin; i < end && i < step.n_out; i++) {
        const int32_t id =
            best_of(l.buffer<const float>(2) + i * n_part, l.buffer<const int32_t>(3) + i * n_part, n_part);
        l.buffer<int32_t>(4)[i] = id;
        results[i] = {id, id < 0 ? 1u : 0u, 0.0f, 0, 0};
    }
}

}  // namespace

NATIVE_TABLE(output) = {
    {"cap_logits", cap_logits, 1},
    {"argmax_partial", argmax_partial, 1},
    {"argmax_final", argmax_final, 1},
    {},
};

}  // namespace zinc
