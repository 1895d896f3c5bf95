// simdgroup and quadgroup functions for the CPU: every lane hands in its value, the last one to come computes all results.
#pragma once

#include "functions.h"
#include "runtime.h"

namespace metal {

namespace detail {

using zinc::msl::simd_width;

struct Add {
    template <class T> static METAL_FUNC T apply(const T &a, const T &b) { return T(a + b); }
    template <class T> static METAL_FUNC T identity() { return T(0); }
};
struct Multiply {
    template <class T> static METAL_FUNC T apply(const T &a, const T &b) { return T(a * b); }
    template <class T> static METAL_FUNC T identity() { return T(1); }
};
struct Largest {
    template <class T> static METAL_FUNC T apply(const T &a, const T &b) { return metal::max(a, b); }
};
struct Smallest {
    template <class T> static METAL_FUNC T apply(const T &a, const T &b) { return metal::min(a, b); }
};
struct BitAnd {
    template <class T> static METAL_FUNC T apply(const T &a, const T &b) { return T(a & b); }
};
struct BitOr {
    template <class T> static METAL_FUNC T apply(const T &a, const T &b) { return T(a | b); }
};
struct BitXor {
    template <class T> static METAL_FUNC T apply(const T &a, const T &b) { return T(a ^ b); }
};

// Every lane of a group of `width` gets the result over the group, summed as a tree as GPUs do.
template <class Op, uint width> struct Reduce {
    template <class T> static void rule(const void *values, const uint *, void *results) {
        const T *in = static_cast<const T *>(values);
        T *out = static_cast<T *>(results);
        for (uint group = 0; group < simd_width; group += width) {
            T tree[width];
            for (uint i = 0; i < width; i++) tree[i] = in[group + i];
            for (uint step = width / 2; step > 0; step /= 2)
                for (uint i = 0; i < step; i++) tree[i] = Op::apply(tree[i], tree[i + step]);
            for (uint i = 0; i < width; i++) out[group + i] = tree[0];
        }
    }
};

template <class Op, bool inclusive> struct Prefix {
    template <class T> static void rule(const void *values, const uint *, void *results) {
        const T *in = static_cast<const T *>(values);
        T *out = static_cast<T *>(results);
        T running = Op::template identity<T>();
        for (uint i = 0; i < simd_width; i++) {
            const T next = Op::apply(running, in[i]);
            out[i] = inclusive ? next : running;
            running = next;
        }
    }
};

// From which lane of its group a lane reads; `width` or more: from none.
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

// A source outside the group is undefined in MSL: all bits set, NaN for floating point, makes it show.
template <class From, uint width> struct Shuffle {
    template <class T> static void rule(const void *values, const uint *arguments, void *results) {
        const T *in = static_cast<const T *>(values);
        T *out = static_cast<T *>(results);
        for (uint i = 0; i < simd_width; i++) {
            const uint group = i / width * width, source = From::source(i % width, arguments[i], width);
            if (source < width) out[i] = in[group + source];
            else __builtin_memset(static_cast<void *>(&out[i]), 0xff, sizeof(T));
        }
    }
};

struct Ballot {
    template <class T> static void rule(const void *, const uint *arguments, void *results) {
        T votes = 0;
        for (uint i = 0; i < simd_width; i++) votes |= T(arguments[i] != 0) << i;
        for (uint i = 0; i < simd_width; i++) static_cast<T *>(results)[i] = votes;
    }
};

template <class Rule, class T>
METAL_FUNC T exchange(const T &value, uint argument, const char *operation, const char *file, uint line) {
    static_assert(sizeof(T) <= zinc::msl::max_exchange_bytes);
    zinc::msl::SimdSlots &slots = *zinc::msl::running.slots;
    const uint lane = zinc::msl::running.thread % simd_width;
    slots.arguments[lane] = argument;
    reinterpret_cast<T *>(slots.values)[lane] = value;
    zinc::msl::simd_meet(&Rule::template rule<T>, operation, file, line);
    return reinterpret_cast<const T *>(slots.results)[lane];
}

template <class A>
concept Exchangeable = Arithmetic<A>;
template <class A> struct ValueOf {
    using type = A;
};
template <class A>
    requires Vectorial<A>
struct ValueOf<A> {
    using type = VecOf<A>;
};
template <class A> using Value = typename ValueOf<A>::type;

}  // namespace detail

#define MSL_SITE const char *file = __builtin_FILE(), uint line = __builtin_LINE()

#define MSL_SIMD_VALUE(name, ...)                                                                              \
    template <detail::Exchangeable A> METAL_FUNC detail::Value<A> name(const A &value, MSL_SITE) {             \
        return detail::exchange<__VA_ARGS__>(detail::Value<A>(value), 0, #name, file, line);                 \
    }
#define MSL_SIMD_LANE(name, ...)                                                                               \
    template <detail::Exchangeable A> METAL_FUNC detail::Value<A> name(const A &value, ushort lane, MSL_SITE) { \
        return detail::exchange<__VA_ARGS__>(detail::Value<A>(value), lane, #name, file, line);              \
    }

MSL_SIMD_VALUE(simd_sum, detail::Reduce<detail::Add, 32>)
MSL_SIMD_VALUE(simd_product, detail::Reduce<detail::Multiply, 32>)
MSL_SIMD_VALUE(simd_max, detail::Reduce<detail::Largest, 32>)
MSL_SIMD_VALUE(simd_min, detail::Reduce<detail::Smallest, 32>)
MSL_SIMD_VALUE(simd_and, detail::Reduce<detail::BitAnd, 32>)
MSL_SIMD_VALUE(simd_or, detail::Reduce<detail::BitOr, 32>)
MSL_SIMD_VALUE(simd_xor, detail::Reduce<detail::BitXor, 32>)
MSL_SIMD_VALUE(simd_prefix_inclusive_sum, detail::Prefix<detail::Add, true>)
MSL_SIMD_VALUE(simd_prefix_exclusive_sum, detail::Prefix<detail::Add, false>)
MSL_SIMD_VALUE(simd_prefix_inclusive_product, detail::Prefix<detail::Multiply, true>)
MSL_SIMD_VALUE(simd_prefix_exclusive_product, detail::Prefix<detail::Multiply, false>)
MSL_SIMD_LANE(simd_shuffle, detail::Shuffle<detail::FromLane, 32>)
MSL_SIMD_LANE(simd_broadcast, detail::Shuffle<detail::FromLane, 32>)
MSL_SIMD_LANE(simd_shuffle_xor, detail::Shuffle<detail::FromXor, 32>)
MSL_SIMD_LANE(simd_shuffle_up, detail::Shuffle<detail::FromBelow, 32>)
MSL_SIMD_LANE(simd_shuffle_down, detail::Shuffle<detail::FromAbove, 32>)
MSL_SIMD_LANE(simd_shuffle_rotate_up, detail::Shuffle<detail::FromBelowRotating, 32>)
MSL_SIMD_LANE(simd_shuffle_rotate_down, detail::Shuffle<detail::FromAboveRotating, 32>)
MSL_SIMD_VALUE(simd_broadcast_first, detail::Shuffle<detail::FromLane, 32>)
MSL_SIMD_VALUE(quad_sum, detail::Reduce<detail::Add, 4>)
MSL_SIMD_VALUE(quad_product, detail::Reduce<detail::Multiply, 4>)
MSL_SIMD_VALUE(quad_max, detail::Reduce<detail::Largest, 4>)
MSL_SIMD_VALUE(quad_min, detail::Reduce<detail::Smallest, 4>)
MSL_SIMD_LANE(quad_shuffle, detail::Shuffle<detail::FromLane, 4>)
MSL_SIMD_LANE(quad_broadcast, detail::Shuffle<detail::FromLane, 4>)
MSL_SIMD_LANE(quad_shuffle_xor, detail::Shuffle<detail::FromXor, 4>)
MSL_SIMD_LANE(quad_shuffle_up, detail::Shuffle<detail::FromBelow, 4>)
MSL_SIMD_LANE(quad_shuffle_down, detail::Shuffle<detail::FromAbove, 4>)
#undef MSL_SIMD_VALUE
#undef MSL_SIMD_LANE

class simd_vote {
  public:
    using vote_t = ulong;
    METAL_FUNC explicit simd_vote(vote_t v = 0) : votes(v) {}
    METAL_FUNC explicit operator vote_t() const { return votes; }
    METAL_FUNC bool all() const { return votes == 0xffffffffu; }
    METAL_FUNC bool any() const { return votes != 0; }

  private:
    vote_t votes;
};

METAL_FUNC simd_vote simd_ballot(bool predicate, MSL_SITE) {
    return simd_vote(detail::exchange<detail::Ballot>(ulong(0), predicate, "simd_ballot", file, line));
}
METAL_FUNC bool simd_all(bool predicate, MSL_SITE) { return simd_ballot(predicate, file, line).all(); }
METAL_FUNC bool simd_any(bool predicate, MSL_SITE) { return simd_ballot(predicate, file, line).any(); }

}  // namespace metal
