// simdgroup and quadgroup functions. The CPU and CUDA each have their own exchange between SIMD lanes (detail::exchange
// and its rules).
#pragma once

#ifdef __CUDACC__
#include "simd_cuda.h"
#else
#include "simd_cpu.h"
#endif

namespace metal {

namespace detail {

template <class A>
concept Exchangeable = Arithmetic<A>;
template <class A>
struct ValueOf {
    using type = A;
};
template <class A>
    requires Vectorial<A>
struct ValueOf<A> {
    using type = VecOf<A>;
};
template <class A>
using Value = typename ValueOf<A>::type;

}  // namespace detail

#define MSL_SITE const char *file = __builtin_FILE(), uint line = __builtin_LINE()

#define MSL_SIMD_VALUE(name, ...)                                                                                      \
    template <detail::Exchangeable A>                                                                                  \
    METAL_FUNC detail::Value<A> name(const A& value, MSL_SITE) {                                                       \
        return detail::exchange<__VA_ARGS__>(detail::Value<A>(value), 0, #name, file, line);                           \
    }
#define MSL_SIMD_LANE(name, ...)                                                                                       \
    template <detail::Exchangeable A>                                                                                  \
    METAL_FUNC detail::Value<A> name(const A& value, ushort lane, MSL_SITE) {                                          \
        return detail::exchange<__VA_ARGS__>(detail::Value<A>(value), lane, #name, file, line);                        \
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
