// Products of W with the RMSNorm of x, without a pass over x before: W norm(x) = (W (x g)) / sqrt(mean(x^2) + eps),
// where g is the norm's weight. Whoever multiplies all of x adds up its squares beside.
#pragma once

#include "quant_dot.h"
#include "shapes.h"

// x, or its norm with the weight `weight`. P has k columns; normed and eps say whether there is a norm, and which.
struct MaybeNormed {
    device const float* at;
    device const float* weight;
    bool normed;
    float eps;

    // The scale of the norm, from the sum of all squares.
    METAL_FUNC float scale(float squares, uint k) const { return precise::rsqrt(squares / float(k) + eps); }
};

template <class P>
METAL_FUNC MaybeNormed maybe_normed(constant P& p, device const float* x, device const float* weight) {
    return {x, weight, FOLDED_NORMS != 0 && p.normed != 0, p.eps};
}

// x g, and the sum of the squares of those that were read. The file aligns g to 8 bytes.
struct Weighted {
    device const float* at;
    device const float* weight;
    float squares;

    METAL_FUNC float4 weigh(float4 v, uint first, uint i) {
        device const float2* g = (device const float2*)(weight + first + i);
        squares += dot(v, v);
        return v * float4(g[0], g[1]);
    }

    METAL_FUNC float4 quad(uint first, uint i) { return weigh(Floats{at}.quad(first, i), first, i); }

    METAL_FUNC float one(uint i) {
        squares += at[i] * at[i];
        return at[i] * weight[i];
    }
};
