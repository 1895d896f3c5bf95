// Scalar types of Metal Shading Language: half and bfloat as classes that round after every operation, as a GPU does.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__F16C__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#ifdef __CUDACC__
#define METAL_FUNC __device__ __forceinline__
#define METAL_CONST_FUNC __host__ __device__ __forceinline__
#else
#define METAL_FUNC inline  // always_inline makes compilation take four times as long
#define METAL_CONST_FUNC METAL_FUNC
#endif

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
static_assert(sizeof(long) == 8, "MSL's long has 64 bits");
static_assert(char(-1) < 0, "MSL's char is signed: compile with -fsigned-char");
using std::ptrdiff_t;
using std::size_t;

// The bits of x as another type of the same size.
template <class To, class From>
METAL_FUNC To as_type(const From& x) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    const From from(x);  // the compiler knows the alignment of this copy
    To to;
    __builtin_memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
    return to;
}

namespace detail {

// IEEE 754 binary16.
struct HalfFormat {
    static METAL_FUNC ushort pack(float f) {
#if defined(__CUDACC__)
        ushort h;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
        return h;
#elif defined(__F16C__)
        return ushort(_cvtss_sh(f, 0));
#elif defined(__aarch64__)
        return as_type<ushort>(__fp16(f));
#else
        uint u = as_type<uint>(f);
        const uint sign = (u >> 16) & 0x8000u;
        u &= 0x7fffffffu;
        if (u > 0x7f800000u) return ushort(sign | 0x7e00u | ((u >> 13) & 0x1ffu));
        if (u >= 0x477ff000u) return ushort(sign | 0x7c00u);  // 65520 and above round to infinity
        if (u < 0x38800000u)  // below 2^-14: one unit in the last place of 0.5f is one half subnormal step
            return ushort(sign | (as_type<uint>(as_type<float>(u) + 0.5f) - 0x3f000000u));
        u += 0xfffu + ((u >> 13) & 1u);
        return ushort(sign | ((u - 0x38000000u) >> 13));
#endif
    }
    static METAL_FUNC float unpack(ushort h) {
#if defined(__CUDACC__)
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
        return f;
#elif defined(__F16C__)
        return _cvtsh_ss(h);
#elif defined(__aarch64__)
        return float(as_type<__fp16>(h));
#else
        const uint sign = uint(h & 0x8000u) << 16, rest = uint(h & 0x7fffu) << 13;
        const uint magnitude = (h & 0x7c00u) == 0x7c00u
                                   ? rest | 0x7f800000u
                                   : as_type<uint>(as_type<float>(rest) * 0x1p112f);  // exact, subnormals too
        return as_type<float>(sign | magnitude);
#endif
    }
};

// The upper half of a float32.
struct BfloatFormat {
    static METAL_FUNC ushort pack(float f) {
        const uint u = as_type<uint>(f);
        if ((u & 0x7fffffffu) > 0x7f800000u) return ushort((u >> 16) | 0x40u);
        return ushort((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
    static METAL_FUNC float unpack(ushort b) { return as_type<float>(uint(b) << 16); }
};

// A 16-bit floating-point number. Operations compute in float and round once; with a float operand the result is float.
template <class Format>
struct SmallFloat {
    ushort bits;

    SmallFloat() = default;
    template <class A>
        requires std::is_arithmetic_v<A>
    METAL_FUNC SmallFloat(A a) : bits(Format::pack(float(a))) {}
    template <class F>
    METAL_FUNC explicit SmallFloat(SmallFloat<F> o) : bits(Format::pack(float(o))) {}
    METAL_FUNC operator float() const { return Format::unpack(bits); }

    METAL_FUNC SmallFloat operator+() const { return *this; }
    METAL_FUNC SmallFloat operator-() const { return as_type<SmallFloat>(ushort(bits ^ 0x8000u)); }
    METAL_FUNC SmallFloat& operator++() { return *this += 1; }
    METAL_FUNC SmallFloat& operator--() { return *this -= 1; }
    template <class A>
    METAL_FUNC SmallFloat& operator+=(A a) {
        return *this = SmallFloat(float(*this) + float(a));
    }
    template <class A>
    METAL_FUNC SmallFloat& operator-=(A a) {
        return *this = SmallFloat(float(*this) - float(a));
    }
    template <class A>
    METAL_FUNC SmallFloat& operator*=(A a) {
        return *this = SmallFloat(float(*this) * float(a));
    }
    template <class A>
    METAL_FUNC SmallFloat& operator/=(A a) {
        return *this = SmallFloat(float(*this) / float(a));
    }
};

// half op int is half; half op float is float.
template <class F, class A>
using Mixed =
    std::enable_if_t<std::is_arithmetic_v<A>, std::conditional_t<std::is_floating_point_v<A>, float, SmallFloat<F>>>;

#define MSL_SMALL_ARITHMETIC(op)                                                                                       \
    template <class F>                                                                                                 \
    METAL_FUNC SmallFloat<F> operator op(SmallFloat<F> a, SmallFloat<F> b) {                                           \
        return SmallFloat<F>(float(a) op float(b));                                                                    \
    }                                                                                                                  \
    template <class F, class A>                                                                                        \
    METAL_FUNC Mixed<F, A> operator op(SmallFloat<F> a, A b) {                                                         \
        return Mixed<F, A>(float(a) op float(b));                                                                      \
    }                                                                                                                  \
    template <class F, class A>                                                                                        \
    METAL_FUNC Mixed<F, A> operator op(A a, SmallFloat<F> b) {                                                         \
        return Mixed<F, A>(float(a) op float(b));                                                                      \
    }
MSL_SMALL_ARITHMETIC(+)
MSL_SMALL_ARITHMETIC(-)
MSL_SMALL_ARITHMETIC(*)
MSL_SMALL_ARITHMETIC(/)
#undef MSL_SMALL_ARITHMETIC

#define MSL_SMALL_COMPARISON(op)                                                                                       \
    template <class F>                                                                                                 \
    METAL_FUNC bool operator op(SmallFloat<F> a, SmallFloat<F> b) {                                                    \
        return float(a) op float(b);                                                                                   \
    }                                                                                                                  \
    template <class F, class A>                                                                                        \
        requires std::is_arithmetic_v<A>                                                                               \
    METAL_FUNC bool operator op(SmallFloat<F> a, A b) {                                                                \
        return float(a) op float(b);                                                                                   \
    }                                                                                                                  \
    template <class F, class A>                                                                                        \
        requires std::is_arithmetic_v<A>                                                                               \
    METAL_FUNC bool operator op(A a, SmallFloat<F> b) {                                                                \
        return float(a) op float(b);                                                                                   \
    }
MSL_SMALL_COMPARISON(==)
MSL_SMALL_COMPARISON(!=)
MSL_SMALL_COMPARISON(<)
MSL_SMALL_COMPARISON(>)
MSL_SMALL_COMPARISON(<=)
MSL_SMALL_COMPARISON(>=)
#undef MSL_SMALL_COMPARISON

}  // namespace detail

using half = detail::SmallFloat<detail::HalfFormat>;
using bfloat = detail::SmallFloat<detail::BfloatFormat>;
static_assert(sizeof(half) == 2 && alignof(half) == 2 && std::is_trivially_copyable_v<half>);

// Type traits as MSL has them; half and bfloat count as floating point.
using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned;
using std::is_unsigned_v;
using std::make_signed_t;
using std::make_unsigned_t;
using std::remove_const_t;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;

template <class T>
struct is_floating_point
    : std::bool_constant<std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>> {};
template <class T>
inline constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : std::bool_constant<std::is_integral_v<T> || is_floating_point_v<T>> {};
template <class T>
inline constexpr bool is_arithmetic_v = is_arithmetic<T>::value;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};

namespace detail {
template <class T, ushort lowest_bits, ushort max_bits, ushort min_bits, ushort eps_bits, ushort inf_bits,
          ushort nan_bits>
struct SmallLimits {
    static constexpr bool is_specialized = true, is_signed = true, is_integer = false, has_infinity = true;
    static METAL_FUNC T lowest() { return as_type<T>(lowest_bits); }
    static METAL_FUNC T max() { return as_type<T>(max_bits); }
    static METAL_FUNC T min() { return as_type<T>(min_bits); }
    static METAL_FUNC T epsilon() { return as_type<T>(eps_bits); }
    static METAL_FUNC T infinity() { return as_type<T>(inf_bits); }
    static METAL_FUNC T quiet_NaN() { return as_type<T>(nan_bits); }
};
}  // namespace detail
template <>
struct numeric_limits<half> : detail::SmallLimits<half, 0xfbff, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00> {};
template <>
struct numeric_limits<bfloat> : detail::SmallLimits<bfloat, 0xff7f, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0> {};

}  // namespace metal

#ifndef MAXFLOAT
#define MAXFLOAT FLT_MAX
#endif
#define HALF_MAX (::metal::numeric_limits<::metal::half>::max())
#define HALF_MIN (::metal::numeric_limits<::metal::half>::min())
#define MAXHALF HALF_MAX
