// One struct per tensor type of quant_types.h, for the native kernels. Layouts are ggml's;
// python/zincmetal/gguf/quants.py is the oracle.
#pragma once

#include "cpu/native/quant_weights.h"
#include "quant_types.h"

namespace zinc {
namespace {

struct Q4_0 : Blocks32<18, false, 8> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = lanes(group + j * BYTES + 2, i, s, j);
        return w;
    }
};

struct Q4_1 : Blocks32<20, true, 0> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = lanes(group + j * BYTES + 4, i, s, j);
        return w;
    }
};

// A fifth bit per weight, in a word before the nibbles.
template <int BLOCK_BYTES, bool MIN, int ZERO, int BITS_AT>
struct FiveBits : Blocks32<BLOCK_BYTES, MIN, ZERO> {
    using Base = Blocks32<BLOCK_BYTES, MIN, ZERO>;
    static INLINE Weights weights(const uint8_t* group, int j, const typename Base::Scales& s) {
        const uint8_t* bits = group + j * BLOCK_BYTES + BITS_AT;
        const vi fifth = load<int32_t>(bits) - vi{};
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] =
            add_where(Base::lanes(bits + 4, i, s, j), fifth, bit_lanes(i * W), 16 * s.scale(j));
        return w;
    }
};

struct Q5_0 : FiveBits<22, false, 16, 2> {};
struct Q5_1 : FiveBits<24, true, 0, 4> {};

struct Q8_0 : Blocks32<34, false, 0> {
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] =
            convert<vf>(widen(signed_bytes(group + j * BYTES + 2 + i * W))) * s.scale(j);
        return w;
    }
};

// Blocks of 256 in eight parts of 32, each with a scale and an offset.
struct KScales {
    alignas(64) float scale[8];
    alignas(64) float offset[8];
};

// d, dmin (half), then eight 6-bit scales and eight 6-bit minima in 12 bytes.
INLINE void k_scales(const uint8_t* block, KScales& s) {
    const float d = half_to_float(load<uint16_t>(block)), dmin = half_to_float(load<uint16_t>(block + 2));
    const uint32_t first = load<uint32_t>(block + 4), second = load<uint32_t>(block + 8),
                   third = load<uint32_t>(block + 12);
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
    const uint64_t scales = (first & six) | uint64_t((third & four) | (first >> 2 & two)) << 32;
    const uint64_t minima = (second & six) | uint64_t((third >> 4 & four) | (second >> 2 & two)) << 32;
    store(s.scale, floats_of_bytes(scales) * d);
    store(s.offset, floats_of_bytes(minima) * -dmin);
}

struct Q4_K {
    static constexpr int GROUP_BYTES = 144;
    using Scales = KScales;
    static INLINE void scales(const uint8_t* group, int, Scales& s) { k_scales(group, s); }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] =
            nibbles<0>(group + 16 + j / 2 * 32 + i * W, j % 2, s.scale[j], s.offset[j]);
        return w;
    }
};

struct Q5_K {
    static constexpr int GROUP_BYTES = 176;
    using Scales = KScales;
    static INLINE void scales(const uint8_t* group, int, Scales& s) { k_scales(group, s); }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const Bytes four = move_bits(load<Bytes>(group + 48 + j / 2 * 32), j % 2 * 4, 0, 0x0f);
        const Bytes fifth = move_bits(load<Bytes>(group + 16), j, 4, 0x10);  // bit j of a byte belongs to part j
        uint8_t quants[BLOCK];
        store(quants, four | fifth);
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] = five_bits(quants + i * W, s.scale[j], s.offset[j]);
        return w;
    }
};

struct Q6_K {
    static constexpr int GROUP_BYTES = 210;
    struct Scales {
        alignas(64) float scale[16];  // per 16 weights
    };
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const float d = half_to_float(load<uint16_t>(group + 208));
        for (int i = 0; i < 16; i += W) store(s.scale + i, convert<vf>(widen(signed_bytes(group + 192 + i))) * d);
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const int half = j / 4, pair = j % 4;
        const Bytes low = load<Bytes>(group + half * 64 + pair % 2 * 32), high = load<Bytes>(group + 128 + half * 32);
        const Bytes six = move_bits(low, pair / 2 * 4, 0, 0x0f) | move_bits(high, pair * 2, 4, 0x30);
        int8_t quants[BLOCK];
        store(quants, six - uint8_t(32));
        Weights w;
        UNROLL for (int i = 0; i < BLOCK / W; i++) w.lanes[i] =
            convert<vf>(widen(quants + i * W)) * s.scale[2 * j + i * W / 16];
        return w;
    }
};

// ---- types that are their own weights ------------------------------------------------------------------------------

struct F32 {
    static constexpr int BYTES = 4;
    static INLINE vf lanes(const uint8_t* p) { return load<vf>(p); }
    static INLINE float one(const uint8_t* p) { return load<float>(p); }
};

struct F16 {
    static constexpr int BYTES = 2;
    static INLINE vf lanes(const uint8_t* p) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
    static INLINE float one(const uint8_t* p) { return half_to_float(load<uint16_t>(p)); }
};

struct BF16 {
    static constexpr int BYTES = 2;
    static INLINE vf lanes(const uint8_t* p) { return load_bfloat(reinterpret_cast<const uint16_t*>(p)); }
    static INLINE float one(const uint8_t* p) { return bits_as<float>(uint32_t(load<uint16_t>(p)) << 16); }
};

// The list of types gives the layout of their weights; a native struct has its own layout.
template <class B>
using Quantised = B;
template <class B>
using Plain = B;

template <class T>
concept Grouped = requires { T::GROUP_BYTES; };

// Bytes of a row of n weights.
template <class T>
constexpr size_t row_bytes(uint32_t n) {
    if constexpr (Grouped<T>)
        return size_t(n) * T::GROUP_BYTES / GROUP;
    else
        return size_t(n) * T::BYTES;
}

// `count` weights of a row, from column `first` on, as floats. Quantised weights: whole blocks of one group.
template <class T>
INLINE void dequantise(const uint8_t* row, uint32_t first, uint32_t count, float* out) {
    if constexpr (Grouped<T>) {
        const uint8_t* group = row + size_t(first / GROUP) * T::GROUP_BYTES;
        const int block = int(first % GROUP / BLOCK), n_blocks = int(count / BLOCK);
        typename T::Scales scales;
        T::scales(group, block + n_blocks, scales);
        settle(scales);
        for (int j = 0; j < n_blocks; j++) store(out + j * BLOCK, T::weights(group, block + j, scales));
    } else {
        const uint8_t* at = row + size_t(first) * T::BYTES;
        uint32_t i = 0;
        for (; i + W <= count; i += W) store(out + i, T::lanes(at + i * T::BYTES));
        for (; i < count; i++) out[i] = T::one(at + i * T::BYTES);
    }
}

}  // namespace
}  // namespace zinc
