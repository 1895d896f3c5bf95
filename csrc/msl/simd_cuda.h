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

// The lane that holds an element of a matrix: the inverse of matrix_row and matrix_col.
METAL_FUNC constexpr uint matrix_lane(uint row, uint col) {
    return (row & 4) << 2 | (row & 3) << 1 | (col & 4) << 1 | (col >> 1 & 1);
}

// D = A B + C with float accumulation, rounded once; the result travels back in c. Two columns of A and two rows of B
// at a time, as their neighbours lie in one lane.
struct MultiplyAccumulate {
    template <class A, class B, class C>
    static METAL_FUNC Product<A, B, C> apply(const Product<A, B, C>& in, uint) {
        const uint row = matrix_row(current_lane()), col = matrix_col(current_lane());
        float2 sum(float(in.c.x), float(in.c.y));
        for (uint k = 0; k < 8; k += 2) {
            const vec<A, 2> a = Shuffle<FromLane, simd_width>::apply(in.a, matrix_lane(row, k));
            const vec<B, 2> b0 = Shuffle<FromLane, simd_width>::apply(in.b, matrix_lane(k, col));
            const vec<B, 2> b1 = Shuffle<FromLane, simd_width>::apply(in.b, matrix_lane(k + 1, col));
            sum += float(a.x) * float2(float(b0.x), float(b0.y));
            sum += float(a.y) * float2(float(b1.x), float(b1.y));
        }
        return {in.a, in.b, vec<C, 2>(C(sum.x), C(sum.y))};
    }
};

template <class Rule, class T>
METAL_FUNC T exchange(const T& value, uint argument, const char*, const char*, uint) {
    return Rule::apply(value, argument);
}

}  // namespace detail
}  // namespace metal
