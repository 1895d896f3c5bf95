// The vectors of the native kernels: W floats, where W follows from the instruction set of this translation unit.
// Arithmetic is the compiler's vector extension, with intrinsics for operations that it cannot express well. Everything
// has internal linkage: the same source is compiled once per instruction set into one module.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "cpu/native/kernel.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#if !defined(__clang__)  // GCC 12 warns of the deliberately undefined vectors inside its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define NATIVE_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define NATIVE_AVX2 1
#elif defined(__aarch64__) && defined(NATIVE_WITH_NEON)
#define NATIVE_NEON 1
#endif

#define INLINE inline __attribute__((always_inline))
// In front of a loop: whole, so that small arrays of vectors live in registers at any optimisation level.
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace zinc {
namespace {

#if defined(NATIVE_AVX512)
constexpr int W = 16;
#elif defined(NATIVE_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using vf = float __attribute__((vector_size(4 * W)));
using vi = int32_t __attribute__((vector_size(4 * W)));
using vu16 = uint16_t __attribute__((vector_size(2 * W)));
using vu8 = uint8_t __attribute__((vector_size(W)));
using vi8 = int8_t __attribute__((vector_size(W)));
using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = int32_t __attribute__((vector_size(32)));

template <class V>
INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
INLINE vf splat(float x) { return x - vf{}; }
template <class To, class From>
INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
template <class To, class From>
INLINE To convert(From from) {
    return __builtin_convertvector(from, To);
}

// W small integers from memory as 32-bit integers. (GCC splits __builtin_convertvector here, lane by lane.)
INLINE vi widen(const uint8_t* p) {
#if defined(NATIVE_AVX512)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(NATIVE_AVX2)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    return convert<vi>(load<vu8>(p));
#endif
}
INLINE vi widen(const int8_t* p) {
#if defined(NATIVE_AVX512)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(NATIVE_AVX2)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    return convert<vi>(load<vi8>(p));
#endif
}
INLINE vi widen(const uint16_t* p) {
#if defined(NATIVE_AVX512)
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(NATIVE_AVX2)
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    return convert<vi>(load<vu16>(p));
#endif
}

INLINE f32x8 floats_of_bytes(uint64_t eight) {
#if defined(NATIVE_AVX512) || defined(NATIVE_AVX2)
    return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(eight))));
#else
    using u8x8 = uint8_t __attribute__((vector_size(8)));
    return convert<f32x8>(convert<i32x8>(bits_as<u8x8>(eight)));
#endif
}

// The bits of a number, from the lowest on, at the places of a mask's bits.
INLINE uint64_t spread_bits(uint64_t bits, uint64_t mask) {
#if defined(__BMI2__)
    return _pdep_u64(bits, mask);
#else
    uint64_t spread = 0;
    for (; mask; mask &= mask - 1, bits >>= 1) spread |= (bits & 1) * (mask & -mask);
    return spread;
#endif
}

template <int DISTANCE, class V, size_t... I>
INLINE V swap_lanes(V v, std::index_sequence<I...>) {
    return __builtin_shufflevector(v, v, int(I ^ DISTANCE)...);
}

// The sum of a vector's lanes, pairwise.
template <class V, int HALF = sizeof(V) / 8>
INLINE float sum_lanes(V v) {
    v += swap_lanes<HALF>(v, std::make_index_sequence<sizeof(V) / 4>());
    if constexpr (HALF > 1) return sum_lanes<V, HALF / 2>(v);
    return v[0];
}

using f32x4 = float __attribute__((vector_size(16)));

// Half of two sums: lanes without the bit DISTANCE hold pairs of a, the others pairs of b.
template <int DISTANCE, size_t... I>
INLINE vf add_pairs(vf a, vf b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, int(I & DISTANCE ? I + W : I)...) +
           __builtin_shufflevector(a, b, int(I & DISTANCE ? (I ^ DISTANCE) + W : I ^ DISTANCE)...);
}

// The sums of four vectors' lanes.
INLINE f32x4 sums_of_lanes(const vf* v) {
    constexpr auto lanes = std::make_index_sequence<W>();
    vf sums = add_pairs<2>(add_pairs<1>(v[0], v[1], lanes), add_pairs<1>(v[2], v[3], lanes), lanes);
    if constexpr (W > 4) sums += swap_lanes<4>(sums, lanes);
    if constexpr (W > 8) sums += swap_lanes<8>(sums, lanes);
    f32x4 four;
    std::memcpy(&four, &sums, sizeof four);
    return four;
}

// ---- half and bfloat16 ---------------------------------------------------------------------------------------------

// IEEE half to float by integer arithmetic, on vectors (V of int32, F of float). A multiplication rebiases the
// exponent, which also normalises subnormals.
template <class F, class V>
INLINE F float_of_half_bits(V h) {
    const V magnitude = (h & 0x7fff) << 13;
    const V special = (magnitude >= (0x7c00 << 13)) & 0x7f800000;
    const F scaled = bits_as<F>(magnitude) * 0x1p112f;
    return bits_as<F>(bits_as<V>(scaled) | special | (h & 0x8000) << 16);
}

INLINE vf load_half(const uint16_t* p) {
#if defined(NATIVE_AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(NATIVE_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(NATIVE_NEON)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    return float_of_half_bits<vf>(widen(p));
#endif
}

INLINE vf load_bfloat(const uint16_t* p) { return bits_as<vf>(widen(p) << 16); }

INLINE float half_to_float(uint16_t h) {
#if defined(NATIVE_AVX512) || defined(NATIVE_AVX2)
    return _cvtsh_ss(h);
#else
    vu16 v{};
    v[0] = h;
    return float_of_half_bits<vf>(convert<vi>(v))[0];
#endif
}

// Rounds to nearest even; NaN stays NaN, overflow becomes infinity.
INLINE uint16_t float_to_half(float x) {
#if defined(NATIVE_AVX512) || defined(NATIVE_AVX2)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000)  // subnormal in half: adding 0.5 leaves the rounded bits at the bottom
        return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000));
    return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
#endif
}

INLINE void store_half(uint16_t* p, vf v) {
#if defined(NATIVE_AVX512)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(NATIVE_AVX2)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(NATIVE_NEON)
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
    for (int i = 0; i < W; i++) p[i] = float_to_half(v[i]);
#endif
}

// ---- functions -----------------------------------------------------------------------------------------------------

// e^x to about 1e-7 relative; 0 far below the range of normal floats, infinity above, NaN stays NaN.
INLINE vf exp(vf x) {
    const vi low = x < -87.0f, high = x > 88.5f;
    const vf z = x * 1.44269504088896341f;
    const vf shift = splat(0x1.8p23f);
    const vf n = (z + shift) - shift;  // nearest integer
    const vf r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    vf y = r * (1.0f / 5040) + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    // 2^n in two factors, so that e^88.5 does not overflow on the way.
    const vi k = convert<vi>(low | high ? vf{} : n);
    const vf power = bits_as<vf>(((k >> 1) + 127) << 23) * bits_as<vf>((k - (k >> 1) + 127) << 23);
    const vf result = y * power;
    return low ? vf{} : (high ? splat(HUGE_VALF) : result);
}

INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }

// GELU by its tanh formula x / 2 (1 + tanh u), which is x sigmoid(2 u).
INLINE vf gelu(vf x) {
    const vf u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp(-2.0f * u));
}

// SwiGLU with clamped factors and a shifted one (gpt-oss).
INLINE vf swiglu_clamped(vf gate, vf up) {
    const vf g = gate < 7.0f ? gate : splat(7.0f), low = up < -7.0f ? splat(-7.0f) : up;
    const vf u = low < 7.0f ? low : splat(7.0f);
    return g / (1.0f + exp(-1.702f * g)) * (u + 1.0f);
}

// Squared ReLU.
INLINE vf relu2(vf x) {
    const vf positive = x > 0.0f ? x : vf{};
    return positive * positive;
}

// Applies `apply(vf...) -> vf` to rows of n floats, with a padded last vector.
template <class Apply>
INLINE void map_floats(size_t n, float* out, const float* a, const float* b, Apply apply) {
    size_t i = 0;
    for (; i + W <= n; i += W) store(out + i, apply(load<vf>(a + i), load<vf>(b + i)));
    if (i == n) return;
    float tail[3][W] = {};
    std::memcpy(tail[0], a + i, (n - i) * sizeof(float));
    std::memcpy(tail[1], b + i, (n - i) * sizeof(float));
    store(tail[2], apply(load<vf>(tail[0]), load<vf>(tail[1])));
    std::memcpy(out + i, tail[2], (n - i) * sizeof(float));
}

// ---- scratch -------------------------------------------------------------------------------------------------------

[[maybe_unused]] INLINE Workspace& workspace() { return *thread_workspace; }
[[maybe_unused]] INLINE Scratch& thread_scratch() { return thread_workspace->rows; }

}  // namespace
}  // namespace zinc
