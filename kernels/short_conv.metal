// The short convolution of LFM2: out = c * conv(b * x), a causal convolution of each channel over a few positions. A
// row of the step has 3 n inputs: b, then c, then x.
//
// A run begins with the state of its slot and leaves its state in slot_out. It moves if these differ. No run touches a
// slot that another run writes; several may begin with one slot. states is [n_slots, taps - 1, n]: entry i of a slot is
// b * x of i + 1 positions before the next one. Before position 0 that counts as zero, for any content of the memory.
#include "common.h"
#include "shapes.h"

// Inputs of the convolution of one channel, newest first. Those from taps - 1 on are zero.
struct Recent {
    float of[SHORT_CONV_TAPS - 1];

    METAL_FUNC void push(float x) {
        UNROLL for (uint i = SHORT_CONV_TAPS - 2; i > 0; i--) of[i] = of[i - 1];
        of[0] = x;
    }
};

// The bindings of short_conv, at the channel of a thread.
template <class T>
struct ConvChannel {
    device const T* b;  // of row 0; rows lie 3 n apart
    device const T* c;
    device const T* x;
    device T* state;  // of slot 0
    device T* out;
    uint n;
    uint taps;

    METAL_FUNC float input(uint t) {
        const ulong at = ulong(t) * 3 * n;
        return b[at] * x[at];
    }

    // The inputs before row t, all of which are rows of its run.
    METAL_FUNC Recent before(uint t) {
        Recent recent;
        UNROLL for (uint i = 0; i < SHORT_CONV_TAPS - 1; i++) recent.of[i] = i < taps - 1 ? input(t - 1 - i) : 0.0f;
        return recent;
    }

    METAL_FUNC Recent load(uint slot, bool is_first) {
        Recent recent;
        device const T* from = state + ulong(slot) * (taps - 1) * n;
        UNROLL for (uint i = 0; i < SHORT_CONV_TAPS - 1; i++) {
            recent.of[i] = is_first || i >= taps - 1 ? 0.0f : float(from[ulong(i) * n]);
        }
        return recent;
    }

    // Stores the state after the rows [begin, end) of a run, before which it was `recent`.
    METAL_FUNC void store(uint slot, Recent recent, uint begin, uint end) {
        for (uint t = max(begin, end - min(end, taps - 1)); t < end; t++) recent.push(input(t));
        device T* to = state + ulong(slot) * (taps - 1) * n;
        UNROLL for (uint i = 0; i < SHORT_CONV_TAPS - 1; i++) {
            if (i < taps - 1) to[ulong(i) * n] = recent.of[i];
        }
    }

    // Row t, after the inputs `recent`. w: the taps, newest first.
    METAL_FUNC void convolve(uint t, thread Recent& recent, thread const float* w) {
        const float now = input(t);
        float sum = w[0] * now;
        UNROLL for (uint i = 1; i < SHORT_CONV_TAPS; i++) sum += w[i] * recent.of[i - 1];
        out[ulong(t) * n] = c[ulong(t) * 3 * n] * sum;
        recent.push(now);
    }
};

// The first row from t on that the tile from row t on works on. The rows of a run that read its slot belong to the tile
// of its first row, which also writes slot_out: no other thread does either.
METAL_FUNC uint tile_begin(device const Row* rows, uint t, uint n_tokens, uint taps) {
    if (t >= n_tokens) return n_tokens;
    const uint begin = rows[t].begin;
    return begin < t ? max(t, min(rows[t].end, begin + taps - 1)) : t;
}

// A thread per channel and tile of rows.
// Grid: (ceil(n / SHORT_CONV_THREADS), ceil(T / SHORT_CONV_TOKENS)). Threads: SHORT_CONV_THREADS.
template <class T>
kernel void short_conv(constant ShortConvParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device const Row* rows [[buffer(2)]], device const T* bcx [[buffer(3)]],
                       device const T* conv_w [[buffer(4)]], device T* states [[buffer(5)]],
                       device T* out [[buffer(6)]], GRID_IDS) {
    static_assert(SHORT_CONV_TAPS <= SHORT_CONV_TOKENS + 1, "a run's first rows reach into one more tile at most");
    const uint channel = tg.x * SHORT_CONV_THREADS + tid;
    const uint n_tokens = step->n_tokens;
    if (channel >= p.n) return;
    const uint first = tile_begin(rows, tg.y * SHORT_CONV_TOKENS, n_tokens, p.taps);
    const uint end = tile_begin(rows, (tg.y + 1) * SHORT_CONV_TOKENS, n_tokens, p.taps);
    ConvChannel<T> of = {
        bcx + channel, bcx + p.n + channel, bcx + 2 * p.n + channel, states + channel, out + channel, p.n, p.taps};
    float w[SHORT_CONV_TAPS];
    device const T* last = conv_w + ulong(channel) * p.taps + (p.taps - 1);  // the last tap is for the row itself
    UNROLL for (uint i = 0; i < SHORT_CONV_TAPS; i++) w[i] = i < p.taps ? float(last[-int(i)]) : 0.0f;
    Recent recent;
    for (uint t = first; t < end; t++) {
        const uint begin = rows[t].begin;
        if (t == begin) {
            recent = of.load(rows[t].slot, rows[t].pos == 0);
            of.store(rows[t].slot_out, recent, begin, rows[t].end);
        } else if (t == first) {
            recent = of.before(t);
        }
        of.convolve(t, recent, w);
    }
}

KERNEL("short_conv", short_conv<float>)
