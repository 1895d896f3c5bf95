// Shared by the kernels of a mixture of experts.
#pragma once

#include "matmul_epilogue.h"
#include "params.h"

// The id comes from a kernel and may be any number: the clamp keeps reads inside the tensors.
template <class P>
METAL_FUNC uint expert_of(constant P& p, int id) {
    return min(uint(id), p.n_expert - 1);
}

// Bytes from the first expert's matrix to another's.
template <class P>
METAL_FUNC ulong expert_offset(constant P& p, int id) {
    return ulong(expert_of(p, id)) * p.expert_bytes;
}

// Stores the products of one expert's matrix, after its bias and activation.
struct ExpertOut {
    static constant constexpr uint MATRICES = 1;
    device float* out;
    device const float* bias;  // of the expert
    uint kind, has_bias;

    METAL_FUNC void put(Place p, float a, float) const {
        const float x = has_bias != 0 ? a + bias[p.row] : a;
        out[p.at] = kind == EXPERT_RELU2 ? relu2(x) : x;
    }
};

// Stores the gated products of one expert's two matrices, after their biases.
struct ExpertGated {
    static constant constexpr uint MATRICES = 2;
    device float* out;
    device const float* gate_bias;  // of the expert
    device const float* up_bias;
    uint kind, has_bias;

    METAL_FUNC void put(Place p, float a, float b) const {
        const float gate = has_bias != 0 ? a + gate_bias[p.row] : a, up = has_bias != 0 ? b + up_bias[p.row] : b;
        out[p.at] =
            kind == EXPERT_CLAMPED ? swiglu_clamped(gate, up) : (kind == EXPERT_GELU ? gelu(gate) : silu(gate)) * up;
    }
};

// The epilogues of an expert, by its id. The biases are those of all experts.
template <class P>
METAL_FUNC ExpertOut expert_out(constant P& p, int id, device float* out, device const float* bias) {
    return {out, bias + (p.has_bias != 0 ? ulong(expert_of(p, id)) * p.m : 0), p.kind, p.has_bias};
}
template <class P>
METAL_FUNC ExpertGated expert_gated(constant P& p, int id, device float* out, device const float* gate_bias,
                                    device const float* up_bias) {
    const ulong at = p.has_bias != 0 ? ulong(expert_of(p, id)) * p.m : 0;
    return {out, gate_bias + at, up_bias + at, p.kind, p.has_bias};
}
