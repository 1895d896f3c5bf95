// KERNEL, GRID_IDS, TG_ARRAY and barriers for the CPU: a kernel registers itself with what its signature says.
#pragma once

#include <tuple>
#include <utility>

#include "runtime.h"
#include "vector.h"

namespace metal {

enum class mem_flags : uint {
    mem_none = zinc::msl::orders_none,
    mem_device = zinc::msl::orders_device,
    mem_threadgroup = zinc::msl::orders_threadgroup,
    mem_texture = 4,
};
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

METAL_FUNC void threadgroup_barrier(mem_flags flags, const char *file = __builtin_FILE(),
                                    uint line = __builtin_LINE()) {
    zinc::msl::threadgroup_barrier(uint(flags), {"threadgroup_barrier", file, line});
}
METAL_FUNC void simdgroup_barrier(mem_flags flags, const char *file = __builtin_FILE(),
                                  uint line = __builtin_LINE()) {
    zinc::msl::simdgroup_barrier(uint(flags), {"simdgroup_barrier", file, line});
}

}  // namespace metal

namespace zinc::msl {

constexpr size_t n_grid_ids = 6;

// A kernel's signature: (const Params&, T*..., tg, n_tg, tid, sg, lane, n_sg).
template <class F> struct Signature;
template <class... A> struct Signature<void (*)(A...)> {
    using Arguments = std::tuple<A...>;
    static_assert(sizeof...(A) > n_grid_ids, "a kernel takes params, buffers and GRID_IDS");
    static constexpr size_t n_buffers = sizeof...(A) - n_grid_ids - 1;
    using Params = std::remove_cvref_t<std::tuple_element_t<0, Arguments>>;
    static_assert(std::is_same_v<std::tuple_element_t<0, Arguments>, const Params &>,
                  "the first parameter of a kernel is `constant XParams& p`");
    template <size_t I> using Buffer = std::tuple_element_t<I + 1, Arguments>;
};

template <class Pointer> constexpr BufferSignature buffer_signature() {
    static_assert(std::is_pointer_v<Pointer>, "between params and GRID_IDS a kernel takes pointers");
    using T = std::remove_pointer_t<Pointer>;
    return {uint32_t(sizeof(T)), uint32_t(alignof(T)), !std::is_const_v<T>};
}

template <auto F> struct Entry {
    using S = Signature<decltype(F)>;

    template <size_t... I> static void call(const ThreadArguments &a, std::index_sequence<I...>) {
        F(*static_cast<const typename S::Params *>(a.params),
          static_cast<typename S::template Buffer<I>>(a.buffers[I])...,
          metal::uint3(a.tg[0], a.tg[1], a.tg[2]), metal::uint3(a.n_tg[0], a.n_tg[1], a.n_tg[2]), a.tid, a.sg,
          a.lane, a.n_sg);
    }
    static void thread(const ThreadArguments &a) { call(a, std::make_index_sequence<S::n_buffers>()); }

    template <size_t... I> static const BufferSignature *buffers(std::index_sequence<I...>) {
        static constexpr BufferSignature all[S::n_buffers + 1] = {
            buffer_signature<typename S::template Buffer<I>>()..., BufferSignature{}};
        return all;
    }
};

template <auto F> struct Registration {
    explicit Registration(const char *name) {
        using S = typename Entry<F>::S;
        register_kernel({name, uint32_t(sizeof(typename S::Params)), uint32_t(S::n_buffers),
                         Entry<F>::buffers(std::make_index_sequence<S::n_buffers>()), &Entry<F>::thread});
    }
};

template <class T, size_t n> METAL_FUNC T (&threadgroup_array_of(const char *name))[n] {
    return *static_cast<T(*)[n]>(threadgroup_array(sizeof(T) * n, alignof(T), name));
}

}  // namespace zinc::msl

#define ZINC_MSL_JOIN_(a, b) a##b
#define ZINC_MSL_JOIN(a, b) ZINC_MSL_JOIN_(a, b)
#define KERNEL(name, ...)                                                                                      \
    static const ::zinc::msl::Registration<&__VA_ARGS__> ZINC_MSL_JOIN(kernel_registration_, __COUNTER__){name};

#define GRID_IDS                                                                                               \
    [[maybe_unused]] ::metal::uint3 tg, [[maybe_unused]] ::metal::uint3 n_tg, [[maybe_unused]] ::metal::uint tid, \
        [[maybe_unused]] ::metal::uint sg, [[maybe_unused]] ::metal::uint lane, [[maybe_unused]] ::metal::uint n_sg

#define TG_ARRAY(T, name, n) T(&name)[n] = ::zinc::msl::threadgroup_array_of<T, (n)>(#name)
