#include "common.h"
#include "shapes.h"

// Element-wise work on rows of n floats. A threadgroup covers ELEMENTWISE_COLUMNS of one row in strides of its threads.
// This keeps several loads of a thread in flight for any n and any alignment of a row.
struct AddOp {
    static METAL_FUNC float apply(float a, float b) { return a + b; }
};

template <class Activation>
struct GatedOp {
    static METAL_FUNC float apply(float gate, float up) { return Activation::apply(gate) * up; }
};

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

// Grid: ceil(n / ELEMENTWISE_COLUMNS). Threads: ELEMENTWISE_THREADS.
template <class T>
kernel void take_last_row(constant ElementwiseParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                          device const T* x [[buffer(2)]], device T* out [[buffer(3)]], GRID_IDS) {
    if (step->n_tokens == 0) return;
    const ulong row = ulong(step->n_tokens - 1) * p.n;
    UNROLL for (uint j = 0; j < ELEMENTWISE_COLUMNS; j += ELEMENTWISE_THREADS) {
        const uint i = tg.x * ELEMENTWISE_COLUMNS + j + tid;
        if (i < p.n) out[i] = x[row + i];
    }
}

KERNEL("add", binary<AddOp>)
KERNEL("swiglu", binary<GatedOp<Silu>>)
KERNEL("geglu", binary<GatedOp<Gelu>>)
KERNEL("take_last_row", take_last_row<float>)
