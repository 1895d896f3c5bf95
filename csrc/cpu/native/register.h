// Included by every native kernel file. A file is compiled once per instruction set, with NATIVE_ISA naming it. It
// exports one table of its kernels. The table is constant data: code of this set must not run before the machine is
// checked.
#pragma once

#include "params.h"
#include "cpu/native/kernel.h"
#include "cpu/native/simd.h"

#define NATIVE_JOIN2(family, group, isa) native_##family##group##_##isa
#define NATIVE_JOIN(family, group, isa) NATIVE_JOIN2(family, group, isa)
#ifndef NATIVE_GROUP
#define NATIVE_GROUP  // of the types of quant_types.h: none
#endif
// NATIVE_TABLE(mul_mv) = {{"name", fn, grain}, ...}; ends with a kernel without a name.
#define NATIVE_TABLE(family)                                                                                           \
    extern const NativeKernel NATIVE_JOIN(family, NATIVE_GROUP, NATIVE_ISA)[];                                         \
    const NativeKernel NATIVE_JOIN(family, NATIVE_GROUP, NATIVE_ISA)[]

namespace zinc {
namespace {

struct Range {
    uint32_t begin, end;
};

// Piece i of n things that divide evenly, in order, into `pieces`. Native kernels cut their work only by the grid: they
// do not know the work of a threadgroup of the MSL kernel.
INLINE Range piece(uint32_t n, uint64_t i, uint32_t pieces) {
    const uint64_t each = (uint64_t(n) + pieces - 1) / pieces;
    return {uint32_t(i * each < n ? i * each : n), uint32_t((i + 1) * each < n ? (i + 1) * each : n)};
}

// Threadgroups [begin, end) of one line along the grid's x, and which line (y).
struct Line {
    uint32_t y;
    uint64_t begin, end;
};

// Calls f(line) for the lines that threadgroups [begin, end) are.
template <class F>
INLINE void for_lines(const NativeLaunch& l, uint64_t begin, uint64_t end, F&& f) {
    const uint64_t width = l.grid[0];
    for (uint64_t y = begin / width; begin < end; y++) {
        const uint64_t stop = (y + 1) * width < end ? (y + 1) * width : end;
        f(Line{uint32_t(y), begin - y * width, stop - y * width});
        begin = stop;
    }
}

// Calls f(x, y) for threadgroups [begin, end) of a grid whose y is rows of the step. Skips rows that are not real.
template <class F>
INLINE void for_rows(const NativeLaunch& l, uint64_t begin, uint64_t end, uint32_t n_tokens, F&& f) {
    for (uint64_t i = begin; i < end; i++)
        if (i / l.grid[0] < n_tokens) f(uint32_t(i % l.grid[0]), uint32_t(i / l.grid[0]));
}

// The range of [0, n) for threadgroups [begin, end) of a grid `width` wide.
INLINE Range pieces(uint32_t n, uint64_t begin, uint64_t end, uint32_t width) {
    return {piece(n, begin, width).begin, piece(n, end - 1, width).end};
}

}  // namespace
}  // namespace zinc
