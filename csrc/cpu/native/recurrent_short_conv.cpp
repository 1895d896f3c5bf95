// Native kernel of LFM2's short convolution. kernels/short_conv.metal describes it, and what slots hold.
#include "shapes.h"
#include "cpu/native/register.h"

namespace zinc {
namespace {

// Channels from one on, as many as V holds: a vector, or a float for the last ones.
template <class V>
struct ConvChannels {
    const float *b, *c, *x;  // of row 0
    float *state, *out;      // of slot 0, of row 0
    size_t n;
    uint32_t taps;
    V w[SHORT_CONV_TAPS], recent[SHORT_CONV_TAPS - 1];  // newest first

    ConvChannels(const NativeLaunch& l, const ShortConvParams& p, uint32_t channel)
        : b(l.buffer<const float>(3) + channel), c(b + p.n), x(c + p.n), state(l.buffer<float>(5) + channel),
          out(l.buffer<float>(6) + channel), n(p.n), taps(p.taps) {
        const float* taps_of = l.buffer<const float>(4) + size_t(channel) * taps;
        for (uint32_t i = 0; i < taps; i++) {
            float of[sizeof(V) / sizeof(float)];
            for (size_t j = 0; j < sizeof(V) / sizeof(float); j++) of[j] = taps_of[j * taps + taps - 1 - i];
            w[i] = load<V>(of);
        }
    }

    V input(uint32_t t) const { return load<V>(b + t * 3 * n) * load<V>(x + t * 3 * n); }
    void push(V input) {
        for (uint32_t i = taps - 2; i > 0; i--) recent[i] = recent[i - 1];
        recent[0] = input;
    }
    float* entry(uint32_t slot, uint32_t i) const { return state + (size_t(slot) * (taps - 1) + i) * n; }

    // Begins a run: its state is loaded, and the state at its end stored.
    void begin(const Row& run) {
        V before[SHORT_CONV_TAPS - 1] = {};
        for (uint32_t i = 0; i < taps - 1; i++) before[i] = run.pos ? load<V>(entry(run.slot, i)) : V{};
        std::memcpy(recent, before, sizeof before);
        const uint32_t n_rows = run.end - run.begin, kept = n_rows < taps - 1 ? n_rows : taps - 1;
        for (uint32_t t = run.end - kept; t < run.end; t++) push(input(t));
        for (uint32_t i = 0; i < taps - 1; i++) store(entry(run.slot_out, i), recent[i]);
        std::memcpy(recent, before, sizeof before);
    }

    void convolve(uint32_t t) {
        const V now = input(t);
        V sum = w[0] * now;
        for (uint32_t i = 1; i < taps; i++) sum += w[i] * recent[i - 1];
        store(out + t * n, load<V>(c + t * 3 * n) * sum);
        push(now);
    }

    void rows(const Row* all, uint32_t first, uint32_t end) {
        for (uint32_t t = first; t < end; t++) {
            if (t == all[t].begin)
                begin(all[t]);
            else if (t == first)
                for (uint32_t i = 0; i < taps - 1; i++) recent[i] = input(t - 1 - i);
            convolve(t);
        }
    }
};

// The first row from t on of the tile from row t on: the tile of a run's first row has all that read its slot.
uint32_t tile_begin(const Row* rows, uint32_t t, uint32_t n_tokens, uint32_t taps) {
    if (t >= n_tokens) return n_tokens;
    const uint32_t begin = rows[t].begin, after = begin + taps - 1 < rows[t].end ? begin + taps - 1 : rows[t].end;
    return begin < t && after > t ? after : t;
}

void short_conv(const NativeLaunch& l, uint64_t first, uint64_t end) {
    const auto& p = l.as<ShortConvParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    const Row* rows = l.buffer<const Row>(2);
    const uint32_t n_tiles = (n_tokens + SHORT_CONV_TOKENS - 1) / SHORT_CONV_TOKENS;
    for_lines(l, first, end, [&](Line line) {
        const Range tiles = piece(n_tiles, line.y, l.grid[1]), channels = pieces(p.n, line.begin, line.end, l.grid[0]);
        const uint32_t from = tile_begin(rows, tiles.begin * SHORT_CONV_TOKENS, n_tokens, p.taps);
        const uint32_t to = tile_begin(rows, tiles.end * SHORT_CONV_TOKENS, n_tokens, p.taps);
        uint32_t i = channels.begin;
        for (; i + W <= channels.end; i += W) ConvChannels<vf>(l, p, i).rows(rows, from, to);
        for (; i < channels.end; i++) ConvChannels<float>(l, p, i).rows(rows, from, to);
    });
}

}  // namespace

NATIVE_TABLE(recurrent_short_conv) = {{"short_conv", short_conv, 1}, {}};

}  // namespace zinc
