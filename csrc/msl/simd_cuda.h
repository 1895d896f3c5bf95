// How the lanes of a simdgroup exchange values on CUDA: a simdgroup is a warp, and all of its lanes take part.
#pragma once

#include "runtime.h"
#include "simd_operations.h"

namespace metal {

namespace detail {

using zinc::msl::simd_width;

constexpr uint all_lanes = 0xffffffffu;

METAL_FUNC uint current_lane() { return threadIdx.x % simd_width; }

// Loads and stores of matrices need no meeting of the lanes.
METAL_FUNC void arrive(const char*, const char*, uint) {}

// Which lane a lane reads from, for one 32-bit word.
struct FromLane {
    template <uint width>
    static METAL_FUNC uint word(uint w, uint argument) {
        return __shfl_sync(all_lanes, w, int(argument), width);
    }
};
struct FromXor {
    template <uint width>
    static METAL_FUNC uint word(uint w, uint argument) {
        return __shfl_xor_sync(all_lanes, w, int(argument), width);
    }
};
struct FromBelow {  // shuffle_up: lanes without a source keep their own value
    template <uint width>
    static METAL_FUNC uint word(uint w, uint argument) {
        return __shfl_up_sync(all_lanes, w, argument, width);
    }
};
struct FromAbove {
    template <uint width>
    static METAL_FUNC uint word(uint w, uint argument) {
        return __shfl_down_sync(all_lanes, w, argument, width);
    }
};
struct FromBelowRotating {  // the hardware takes the lane modulo the width
    template <uint width>
    static METAL_FUNC uint word(uint w, uint argument) {
        return __shfl_sync(all_lanes, w, int(current_lane() - argument), width);
    }
};
struct FromAboveRotating {
    template <uint width>
    static METAL_FUNC uint word(uint w, uint argument) {
        return __shfl_sync(all_lanes, w, int(current_lane() + argument), width);
    }
};

// A value of any size travels as words.
template <class From, uint width>
struct Shuffle {
    template <class T>
    static METAL_FUNC T apply(const T& value, uint argument) {
        constexpr uint n_words = (sizeof(T) + 3) / 4;
        uint words[n_words] = {};
        __builtin_memcpy(words, static_cast<const void*>(&value), sizeof(T));
        for (uint i = 0; i < n_words; i++) words[i] = From::template word<width>(words[i], argument);
        T result;
        __builtin_memcpy(static_cast<void*>(&result), words, sizeof(T));
        return result;
    }
};

// One instruction for 32-bit integers of a whole simdgroup.
template <class T>
concept Word = std::is_same_v<T, int> || std::is_same_v<T, uint>;
template <Word T>
METAL_FUNC T reduce_words(Add, T x) {
    return T(__reduce_add_sync(all_lanes, uint(x)));
}
template <Word T>
METAL_FUNC T reduce_words(Largest, T x) {
    return __reduce_max_sync(all_lanes, x);
}
template <Word T>
METAL_FUNC T reduce_words(Smallest, T x) {
    return __reduce_min_sync(all_lanes, x);
}
template <Word T>
METAL_FUNC T reduce_words(BitAnd, T x) {
    return T(__reduce_and_sync(all_lanes, uint(x)));
}
template <Word T>
METAL_FUNC T reduce_words(BitOr, T x) {
    return T(__reduce_or_sync(all_lanes, uint(x)));
}
template <Word T>
METAL_FUNC T reduce_words(BitXor, T x) {
    return T(__reduce_xor_sync(all_lanes, uint(x)));
}

// Every lane of a group of `width` gets the result over the group: the tree of the CPU lane, so the same rounding.
template <class Op, uint width>
struct Reduce {
    template <class T>
    static METAL_FUNC T apply(const T& value, uint) {
        if constexpr (width == simd_width && requires { reduce_words(Op(), value); }) {
            return reduce_words(Op(), value);
        } else {
            T all = value;
            for (uint step = width / 2; step > 0; step /= 2)
                all = Op::apply(all, Shuffle<FromXor, width>::apply(all, step));
            return all;
        }
    }
};

template <class Op, bool inclusive>
struct Prefix {
    template <class T>
    static METAL_FUNC T apply(const T& value, uint) {
        T sum = value;
        for (uint step = 1; step < simd_width; step *= 2) {
            const T below = Shuffle<FromBelow, simd_width>::apply(sum, step);
            if (current_lane() >= step) sum = Op::apply(below, sum);
        }
        if (inclusive) return sum;
        const T before = Shuffle<FromBelow, simd_width>::apply(sum, 1);
        return current_lane() == 0 ? Op::template identity<T>() : before;
    }
};

struct Ballot {
    template <class T>
    static METAL_FUNC T apply(const T&, uint argument) {
        return T(__ballot_sync(all_lanes, int(argument)));
    }
};

// Row and first column of a lane's two elements: as the matrix unit has its results.
METAL_FUNC constexpr uint matrix_row(uint lane) { return lane / 4; }
METAL_FUNC constexpr uint matrix_col(uint lane) { return lane % 4 * 2; }

// A float as two that the matrix unit takes, of 11 significant bits each: what they leave is 2^-22 of it. That is all
// of the narrower types in the first.
struct Split {
    uint high, low;
    METAL_FUNC explicit Split(float x) {
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(x));
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(x - __uint_as_float(high)));
    }
};

// sum += A B by the matrix unit, of which 8 by 8 matrices fill a half. Its column q of A is column 2 q of ours, q + 4
// is 2 q + 1, and so for the rows of B: a sum does not mind, and A's elements are where they should be.
METAL_FUNC void multiply_tf32(float2& sum, uint a0, uint a1, uint b0, uint b1) {
    [[maybe_unused]] float unused0, unused1;
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(sum.x), "=f"(sum.y), "=f"(unused0), "=f"(unused1)
        : "r"(a0), "r"(0), "r"(a1), "r"(0), "r"(b0), "r"(b1), "f"(sum.x), "f"(sum.y), "f"(0.0f), "f"(0.0f));
}

// Element (row, lane / 4) of a matrix.
template <class T>
METAL_FUNC float column_of_lane(const vec<T, 2>& m, uint row) {
    const uint column = current_lane() / 4;
    const vec<T, 2> pair = Shuffle<FromLane, simd_width>::apply(m, row * 4 + column / 2);
    return column % 2 ? float(pair.y) : float(pair.x);
}

// D = A B + C with float accumulation; the result travels back in c. The matrix unit rounds its sums towards zero: it
// gets those of eight products alone.
struct MultiplyAccumulate {
    template <class A, class B, class C>
    static METAL_FUNC Product<A, B, C> apply(const Product<A, B, C>& in, uint) {
        const uint k = current_lane() % 4 * 2;
        const Split a0(float(in.a.x)), a1(float(in.a.y));
        const Split b0(column_of_lane(in.b, k)), b1(column_of_lane(in.b, k + 1));
        float2 sum(0.0f, 0.0f);
        multiply_tf32(sum, a0.low, a1.low, b0.high, b1.high);
        multiply_tf32(sum, a0.high, a1.high, b0.low, b1.low);
        multiply_tf32(sum, a0.high, a1.high, b0.high, b1.high);
        return {in.a, in.b, vec<C, 2>(C(float(in.c.x) + sum.x), C(float(in.c.y) + sum.y))};
    }
};

template <class Rule, class T>
METAL_FUNC T exchange(const T& value, uint argument, const char*, const char*, uint) {
    return Rule::apply(value, argument);
}

}  // namespace detail
}  // namespace metal
