// The functions of MSL on scalars and vectors, declared one by one for each type as Apple declares them: a call whose
// arguments fit two of them equally well is ambiguous here as there.
#pragma once

#include "types.h"

namespace metal {

#define MSL_1(R, name, T)                                                                                              \
    R name(T);                                                                                                         \
    vec<R, 2> name(vec<T, 2>);                                                                                         \
    vec<R, 3> name(vec<T, 3>);                                                                                         \
    vec<R, 4> name(vec<T, 4>);
#define MSL_2(name, T)                                                                                                 \
    T name(T, T);                                                                                                      \
    vec<T, 2> name(vec<T, 2>, vec<T, 2>);                                                                              \
    vec<T, 3> name(vec<T, 3>, vec<T, 3>);                                                                              \
    vec<T, 4> name(vec<T, 4>, vec<T, 4>);
#define MSL_3(name, T)                                                                                                 \
    T name(T, T, T);                                                                                                   \
    vec<T, 2> name(vec<T, 2>, vec<T, 2>, vec<T, 2>);                                                                   \
    vec<T, 3> name(vec<T, 3>, vec<T, 3>, vec<T, 3>);                                                                   \
    vec<T, 4> name(vec<T, 4>, vec<T, 4>, vec<T, 4>);

#define MSL_UNARY_NAMES(M, T)                                                                                          \
    M(T, acos, T)                                                                                                      \
    M(T, acosh, T)                                                                                                     \
    M(T, asin, T)                                                                                                      \
    M(T, asinh, T)                                                                                                     \
    M(T, atan, T)                                                                                                      \
    M(T, atanh, T)                                                                                                     \
    M(T, ceil, T)                                                                                                      \
    M(T, cos, T)                                                                                                       \
    M(T, cosh, T)                                                                                                      \
    M(T, cospi, T)                                                                                                     \
    M(T, exp, T)                                                                                                       \
    M(T, exp2, T)                                                                                                      \
    M(T, exp10, T)                                                                                                     \
    M(T, fabs, T)                                                                                                      \
    M(T, floor, T)                                                                                                     \
    M(T, fract, T)                                                                                                     \
    M(T, log, T)                                                                                                       \
    M(T, log2, T)                                                                                                      \
    M(T, log10, T)                                                                                                     \
    M(T, rint, T)                                                                                                      \
    M(T, round, T)                                                                                                     \
    M(T, rsqrt, T)                                                                                                     \
    M(T, saturate, T)                                                                                                  \
    M(T, sign, T)                                                                                                      \
    M(T, sin, T)                                                                                                       \
    M(T, sinh, T)                                                                                                      \
    M(T, sinpi, T)                                                                                                     \
    M(T, sqrt, T)                                                                                                      \
    M(T, tan, T)                                                                                                       \
    M(T, tanh, T)                                                                                                      \
    M(T, tanpi, T)                                                                                                     \
    M(T, trunc, T)
#define MSL_BINARY_NAMES(M, T)                                                                                         \
    M(atan2, T)                                                                                                        \
    M(copysign, T) M(fdim, T) M(fmax, T) M(fmin, T) M(fmod, T) M(nextafter, T) M(pow, T) M(powr, T) M(step, T)
#define MSL_TERNARY_NAMES(M, T) M(fma, T) M(fmax3, T) M(fmedian3, T) M(fmin3, T) M(mix, T) M(smoothstep, T)

#define MSL_FLOAT_FUNCTIONS(T)                                                                                         \
    MSL_UNARY_NAMES(MSL_1, T)                                                                                          \
    MSL_BINARY_NAMES(MSL_2, T)                                                                                         \
    MSL_TERNARY_NAMES(MSL_3, T)                                                                                        \
    MSL_1(bool, isfinite, T)                                                                                           \
    MSL_1(bool, isinf, T)                                                                                              \
    MSL_1(bool, isnan, T)                                                                                              \
    MSL_1(bool, isnormal, T)                                                                                           \
    MSL_1(bool, signbit, T)                                                                                            \
    bool isordered(T, T);                                                                                              \
    bool isunordered(T, T);                                                                                            \
    T frexp(T, thread int&);                                                                                           \
    T ldexp(T, int);                                                                                                   \
    int ilogb(T);                                                                                                      \
    T modf(T, thread T&);                                                                                              \
    T sincos(T, thread T&);                                                                                            \
    vec<T, 3> cross(vec<T, 3>, vec<T, 3>);                                                                             \
    MSL_GEOMETRIC(T, 2) MSL_GEOMETRIC(T, 3) MSL_GEOMETRIC(T, 4)
#define MSL_GEOMETRIC(T, N)                                                                                            \
    T distance(vec<T, N>, vec<T, N>);                                                                                  \
    T distance_squared(vec<T, N>, vec<T, N>);                                                                          \
    T dot(vec<T, N>, vec<T, N>);                                                                                       \
    T length(vec<T, N>);                                                                                               \
    T length_squared(vec<T, N>);                                                                                       \
    vec<T, N> normalize(vec<T, N>);                                                                                    \
    vec<T, N> reflect(vec<T, N>, vec<T, N>);
MSL_FLOATS(MSL_FLOAT_FUNCTIONS)

#define MSL_ANY_FUNCTIONS(T)                                                                                           \
    MSL_1(T, abs, T)                                                                                                   \
    MSL_2(max, T)                                                                                                      \
    MSL_2(min, T)                                                                                                      \
    MSL_3(clamp, T)                                                                                                    \
    MSL_3(max3, T)                                                                                                     \
    MSL_3(median3, T)                                                                                                  \
    MSL_3(min3, T)
MSL_INTEGERS(MSL_ANY_FUNCTIONS)
MSL_FLOATS(MSL_ANY_FUNCTIONS)
MSL_ANY_FUNCTIONS(bfloat)

#define MSL_INTEGER_FUNCTIONS(T)                                                                                       \
    MSL_1(T, clz, T)                                                                                                   \
    MSL_1(T, ctz, T)                                                                                                   \
    MSL_1(T, popcount, T)                                                                                              \
    MSL_1(T, reverse_bits, T)                                                                                          \
    MSL_2(absdiff, T)                                                                                                  \
    MSL_2(addsat, T)                                                                                                   \
    MSL_2(hadd, T)                                                                                                     \
    MSL_2(mulhi, T)                                                                                                    \
    MSL_2(rhadd, T)                                                                                                    \
    MSL_2(rotate, T)                                                                                                   \
    MSL_2(subsat, T)                                                                                                   \
    MSL_3(madhi, T)                                                                                                    \
    MSL_3(madsat, T)                                                                                                   \
    T extract_bits(T, uint, uint);                                                                                     \
    T insert_bits(T, T, uint, uint);
MSL_INTEGERS(MSL_INTEGER_FUNCTIONS)
int mul24(int, int);
uint mul24(uint, uint);
int mad24(int, int, int);
uint mad24(uint, uint, uint);

// Where clang's vector comparison has integers of the operands' width, MSL has booleans: these take both.
#define MSL_CONDITION(C, N)                                                                                            \
    bool all(vec<C, N>);                                                                                               \
    bool any(vec<C, N>);
#define MSL_CONDITIONS(N)                                                                                              \
    MSL_CONDITION(bool, N)                                                                                             \
    MSL_CONDITION(char, N) MSL_CONDITION(short, N) MSL_CONDITION(int, N) MSL_CONDITION(long, N)
MSL_CONDITIONS(2)
MSL_CONDITIONS(3) MSL_CONDITIONS(4) bool all(bool);
bool any(bool);
#define MSL_SELECT(T)                                                                                                  \
    T select(T, T, bool);                                                                                              \
    MSL_SELECT_N(T, 2) MSL_SELECT_N(T, 3) MSL_SELECT_N(T, 4)
#define MSL_SELECT_N(T, N)                                                                                             \
    vec<T, N> select(vec<T, N>, vec<T, N>, vec<bool, N>);                                                              \
    vec<T, N> select(vec<T, N>, vec<T, N>, vec<char, N>);                                                              \
    vec<T, N> select(vec<T, N>, vec<T, N>, vec<short, N>);                                                             \
    vec<T, N> select(vec<T, N>, vec<T, N>, vec<int, N>);
MSL_INTEGERS(MSL_SELECT)
MSL_FLOATS(MSL_SELECT)
MSL_SELECT(bfloat)
MSL_SELECT(bool)

float4 unpack_unorm4x8_to_float(uint);
float4 unpack_snorm4x8_to_float(uint);
uint pack_float_to_unorm4x8(float4);

// The forms of float functions with a precision of their own.
#define MSL_FLOAT_FORMS                                                                                                \
    MSL_UNARY_NAMES(MSL_1, float)                                                                                      \
    MSL_BINARY_NAMES(MSL_2, float)                                                                                     \
    MSL_UNARY_NAMES(MSL_1, half)                                                                                       \
    MSL_BINARY_NAMES(MSL_2, half)                                                                                      \
    MSL_1(float, abs, float)                                                                                           \
    MSL_3(clamp, float)                                                                                                \
    MSL_2(divide, float)                                                                                               \
    MSL_2(max, float)                                                                                                  \
    MSL_2(min, float)                                                                                                  \
    float sincos(float, thread float&);
namespace precise {
MSL_FLOAT_FORMS
}  // namespace precise
namespace fast {
MSL_FLOAT_FORMS
}  // namespace fast

}  // namespace metal
