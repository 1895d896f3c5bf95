// The exchange of values between the lanes of a simdgroup on the CPU. Every lane hands in its value. The last lane
// to come computes all results.
#pragma once

#include "msl/run/runtime.h"
#include "simd_operations.h"

namespace metal {

namespace detail {

using zinc::msl::simd_width;

METAL_FUNC uint current_thread() { return zinc::msl::running->thread; }
METAL_FUNC uint current_lane() { return current_thread() % simd_width; }

METAL_FUNC void arrive(const char* operation, const char* file, uint line) {
    zinc::msl::simd_arrive({operation, file, line});
}

// Every lane of a group of `width` gets the result over the group, summed as a tree as GPUs do.
template <class Op, uint width>
struct Reduce {
    template <class T>
    static void rule(const void* values, const uint*, void* results) {
        const T* in = static_cast<const T*>(values);
        T* out = static_cast<T*>(results);
        for (uint group = 0; group < simd_width; group += width) {
            T tree[width];
            for (uint i = 0; i < width; i++) tree[i] = in[group + i];
            for (uint step = width / 2; step > 0; step /= 2)
                for (uint i = 0; i < step; i++) tree[i] = Op::apply(tree[i], tree[i + step]);
            for (uint i = 0; i < width; i++) out[group + i] = tree[0];
        }
    }
};

template <class Op, bool inclusive>
struct Prefix {
    template <class T>
    static void rule(const void* values, const uint*, void* results) {
        const T* in = static_cast<const T*>(values);
        T* out = static_cast<T*>(results);
        T running = Op::template identity<T>();
        for (uint i = 0; i < simd_width; i++) {
            const T next = Op::apply(running, in[i]);
            out[i] = inclusive ? next : running;
            running = next;
        }
    }
};

// The lane of its group that a lane reads from; `width` or more: none.
struct FromLane {
    static METAL_FUNC uint source(uint, uint argument, uint) { return argument; }
};
struct FromXor {
    static METAL_FUNC uint source(uint lane, uint argument, uint) { return lane ^ argument; }
};
struct FromBelow {  // shuffle_up: lanes without a source keep their own value
    static METAL_FUNC uint source(uint lane, uint argument, uint) { return lane >= argument ? lane - argument : lane; }
};
struct FromAbove {
    static METAL_FUNC uint source(uint lane, uint argument, uint width) {
        return argument < width - lane ? lane + argument : lane;
    }
};
struct FromBelowRotating {
    static METAL_FUNC uint source(uint lane, uint argument, uint width) { return (lane - argument) % width; }
};
struct FromAboveRotating {
    static METAL_FUNC uint source(uint lane, uint argument, uint width) { return (lane + argument) % width; }
};

// A source outside the group is undefined in MSL. All bits set, NaN for floating point, make it visible.
template <class From, uint width>
struct Shuffle {
    template <class T>
    static void rule(const void* values, const uint* arguments, void* results) {
        const T* in = static_cast<const T*>(values);
        T* out = static_cast<T*>(results);
        for (uint i = 0; i < simd_width; i++) {
            const uint group = i / width * width, source = From::source(i % width, arguments[i], width);
            if (source < width)
                out[i] = in[group + source];
            else
                __builtin_memset(static_cast<void*>(&out[i]), 0xff, sizeof(T));
        }
    }
};

struct Ballot {
    template <class T>
    static void rule(const void*, const uint* arguments, void* results) {
        T votes = 0;
        for (uint i = 0; i < simd_width; i++) votes |= T(arguments[i] != 0) << i;
        for (uint i = 0; i < simd_width; i++) static_cast<T*>(results)[i] = votes;
    }
};

template <class Rule, class T>
METAL_FUNC T exchange(const T& value, uint argument, const char* operation, const char* file, uint line) {
    static_assert(sizeof(T) <= zinc::msl::max_exchange_bytes);
    zinc::msl::Running& here = *zinc::msl::running;
    zinc::msl::SimdSlots& slots = *here.slots;
    const uint lane = here.thread % simd_width;
    slots.arguments[lane] = argument;
    reinterpret_cast<T*>(slots.values)[lane] = value;
    zinc::msl::simd_meet(here, &Rule::template rule<T>, {operation, file, line});
    return reinterpret_cast<const T*>(slots.results)[lane];
}

// Row and first column of a lane's two elements: quads tile the matrix as in Apple's hardware.
METAL_FUNC constexpr uint matrix_row(uint lane) { return (lane >> 2 & 4) + (lane >> 1 & 3); }
METAL_FUNC constexpr uint matrix_col(uint lane) { return (lane >> 1 & 4) + (lane << 1 & 2); }

// A lane's share of a matrix.
template <class T>
struct Held {
    vec<T, 2> elements;

    METAL_FUNC vec<T, 2>& change() { return elements; }
    template <class Elements>
    METAL_FUNC void load(const Elements& source, bool transpose) {
        elements = source(transpose);
    }
};

// D = A B + C with float accumulation, rounded once; the result travels back in c.
struct MultiplyAccumulate {
    template <class P>
    static void rule(const void* values, const uint*, void* results) {
        const P* in = static_cast<const P*>(values);
        P* out = static_cast<P*>(results);
        float a[8][8], b[8][8], d[8][8];
        for (uint lane = 0; lane < simd_width; lane++)
            for (uint i = 0; i < 2; i++) {
                const uint r = matrix_row(lane), c = matrix_col(lane) + i;
                a[r][c] = float(in[lane].a.data[i]);
                b[r][c] = float(in[lane].b.data[i]);
                d[r][c] = float(in[lane].c.data[i]);
            }
        for (uint r = 0; r < 8; r++)
            for (uint k = 0; k < 8; k++)
                for (uint c = 0; c < 8; c++) d[r][c] += a[r][k] * b[k][c];
        for (uint lane = 0; lane < simd_width; lane++)
            for (uint i = 0; i < 2; i++)
                out[lane].c.data[i] =
                    remove_reference_t<decltype(out[lane].c.data[i])>(d[matrix_row(lane)][matrix_col(lane) + i]);
    }
};

template <class A, class B, class C>
METAL_FUNC vec<C, 2> multiply_accumulate(const Held<A>& a, const Held<B>& b, const vec<C, 2>& c, const char* file,
                                         uint line) {
    const Product<A, B, C> parts{a.elements, b.elements, c};
    return exchange<MultiplyAccumulate>(parts, 0, "simdgroup_multiply", file, line).c;
}

template <class C, class A, class B, uint M>
METAL_FUNC void multiply_accumulate_each(C (&c)[M], const A (&a)[M], const B& b, const char* file, uint line) {
    for (uint i = 0; i < M; i++)
        c[i].thread_elements() = multiply_accumulate(a[i].held, b.held, c[i].thread_elements(), file, line);
}

template <class M, class T, uint N>
METAL_FUNC void load_columns(M (&m)[N], const T* source, ulong stride, const char* file, uint line) {
    for (uint i = 0; i < N; i++) simdgroup_load(m[i], source + 8 * i, stride, ulong2(0), false, file, line);
}

template <class Matrix, class T, uint M, uint N>
METAL_FUNC void load_left(Matrix (&m)[M][N], const T* source, uint stride, const char* file, uint line) {
    for (uint i = 0; i < M; i++)
        for (uint j = 0; j < N; j++)
            simdgroup_load(m[i][j], source + j * stride + 64 * i, 8, ulong2(0), false, file, line);
}

template <class M, class T, uint N>
METAL_FUNC void load_right(M (&m)[N], const T* source, uint stride, const char* file, uint line) {
    for (uint j = 0; j < N; j++) simdgroup_load(m[j], source + j * stride, 8, ulong2(0), true, file, line);
}

template <class M, class T, uint N>
METAL_FUNC void load_right_rows(M (&m)[N], const T* source, uint stride, const char* file, uint line) {
    for (uint j = 0; j < N; j++) simdgroup_load(m[j], source + j * stride, 8, ulong2(0), false, file, line);
}

template <class M, uint N, class F>
METAL_FUNC void fill_columns(M (&m)[N], const F& f) {
    const uint lane = current_lane();
    for (uint i = 0; i < N; i++) {
        for (uint j = 0; j < 2; j++) {
            const uint column = 8 * i + matrix_col(lane) + j;
            m[i].thread_elements().data[j] = as_type<vec<half, 4>>(f(matrix_row(lane), column / 4)).data[column % 4];
        }
    }
}

template <class M, class T, uint N>
METAL_FUNC void load_columns_transposed(M (&m)[N], const T* x, ulong stride, uint first, uint n, const char* file,
                                        uint line) {
    arrive("load_columns_transposed", file, line);
    const uint lane = current_lane(), column = matrix_row(lane);
    for (uint i = 0; i < N; i++) {
        for (uint j = 0; j < 2; j++) {
            const uint row = first + matrix_col(lane) + j;
            m[i].thread_elements().data[j] = x[(row < n ? row : n - 1) * stride + 8 * i + column];
        }
    }
}

template <bool ACCUMULATE, class C, class A, class B, uint M, uint N>
METAL_FUNC void multiply_all(C (&c)[M], const A (&a)[M][N], const B (&b)[N], const char* file, uint line) {
    for (uint i = 0; i < M; i++) {
        if (!ACCUMULATE) c[i].thread_elements() = vec<float, 2>(0.0f);
        for (uint j = 0; j < N; j++) simdgroup_multiply_accumulate(c[i], a[i][j], b[j], c[i], file, line);
    }
}

template <class C, uint N>
METAL_FUNC void sum_columns(C& c, const C (&b)[N], const char* file, uint line) {
    C ones;
    ones.thread_elements() = vec<float, 2>(1.0f);
    c.thread_elements() = vec<float, 2>(0.0f);
    for (uint j = 0; j < N; j++) simdgroup_multiply_accumulate(c, ones, b[j], c, file, line);
}

}  // namespace detail
}  // namespace metal
