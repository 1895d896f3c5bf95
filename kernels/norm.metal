#include "reduce.h"

// out = x / sqrt(mean(x^2) + eps) * weight, one threadgroup per row. Neighbouring threads read neighbouring floats, so
// that any row length and any 4-byte alignment (weights lie where the file puts them) costs no extra transactions.
template <class T>
kernel void rms_norm(constant NormParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const T* x [[buffer(2)]], device const T* weight [[buffer(3)]], device T* out [[buffer(4)]],
                     GRID_IDS) {
    TG_ARRAY(float, scratch, SIMD);
    if (tg.x >= step->n_tokens) return;
    const ulong row = ulong(tg.x) * p.n;
    const uint n_threads = n_sg * SIMD;

    float squares = 0.0f;
    for (uint i = tid; i < p.n; i += n_threads) {
        const float v = x[row + i];
        squares += v * v;
    }
    const float total = threadgroup_sum(squares, scratch, sg, lane, n_sg);
    const float scale = precise::rsqrt(total / float(p.n) + p.eps);

    for (uint i = tid; i < p.n; i += n_threads) out[row + i] = x[row + i] * scale * weight[i];
}

KERNEL("rms_norm", rms_norm<float>)
