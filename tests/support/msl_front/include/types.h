// The types of MSL, as Apple's compiler has them: vectors are clang's own, so that what may be mixed, converted and
// referred to is clang's answer. A vector by its parts, float4(a, b), is spelled make<float4>(a, b) by source.py.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.40282346638528859812e+38f
#define FLT_MAX MAXFLOAT
#define FLT_MIN 1.17549435082228750797e-38f
#define FLT_EPSILON 1.1920928955078125e-07f
#define HALF_MAX half(65504.0f)
#define MAXHALF HALF_MAX
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_LOG10E_F 0.43429448190325182765f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define assert(...) ((void)0)

constexpr half operator""h(long double x) { return half(x); }
constexpr bfloat operator"" bf(long double x) { return bfloat(x); }

namespace metal {

using ::bfloat;
using ::half;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::ptrdiff_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// M(scalar type) for the groups of types that functions are declared for.
#define MSL_SMALL_INTEGERS(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint)
#define MSL_INTEGERS(M) MSL_SMALL_INTEGERS(M) M(long) M(ulong)
#define MSL_FLOATS(M) M(half) M(float)

#define MSL_VECTOR_NAMES(T)                                                                                            \
    typedef vec<T, 2> T##2;                                                                                            \
    typedef vec<T, 3> T##3;                                                                                            \
    typedef vec<T, 4> T##4;
MSL_INTEGERS(MSL_VECTOR_NAMES)
MSL_FLOATS(MSL_VECTOR_NAMES)
MSL_VECTOR_NAMES(bool)
MSL_VECTOR_NAMES(bfloat)

// Objects in other address spaces become values of a thread.
#define MSL_COPIES(Class)                                                                                              \
    Class(thread const Class&) = default;                                                                              \
    Class(device const Class&);                                                                                        \
    Class(constant Class&);                                                                                            \
    Class(threadgroup const Class&);

// Components alone, aligned as one of them.
template <class T, int N>
struct packed_vec {
    T data[N];
    packed_vec() = default;
    MSL_COPIES(packed_vec)
    packed_vec(vec<T, N>);
    template <class... A>
    packed_vec(A...);
    operator vec<T, N>() const;
    T operator[](uint) const;
};
#define MSL_PACKED_NAMES(T)                                                                                            \
    typedef packed_vec<T, 2> packed_##T##2;                                                                            \
    typedef packed_vec<T, 3> packed_##T##3;                                                                            \
    typedef packed_vec<T, 4> packed_##T##4;
MSL_INTEGERS(MSL_PACKED_NAMES)
MSL_FLOATS(MSL_PACKED_NAMES)
MSL_PACKED_NAMES(bfloat)

// Columns of vectors.
template <class T, int Cols, int Rows>
struct matrix {
    typedef vec<T, Rows> column;
    column columns[Cols];
    matrix() = default;
    MSL_COPIES(matrix)
    template <int C, int R, class U>
    explicit matrix(matrix<U, C, R>);
    explicit matrix(T diagonal);
    template <class... A>
    explicit matrix(column, A...);
    thread column& operator[](int);
    thread const column& operator[](int) const;
};
#define MSL_MATRIX_NAMES(T)                                                                                            \
    typedef matrix<T, 2, 2> T##2x2;                                                                                    \
    typedef matrix<T, 2, 3> T##2x3;                                                                                    \
    typedef matrix<T, 2, 4> T##2x4;                                                                                    \
    typedef matrix<T, 3, 2> T##3x2;                                                                                    \
    typedef matrix<T, 3, 3> T##3x3;                                                                                    \
    typedef matrix<T, 3, 4> T##3x4;                                                                                    \
    typedef matrix<T, 4, 2> T##4x2;                                                                                    \
    typedef matrix<T, 4, 3> T##4x3;                                                                                    \
    typedef matrix<T, 4, 4> T##4x4;
MSL_FLOATS(MSL_MATRIX_NAMES)

namespace detail {

template <class V>
struct Shape {
    typedef V T;
    static constexpr int n = 1;
};
template <class E, int N>
struct Shape<E __attribute__((ext_vector_type(N)))> {
    typedef E T;
    static constexpr int n = N;
};
template <class E, int N>
struct Shape<packed_vec<E, N>> : Shape<vec<E, N>> {};

constexpr int total() { return 0; }
template <class... A>
constexpr int total(int first, A... rest) {
    return first + total(rest...);
}

template <class A, class B>
constexpr bool same_element = __is_same(typename Shape<A>::T, typename Shape<B>::T);
template <class V, class A>
constexpr bool is_part = Shape<A>::n == 1 ? __is_convertible(A, typename Shape<V>::T) : same_element<V, A>;
template <class V, class... A>
struct AreParts;
template <class V>
struct AreParts<V> {
    static constexpr bool value = true;
};
template <class V, class A, class... Rest>
struct AreParts<V, A, Rest...> {
    static constexpr bool value = is_part<V, A> && AreParts<V, Rest...>::value;
};

template <class V>
V value_of();

}  // namespace detail

// V(a, b, ...): one scalar for all components, a vector of as many components, or parts that make up V.
template <class V, class... A>
constexpr V make(A... parts) {
    constexpr int n = detail::total(detail::Shape<A>::n...), N = detail::Shape<V>::n;
    static_assert(sizeof...(A) == 0 || n == N || (n == 1 && sizeof...(A) == 1), "parts do not make up the vector");
    static_assert(sizeof...(A) <= 1 || detail::AreParts<V, A...>::value, "a part is of another element type");
    return V{};
}

namespace detail {

template <class V, int n = Shape<V>::n>
struct Converter {
    template <class A>
    static constexpr V apply(A x) {
        return make<V>(x);
    }
};
template <class V>
struct Converter<V, 1> {
    template <class A>
    static constexpr V apply(A x) {
        return (V)x;
    }
};

}  // namespace detail

// (V)x for any types that a thread holds: Cast<V>() ->* x binds as a cast does.
template <class V>
struct Cast {};
template <class V, class A>
constexpr V operator->*(Cast<V>, A x) {
    return detail::Converter<V>::apply(x);
}

template <class To, class From>
constexpr To as_type(From) {
    static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
    static_assert(!__is_class(To) && !__is_class(From), "as_type takes scalars and vectors");
    return To{};
}

}  // namespace metal

// Apple's compiler has these names without a namespace.
using metal::as_type;
#define MSL_GLOBAL_NAMES(T)                                                                                            \
    using metal::T##2;                                                                                                 \
    using metal::T##3;                                                                                                 \
    using metal::T##4;
MSL_INTEGERS(MSL_GLOBAL_NAMES)
MSL_FLOATS(MSL_GLOBAL_NAMES)
MSL_GLOBAL_NAMES(bool)
MSL_GLOBAL_NAMES(bfloat)
#define MSL_GLOBAL_PACKED(T) MSL_GLOBAL_NAMES(packed_##T)
MSL_INTEGERS(MSL_GLOBAL_PACKED)
MSL_FLOATS(MSL_GLOBAL_PACKED)
MSL_GLOBAL_PACKED(bfloat)
#define MSL_GLOBAL_MATRICES(T) MSL_GLOBAL_NAMES(T##2x) MSL_GLOBAL_NAMES(T##3x) MSL_GLOBAL_NAMES(T##4x)
MSL_FLOATS(MSL_GLOBAL_MATRICES)
