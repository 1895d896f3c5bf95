// The operations between the lanes of a simdgroup.
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

// A lane's operands in a matrix product.
template <class A, class B, class C>
struct Product {
    vec<A, 2> a;
    vec<B, 2> b;
    vec<C, 2> c;
};

}  // namespace detail
}  // namespace metal
