// RMSNorm of a vector.
#pragma once

#include <cmath>

#include "cpu/native/simd.h"

namespace zinc {
namespace {

// 1 / sqrt(mean(x^2) + eps)
INLINE float rms_scale(const float* x, uint32_t n, float eps) {
    vf squares{};
    uint32_t i = 0;
    for (; i + W <= n; i += W) squares += load<vf>(x + i) * load<vf>(x + i);
    float total = sum_lanes(squares);
    for (; i < n; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / float(n) + eps);
}

// out = x * scale, and * weight if there is one
INLINE void multiply(float* out, const float* x, float scale, const float* weight, uint32_t n) {
    if (weight)
        map_floats(n, out, x, weight, [scale](vf v, vf w) { return v * scale * w; });
    else
        map_floats(n, out, x, x, [scale](vf v, vf) { return v * scale; });
}

}  // namespace
}  // namespace zinc
