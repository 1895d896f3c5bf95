// What the lanes of a simdgroup may ask of each other, and where the elements of a matrix lie in them.
#pragma once

#include "functions.h"

namespace metal {
namespace detail {

struct Add {
    template <class T>
    static METAL_FUNC T apply(const T& a, const T& b) {
        return T(a + b);
    }
    template <class T>
    static METAL_FUNC T identity() {
        return T(0);
    }
};
struct Multiply {
    template <class T>
    static METAL_FUNC T apply(const T& a, const T& b) {
        return T(a * b);
    }
    template <class T>
    static METAL_FUNC T identity() {
        return T(1);
    }
};
struct Largest {
    template <class T>
    static METAL_FUNC T apply(const T& a, const T& b) {
        return metal::max(a, b);
    }
};
struct Smallest {
    template <class T>
    static METAL_FUNC T apply(const T& a, const T& b) {
        return metal::min(a, b);
    }
};
struct BitAnd {
    template <class T>
    static METAL_FUNC T apply(const T& a, const T& b) {
        return T(a & b);
    }
};
struct BitOr {
    template <class T>
    static METAL_FUNC T apply(const T& a, const T& b) {
        return T(a | b);
    }
};
struct BitXor {
    template <class T>
    static METAL_FUNC T apply(const T& a, const T& b) {
        return T(a ^ b);
    }
};

// Row and first column of a lane's two elements: quads tile the matrix as Apple's hardware has it.
METAL_FUNC constexpr uint matrix_row(uint lane) { return (lane >> 2 & 4) + (lane >> 1 & 3); }
METAL_FUNC constexpr uint matrix_col(uint lane) { return (lane >> 1 & 4) + (lane << 1 & 2); }

// What a lane brings to a matrix product.
template <class A, class B, class C>
struct Product {
    vec<A, 2> a;
    vec<B, 2> b;
    vec<C, 2> c;
};

}  // namespace detail
}  // namespace metal
