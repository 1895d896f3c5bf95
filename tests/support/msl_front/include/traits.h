// Type traits and limits.
#pragma once

#include "types.h"

namespace metal {

template <class T, T v>
struct integral_constant {
    typedef T value_type;
    static constexpr constant T value = v;
    constexpr operator T() const { return v; }
};
template <bool b>
using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool b, class A, class B>
struct conditional {
    typedef A type;
};
template <class A, class B>
struct conditional<false, A, B> {
    typedef B type;
};
template <bool b, class A, class B>
using conditional_t = typename conditional<b, A, B>::type;

template <bool b, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
    typedef T type;
};
template <bool b, class T = void>
using enable_if_t = typename enable_if<b, T>::type;

template <class T>
struct remove_addrspace {
    typedef T type;
};
#define MSL_REMOVE_SPACE(space)                                                                                        \
    template <class T>                                                                                                 \
    struct remove_addrspace<space T> {                                                                                 \
        typedef T type;                                                                                                \
    };                                                                                                                 \
    template <class T>                                                                                                 \
    struct remove_addrspace<const space T> {                                                                           \
        typedef const T type;                                                                                          \
    };
MSL_REMOVE_SPACE(device)
MSL_REMOVE_SPACE(threadgroup)
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

// A type without const, volatile and address space.
template <class T>
struct remove_cv {
    typedef __remove_cv(typename remove_addrspace<T>::type) type;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
using remove_const_t = __remove_const(T);
template <class T>
struct remove_reference {
    typedef __remove_reference_t(T) type;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using decay_t = remove_cv_t<remove_reference_t<T>>;
template <class T>
struct remove_pointer {
    typedef __remove_pointer(T) type;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
struct make_unsigned {
    typedef __make_unsigned(T) type;
};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
struct make_signed {
    typedef __make_signed(T) type;
};
template <class T>
using make_signed_t = typename make_signed<T>::type;

#define MSL_TRAIT(name, ...)                                                                                           \
    template <class T>                                                                                                 \
    struct name : bool_constant<(__VA_ARGS__)> {};                                                                     \
    template <class T>                                                                                                 \
    constexpr constant bool name##_v = name<T>::value;
MSL_TRAIT(is_floating_point,
          __is_same(remove_cv_t<T>, float) || __is_same(remove_cv_t<T>, half) || __is_same(remove_cv_t<T>, bfloat))
MSL_TRAIT(is_integral, __is_integral(T))
MSL_TRAIT(is_arithmetic, is_integral<T>::value || is_floating_point<T>::value)
MSL_TRAIT(is_scalar, is_arithmetic<T>::value)
MSL_TRAIT(is_vector, (detail::Shape<remove_cv_t<T>>::n > 1))
MSL_TRAIT(is_signed, is_arithmetic<T>::value&& T(-1) < T(0))
MSL_TRAIT(is_unsigned, __is_unsigned(T))
MSL_TRAIT(is_pointer, __is_pointer(T))
MSL_TRAIT(is_enum, __is_enum(T))
MSL_TRAIT(is_class, __is_class(T))
MSL_TRAIT(is_void, __is_void(T))
MSL_TRAIT(is_const, __is_const(T))
template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B>
constexpr constant bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B>
constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <class B, class D>
constexpr constant bool is_base_of_v = __is_base_of(B, D);

template <class T>
using vec2 = vec<T, 2>;
template <class T>
struct vec_elements : integral_constant<int, detail::Shape<T>::n> {};

template <class T, T... values>
struct integer_sequence {
    typedef T value_type;
    static constexpr size_t size() { return sizeof...(values); }
};
template <size_t... values>
using index_sequence = integer_sequence<size_t, values...>;
template <class T, T n>
using make_integer_sequence = __make_integer_seq<integer_sequence, T, n>;
template <size_t n>
using make_index_sequence = make_integer_sequence<size_t, n>;

template <class Call>
struct result_of;
template <class F, class... A>
struct result_of<F(A...)> {
    typedef decltype(detail::value_of<F>()(detail::value_of<A>()...)) type;
};
template <class Call>
using result_of_t = typename result_of<Call>::type;

// Limits: what they are is no matter here.
template <class T>
struct numeric_limits {
    static constexpr constant bool is_signed = is_signed_v<T>;
    static constexpr constant bool is_integer = is_integral_v<T>;
    static constexpr constant bool has_infinity = !is_integral_v<T>;
    static constexpr constant bool has_quiet_NaN = !is_integral_v<T>;
    static constexpr constant int digits = 0;
    static constexpr T max() { return T(1); }
    static constexpr T min() { return T(0); }
    static constexpr T lowest() { return T(0); }
    static constexpr T infinity() { return T(1); }
    static constexpr T quiet_NaN() { return T(1); }
    static constexpr T epsilon() { return T(1); }
};

template <class T, size_t N>
struct array {
    T elements[N];
    static constexpr size_t size() { return N; }
    thread T& operator[](size_t);
    thread const T& operator[](size_t) const;
};

}  // namespace metal
