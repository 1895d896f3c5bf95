#include "probe.h"

// Operands: x in (0, 1), y in (1, 4), z in (-8, 8).
#define FLOAT_OPERATIONS(OP)                                                                                   \
    OP(x + y)                                                                                                  \
    OP(x - y)                                                                                                  \
    OP(x * z)                                                                                                  \
    OP(z / y)                                                                                                  \
    OP(-z)                                                                                                     \
    OP(+z)                                                                                                     \
    OP(z + T(2))                                                                                               \
    OP(T(3) - z)                                                                                               \
    OP(z * 2)                                                                                                  \
    OP(exp(z))                                                                                                 \
    OP(exp2(z))                                                                                                \
    OP(exp10(x))                                                                                               \
    OP(log(y))                                                                                                 \
    OP(log2(y))                                                                                                \
    OP(log10(y))                                                                                               \
    OP(sqrt(y))                                                                                                \
    OP(rsqrt(y))                                                                                               \
    OP(sin(z))                                                                                                 \
    OP(cos(z))                                                                                                 \
    OP(tan(x))                                                                                                 \
    OP(asin(x))                                                                                                \
    OP(acos(x))                                                                                                \
    OP(atan(z))                                                                                                \
    OP(sinh(z))                                                                                                \
    OP(cosh(z))                                                                                                \
    OP(tanh(z))                                                                                                \
    OP(asinh(z))                                                                                               \
    OP(acosh(y))                                                                                               \
    OP(atanh(x))                                                                                               \
    OP(floor(z))                                                                                               \
    OP(ceil(z))                                                                                                \
    OP(trunc(z))                                                                                               \
    OP(round(z))                                                                                               \
    OP(rint(z))                                                                                                \
    OP(fabs(z))                                                                                                \
    OP(abs(z))                                                                                                 \
    OP(fract(z))                                                                                               \
    OP(saturate(z))                                                                                            \
    OP(sign(z))                                                                                                \
    OP(pow(y, z))                                                                                              \
    OP(powr(y, z))                                                                                             \
    OP(fmod(z, y))                                                                                             \
    OP(atan2(z, y))                                                                                            \
    OP(min(z, y))                                                                                              \
    OP(max(z, y))                                                                                              \
    OP(fmin(z, y))                                                                                             \
    OP(fmax(z, y))                                                                                             \
    OP(copysign(y, z))                                                                                         \
    OP(step(x, z))                                                                                             \
    OP(clamp(z, x, y))                                                                                         \
    OP(fma(x, y, z))                                                                                           \
    OP(mix(y, z, x))                                                                                           \
    OP(select(x, y, z < T(0)))                                                                                 \
    OP(select(x, y, z >= y))                                                                                   \
    OP(select(x, y, isnan(z / z) || isinf(z)))                                                                 \
    OP(select(x, y, isfinite(z) && signbit(z)))                                                                \
    OP(precise::exp(z))                                                                                        \
    OP(fast::sin(z))

// x and y small enough that products do not overflow, y > 0; s below the width.
#define INTEGER_OPERATIONS(OP)                                                                                 \
    OP(x + y)                                                                                                  \
    OP(x - y)                                                                                                  \
    OP(x * y)                                                                                                  \
    OP(x / y)                                                                                                  \
    OP(x % y)                                                                                                  \
    OP(x & y)                                                                                                  \
    OP(x | y)                                                                                                  \
    OP(x ^ y)                                                                                                  \
    OP(~x)                                                                                                     \
    OP(-x)                                                                                                     \
    OP(x << s)                                                                                                 \
    OP(x >> s)                                                                                                 \
    OP(min(x, y))                                                                                              \
    OP(max(x, y))                                                                                              \
    OP(clamp(x, s, y))                                                                                         \
    OP(popcount(x))                                                                                            \
    OP(clz(x))                                                                                                 \
    OP(ctz(x))                                                                                                 \
    OP(select(x, y, x == s))                                                                                   \
    OP(select(x, y, x != s))                                                                                   \
    OP(select(x, y, x > s))                                                                                    \
    OP(select(x, y, x <= s))                                                                                   \
    OP(select(x, y, !(x < s)))

#define SCALAR_INTEGER_OPERATIONS(OP)                                                                          \
    OP(rotate(x, s))                                                                                           \
    OP(extract_bits(x, 2, 3))                                                                                  \
    OP(abs(x))

#define STORE(expression)                                                                                      \
    Components<V, N>::store(V(expression), out + (ulong(k++) * p.n + i) * N);

template <class T, int N>
kernel void probe_float(constant ProbeParams& p [[buffer(0)]], device const T* a [[buffer(1)]],
                        device const T* b [[buffer(2)]], device const T* c [[buffer(3)]],
                        device T* out [[buffer(4)]], GRID_IDS) {
    typedef typename VectorOf<T, N>::type V;
    const uint i = tg.x * n_sg * SIMD + tid;
    if (i >= p.n) return;
    const V x = Components<V, N>::load(a + i * N);
    const V y = Components<V, N>::load(b + i * N);
    const V z = Components<V, N>::load(c + i * N);
    uint k = 0;
    FLOAT_OPERATIONS(STORE)
}

template <class T, int N>
kernel void probe_integer(constant ProbeParams& p [[buffer(0)]], device const T* a [[buffer(1)]],
                          device const T* b [[buffer(2)]], device const T* c [[buffer(3)]],
                          device T* out [[buffer(4)]], GRID_IDS) {
    typedef typename VectorOf<T, N>::type V;
    const uint i = tg.x * n_sg * SIMD + tid;
    if (i >= p.n) return;
    const V x = Components<V, N>::load(a + i * N);
    const V y = Components<V, N>::load(b + i * N);
    const V s = Components<V, N>::load(c + i * N);
    uint k = 0;
    INTEGER_OPERATIONS(STORE)
}

template <class T>
kernel void probe_bits(constant ProbeParams& p [[buffer(0)]], device const T* a [[buffer(1)]],
                       device const T* b [[buffer(2)]], device const T* c [[buffer(3)]], device T* out [[buffer(4)]],
                       GRID_IDS) {
    typedef T V;
    constexpr int N = 1;
    const uint i = tg.x * n_sg * SIMD + tid;
    if (i >= p.n) return;
    const T x = a[i], s = c[i];
    uint k = 0;
    SCALAR_INTEGER_OPERATIONS(STORE)
}

// Small floats to float and back, and what mixed arithmetic rounds to.
template <class T>
kernel void probe_convert(constant ProbeParams& p [[buffer(0)]], device const ushort* bits [[buffer(1)]],
                          device const float* f [[buffer(2)]], device float* to_float [[buffer(3)]],
                          device ushort* from_float [[buffer(4)]], device float* mixed [[buffer(5)]], GRID_IDS) {
    const uint i = tg.x * n_sg * SIMD + tid;
    if (i >= p.n) return;
    const T h = as_type<T>(bits[i]);
    to_float[i] = float(h);
    from_float[i] = as_type<ushort>(T(f[i]));
    T running = h;
    running += f[i];
    mixed[3 * i] = h * f[i];
    mixed[3 * i + 1] = float(h * h + T(1));
    mixed[3 * i + 2] = float(running);
}

KERNEL("probe_float_float1", probe_float<float, 1>)
KERNEL("probe_float_float2", probe_float<float, 2>)
KERNEL("probe_float_float3", probe_float<float, 3>)
KERNEL("probe_float_float4", probe_float<float, 4>)
KERNEL("probe_float_half1", probe_float<half, 1>)
KERNEL("probe_float_half3", probe_float<half, 3>)
KERNEL("probe_float_half4", probe_float<half, 4>)
KERNEL("probe_float_bfloat1", probe_float<bfloat, 1>)
KERNEL("probe_float_bfloat2", probe_float<bfloat, 2>)
KERNEL("probe_integer_char1", probe_integer<char, 1>)
KERNEL("probe_integer_uchar1", probe_integer<uchar, 1>)
KERNEL("probe_integer_uchar4", probe_integer<uchar, 4>)
KERNEL("probe_integer_short1", probe_integer<short, 1>)
KERNEL("probe_integer_ushort2", probe_integer<ushort, 2>)
KERNEL("probe_integer_int1", probe_integer<int, 1>)
KERNEL("probe_integer_int3", probe_integer<int, 3>)
KERNEL("probe_integer_uint1", probe_integer<uint, 1>)
KERNEL("probe_integer_uint4", probe_integer<uint, 4>)
KERNEL("probe_integer_long2", probe_integer<long, 2>)
KERNEL("probe_integer_ulong1", probe_integer<ulong, 1>)
KERNEL("probe_bits_char", probe_bits<char>)
KERNEL("probe_bits_uchar", probe_bits<uchar>)
KERNEL("probe_bits_short", probe_bits<short>)
KERNEL("probe_bits_uint", probe_bits<uint>)
KERNEL("probe_bits_int", probe_bits<int>)
KERNEL("probe_bits_ulong", probe_bits<ulong>)
KERNEL("probe_convert_half", probe_convert<half>)
KERNEL("probe_convert_bfloat", probe_convert<bfloat>)
