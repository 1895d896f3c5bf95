// Epilogues of the matrix kernels. An epilogue takes the products a and b of one row in each of MATRICES matrices with
// the same activations, and their place in the output. b counts if there are two matrices.
#pragma once

#include "common.h"

struct Place {
    uint token, row;
    ulong at;  // the element of the output
};

struct Store {
    static constant constexpr uint MATRICES = 1;
    device float* out;

    METAL_FUNC void put(Place p, float a, float) const { out[p.at] = a; }
};

// residual may be out itself: an element is read and written by one thread.
struct AddResidual {
    static constant constexpr uint MATRICES = 1;
    device const float* residual;
    uint stride;  // from one token's to the next
    device float* out;

    METAL_FUNC void put(Place p, float a, float) const { out[p.at] = residual[ulong(p.token) * stride + p.row] + a; }
};

// Multiplies the products of a token by the factor of the token.
struct AddScaled {
    static constant constexpr uint MATRICES = 1;
    AddResidual sum;
    device const float* scale;
    uint stride;  // from one token's to the next

    METAL_FUNC void put(Place p, float a, float) const { sum.put(p, scale[ulong(p.token) * stride] * a, 0.0f); }
};

template <class Activation>
struct Gated {
    static constant constexpr uint MATRICES = 2;
    device float* out;

    METAL_FUNC void put(Place p, float gate, float up) const { out[p.at] = Activation::apply(gate) * up; }
};

typedef Gated<Silu> SwiGlu;
typedef Gated<Gelu> GeGlu;

// The weights of one or two matrices of one shape. Work on n rows takes the first n / N rows from the first matrix and
// the same rows from the second. So one loop serves both, and gate and up share the loaded activations.
template <uint N>
struct Matrices {
    device const uchar* w[N];

    // Row i of the n rows; the first is row `first` of a matrix. Rows past the last row, m - 1, read the last row.
    METAL_FUNC device const uchar* row(uint i, uint n, uint first, uint m, uint row_bytes) const {
        const uint per_matrix = n / N;
        device const uchar* base = i < per_matrix ? w[0] : w[N - 1];
        return base + ulong(min(first + i % per_matrix, m - 1)) * row_bytes;
    }
};
