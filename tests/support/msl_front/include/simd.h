// What lanes, simdgroups and threadgroups do together. Values of 64 bits and booleans do not travel between lanes.
#pragma once

#include "types.h"

namespace metal {

// No pass may move these under another condition, or from under one.
#pragma clang attribute push(__attribute__((convergent)), apply_to = function)

enum class mem_flags {
    mem_none = 0,
    mem_device = 1,
    mem_threadgroup = 2,
    mem_texture = 4,
    mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
void quadgroup_barrier(mem_flags);

#define MSL_LANE_TYPES(M, name)                                                                                        \
    M(char, name)                                                                                                      \
    M(uchar, name)                                                                                                     \
    M(short, name) M(ushort, name) M(int, name) M(uint, name) M(half, name) M(float, name) M(bfloat, name)
#define MSL_LANE_INTEGERS(M, name)                                                                                     \
    M(char, name) M(uchar, name) M(short, name) M(ushort, name) M(int, name) M(uint, name)
#define MSL_VALUE(T, name)                                                                                             \
    T name(T);                                                                                                         \
    vec<T, 2> name(vec<T, 2>);                                                                                         \
    vec<T, 3> name(vec<T, 3>);                                                                                         \
    vec<T, 4> name(vec<T, 4>);
#define MSL_FROM_LANE(T, name)                                                                                         \
    T name(T, ushort);                                                                                                 \
    vec<T, 2> name(vec<T, 2>, ushort);                                                                                 \
    vec<T, 3> name(vec<T, 3>, ushort);                                                                                 \
    vec<T, 4> name(vec<T, 4>, ushort);
#define MSL_FILLED(T, name)                                                                                            \
    T name(T, T, ushort);                                                                                              \
    vec<T, 2> name(vec<T, 2>, vec<T, 2>, ushort);                                                                      \
    vec<T, 3> name(vec<T, 3>, vec<T, 3>, ushort);                                                                      \
    vec<T, 4> name(vec<T, 4>, vec<T, 4>, ushort);

#define MSL_GROUP(group)                                                                                               \
    MSL_LANE_TYPES(MSL_VALUE, group##_sum)                                                                             \
    MSL_LANE_TYPES(MSL_VALUE, group##_product)                                                                         \
    MSL_LANE_TYPES(MSL_VALUE, group##_max)                                                                             \
    MSL_LANE_TYPES(MSL_VALUE, group##_min)                                                                             \
    MSL_LANE_INTEGERS(MSL_VALUE, group##_and)                                                                          \
    MSL_LANE_INTEGERS(MSL_VALUE, group##_or)                                                                           \
    MSL_LANE_INTEGERS(MSL_VALUE, group##_xor)                                                                          \
    MSL_LANE_TYPES(MSL_VALUE, group##_prefix_inclusive_sum)                                                            \
    MSL_LANE_TYPES(MSL_VALUE, group##_prefix_exclusive_sum)                                                            \
    MSL_LANE_TYPES(MSL_VALUE, group##_prefix_inclusive_product)                                                        \
    MSL_LANE_TYPES(MSL_VALUE, group##_prefix_exclusive_product)                                                        \
    MSL_LANE_TYPES(MSL_VALUE, group##_broadcast_first)                                                                 \
    MSL_LANE_TYPES(MSL_FROM_LANE, group##_broadcast)                                                                   \
    MSL_LANE_TYPES(MSL_FROM_LANE, group##_shuffle)                                                                     \
    MSL_LANE_TYPES(MSL_FROM_LANE, group##_shuffle_xor)                                                                 \
    MSL_LANE_TYPES(MSL_FROM_LANE, group##_shuffle_up)                                                                  \
    MSL_LANE_TYPES(MSL_FROM_LANE, group##_shuffle_down)                                                                \
    MSL_LANE_TYPES(MSL_FROM_LANE, group##_shuffle_rotate_up)                                                           \
    MSL_LANE_TYPES(MSL_FROM_LANE, group##_shuffle_rotate_down)                                                         \
    MSL_LANE_TYPES(MSL_FILLED, group##_shuffle_and_fill_up)                                                            \
    MSL_LANE_TYPES(MSL_FILLED, group##_shuffle_and_fill_down)                                                          \
    bool group##_all(bool);                                                                                            \
    bool group##_any(bool);                                                                                            \
    bool group##_is_first();
MSL_GROUP(simd)
MSL_GROUP(quad)

// vote_t is what the specification leaves open: a class of its own here, so that only the spelling that needs no
// guess, simd_vote::vote_t(vote), is taken.
struct simd_vote {
    struct vote_t {
        constexpr vote_t(ulong);
        constexpr operator ulong() const;
    };
    explicit constexpr simd_vote(vote_t = 0);
    explicit constexpr operator vote_t() const;
    bool all() const;
    bool any() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();

template <class T, int Cols, int Rows = Cols>
struct simdgroup_matrix {
    static_assert(Cols == 8 && Rows == 8, "MSL has 8 by 8 matrices");
    static_assert(__is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat), "of half, bfloat and float");
    typedef vec<T, 2> storage_type;
    simdgroup_matrix() = default;
    explicit simdgroup_matrix(T diagonal);
    thread storage_type& thread_elements();
    thread const storage_type& thread_elements() const;
    storage_type t;
};
typedef simdgroup_matrix<float, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8> simdgroup_bfloat8x8;

template <class T, int Cols, int Rows = Cols>
simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T);

#define MSL_MATRIX_MEMORY(space)                                                                                       \
    template <class T, int Cols, int Rows>                                                                             \
    void simdgroup_load(thread simdgroup_matrix<T, Cols, Rows>&, const space T*, ulong elements_per_row = Cols,        \
                        ulong2 matrix_origin = 0, bool transpose_matrix = false);                                      \
    template <class T, int Cols, int Rows>                                                                             \
    void simdgroup_store(simdgroup_matrix<T, Cols, Rows>, space T*, ulong elements_per_row = Cols,                     \
                         ulong2 matrix_origin = 0, bool transpose_matrix = false);
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)

template <class R, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<R, 8>&, simdgroup_matrix<A, 8>, simdgroup_matrix<B, 8>);
template <class R, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<R, 8>&, simdgroup_matrix<A, 8>, simdgroup_matrix<B, 8>,
                                   simdgroup_matrix<C, 8>);

#pragma clang attribute pop

}  // namespace metal
