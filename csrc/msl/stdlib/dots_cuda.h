// What mul_mv_tile.h needs of a device: products of halves on the matrix unit, and copies of 16 bytes. CUDA alone.
#pragma once

#include "vector.h"

namespace metal {

// c += A B. A is 16 by 16 halves, B 16 by 8. Lane 4 g + t has of A the pairs of columns (2 t, 2 t + 1) and (2 t + 8,
// 2 t + 9), rows g and g + 8; of B these pairs of rows, column g; of c columns 2 t and 2 t + 1, rows g and g + 8.
METAL_FUNC void multiply_halves(vec<float, 4>& c, const vec<uint, 2>& a_first, const vec<uint, 2>& a_second,
                                const vec<uint, 2>& b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
        : "r"(a_first.x), "r"(a_second.x), "r"(a_first.y), "r"(a_second.y), "r"(b.x), "r"(b.y));
}

// Two floats as halves, the first in the low bits.
METAL_FUNC uint two_halves(float first, float second) {
    uint both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// As copy_eight, past the first cache: n bytes, then zeros up to 16. Both addresses are multiples of 16.
METAL_FUNC void copy_sixteen(unsigned char* to, const unsigned char* from, uint n) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint(__cvta_generic_to_shared(to))), "l"(from),
                 "r"(n)
                 : "memory");
}
// All sixteen.
METAL_FUNC void copy_sixteen(unsigned char* to, const unsigned char* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
}

// The word that begins `shift` bits above the start of two words.
METAL_FUNC uint word_between(uint low, uint high, uint shift) { return __funnelshift_r(low, high, shift); }

}  // namespace metal
