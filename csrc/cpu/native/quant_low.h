// Native structs of the K types of 2 and 3 bits.
#pragma once

#include "cpu/native/quant_bytes.h"

namespace zinc {
namespace {

// One per 16 weights.
struct LowScales {
    alignas(64) float scale[16];
    alignas(64) float offset[16];
};

// The bit pairs of part j: pair j % 4 of the 32 bytes of its half.
INLINE Bytes two_bits(const uint8_t* qs, int j) { return move_bits(load<Bytes>(qs + j / 4 * 32), j % 4 * 2, 0, 3); }

struct Q2_K {
    static constexpr int GROUP_BYTES = 84;
    using Scales = LowScales;
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const float d = half_to_float(load<uint16_t>(group + 80)), dmin = half_to_float(load<uint16_t>(group + 82));
        for (int i = 0; i < 16; i += W) {
            const vi packed = widen(group + i);
            store(s.scale + i, convert<vf>(packed & 15) * d);
            store(s.offset + i, convert<vf>(packed >> 4) * -dmin);
        }
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        return weights_of<2>(two_bits(group + 16, j), s.scale + 2 * j, s.offset + 2 * j);
    }
};

struct Q3_K {
    static constexpr int GROUP_BYTES = 110;
    using Scales = LowScales;
    static INLINE void scales(const uint8_t* group, int, Scales& s) {
        const float d = half_to_float(load<uint16_t>(group + 108));
        const uint64_t low = load<uint64_t>(group + 96), pairs = load<uint32_t>(group + 104);
        const uint64_t both = pairs | pairs << 30;  // the pairs of scales 0-3, and above them those of 4-7
        const uint64_t four = 0x0F0F0F0F0F0F0F0F, two = 0x3030303030303030;
        put((low & four) | (both << 4 & two), d, s, 0);
        put((low >> 4 & four) | (both & two), d, s, 8);
    }
    static INLINE Weights weights(const uint8_t* group, int j, const Scales& s) {
        const Bytes quants = two_bits(group + 32, j) | move_bits(load<Bytes>(group), j, 2, 4);
        return weights_of<2>(quants, s.scale + 2 * j, s.offset + 2 * j);
    }

  private:
    static INLINE void put(uint64_t scales, float d, Scales& s, int i) {
        const f32x8 scale = (floats_of_bytes(scales) - 32.0f) * d;
        store(s.scale + i, scale);
        store(s.offset + i, scale * -4.0f);
    }
};

}  // namespace
}  // namespace zinc
