// A tile of mul_few, see mul_few_stage.h, whose chunks are copied as they are. Quants are decoded on their way from
// threadgroup memory to the matrices, as halves, which hold them exactly. The sums of a group are multiplied by its
// scale. It suits devices whose matrices are fast in half precision; its functions of matrices are the stand-in's.
#pragma once

#include "mul_few_stage.h"

METAL_FUNC uint four_bytes(threadgroup const uchar* p) { return *(threadgroup const uint*)p; }
METAL_FUNC uint four_bytes_of_pairs(threadgroup const uchar* p) {
    return ((threadgroup const ushort*)p)[0] | uint(((threadgroup const ushort*)p)[1]) << 16;
}

// The fifth bits of four quants: bit i of `bits` becomes bit 4 of byte i.
METAL_FUNC uint fifth_bits_of_four(uint bits) { return ((bits & 0xF) * 0x00204081 & 0x01010101) << 4; }

// How blocks are read in threadgroup memory. BLOCKS: of a chunk. STRIDE: bytes from one row to the next, which keep
// lanes that read at a time in different banks. ZERO: the quant of weight 0. FLIP: the signs of signed quants.
// quants(block, c): those of columns c to c + 3, as bytes. scale(block, g): scale and offset of group g of the block.
template <uint BLOCKS_, uint STRIDE_, uint GROUP_, uint ZERO_, bool OFFSET_, uint FLIP_ = 0>
struct RawLayout {
    static constant constexpr uint BLOCKS = BLOCKS_, STRIDE = STRIDE_, GROUP = GROUP_, ZERO = ZERO_, FLIP = FLIP_;
    static constant constexpr bool OFFSET = OFFSET_, KNOWN = true;
};

METAL_FUNC float half_at(threadgroup const uchar* p) { return float(*(threadgroup const half*)p); }
METAL_FUNC float2 scale_alone(threadgroup const uchar* block, uint) { return float2(half_at(block), 0.0f); }
METAL_FUNC float2 scale_and_offset(threadgroup const uchar* block, uint) {
    return float2(half_at(block), half_at(block + 2));
}
METAL_FUNC float2 k_scale(threadgroup const uchar* block, uint g) {
    threadgroup const uint2* words = (threadgroup const uint2*)block;
    float2 scale, offset;
    KScales::decode(words[0], words[1], g / 2, scale, offset);
    return float2(scale[g % 2], offset[g % 2]);
}

template <class B>
struct Raw {
    static constant constexpr bool KNOWN = false;
};

template <>
struct Raw<Q4_0> : RawLayout<8, 176, 32, 8, false> {
    static METAL_FUNC uint quants(threadgroup const uchar* block, uint c) {
        return four_bytes_of_pairs(block + 2 + c % 16) >> (c / 16 * 4) & 0x0F0F0F0F;
    }
    static METAL_FUNC float2 scale(threadgroup const uchar* block, uint g) { return scale_alone(block, g); }
};

template <>
struct Raw<Q4_1> : RawLayout<8, 176, 32, 0, true> {
    static METAL_FUNC uint quants(threadgroup const uchar* block, uint c) {
        return four_bytes(block + 4 + c % 16) >> (c / 16 * 4) & 0x0F0F0F0F;
    }
    static METAL_FUNC float2 scale(threadgroup const uchar* block, uint g) { return scale_and_offset(block, g); }
};

template <>
struct Raw<Q5_0> : RawLayout<8, 208, 32, 16, false> {
    static METAL_FUNC uint quants(threadgroup const uchar* block, uint c) {
        const uint high = fifth_bits_of_four(four_bytes_of_pairs(block + 2) >> c);
        return (four_bytes_of_pairs(block + 6 + c % 16) >> (c / 16 * 4) & 0x0F0F0F0F) | high;
    }
    static METAL_FUNC float2 scale(threadgroup const uchar* block, uint g) { return scale_alone(block, g); }
};

template <>
struct Raw<Q5_1> : RawLayout<8, 208, 32, 0, true> {
    static METAL_FUNC uint quants(threadgroup const uchar* block, uint c) {
        const uint high = fifth_bits_of_four(four_bytes(block + 4) >> c);
        return (four_bytes(block + 8 + c % 16) >> (c / 16 * 4) & 0x0F0F0F0F) | high;
    }
    static METAL_FUNC float2 scale(threadgroup const uchar* block, uint g) { return scale_and_offset(block, g); }
};

template <>
struct Raw<Q8_0> : RawLayout<4, 144, 32, 128, false, 0x80808080> {
    static METAL_FUNC uint quants(threadgroup const uchar* block, uint c) { return four_bytes_of_pairs(block + 2 + c); }
    static METAL_FUNC float2 scale(threadgroup const uchar* block, uint g) { return scale_alone(block, g); }
};

template <>
struct Raw<Q4_K> : RawLayout<1, 144, 32, 0, true> {
    static METAL_FUNC uint quants(threadgroup const uchar* block, uint c) {
        return four_bytes(block + 16 + c / 64 * 32 + c % 32) >> (c % 64 / 32 * 4) & 0x0F0F0F0F;
    }
    static METAL_FUNC float2 scale(threadgroup const uchar* block, uint g) { return k_scale(block, g); }
};

template <>
struct Raw<Q5_K> : RawLayout<1, 176, 32, 0, true> {
    static METAL_FUNC uint quants(threadgroup const uchar* block, uint c) {
        const uint high = four_bytes(block + 16 + c % 32) >> (c / 32) & 0x01010101;
        const uint low = four_bytes(block + 48 + c / 64 * 32 + c % 32) >> (c % 64 / 32 * 4) & 0x0F0F0F0F;
        return low | high << 4;
    }
    static METAL_FUNC float2 scale(threadgroup const uchar* block, uint g) { return k_scale(block, g); }
};

template <>
struct Raw<Q6_K> : RawLayout<1, 240, 16, 32, false> {
    static METAL_FUNC uint quants(threadgroup const uchar* block, uint c) {
        const uint high = four_bytes_of_pairs(block + 128 + c / 128 * 32 + c % 32) >> (c % 128 / 32 * 2) & 0x03030303;
        const uint low = four_bytes_of_pairs(block + c / 128 * 64 + c % 64) >> (c % 128 / 64 * 4) & 0x0F0F0F0F;
        return low | high << 4;
    }
    static METAL_FUNC float2 scale(threadgroup const uchar* block, uint g) {
        return float2(half_at(block + 208) * float(*(threadgroup const char*)(block + 192 + g)), 0.0f);
    }
};

// Quants of type B, as they are in memory.
template <class B_>
struct RawQuants {
    typedef B_ B;
    typedef Quantised<B> Q;
    typedef half T;
    typedef Raw<B> Layout;
    static constant constexpr uint GROUP = Layout::GROUP, COLUMNS = Layout::BLOCKS * B::BLOCK, GROUPS = COLUMNS / GROUP;
    static constant constexpr bool SCALED = true, OFFSET = Layout::OFFSET;
    static constant constexpr uint SCALE_BYTES = GROUPS * sizeof(float) * (OFFSET ? 2 : 1);
    // Two buffers, if a threadgroup has room for them: then a chunk is on its way while another is multiplied.
    static constant constexpr uint ROOM = 48 * 1024 / (FEW_ROWS * FEW_SIMDGROUPS);
    static constant constexpr uint BUFFERS = 2 * Layout::STRIDE + SCALE_BYTES <= ROOM ? 2 : 1;
    static constant constexpr uint ROW_BYTES = BUFFERS * Layout::STRIDE + SCALE_BYTES;
};

// Decodes four columns of a row of a chunk, from column 4 i of group `group` on.
template <class B>
struct DecodeFour {
    threadgroup const uchar* rows;
    uint column;

    METAL_FUNC uint2 operator()(uint row, uint i) const {
        typedef Raw<B> Layout;
        const uint c = column + 4 * i;
        threadgroup const uchar* block = rows + row * Layout::STRIDE + c / B::BLOCK * sizeof(B);
        const uint quants = Layout::quants(block, c % B::BLOCK) ^ Layout::FLIP;
        // A byte below the exponent of 1024 is a half that is larger by 1024.
        const half2 one = half2(half(1.0f)), minus = half2(half(-1024.0f - Layout::ZERO));
        return uint2(as_type<uint>(fma(as_type<half2>(spread_bytes(quants, false, 0x64)), one, minus)),
                     as_type<uint>(fma(as_type<half2>(spread_bytes(quants, true, 0x64)), one, minus)));
    }
};

// A simdgroup's chunk of the rows of a tile, copied in steps of eight bytes, or of two where rows are not aligned.
template <class Staged, uint R>
struct RawStage {
    typedef typename Staged::B B;
    typedef typename Staged::Layout Layout;
    static constant constexpr uint BYTES = Layout::BLOCKS * sizeof(B), GROUP = Staged::GROUP, GROUPS = Staged::GROUPS;
    static constant constexpr uint LANES = 8, EIGHTS = (BYTES + 6 + 7) / 8;  // lanes of a row, and their steps
    static_assert(EIGHTS * 8 <= Layout::STRIDE || BYTES % 8 == 0, "a chunk with what its alignment adds");

    device const uchar* w[2];
    uint first, m, per_matrix, row_bytes, lane, k;
    threadgroup uchar* memory;
    threadgroup uchar* bytes;  // of the chunk
    threadgroup float* scales;
    threadgroup float* offsets;
    uint buffer;

    template <class P, uint N>
    METAL_FUNC void begin(constant P& p, Matrices<N> weights, uint first_, threadgroup float* memory_, uint lane_) {
        w[0] = weights.w[0];
        w[1] = weights.w[N - 1];
        per_matrix = R / N;
        first = first_;
        m = p.m;
        k = p.k;
        row_bytes = p.row_bytes;
        lane = lane_;
        memory = (threadgroup uchar*)memory_;
        scales = memory_ + Staged::BUFFERS * R * Layout::STRIDE / sizeof(float);
        offsets = scales + R * GROUPS;
    }

    METAL_FUNC device const uchar* row_of(uint i) const {
        device const uchar* base = i < per_matrix ? w[0] : w[1];
        return base + ulong(min(first + i % per_matrix, m - 1)) * row_bytes;
    }

    METAL_FUNC bool is_aligned() const { return (row_bytes | k / B::BLOCK * uint(sizeof(B))) % 8 == 0; }

    // Copies a chunk to one of the buffers. Eights that hold its first and last bytes do not go beyond an aligned row.
    METAL_FUNC void copy(uint chunk, uint buffer) {
        threadgroup uchar* room = memory + buffer * R * Layout::STRIDE;
        const uint length = k / B::BLOCK * uint(sizeof(B)), begin = chunk * BYTES, end = min(begin + BYTES, length);
        if (is_aligned()) {
            const uint before = begin % 8, n = (end - begin + before + 7) / 8;
            for (uint r = lane / LANES; r < R; r += SIMD / LANES) {
                device const uchar* from = row_of(r) + (begin - before);
                threadgroup uchar* to = room + r * Layout::STRIDE;
                UNROLL for (uint i = 0; i < EIGHTS; i += LANES) {
                    const uint at = i + lane % LANES;
                    if (at < n) copy_eight((threadgroup uint2*)to + at, (device const uint2*)from + at);
                }
            }
        } else {
            for (uint r = 0; r < R; r++) {
                device const ushort* from = (device const ushort*)(row_of(r) + begin);
                threadgroup ushort* to = (threadgroup ushort*)(room + r * Layout::STRIDE);
                for (uint i = lane; i < (end - begin) / 2; i += SIMD) to[i] = from[i];
            }
        }
    }

    METAL_FUNC void load(uint chunk) {
        buffer = 0;
        if (Staged::BUFFERS > 1) copy(chunk, 0);
        end_copies();
    }

    // Waits for a chunk, while the next is on its way to the other buffer. Then each lane decodes the scales of a row.
    METAL_FUNC void stage(uint chunk, uint next, uint n_chunks) {
        bytes = memory + buffer * R * Layout::STRIDE + (is_aligned() ? chunk * BYTES % 8 : 0);
        if (Staged::BUFFERS > 1) {
            buffer = 1 - buffer;
            if (next < n_chunks) copy(next, buffer);
        } else {
            copy(chunk, 0);
        }
        end_copies();
        wait_for_copies<Staged::BUFFERS - 1>();
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (uint r = lane; r < R; r += SIMD) {
            threadgroup const uchar* row = bytes + r * Layout::STRIDE;
            UNROLL for (uint g = 0; g < GROUPS; g++) {
                if (column(chunk, g) < k) {
                    const float2 s = Layout::scale(row + g * GROUP / B::BLOCK * sizeof(B), g % (B::BLOCK / GROUP));
                    scales[g * R + r] = s.x;
                    if (Staged::OFFSET) offsets[g * R + r] = s.y;
                }
            }
        }
    }

    METAL_FUNC uint column(uint chunk, uint group) const { return chunk * Staged::COLUMNS + group * GROUP; }

    // Of a group, by row.
    METAL_FUNC threadgroup const float* scales_of(uint group) const { return scales + group * R; }
    METAL_FUNC threadgroup const float* offsets_of(uint group) const { return offsets + group * R; }

    template <class Left, uint N>
    METAL_FUNC void left(thread Left (&a)[N], uint group, uint i) const {
        const DecodeFour<B> decode{bytes + i * MATRIX_ROWS * Layout::STRIDE, group * GROUP};
        fill_columns(a, decode);
    }
};
