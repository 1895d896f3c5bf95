// Vectors of two to four components, with constructors, operators and swizzles as in MSL. Stricter than MSL in one
// place, so that code which compiles here compiles there. A vector combines only with vectors of its own type, or with
// scalars that its component type holds without losing a fraction.
#pragma once

#include <new>

#include "msl/run/runtime.h"
#include "scalar.h"

namespace metal {

template <class T, int N>
struct vec;
template <class T, int N>
struct packed_vec;

namespace detail {
template <class T, int S, int... I>
struct Swizzle;

// Component type and count of an operand; n is 1 for scalars and 0 for everything else.
template <class A>
struct Shape {
    using T = A;
    static constexpr int n = is_arithmetic_v<A> ? 1 : 0;
};
template <class E, int N>
struct Shape<vec<E, N>> {
    using T = E;
    static constexpr int n = N;
};
template <class E, int N>
struct Shape<packed_vec<E, N>> : Shape<vec<E, N>> {};
template <class E, int S, int... I>
struct Shape<Swizzle<E, S, I...>> : Shape<vec<E, sizeof...(I)>> {};

// An index of n components. Compilers let a reference be one past an array's end, so the checked build checks it here.
METAL_FUNC uint component(uint i, [[maybe_unused]] uint n) {
#ifdef ZINC_CHECKED
    if (i >= n) zinc::msl::no_component(i, n);
#endif
    return i;
}

template <class A>
concept Scalar = Shape<A>::n == 1;
template <class A>
concept Vectorial = Shape<A>::n >= 2;
template <class A>
concept Arithmetic = Shape<A>::n >= 1;

// True if scalar S may stand beside a vector of T.
template <class S, class T>
inline constexpr bool fits =
    std::is_integral_v<S> || std::is_same_v<S, T> || (is_floating_point_v<S> && std::is_same_v<T, float>);

// The common vector type of operands, or void.
template <class A, class B>
struct JoinPair {
    using type = void;
};
template <class A, class B>
    requires(Vectorial<A> && Vectorial<B> && Shape<A>::n == Shape<B>::n &&
             std::is_same_v<typename Shape<A>::T, typename Shape<B>::T>)
struct JoinPair<A, B> {
    using type = vec<typename Shape<A>::T, Shape<A>::n>;
};
template <class A, class B>
    requires(Vectorial<A> && Scalar<B> && fits<B, typename Shape<A>::T>)
struct JoinPair<A, B> {
    using type = vec<typename Shape<A>::T, Shape<A>::n>;
};
template <class A, class B>
    requires(Scalar<A> && Vectorial<B>)
struct JoinPair<A, B> : JoinPair<B, A> {};
template <class A, class B>
using Join = typename JoinPair<A, B>::type;

template <class A, class B>
concept Operands = !std::is_void_v<Join<A, B>>;

template <class A>
using VecOf = vec<typename Shape<A>::T, Shape<A>::n>;

template <int... I>
constexpr bool distinct() {
    const int all[] = {I...};
    for (size_t i = 0; i < sizeof...(I); i++)
        for (size_t j = 0; j < i; j++)
            if (all[i] == all[j]) return false;
    return true;
}

// A choice of components of the vector in whose storage it lives.
template <class T, int S, int... I>
struct Swizzle {
    static constexpr int N = sizeof...(I);
    T data[S];

    Swizzle() = default;
    Swizzle(const Swizzle&) = default;
    METAL_FUNC operator vec<T, N>() const { return vec<T, N>(data[I]...); }
    METAL_FUNC Swizzle& operator=(const vec<T, N>& v)
        requires(distinct<I...>())
    {
        int i = 0;
        ((data[I] = v.data[i++]), ...);
        return *this;
    }
    METAL_FUNC Swizzle& operator=(const Swizzle& o) { return *this = vec<T, N>(o); }
    METAL_FUNC T operator[](uint i) const { return vec<T, N>(*this).data[i]; }
};

// Appends the components of an argument.
template <class T, class A>
METAL_FUNC void append(T* data, int& i, const A& a) {
    if constexpr (Scalar<A>) {
        data[i++] = T(a);
    } else {
        const VecOf<A> v(a);
        for (int k = 0; k < Shape<A>::n; k++) data[i++] = v.data[k];
    }
}

template <class A, class T>
concept PartOf = Scalar<A> || (Vectorial<A> && std::is_same_v<typename Shape<A>::T, T>);

}  // namespace detail

// Every two-, three- and four-letter combination of the first S letters of x y z w.
#define MSL_2a(M, ...) M(x, 0, __VA_ARGS__) M(y, 1, __VA_ARGS__)
#define MSL_2b(M, ...) M(x, 0, __VA_ARGS__) M(y, 1, __VA_ARGS__)
#define MSL_2c(M, ...) M(x, 0, __VA_ARGS__) M(y, 1, __VA_ARGS__)
#define MSL_2d(M, ...) M(x, 0, __VA_ARGS__) M(y, 1, __VA_ARGS__)
#define MSL_3a(M, ...) MSL_2a(M, __VA_ARGS__) M(z, 2, __VA_ARGS__)
#define MSL_3b(M, ...) MSL_2b(M, __VA_ARGS__) M(z, 2, __VA_ARGS__)
#define MSL_3c(M, ...) MSL_2c(M, __VA_ARGS__) M(z, 2, __VA_ARGS__)
#define MSL_3d(M, ...) MSL_2d(M, __VA_ARGS__) M(z, 2, __VA_ARGS__)
#define MSL_4a(M, ...) MSL_3a(M, __VA_ARGS__) M(w, 3, __VA_ARGS__)
#define MSL_4b(M, ...) MSL_3b(M, __VA_ARGS__) M(w, 3, __VA_ARGS__)
#define MSL_4c(M, ...) MSL_3c(M, __VA_ARGS__) M(w, 3, __VA_ARGS__)
#define MSL_4d(M, ...) MSL_3d(M, __VA_ARGS__) M(w, 3, __VA_ARGS__)
#define MSL_LETTER1(l, i, S) MSL_##S##b(MSL_LETTER2, S, l, i)
#define MSL_LETTER2(l, i, S, p, ...)                                                                                   \
    detail::Swizzle<T, S, __VA_ARGS__, i> p##l;                                                                        \
    MSL_##S##c(MSL_LETTER3, S, p##l, __VA_ARGS__, i)
#define MSL_LETTER3(l, i, S, p, ...)                                                                                   \
    detail::Swizzle<T, S, __VA_ARGS__, i> p##l;                                                                        \
    MSL_##S##d(MSL_LETTER4, S, p##l, __VA_ARGS__, i)
#define MSL_LETTER4(l, i, S, p, ...) detail::Swizzle<T, S, __VA_ARGS__, i> p##l;

#define MSL_VEC_MEMBERS(S)                                                                                             \
    vec() = default;                                                                                                   \
    vec(const vec&) = default;                                                                                         \
    /* By way of the default copy: compilers know that to be aligned. */                                               \
    METAL_FUNC vec& operator=(const vec& o) { return *::new (static_cast<void*>(this)) vec(o); }                       \
    template <class A>                                                                                                 \
        requires detail::Scalar<A>                                                                                     \
    METAL_FUNC vec(A a) {                                                                                              \
        for (int i = 0; i < S; i++) data[i] = T(a);                                                                    \
    }                                                                                                                  \
    template <class U>                                                                                                 \
        requires(!std::is_same_v<T, U>)                                                                                \
    METAL_FUNC explicit vec(const vec<U, S>& o) {                                                                      \
        for (int i = 0; i < S; i++) data[i] = T(o.data[i]);                                                            \
    }                                                                                                                  \
    template <class A>                                                                                                 \
        requires(detail::Vectorial<A> && detail::Shape<A>::n == S && !std::is_same_v<typename detail::Shape<A>::T, T>) \
    METAL_FUNC explicit vec(const A& a) : vec(detail::VecOf<A>(a)) {}                                                  \
    template <class... A>                                                                                              \
        requires(sizeof...(A) >= 2 && (detail::PartOf<A, T> && ...) && (detail::Shape<A>::n + ...) == S)               \
    METAL_FUNC vec(const A&... parts) {                                                                                \
        int i = 0;                                                                                                     \
        (detail::append(data, i, parts), ...);                                                                         \
    }                                                                                                                  \
    METAL_FUNC T& operator[](uint i) { return data[detail::component(i, S)]; }                                         \
    METAL_FUNC const T& operator[](uint i) const { return data[detail::component(i, S)]; }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
    union {
        T data[2];
        struct {
            T x, y;
        };
        struct {
            T r, g;
        };
        MSL_2a(MSL_LETTER1, 2)
    };
    MSL_VEC_MEMBERS(2)
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
    union {
        T data[3];
        struct {
            T x, y, z;
        };
        struct {
            T r, g, b;
        };
        MSL_3a(MSL_LETTER1, 3)
    };
    MSL_VEC_MEMBERS(3)
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
    union {
        T data[4];
        struct {
            T x, y, z, w;
        };
        struct {
            T r, g, b, a;
        };
        MSL_4a(MSL_LETTER1, 4)
    };
    MSL_VEC_MEMBERS(4)
};

// Components without padding, aligned like one component: for rows that are not a multiple of a vector.
template <class T, int N>
struct packed_vec {
    T data[N];

    packed_vec() = default;
    METAL_FUNC packed_vec(const vec<T, N>& v) {
        for (int i = 0; i < N; i++) data[i] = v.data[i];
    }
    METAL_FUNC operator vec<T, N>() const {
        vec<T, N> v;
        for (int i = 0; i < N; i++) v.data[i] = data[i];
        return v;
    }
    METAL_FUNC T& operator[](uint i) { return data[detail::component(i, N)]; }
    METAL_FUNC const T& operator[](uint i) const { return data[detail::component(i, N)]; }
};

#undef MSL_VEC_MEMBERS

namespace detail {

#define MSL_VECTOR_OPERATOR(op)                                                                                        \
    template <class A, class B>                                                                                        \
        requires Operands<A, B>                                                                                        \
    METAL_FUNC Join<A, B> operator op(const A & a, const B & b) {                                                      \
        const Join<A, B> l(a), r(b);                                                                                   \
        Join<A, B> out;                                                                                                \
        for (int i = 0; i < Shape<Join<A, B>>::n; i++)                                                                 \
            out.data[i] = typename Shape<Join<A, B>>::T(l.data[i] op r.data[i]);                                       \
        return out;                                                                                                    \
    }                                                                                                                  \
    template <class A, class B>                                                                                        \
        requires(Vectorial<A> && Operands<A, B>)                                                                       \
    METAL_FUNC A& operator op##=(A & a, const B & b) {                                                                 \
        return a = a op b;                                                                                             \
    }
MSL_VECTOR_OPERATOR(+)
MSL_VECTOR_OPERATOR(-)
MSL_VECTOR_OPERATOR(*)
MSL_VECTOR_OPERATOR(/)
MSL_VECTOR_OPERATOR(%)
MSL_VECTOR_OPERATOR(&)
MSL_VECTOR_OPERATOR(|)
MSL_VECTOR_OPERATOR(^)
MSL_VECTOR_OPERATOR(<<)
MSL_VECTOR_OPERATOR(>>)
#undef MSL_VECTOR_OPERATOR

#define MSL_VECTOR_COMPARISON(op)                                                                                      \
    template <class A, class B>                                                                                        \
        requires Operands<A, B>                                                                                        \
    METAL_FUNC vec<bool, Shape<Join<A, B>>::n> operator op(const A & a, const B & b) {                                 \
        const Join<A, B> l(a), r(b);                                                                                   \
        vec<bool, Shape<Join<A, B>>::n> out;                                                                           \
        for (int i = 0; i < Shape<Join<A, B>>::n; i++) out.data[i] = l.data[i] op r.data[i];                           \
        return out;                                                                                                    \
    }
MSL_VECTOR_COMPARISON(==)
MSL_VECTOR_COMPARISON(!=)
MSL_VECTOR_COMPARISON(<)
MSL_VECTOR_COMPARISON(>)
MSL_VECTOR_COMPARISON(<=)
MSL_VECTOR_COMPARISON(>=)
MSL_VECTOR_COMPARISON(&&)
MSL_VECTOR_COMPARISON(||)
#undef MSL_VECTOR_COMPARISON

#define MSL_VECTOR_UNARY(op, R)                                                                                        \
    template <class A>                                                                                                 \
        requires Vectorial<A>                                                                                          \
    METAL_FUNC vec<R, Shape<A>::n> operator op(const A & a) {                                                          \
        const VecOf<A> v(a);                                                                                           \
        vec<R, Shape<A>::n> out;                                                                                       \
        for (int i = 0; i < Shape<A>::n; i++) out.data[i] = R(op v.data[i]);                                           \
        return out;                                                                                                    \
    }
MSL_VECTOR_UNARY(+, typename Shape<A>::T)
MSL_VECTOR_UNARY(-, typename Shape<A>::T)
MSL_VECTOR_UNARY(~, typename Shape<A>::T)
MSL_VECTOR_UNARY(!, bool)
#undef MSL_VECTOR_UNARY

}  // namespace detail

using detail::operator+, detail::operator-, detail::operator*, detail::operator/, detail::operator%;
using detail::operator&, detail::operator|, detail::operator^, detail::operator<<, detail::operator>>;
using detail::operator+=, detail::operator-=, detail::operator*=, detail::operator/=, detail::operator%=;
using detail::operator&=, detail::operator|=, detail::operator^=, detail::operator<<=, detail::operator>>=;
using detail::operator==, detail::operator!=, detail::operator<, detail::operator>, detail::operator<=;
using detail::operator>=, detail::operator&&, detail::operator||, detail::operator~, detail::operator!;

#define MSL_VECTOR_NAMES(T)                                                                                            \
    using T##2 = vec<T, 2>;                                                                                            \
    using T##3 = vec<T, 3>;                                                                                            \
    using T##4 = vec<T, 4>;                                                                                            \
    using packed_##T##2 = packed_vec<T, 2>;                                                                            \
    using packed_##T##3 = packed_vec<T, 3>;                                                                            \
    using packed_##T##4 = packed_vec<T, 4>;
MSL_VECTOR_NAMES(char)
MSL_VECTOR_NAMES(uchar)
MSL_VECTOR_NAMES(short)
MSL_VECTOR_NAMES(ushort)
MSL_VECTOR_NAMES(int)
MSL_VECTOR_NAMES(uint)
MSL_VECTOR_NAMES(long)
MSL_VECTOR_NAMES(ulong)
MSL_VECTOR_NAMES(half)
MSL_VECTOR_NAMES(bfloat)
MSL_VECTOR_NAMES(float)
MSL_VECTOR_NAMES(bool)
#undef MSL_VECTOR_NAMES

}  // namespace metal
