#include "reduce.h"
#include "shapes.h"

// RMSNorm, one threadgroup per vector. Neighbouring threads read neighbouring floats. So any length and any 4-byte
// alignment (the file places the weights) costs no extra transactions.

// 1 / sqrt(mean(x^2) + eps) of a vector, from the squares that each thread has seen.
METAL_FUNC float rms_scale(constant NormParams& p, float squares, float eps, threadgroup float* scratch, uint sg,
                           uint lane, uint n_sg) {
    return precise::rsqrt(threadgroup_sum(squares, scratch, sg, lane, n_sg) / float(p.n) + eps);
}

template <class T>
METAL_FUNC float sum_of_squares(device const T* x, uint n, uint tid, uint n_threads) {
    float squares = 0.0f;
    for (uint i = tid; i < n; i += n_threads) {
        const float v = x[i];
        squares += v * v;
    }
    return squares;
}

// The first floats of a vector that fall to a thread: tid, tid + n_threads, ... They are loaded together before any is
// needed: a kernel this small takes as long as its loads that wait for each other.
struct Share {
    float of[NORM_KEPT];
};

template <class T>
METAL_FUNC Share keep(device const T* row, uint n, uint tid, uint n_threads) {
    Share share;
    UNROLL for (uint j = 0; j < NORM_KEPT; j++) {
        const uint i = tid + j * n_threads;
        share.of[j] = i < n ? row[i] : T(0);
    }
    return share;
}

METAL_FUNC float sum_of_squares(thread const Share& share) {
    float squares = 0.0f;
    UNROLL for (uint j = 0; j < NORM_KEPT; j++) squares += share.of[j] * share.of[j];
    return squares;
}

// sum = (residual + x * scale * weight) * out_scale; returns the sum of the squares that this thread wrote.
template <class T>
METAL_FUNC float add_scaled(constant NormParams& p, device const T* x, float scale, device const T* weight,
                            device const T* residual, device const T* out_scale, device T* sum, uint tid,
                            uint n_threads) {
    const float factor = p.scaled ? out_scale[0] : T(1);
    float squares = 0.0f;
    for (uint i = tid; i < p.n; i += n_threads) {
        const float v = (residual[i] + x[i] * scale * (p.weighted ? weight[i] : T(1))) * factor;
        sum[i] = v;
        squares += v * v;
    }
    return squares;
}

// out = x / sqrt(mean(x^2) + eps) * scale * weight
// Grid: T groups. Threads: NORM_THREADS.
template <class T>
kernel void rms_norm(constant NormParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const T* x [[buffer(2)]], device const T* weight [[buffer(3)]], device T* out [[buffer(4)]],
                     GRID_IDS) {
    TG_ARRAY(float, scratch, SIMD);
    if (tg.x >= step->n_tokens * p.groups) return;
    const ulong row = ulong(tg.x) * p.n;
    const uint n_threads = n_sg * SIMD;
    const uint n_kept = min(p.n, NORM_KEPT * n_threads);
    const Share xs = keep(x + row, p.n, tid, n_threads), weights = keep(weight, p.weighted ? p.n : 0, tid, n_threads);
    const float squares = sum_of_squares(xs) + sum_of_squares(x + row + n_kept, p.n - n_kept, tid, n_threads);
    const float scale = rms_scale(p, squares, p.eps, scratch, sg, lane, n_sg) * p.scale;
    UNROLL for (uint j = 0; j < NORM_KEPT; j++) {
        const uint i = tid + j * n_threads;
        if (i < p.n) out[row + i] = xs.of[j] * scale * (p.weighted ? weights.of[j] : 1.0f);
    }
    for (uint i = n_kept + tid; i < p.n; i += n_threads)
        out[row + i] = x[row + i] * scale * (p.weighted ? weight[i] : T(1));
}

// sum = (residual + rms_norm(x)) * out_scale
// Grid: T groups. Threads: NORM_THREADS.
template <class T>
kernel void rms_norm_add(constant NormParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                         device const T* x [[buffer(2)]], device const T* weight [[buffer(3)]],
                         device const T* residual [[buffer(4)]], device const T* out_scale [[buffer(5)]],
                         device T* sum [[buffer(6)]], GRID_IDS) {
    TG_ARRAY(float, scratch, SIMD);
    if (tg.x >= step->n_tokens * p.groups) return;
    const ulong row = ulong(tg.x) * p.n;
    const uint n_threads = n_sg * SIMD;
    const float squares = sum_of_squares(x + row, p.n, tid, n_threads);
    const float scale = rms_scale(p, squares, p.eps, scratch, sg, lane, n_sg) * p.scale;
    add_scaled(p, x + row, scale, weight, residual + row, out_scale, sum + row, tid, n_threads);
}

// sum = (residual + rms_norm(x)) * out_scale, out = rms_norm(sum) with another weight, and always with one
// Grid: T groups. Threads: NORM_THREADS.
template <class T>
kernel void rms_norm_add_norm(constant NormParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                              device const T* x [[buffer(2)]], device const T* weight [[buffer(3)]],
                              device const T* residual [[buffer(4)]], device const T* out_weight [[buffer(5)]],
                              device const T* out_scale [[buffer(6)]], device T* sum [[buffer(7)]],
                              device T* out [[buffer(8)]], GRID_IDS) {
    TG_ARRAY(float, scratch, 2 * SIMD);  // a half for each norm: slow threads read the first when others write again
    if (tg.x >= step->n_tokens * p.groups) return;
    const ulong row = ulong(tg.x) * p.n;
    const uint n_threads = n_sg * SIMD;
    float squares = sum_of_squares(x + row, p.n, tid, n_threads);
    float scale = rms_scale(p, squares, p.eps, scratch, sg, lane, n_sg) * p.scale;
    squares = add_scaled(p, x + row, scale, weight, residual + row, out_scale, sum + row, tid, n_threads);
    scale = rms_scale(p, squares, p.next_eps, scratch + SIMD, sg, lane, n_sg);
    // A thread reads what it wrote itself.
    for (uint i = tid; i < p.n; i += n_threads) out[row + i] = sum[row + i] * scale * out_weight[i];
}

KERNEL("rms_norm", rms_norm<float>)
KERNEL("rms_norm_add", rms_norm_add<float>)
KERNEL("rms_norm_add_norm", rms_norm_add_norm<float>)
