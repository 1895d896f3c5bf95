// Scalar and vector functions of MSL. Both the precise:: and the fast:: forms are exact here.
#pragma once

#include "vector.h"

namespace metal {

namespace detail {

// Applies a function to every component of vectors.
#define MSL_COMPONENTS(R, N, expression)                                                                               \
    vec<R, N> out;                                                                                                     \
    for (int i = 0; i < N; i++) out.data[i] = expression;                                                              \
    return out;

// Three operands. At least one of the first two is a vector, or only the third.
template <class A, class B, class C>
struct JoinTriple {
    using AB = std::conditional_t<Scalar<A> && Scalar<B>, Join<A, C>, Join<A, B>>;
    using type = std::conditional_t<std::is_void_v<AB>, void, Join<AB, C>>;
};
template <class A, class B, class C>
concept Operands3 =
    (Vectorial<A> || Vectorial<B> || Vectorial<C>) && !std::is_void_v<typename JoinTriple<A, B, C>::type>;

}  // namespace detail

// A function that C has too. CUDA and libc++ declare it for floats in the global namespace. There `using namespace
// metal` would make the two ambiguous, so metal's is C's function.
#if defined(__CUDACC__) || defined(_LIBCPP_VERSION)
#define MSL_C_FUNCTION(R, name, parameters, expression) using ::name;
#else
#define MSL_C_FUNCTION(R, name, parameters, expression)                                                                \
    METAL_FUNC R name parameters { return expression; }
#endif

#define MSL_C_UNARY(name, expression)                                                                                  \
    MSL_C_FUNCTION(float, name, (float x), expression)                                                                 \
    MSL_UNARY_FORMS(name)
#define MSL_UNARY(name, expression)                                                                                    \
    METAL_FUNC float name(float x) { return expression; }                                                              \
    MSL_UNARY_FORMS(name)
#ifdef __CUDACC__
#define MSL_CUDA_UNARY MSL_C_UNARY
#else
#define MSL_CUDA_UNARY MSL_UNARY
#endif
#define MSL_UNARY_FORMS(name)                                                                                          \
    template <class F>                                                                                                 \
    METAL_FUNC detail::SmallFloat<F> name(detail::SmallFloat<F> x) {                                                   \
        return detail::SmallFloat<F>(name(float(x)));                                                                  \
    }                                                                                                                  \
    template <class A>                                                                                                 \
        requires(detail::Vectorial<A> && is_floating_point_v<typename detail::Shape<A>::T>)                            \
    METAL_FUNC detail::VecOf<A> name(const A& a) {                                                                     \
        const detail::VecOf<A> v(a);                                                                                   \
        MSL_COMPONENTS(typename detail::Shape<A>::T, detail::Shape<A>::n, name(v.data[i]))                             \
    }

MSL_C_UNARY(exp, std::exp(x))
MSL_C_UNARY(exp2, std::exp2(x))
MSL_CUDA_UNARY(exp10, std::pow(10.0f, x))
MSL_C_UNARY(log, std::log(x))
MSL_C_UNARY(log2, std::log2(x))
MSL_C_UNARY(log10, std::log10(x))
MSL_C_UNARY(sqrt, std::sqrt(x))
MSL_CUDA_UNARY(rsqrt, 1.0f / std::sqrt(x))
MSL_C_UNARY(sin, std::sin(x))
MSL_C_UNARY(cos, std::cos(x))
MSL_C_UNARY(tan, std::tan(x))
MSL_C_UNARY(asin, std::asin(x))
MSL_C_UNARY(acos, std::acos(x))
MSL_C_UNARY(atan, std::atan(x))
MSL_C_UNARY(sinh, std::sinh(x))
MSL_C_UNARY(cosh, std::cosh(x))
MSL_C_UNARY(tanh, std::tanh(x))
MSL_C_UNARY(asinh, std::asinh(x))
MSL_C_UNARY(acosh, std::acosh(x))
MSL_C_UNARY(atanh, std::atanh(x))
MSL_C_UNARY(floor, std::floor(x))
MSL_C_UNARY(ceil, std::ceil(x))
MSL_C_UNARY(trunc, std::trunc(x))
MSL_C_UNARY(round, std::round(x))
MSL_C_UNARY(rint, std::rint(x))
MSL_C_UNARY(fabs, std::fabs(x))
MSL_UNARY(fract, std::fmin(x - std::floor(x), 0x1.fffffep-1f))
MSL_UNARY(saturate, x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f)
MSL_UNARY(sign, x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : (x == 0.0f ? x : 0.0f)))
#undef MSL_C_UNARY
#undef MSL_CUDA_UNARY
#undef MSL_UNARY
#undef MSL_UNARY_FORMS

#define MSL_C_BINARY(name, expression)                                                                                 \
    MSL_C_FUNCTION(float, name, (float x, float y), expression)                                                        \
    MSL_BINARY_FORMS(name)
#define MSL_BINARY(name, expression)                                                                                   \
    METAL_FUNC float name(float x, float y) { return expression; }                                                     \
    MSL_BINARY_FORMS(name)
#define MSL_BINARY_FORMS(name)                                                                                         \
    template <class F>                                                                                                 \
    METAL_FUNC detail::SmallFloat<F> name(detail::SmallFloat<F> x, detail::SmallFloat<F> y) {                          \
        return detail::SmallFloat<F>(name(float(x), float(y)));                                                        \
    }                                                                                                                  \
    template <class A, class B>                                                                                        \
        requires detail::Operands<A, B>                                                                                \
    METAL_FUNC detail::Join<A, B> name(const A& a, const B& b) {                                                       \
        using V = detail::Join<A, B>;                                                                                  \
        const V l(a), r(b);                                                                                            \
        MSL_COMPONENTS(typename detail::Shape<V>::T, detail::Shape<V>::n, name(l.data[i], r.data[i]))                  \
    }

MSL_C_BINARY(pow, std::pow(x, y))
MSL_BINARY(powr, std::pow(x, y))
MSL_C_BINARY(fmod, std::fmod(x, y))
MSL_C_BINARY(atan2, std::atan2(x, y))
MSL_C_BINARY(fmin, std::fmin(x, y))
MSL_C_BINARY(fmax, std::fmax(x, y))
MSL_C_BINARY(copysign, std::copysign(x, y))
MSL_BINARY(step, y < x ? 0.0f : 1.0f)
#undef MSL_C_BINARY
#undef MSL_BINARY
#undef MSL_BINARY_FORMS

// Functions of one type T throughout, for scalars of any arithmetic type and for vectors.
#define MSL_BINARY_T(name, expression)                                                                                 \
    template <class T>                                                                                                 \
        requires detail::Scalar<T>                                                                                     \
    METAL_FUNC T name(T x, T y) {                                                                                      \
        return T(expression);                                                                                          \
    }                                                                                                                  \
    template <class A, class B>                                                                                        \
        requires detail::Operands<A, B>                                                                                \
    METAL_FUNC detail::Join<A, B> name(const A& a, const B& b) {                                                       \
        using V = detail::Join<A, B>;                                                                                  \
        const V l(a), r(b);                                                                                            \
        MSL_COMPONENTS(typename detail::Shape<V>::T, detail::Shape<V>::n, name(l.data[i], r.data[i]))                  \
    }
MSL_BINARY_T(max, x < y ? y : x)
MSL_BINARY_T(min, y < x ? y : x)
#undef MSL_BINARY_T

#define MSL_TERNARY_T(name, expression)                                                                                \
    template <class T>                                                                                                 \
        requires detail::Scalar<T>                                                                                     \
    METAL_FUNC T name(T x, T y, T z) {                                                                                 \
        return T(expression);                                                                                          \
    }                                                                                                                  \
    template <class A, class B, class C>                                                                               \
        requires detail::Operands3<A, B, C>                                                                            \
    METAL_FUNC auto name(const A& a, const B& b, const C& c) {                                                         \
        using V = typename detail::JoinTriple<A, B, C>::type;                                                          \
        const V p(a), q(b), r(c);                                                                                      \
        MSL_COMPONENTS(typename detail::Shape<V>::T, detail::Shape<V>::n, name(p.data[i], q.data[i], r.data[i]))       \
    }
MSL_TERNARY_T(fma, std::fma(float(x), float(y), float(z)))
// Two bytes of a word, the lower or the upper two, each below the byte `over`: see kernels/common.h.
METAL_FUNC uint spread_bytes(uint word, bool upper, uint over) {
#ifdef __CUDACC__
    return __byte_perm(word, over, upper ? 0x4342 : 0x4140);
#else
    const uint two = upper ? word >> 16 : word;
    return (two & 0xFF) | (two << 8 & 0xFF0000) | over << 8 | over << 24;
#endif
}

#ifdef __CUDACC__
// Two at once, rounded once.
METAL_FUNC vec<half, 2> fma(const vec<half, 2>& a, const vec<half, 2>& b, const vec<half, 2>& c) {
    uint out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(out)
        : "r"(as_type<uint>(a)), "r"(as_type<uint>(b)), "r"(as_type<uint>(c)));
    return as_type<vec<half, 2>>(out);
}
#endif
MSL_TERNARY_T(mix, x + (y - x) * z)
MSL_TERNARY_T(clamp, min(max(x, y), z))
#undef MSL_TERNARY_T

template <class A>
    requires detail::Arithmetic<A>
METAL_FUNC auto abs(const A& a) {
    if constexpr (detail::Scalar<A>) {
        if constexpr (std::is_same_v<A, float>)
            return std::fabs(a);
        else if constexpr (std::is_unsigned_v<A>)
            return a;
        else
            return a < A(0) ? A(-a) : A(a);
    } else {
        const detail::VecOf<A> v(a);
        MSL_COMPONENTS(typename detail::Shape<A>::T, detail::Shape<A>::n, abs(v.data[i]))
    }
}

MSL_C_FUNCTION(float, ldexp, (float x, int e), std::ldexp(x, e))
METAL_FUNC float smoothstep(float low, float high, float x) {
    const float t = saturate((x - low) / (high - low));
    return t * t * (3.0f - 2.0f * t);
}

// Classification.
#define MSL_CLASSIFY(name)                                                                                             \
    MSL_C_FUNCTION(bool, name, (float x), std::name(x))                                                                \
    template <class F>                                                                                                 \
    METAL_FUNC bool name(detail::SmallFloat<F> x) {                                                                    \
        return std::name(float(x));                                                                                    \
    }                                                                                                                  \
    template <class A>                                                                                                 \
        requires detail::Vectorial<A>                                                                                  \
    METAL_FUNC vec<bool, detail::Shape<A>::n> name(const A& a) {                                                       \
        const detail::VecOf<A> v(a);                                                                                   \
        MSL_COMPONENTS(bool, detail::Shape<A>::n, name(v.data[i]))                                                     \
    }
MSL_CLASSIFY(isnan)
MSL_CLASSIFY(isinf)
MSL_CLASSIFY(isfinite)
MSL_CLASSIFY(signbit)
#undef MSL_CLASSIFY
#undef MSL_C_FUNCTION

METAL_FUNC bool all(bool a) { return a; }
METAL_FUNC bool any(bool a) { return a; }
template <int N>
METAL_FUNC bool all(const vec<bool, N>& v) {
    bool result = true;
    for (int i = 0; i < N; i++) result = result && v.data[i];
    return result;
}
template <int N>
METAL_FUNC bool any(const vec<bool, N>& v) {
    bool result = false;
    for (int i = 0; i < N; i++) result = result || v.data[i];
    return result;
}

// b where the condition holds, a elsewhere.
template <class T>
    requires detail::Scalar<T>
METAL_FUNC T select(T a, T b, bool condition) {
    return condition ? b : a;
}
template <class T, int N>
METAL_FUNC vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& condition) {
    MSL_COMPONENTS(T, N, condition.data[i] ? b.data[i] : a.data[i])
}

// Geometry.
template <class A, class B>
    requires detail::Operands<A, B>
METAL_FUNC auto dot(const A& a, const B& b) {
    using V = detail::Join<A, B>;
    const V l(a), r(b);
    typename detail::Shape<V>::T sum = l.data[0] * r.data[0];
    for (int i = 1; i < detail::Shape<V>::n; i++) sum += l.data[i] * r.data[i];
    return sum;
}
template <class A>
    requires detail::Vectorial<A>
METAL_FUNC auto length_squared(const A& a) {
    return dot(a, a);
}
template <class A>
    requires detail::Vectorial<A>
METAL_FUNC auto length(const A& a) {
    return sqrt(dot(a, a));
}
template <class A, class B>
    requires detail::Operands<A, B>
METAL_FUNC auto distance(const A& a, const B& b) {
    return length(a - b);
}
template <class A>
    requires detail::Vectorial<A>
METAL_FUNC detail::VecOf<A> normalize(const A& a) {
    return a * rsqrt(dot(a, a));
}
template <class T>
METAL_FUNC vec<T, 3> cross(const vec<T, 3>& a, const vec<T, 3>& b) {
    return vec<T, 3>(a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x);
}

// Integers.
#define MSL_INTEGER(name, expression)                                                                                  \
    template <class T>                                                                                                 \
        requires std::is_integral_v<T>                                                                                 \
    METAL_FUNC T name(T x) {                                                                                           \
        using U = std::make_unsigned_t<T>;                                                                             \
        constexpr int width = int(sizeof(T) * 8);                                                                      \
        return T(expression);                                                                                          \
    }                                                                                                                  \
    template <class A>                                                                                                 \
        requires detail::Vectorial<A>                                                                                  \
    METAL_FUNC detail::VecOf<A> name(const A& a) {                                                                     \
        const detail::VecOf<A> v(a);                                                                                   \
        MSL_COMPONENTS(typename detail::Shape<A>::T, detail::Shape<A>::n, name(v.data[i]))                             \
    }
#ifdef __CUDA_ARCH__
#define MSL_POPCOUNT(u) __popcll(u)
#define MSL_CLZ(u) __clzll((long long)(u))
#define MSL_CTZ(u) (__ffsll((long long)(u)) - 1)
#else
#define MSL_POPCOUNT(u) __builtin_popcountll(u)
#define MSL_CLZ(u) __builtin_clzll(u)
#define MSL_CTZ(u) __builtin_ctzll(u)
#endif
MSL_INTEGER(popcount, width == 0 ? 0 : MSL_POPCOUNT((unsigned long long)(U(x))))
MSL_INTEGER(clz, x == 0 ? width : MSL_CLZ((unsigned long long)(U(x))) - (64 - width))
MSL_INTEGER(ctz, x == 0 ? width : MSL_CTZ((unsigned long long)(U(x))))
#undef MSL_POPCOUNT
#undef MSL_CLZ
#undef MSL_CTZ
#undef MSL_INTEGER

template <class T>
    requires std::is_integral_v<T>
METAL_FUNC T rotate(T x, T by) {
    using U = std::make_unsigned_t<T>;
    constexpr uint width = sizeof(T) * 8;
    const uint left = uint(by) % width;
    return T(U(U(x) << left) | U(U(x) >> ((width - left) % width)));
}
METAL_FUNC int mulhi(int a, int b) { return int((long(a) * long(b)) >> 32); }
METAL_FUNC uint mulhi(uint a, uint b) { return uint((ulong(a) * ulong(b)) >> 32); }
// Bits [offset, offset + bits), sign-extended for signed types.
template <class T>
    requires std::is_integral_v<T>
METAL_FUNC T extract_bits(T x, uint offset, uint bits) {
    constexpr uint width = sizeof(T) * 8;
    if (bits == 0) return T(0);
    const auto top = std::make_unsigned_t<T>(std::make_unsigned_t<T>(x) << (width - offset - bits));
    return T(T(top) >> (width - bits));
}

#undef MSL_COMPONENTS

#define MSL_SAME_FUNCTIONS                                                                                             \
    using metal::acos, metal::asin, metal::atan, metal::atan2, metal::ceil, metal::clamp, metal::cos, metal::cosh;     \
    using metal::exp, metal::exp10, metal::exp2, metal::fabs, metal::floor, metal::fma, metal::fmax, metal::fmin;      \
    using metal::fmod, metal::fract, metal::log, metal::log10, metal::log2, metal::max, metal::min, metal::pow;        \
    using metal::powr, metal::rint, metal::round, metal::rsqrt, metal::saturate, metal::sin, metal::sinh;              \
    using metal::sqrt, metal::tan, metal::tanh, metal::trunc, metal::abs, metal::normalize, metal::length;
namespace precise {
MSL_SAME_FUNCTIONS
}
namespace fast {
MSL_SAME_FUNCTIONS
}
#undef MSL_SAME_FUNCTIONS

}  // namespace metal
