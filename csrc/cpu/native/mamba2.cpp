// Native kernels of Mamba2. kernels/mamba2.metal describes each kernel.
#include "cpu/native/recurrent.h"

namespace zinc {
namespace {

size_t d_inner(const Mamba2Params& p) { return size_t(p.n_head) * p.d_head; }
size_t n_channels(const Mamba2Params& p) { return d_inner(p) + size_t(2) * p.n_group * p.d_state; }
size_t row_width(const Mamba2Params& p) { return d_inner(p) + n_channels(p) + p.n_head; }

// The first channel of x, B and C of a head, and whether it is the first of its group, which stores B and C.
struct Head {
    size_t x, b, c;
    bool is_first;

    Head(const Mamba2Params& p, uint32_t head) {
        const uint32_t per_group = p.n_head / p.n_group;
        x = size_t(head) * p.d_head;
        b = d_inner(p) + size_t(head / per_group) * p.d_state;
        c = b + size_t(p.n_group) * p.d_state;
        is_first = head % per_group == 0;
    }
};

// The inputs of channels from `first` on. `inputs`: rows of the step.
ConvInputs inputs_of(const Mamba2Params& p, const float* inputs, float* rings, size_t first) {
    return {p.d_conv, n_channels(p), row_width(p), inputs + d_inner(p) + first, rings + first};
}

// Decay and dt of one head for W tokens at a time.
struct Pace {
    const float* raw;  // of the head, at row 0
    size_t stride;
    float a, dt_bias;
    float decays[W], dts[W];

    Pace(const Mamba2Params& p, uint32_t head, const float* inputs, const float* as, const float* dt_biases)
        : raw(inputs + d_inner(p) + n_channels(p) + head), stride(row_width(p)), a(as[head]), dt_bias(dt_biases[head]) {
    }

    // Of rows [t, min(t + W, end)).
    void compute(uint32_t t, uint32_t end) {
        vf x{};
        for (uint32_t i = 0; i < W && t + i < end; i++) x[i] = raw[size_t(t + i) * stride];
        const vf dt = softplus(x + dt_bias);
        store(dts, dt);
        store(decays, exp(dt * a));
    }
};

// ---- convolution --------------------------------------------------------------------------------------------------

constexpr uint32_t CONV_CHANNELS = 128;  // convolved together
static_assert(CONV_CHANNELS <= SSM_MAX_HEAD);

// Channels are 16 or more together, so that vectors have no tails.
void mamba2_conv1d(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<Mamba2Params>();
    const uint32_t n = l.buffer<const Step>(1)->n_tokens, channels = uint32_t(n_channels(p));
    const Row* rows = l.buffer<const Row>(2);
    for (uint64_t i = begin; i < end; i++) {
        const Range groups = piece((n + CONV_TOKENS - 1) / CONV_TOKENS, i / l.grid[0], l.grid[1]);
        if (groups.begin == groups.end) continue;
        const uint32_t last = groups.end * CONV_TOKENS < n ? groups.end * CONV_TOKENS : n;
        const Range blocks = piece((channels + CONV_CHANNELS - 1) / CONV_CHANNELS, i % l.grid[0], l.grid[0]);
        for (uint32_t block = blocks.begin; block < blocks.end; block++) {
            const uint32_t first = block * CONV_CHANNELS;
            const uint32_t count = channels - first < CONV_CHANNELS ? channels - first : CONV_CHANNELS;
            const ConvInputs inputs = inputs_of(p, l.buffer<const float>(3), l.buffer<float>(6), first);
            const Convolution conv(inputs, l.buffer<const float>(4) + size_t(first) * p.d_conv, count);
            for (uint32_t t = groups.begin * CONV_TOKENS; t < last; t++)
                conv.silu_conv(rows[t], t, l.buffer<const float>(5) + first,
                               l.buffer<float>(7) + size_t(t) * channels + first);
        }
    }
}

// ---- the recurrence -----------------------------------------------------------------------------------------------

constexpr uint32_t COLUMNS = 4;  // of a state, worked on together: they share the loads of B and C

struct Token {
    const float *b, *c;
    float decay, dt;
};

// One token on COLUMNS columns of a state, each [n]: s = s decay + dt x B; o = s·C + d x.
INLINE void update_columns(float* s, uint32_t n, const Token& token, const float* x, float d, float* o) {
    const f32x4 xs = load<f32x4>(x), taken = xs * token.dt;
    vf sums[COLUMNS] = {};
    for (uint32_t i = 0; i < n; i += W) {
        const vf b = load<vf>(token.b + i), c = load<vf>(token.c + i);
        UNROLL for (uint32_t j = 0; j < COLUMNS; j++) {
            const vf column = load<vf>(s + j * n + i) * token.decay + b * taken[j];
            store(s + j * n + i, column);
            sums[j] += column * c;
        }
    }
    store(o, sums_of_lanes(sums) + xs * d);
}

// Rows [begin, end) of a run on n columns of a head. b, c, x and o are of row `begin`. Not inlined: the loop needs all
// registers.
__attribute__((noinline)) void scan_rows(const Mamba2Params& p, Pace& pace, float d, uint32_t begin, uint32_t end,
                                         const float* b, const float* c, const float* x, uint32_t n, float* o,
                                         float* state) {
    const size_t channels = n_channels(p), width = d_inner(p);
    const uint32_t d_state = p.d_state;
    for (uint32_t t = 0; t < end - begin; t++, b += channels, c += channels, x += channels, o += width) {
        if (t % W == 0) pace.compute(begin + t, end);
        if (begin + t + PREFETCH_TOKENS < end) {
            prefetch(b + PREFETCH_TOKENS * channels, d_state);
            prefetch(c + PREFETCH_TOKENS * channels, d_state);
            prefetch(x + PREFETCH_TOKENS * channels, n);
            prefetch(o + PREFETCH_TOKENS * width, n);
        }
        const Token token{b, c, pace.decays[t % W], pace.dts[t % W]};
        for (uint32_t j = 0; j < n; j += COLUMNS) update_columns(state + j * d_state, d_state, token, x + j, d, o + j);
    }
}

// Columns [columns.begin, columns.end) COLUMNS of a head, in one run.
void scan_run(const NativeLaunch& l, const Mamba2Params& p, const Row& run, uint32_t head, Range columns) {
    const Head at(p, head);
    const uint32_t first = columns.begin * COLUMNS, n = (columns.end - columns.begin) * COLUMNS;
    float* state = begin_state(l.buffer<float>(9), run, d_inner(p), at.x + first, n, p.d_state);
    const float* xbc = l.buffer<const float>(4) + run.begin * n_channels(p);
    float* o = l.buffer<float>(10) + run.begin * d_inner(p) + at.x + first;
    Pace pace(p, head, l.buffer<const float>(3), l.buffer<const float>(5), l.buffer<const float>(7));
    scan_rows(p, pace, l.buffer<const float>(6)[head], run.begin, run.end, xbc + at.b, xbc + at.c, xbc + at.x + first,
              n, o, state);
}

// Piece x of `pieces` of a head's inputs.
void store_inputs(const NativeLaunch& l, const Mamba2Params& p, const Row& run, uint32_t head, uint32_t x,
                  uint32_t pieces) {
    const Head at(p, head);
    const auto keep = [&](size_t channel, uint32_t n) {
        const Range range = piece(n, x, pieces);
        inputs_of(p, l.buffer<const float>(3), l.buffer<float>(8), channel + range.begin)
            .keep_run(run, range.end - range.begin);
    };
    keep(at.x, p.d_head);
    if (!at.is_first) return;
    keep(at.b, p.d_state);
    keep(at.c, p.d_state);
}

// Work is numbered with z fastest, so that neighbours are equally long.
void mamba2_scan(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<Mamba2Params>();
    const Step step = *l.buffer<const Step>(1);
    const uint32_t width = l.grid[0], n_z = l.grid[2];
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t z = uint32_t(i % n_z), x = uint32_t(i / n_z % width), head = uint32_t(i / n_z / width);
        for_runs(step, l.buffer<const Row>(2), z, n_z, [&](const Row& row) {
            scan_run(l, p, row, head, piece(p.d_head / COLUMNS, x, width));
            store_inputs(l, p, row, head, x, width);
        });
    }
}

// ---- runs of one row ----------------------------------------------------------------------------------------------

void step_head(const NativeLaunch& l, const Mamba2Params& p, const Row& row, uint32_t t, uint32_t head) {
    float x[SSM_MAX_HEAD], b[SSM_MAX_HEAD], c[SSM_MAX_HEAD];
    const Head at(p, head);
    // In place, no head reads the entry that is stored.
    const auto convolve = [&](size_t first, uint32_t n, float* out, bool is_owner) {
        const Convolution conv(inputs_of(p, l.buffer<const float>(3), l.buffer<float>(9), first),
                               l.buffer<const float>(4) + first * p.d_conv, n);
        conv.silu_conv(row, t, l.buffer<const float>(5) + first, out);
        if (is_owner) conv.inputs.keep(row, t, n);
    };
    convolve(at.x, p.d_head, x, true);
    convolve(at.b, p.d_state, b, at.is_first);
    convolve(at.c, p.d_state, c, at.is_first);
    Pace pace(p, head, l.buffer<const float>(3), l.buffer<const float>(6), l.buffer<const float>(8));
    pace.compute(t, t + 1);
    const Token token{b, c, pace.decays[0], pace.dts[0]};
    const float d = l.buffer<const float>(7)[head];
    float* state = begin_state(l.buffer<float>(10), row, d_inner(p), at.x, p.d_head, p.d_state);
    float* o = l.buffer<float>(11) + t * d_inner(p) + at.x;
    for (uint32_t j = 0; j < p.d_head; j += COLUMNS)
        update_columns(state + j * p.d_state, p.d_state, token, x + j, d, o + j);
}

void mamba2_step(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<Mamba2Params>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    for (uint64_t i = begin; i < end && i / l.grid[0] < n_tokens; i++) {
        const uint32_t t = uint32_t(i / l.grid[0]);
        step_head(l, p, l.buffer<const Row>(2)[t], t, uint32_t(i % l.grid[0]));
    }
}

// ---- the norm of groups -------------------------------------------------------------------------------------------

void mamba2_norm(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<Mamba2Params>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens, n = uint32_t(d_inner(p) / p.n_group);
    for (uint64_t i = begin; i < end && i / p.n_group < n_tokens; i++) {
        const size_t t = i / p.n_group, first = i % p.n_group * size_t(n);
        const float* o = l.buffer<const float>(2) + t * d_inner(p) + first;
        const float* z = l.buffer<const float>(3) + t * row_width(p) + first;
        const float* weight = l.buffer<const float>(4) + first;
        float* out = l.buffer<float>(5) + t * d_inner(p) + first;
        for (uint32_t j = 0; j < n; j += W) store(out + j, load<vf>(o + j) * silu(load<vf>(z + j)));
        const float scale = 1.0f / std::sqrt(dot(out, out, n) / float(n) + p.norm_eps);
        for (uint32_t j = 0; j < n; j += W) store(out + j, load<vf>(out + j) * scale * load<vf>(weight + j));
    }
}

}  // namespace

// One native kernel serves every class of d_state.
#define MAMBA2(d_state) {"mamba2_scan_" #d_state, mamba2_scan, 1}, {"mamba2_step_" #d_state, mamba2_step, 1},

NATIVE_TABLE(mamba2) = {SSM_CLASSES(MAMBA2){"mamba2_conv1d", mamba2_conv1d, 1}, {"mamba2_norm", mamba2_norm, 1}, {}};

}  // namespace zinc
