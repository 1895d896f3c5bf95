#include "shapes.h"
#include "sort_key.h"

// Element-wise work on rows of n floats. A threadgroup covers ELEMENTWISE_COLUMNS of one row in strides of its threads.
// This keeps several loads of a thread in flight for any n and any alignment of a row.
struct AddOp {
    static METAL_FUNC float apply(float a, float b) { return a + b; }
};

template <class Activation>
struct GatedOp {
    static METAL_FUNC float apply(float gate, float up) { return Activation::apply(gate) * up; }
};

struct ClampedOp {
    static METAL_FUNC float apply(float gate, float up) { return swiglu_clamped(gate, up); }
};

struct Relu2Op {
    static METAL_FUNC float apply(float x) { return relu2(x); }
};

// Grid: (ceil(n / ELEMENTWISE_COLUMNS), T). Threads: ELEMENTWISE_THREADS.
template <class Op>
kernel void unary(constant ElementwiseParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                  device const float* x [[buffer(2)]], device float* out [[buffer(3)]], GRID_IDS) {
    if (tg.y >= step->n_tokens) return;
    const ulong row = ulong(tg.y) * p.n;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i < p.n) out[row + i] = Op::apply(x[row + i]);
    }
}

// Grid: (ceil(n / ELEMENTWISE_COLUMNS), T). Threads: ELEMENTWISE_THREADS.
template <class Op>
kernel void binary(constant ElementwiseParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                   device const float* a [[buffer(2)]], device const float* b [[buffer(3)]],
                   device float* out [[buffer(4)]], GRID_IDS) {
    if (tg.y >= step->n_tokens) return;
    const ulong row = ulong(tg.y) * p.n;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i < p.n) out[row + i] = Op::apply(a[row + i], b[row + i]);
    }
}

// out = Op(a, a slice of b). b begins with the first row's slice.
// Grid: (ceil(n / ELEMENTWISE_COLUMNS), T). Threads: ELEMENTWISE_THREADS.
template <class Op>
kernel void with_slice(constant SliceParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device const float* a [[buffer(2)]], device const float* b [[buffer(3)]],
                       device float* out [[buffer(4)]], GRID_IDS) {
    if (tg.y >= step->n_tokens) return;
    const ulong row = ulong(tg.y) * p.n, other = ulong(tg.y) * p.stride;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i < p.n) out[row + i] = Op::apply(a[row + i], b[other + i]);
    }
}

// out = x * factor[0]
// Grid: (ceil(n / ELEMENTWISE_COLUMNS), T). Threads: ELEMENTWISE_THREADS.
template <class T>
kernel void scale(constant ElementwiseParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                  device const T* x [[buffer(2)]], device const T* factor [[buffer(3)]], device T* out [[buffer(4)]],
                  GRID_IDS) {
    if (tg.y >= step->n_tokens) return;
    const ulong row = ulong(tg.y) * p.n;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i < p.n) out[row + i] = x[row + i] * factor[0];
    }
}

// Scales and caps the logits in place. A logit that is not finite stays so: the end of a plan looks for these.
// Grid: (ceil(n / ELEMENTWISE_COLUMNS), O). Threads: ELEMENTWISE_THREADS.
template <class T>
kernel void cap_logits(constant LogitParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                       device T* logits [[buffer(2)]], GRID_IDS) {
    if (tg.y >= step->n_out) return;
    device T* row = logits + ulong(tg.y) * p.n;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i >= p.n || !is_finite_bits(row[i])) continue;
        const float x = row[i] * p.scale;
        row[i] = p.cap == 0.0f ? x : p.cap * precise::tanh(x / p.cap);
    }
}

// out[i] = x[out_rows[i]], for each output. O is the most outputs of the plan.
// Grid: (ceil(n / ELEMENTWISE_COLUMNS), O). Threads: ELEMENTWISE_THREADS.
template <class T>
kernel void take_rows(constant ElementwiseParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                      device const uint* out_rows [[buffer(2)]], device const T* x [[buffer(3)]],
                      device T* out [[buffer(4)]], GRID_IDS) {
    if (tg.y >= step->n_out) return;
    const ulong from = ulong(out_rows[tg.y]) * p.n, to = ulong(tg.y) * p.n;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i < p.n) out[to + i] = x[from + i];
    }
}

KERNEL("add", binary<AddOp>)
KERNEL("swiglu", binary<GatedOp<Silu>>)
KERNEL("geglu", binary<GatedOp<Gelu>>)
KERNEL("swiglu_clamped", binary<ClampedOp>)
KERNEL("relu2", unary<Relu2Op>)
KERNEL("geglu_slice", with_slice<GatedOp<Gelu>>)
KERNEL("scale", scale<float>)
KERNEL("cap_logits", cap_logits<float>)
KERNEL("take_rows", take_rows<float>)
