// What the kernels of experts do with their products: biases, then an activation or a gate.
#pragma once

#include "cpu/native/simd.h"
#include "params.h"

namespace zinc {
namespace {

constexpr uint32_t STORED_ROWS = 64;  // products that store_expert takes at a time, at most

// Writes n products of rows from `first` on of an expert, of one matrix or of gate and up, to out. bias(i) are the
// biases of matrix i of all experts.
template <int MATRICES, class P, class Bias>
INLINE void store_expert(const P& p, uint32_t expert, uint32_t first, uint32_t n, float* out, const float* y0,
                         const float* y1, Bias&& bias) {
    float sum[2][STORED_ROWS];
    const float* y[2] = {y0, y1};
    for (int i = 0; p.has_bias && i < MATRICES; i++) {
        map_floats(n, sum[i], y[i], bias(i) + size_t(expert) * p.m + first, [](vf a, vf b) { return a + b; });
        y[i] = sum[i];
    }
    if constexpr (MATRICES == 1) {
        if (p.kind == EXPERT_RELU2)
            map_floats(n, out, y[0], y[0], [](vf a, vf) { return relu2(a); });
        else
            std::memcpy(out, y[0], n * sizeof(float));
    } else if (p.kind == EXPERT_CLAMPED) {
        map_floats(n, out, y[0], y[1], [](vf gate, vf up) { return swiglu_clamped(gate, up); });
    } else if (p.kind == EXPERT_GELU) {
        map_floats(n, out, y[0], y[1], [](vf gate, vf up) { return gelu(gate) * up; });
    } else {
        map_floats(n, out, y[0], y[1], [](vf gate, vf up) { return silu(gate) * up; });
    }
}

}  // namespace
}  // namespace zinc
