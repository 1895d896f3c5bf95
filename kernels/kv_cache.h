// The KV cache: the place of a position of the sequence, and the layout of a head vector at a position.
#pragma once

#include "quant_blocks.h"
#include "shapes.h"

METAL_FUNC ulong cache_row(device const uint* pages, uint position) {
    return ulong(pages[position / KV_PAGE]) * KV_PAGE + position % KV_PAGE;
}

// The types of a cache, one struct each. A head vector is head_dim / ELEMENTS units.
//   quad    elements 4 i to 4 i + 3 as they are stored
//   value   a quad as floats; a separate call, so that many loads can be under way before the first is used
//   put     makes x element i; a whole simdgroup writes 32 consecutive elements at a time, or the rest of them
struct CacheF32 {
    typedef float4 Unit;
    typedef float4 Quad;
    static constant constexpr uint ELEMENTS = 4;

    static METAL_FUNC Quad quad(device const Unit* head, uint i) { return head[i]; }
    static METAL_FUNC float4 value(Quad q) { return q; }
    static METAL_FUNC void put(device Unit* head, uint i, float x) { ((device float*)head)[i] = x; }
};

struct CacheF16 {
    typedef half4 Unit;
    typedef half4 Quad;
    static constant constexpr uint ELEMENTS = 4;

    static METAL_FUNC Quad quad(device const Unit* head, uint i) { return head[i]; }
    static METAL_FUNC float4 value(Quad q) { return float4(q); }
    static METAL_FUNC void put(device Unit* head, uint i, float x) { ((device half*)head)[i] = half(x); }
};

struct CacheQ8_0 {
    typedef Q8_0 Unit;
    struct Quad {
        uint quants;
        half d;
    };
    static constant constexpr uint ELEMENTS = 32;

    static METAL_FUNC Quad quad(device const Unit* head, uint i) {
        device const Q8_0* block = head + i / 8;
        return {as_type<uint>(ushort2(block->qs[2 * (i % 8)], block->qs[2 * (i % 8) + 1])), block->d};
    }
    // A byte at the end of 2^23's mantissa adds its value to the float: cheaper than a conversion.
    static METAL_FUNC float4 value(Quad q) {
        const uint bytes = q.quants ^ 0x80808080;  // 128 more each, so that none is negative
        const uint4 mantissas = uint4(bytes, bytes >> 8, bytes >> 16, bytes >> 24) & uint4(0xFF);
        return float(q.d) * (as_type<float4>(mantissas | uint4(0x4B000000)) - float4(8388608.0f + 128.0f));
    }

    // The largest magnitude of the block becomes 127.
    static METAL_FUNC void put(device Unit* head, uint i, float x) {
        device Q8_0* block = head + i / 32;
        const float largest = simd_max(fabs(x));
        // Far below the smallest half scale, the reciprocal is not a float either.
        const float quants = largest > 1e-30f ? 127.0f / largest : 0.0f;
        ((device int8_t*)block->qs)[i % 32] = int8_t(rint(x * quants));
        if (i % 32 == 0) block->d = half(largest / 127.0f);
    }
};
