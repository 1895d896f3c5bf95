// The exchange of values between the lanes of a simdgroup on CUDA: a simdgroup is a warp, and all of its lanes call.
#pragma once

#include "msl/run/runtime.h"
#include "simd_operations.h"

namespace metal {

namespace detail {

using zinc::msl::simd_width;

constexpr uint all_lanes = 0xffffffffu;

METAL_FUNC uint current_lane() { return threadIdx.x % simd_width; }

// Loads and stores of matrices do not synchronise the lanes.
METAL_FUNC void arrive(const char*, const char*, uint) {}

// The lane that a lane reads from, for one 32-bit word.
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

// Every lane of a group of `width` gets the result over the group. The tree is the CPU's, and so is the rounding.
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

// Row and first column of a lane's two elements, as in the matrix unit's results.
METAL_FUNC constexpr uint matrix_row(uint lane) { return lane / 4; }
METAL_FUNC constexpr uint matrix_col(uint lane) { return lane % 4 * 2; }

// A lane's share of a matrix: its elements in the layout of results. A loaded matrix also has the elements that the
// lane needs if the matrix is the right one of a product. An unused load costs nothing.
template <class T>
struct Held {
    vec<T, 2> elements;  // (row, column) and (row, column + 1)
    vec<T, 2> crossed;   // (column, row) and (column + 1, row)
    bool has_crossed = false;

    METAL_FUNC vec<T, 2>& change() {
        has_crossed = false;
        return elements;
    }
    template <class Elements>
    METAL_FUNC void load(const Elements& source, bool transpose) {
        elements = source(transpose);
        crossed = source(!transpose);
        has_crossed = true;
    }
    METAL_FUNC void cross(const vec<T, 2>& pair) {
        crossed = pair;
        has_crossed = true;
    }
    METAL_FUNC float2 right() const {
        if (has_crossed) return float2(float(crossed.x), float(crossed.y));
        const uint row = matrix_col(current_lane());
        return float2(element(row), element(row + 1));
    }

  private:
    // Element (row, lane / 4).
    METAL_FUNC float element(uint row) const {
        const uint column = current_lane() / 4;
        const vec<T, 2> pair = Shuffle<FromLane, simd_width>::apply(elements, row * 4 + column / 2);
        return column % 2 ? float(pair.y) : float(pair.x);
    }
};

// Two floats as four numbers of the matrix unit, with 11 significant bits each: the error is 2^-21 of a float. Narrower
// types fit into the high numbers. The unit drops the excess bits of the low numbers.
struct Split {
    uint2 high, low;
    METAL_FUNC explicit Split(float2 v) {
        for (uint i = 0; i < 2; i++) {
            high[i] = (__float_as_uint(v[i]) + 0x1000) & 0xFFFFE000;
            low[i] = __float_as_uint(v[i] - __uint_as_float(high[i]));
        }
    }
};

// sum += A B by the matrix unit. Its A, and its result, are two of our matrices, one below the other. Its column q of A
// is our column 2 q, and q + 4 is 2 q + 1. The rows of B are permuted in the same way, so the sum does not change, and
// A's elements are already in the right lanes.
METAL_FUNC void multiply_tf32(float4& sum, uint2 upper, uint2 lower, uint2 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
        : "r"(upper.x), "r"(lower.x), "r"(upper.y), "r"(lower.y), "r"(b.x), "r"(b.y));
}

template <class T>
METAL_FUNC float2 as_float2(const vec<T, 2>& v) {
    return float2(float(v.x), float(v.y));
}

// The matrix unit rounds its sums towards zero, so it only gets sums of eight products. A single matrix leaves half of
// the unit for its low numbers.
template <class A, class B, class C>
METAL_FUNC vec<C, 2> multiply_accumulate(const Held<A>& a, const Held<B>& b, const vec<C, 2>& c, const char*, uint) {
    const Split left(as_float2(a.elements)), right(b.right());
    float4 sum(0.0f);
    multiply_tf32(sum, left.high, left.low, right.low);
    multiply_tf32(sum, left.high, left.low, right.high);
    return vec<C, 2>(C(float(c.x) + (sum.x + sum.z)), C(float(c.y) + (sum.y + sum.w)));
}

// Pairs of the left matrices go together.
template <class C, class A, class B, uint M>
METAL_FUNC void multiply_accumulate_each(C (&c)[M], const A (&a)[M], const B& b, const char*, uint) {
    static_assert(M % 2 == 0);
    const Split right(b.held.right());
#pragma unroll
    for (uint i = 0; i < M; i += 2) {
        const Split upper(as_float2(a[i].held.elements)), lower(as_float2(a[i + 1].held.elements));
        float4 sum(0.0f);
        multiply_tf32(sum, upper.low, lower.low, right.high);
        multiply_tf32(sum, upper.high, lower.high, right.low);
        multiply_tf32(sum, upper.high, lower.high, right.high);
        c[i].held.elements += float2(sum.x, sum.y);
        c[i + 1].held.elements += float2(sum.z, sum.w);
    }
}

// Neighbours in memory, as one load.
template <class T, uint N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Neighbours {
    T of[N];
};

// A lane takes four neighbours of its row for every two matrices.
template <class T>
METAL_FUNC vec<T, 2> pair_of(const T* two) {
    vec<T, 2> pair;
    pair.data[0] = two[0];
    pair.data[1] = two[1];
    return pair;
}

template <class M, class T, uint N>
METAL_FUNC void load_columns(M (&m)[N], const T* source, ulong stride, const char*, uint) {
    static_assert(N % 2 == 0);
    const T* at = source + matrix_row(current_lane()) * stride + 2 * matrix_col(current_lane());
#pragma unroll
    for (uint i = 0; i < N; i++) {
        const auto four = *reinterpret_cast<const Neighbours<T, 4>*>(at + i / 2 * 16);
        m[i].held.change() = pair_of(four.of + i % 2 * 2);
    }
}

// Four matrices of halves, a lane's elements as in results. The address is that of row lane % 8 of matrix lane / 8.
METAL_FUNC void load_four(uint (&words)[4], const half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(uint(__cvta_generic_to_shared(row)))
                 : "memory");
}
METAL_FUNC void load_four_transposed(uint (&words)[4], const half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(uint(__cvta_generic_to_shared(row)))
                 : "memory");
}

// In the order of multiply_halves: a lane gets neighbours among its registers.
template <class Matrix, class T, uint M, uint N>
METAL_FUNC void load_left(Matrix (&m)[M][N], const T* source, uint stride, const char*, uint) {
    const uint lane = current_lane();
    if constexpr (std::is_same_v<T, half> && M % 2 == 0 && N % 2 == 0) {
        const T* row = source + lane / 16 * stride + lane % 16 * 8;
#pragma unroll
        for (uint j = 0; j < N; j += 2) {
#pragma unroll
            for (uint i = 0; i < M; i += 2) {
                uint words[4];
                load_four(words, row + j * stride + 64 * i);
#pragma unroll
                for (uint w = 0; w < 4; w++) {
                    m[i + w % 2][j + w / 2].held.change() = as_type<vec<half, 2>>(words[w]);
                }
            }
        }
    } else {
        const T* at = source + 2 * lane;
        for (uint i = 0; i < M; i++)
            for (uint j = 0; j < N; j++) m[i][j].held.change() = pair_of(at + j * stride + 64 * i);
    }
}

// Right matrices of halves by fours, as they lie, or with rows for columns.
template <bool TRANSPOSED, class M, uint N>
METAL_FUNC void load_right_fours(M (&m)[N], const half* source, uint stride) {
    const half* row = source + current_lane() / 8 * stride + current_lane() % 8 * 8;
#pragma unroll
    for (uint j = 0; j < N; j += 4) {
        uint words[4];
        if constexpr (TRANSPOSED)
            load_four_transposed(words, row + j * stride);
        else
            load_four(words, row + j * stride);
#pragma unroll
        for (uint w = 0; w < 4; w++) m[j + w].held.cross(as_type<vec<half, 2>>(words[w]));
    }
}

template <class M, class T, uint N>
METAL_FUNC void load_right(M (&m)[N], const T* source, uint stride, const char*, uint) {
    if constexpr (std::is_same_v<T, half> && N % 4 == 0) {
        load_right_fours<false>(m, source, stride);
    } else {
        for (uint j = 0; j < N; j++) m[j].held.cross(pair_of(source + j * stride + 2 * current_lane()));
    }
}

template <class M, class T, uint N>
METAL_FUNC void load_right_rows(M (&m)[N], const T* source, uint stride, const char*, uint) {
    if constexpr (std::is_same_v<T, half> && N % 4 == 0) {
        load_right_fours<true>(m, source, stride);
    } else {
        const T* at = source + matrix_col(current_lane()) * 8 + matrix_row(current_lane());
#pragma unroll
        for (uint j = 0; j < N; j++) {
            vec<T, 2> pair;
            pair.data[0] = at[j * stride];
            pair.data[1] = at[j * stride + 8];
            m[j].held.cross(pair);
        }
    }
}

template <class M, class T, uint N>
METAL_FUNC void load_columns_transposed(M (&m)[N], const T* x, ulong stride, uint first, uint n, const char*, uint) {
    static_assert(N % 2 == 0);
    const T* at = x + min(first + matrix_row(current_lane()), n - 1) * stride + 2 * matrix_col(current_lane());
#pragma unroll
    for (uint i = 0; i < N; i++) {
        const auto four = *reinterpret_cast<const Neighbours<T, 4>*>(at + i / 2 * 16);
        m[i].held.crossed = pair_of(four.of + i % 2 * 2);
        m[i].held.has_crossed = true;
    }
}

template <class M, uint N, class F>
METAL_FUNC void fill_columns(M (&m)[N], const F& f) {
    static_assert(N % 2 == 0);
#pragma unroll
    for (uint i = 0; i < N; i += 2) {
        const uint2 four = f(matrix_row(current_lane()), 2 * i + current_lane() % 4);
        m[i].held.change() = as_type<vec<half, 2>>(four.x);
        m[i + 1].held.change() = as_type<vec<half, 2>>(four.y);
    }
}

METAL_FUNC uint2 bits_of(const vec<half, 2>& v) {
    return uint2(__float_as_uint(float(v.x)), __float_as_uint(float(v.y)));
}

// c += A B of halves, for two left matrices one below the other and 16 columns. The numbers of a lane are those that
// the matrix unit expects, but for the order of the columns, which A and B share.
template <class C, class A, class B>
METAL_FUNC void multiply_halves(C& upper, C& lower, const A* a, const A* b, const B* right) {
    vec<float, 2>&c = upper.held.change(), &d = lower.held.change();
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.data[0]), "+f"(c.data[1]), "+f"(d.data[0]), "+f"(d.data[1])
        : "r"(as_type<uint>(a[0].held.elements)), "r"(as_type<uint>(b[0].held.elements)),
          "r"(as_type<uint>(a[1].held.elements)), "r"(as_type<uint>(b[1].held.elements)),
          "r"(as_type<uint>(right[0].held.crossed)), "r"(as_type<uint>(right[1].held.crossed)));
}

// The matrix unit adds the products of up to 32 columns: it rounds few sums. Halves fit into its numbers.
template <bool ACCUMULATE, class C, class A, class B, uint M, uint N>
METAL_FUNC void multiply_all(C (&c)[M], const A (&a)[M][N], const B (&b)[N], const char*, uint) {
    static_assert(M % 2 == 0 && N <= 4);
#pragma unroll
    for (uint i = 0; i < M; i += 2) {
        float4 sum(0.0f);
#pragma unroll
        for (uint j = 0; j < N; j++) {
            const Split right(b[j].held.right());
            if constexpr (std::is_same_v<decltype(A::held), Held<half>>) {
                const uint2 upper = bits_of(a[i][j].held.elements), lower = bits_of(a[i + 1][j].held.elements);
                multiply_tf32(sum, upper, lower, right.low);
                multiply_tf32(sum, upper, lower, right.high);
            } else {
                const Split upper(as_float2(a[i][j].held.elements)), lower(as_float2(a[i + 1][j].held.elements));
                multiply_tf32(sum, upper.low, lower.low, right.high);
                multiply_tf32(sum, upper.high, lower.high, right.low);
                multiply_tf32(sum, upper.high, lower.high, right.high);
            }
        }
        const float2 first(sum.x, sum.y), second(sum.z, sum.w);
        c[i].held.change() = ACCUMULATE ? c[i].held.elements + first : first;
        c[i + 1].held.change() = ACCUMULATE ? c[i + 1].held.elements + second : second;
    }
}

// A single left matrix.
template <bool ACCUMULATE, class C, class A, class B, uint N>
METAL_FUNC void multiply_all(C (&c)[1], const A (&a)[1][N], const B (&b)[N], const char* file, uint line) {
    if (!ACCUMULATE) c[0].held.change() = float2(0.0f);
#pragma unroll
    for (uint j = 0; j < N; j++)
        c[0].held.change() = multiply_accumulate(a[0][j].held, b[j].held, c[0].held.elements, file, line);
}

// Halves by halves, for 16 columns at a time.
template <class M>
concept OfHalves = std::is_same_v<decltype(M::held), Held<half>>;
template <bool ACCUMULATE, class C, OfHalves A, OfHalves B, uint M, uint N>
METAL_FUNC void multiply_all(C (&c)[M], const A (&a)[M][N], const B (&b)[N], const char*, uint) {
    static_assert(ACCUMULATE && M % 2 == 0 && N % 2 == 0);
#pragma unroll
    for (uint j = 0; j < N; j += 2) {
#pragma unroll
        for (uint i = 0; i < M; i += 2) multiply_halves(c[i], c[i + 1], a[i] + j, a[i + 1] + j, b + j);
    }
}

template <class C, uint N>
METAL_FUNC void sum_columns(C& c, const C (&b)[N], const char*, uint) {
    float2 all(0.0f);
#pragma unroll
    for (uint j = 0; j < N; j++) all += b[j].held.right();
    const Split right(all);
    const uint2 ones(__float_as_uint(1.0f));
    float4 sum(0.0f);
    multiply_tf32(sum, ones, ones, right.low);
    multiply_tf32(sum, ones, ones, right.high);
    c.held.change() = float2(sum.x, sum.y);
}

template <class Rule, class T>
METAL_FUNC T exchange(const T& value, uint argument, const char*, const char*, uint) {
    return Rule::apply(value, argument);
}

}  // namespace detail
}  // namespace metal
