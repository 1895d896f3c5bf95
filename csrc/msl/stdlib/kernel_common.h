// The macros of a kernel that all lanes share: KERNEL, GRID_IDS, memory flags. A kernel registers itself with the facts
// of its signature, and with the factor by which its loop is unrolled. The lane's own header has Registration, TG_ARRAY
// and the barriers.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "msl/run/runtime.h"
#include "vector.h"

namespace metal {

enum class mem_flags : uint {
    mem_none = zinc::msl::orders_none,
    mem_device = zinc::msl::orders_device,
    mem_threadgroup = zinc::msl::orders_threadgroup,
    mem_texture = 4,
};
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

}  // namespace metal

namespace zinc::msl {

constexpr size_t n_grid_ids = 6;

// A kernel's signature: (const Params&, T*..., tg, n_tg, tid, sg, lane, n_sg).
template <class F>
struct Signature;
template <class... A>
struct Signature<void (*)(A...)> {
    using Arguments = std::tuple<A...>;
    static_assert(sizeof...(A) > n_grid_ids, "a kernel takes params, buffers and GRID_IDS");
    static constexpr size_t n_buffers = sizeof...(A) - n_grid_ids - 1;
    using Params = std::remove_cvref_t<std::tuple_element_t<0, Arguments>>;
    static_assert(std::is_same_v<std::tuple_element_t<0, Arguments>, const Params&>,
                  "the first parameter of a kernel is `constant XParams& p`");
    template <size_t I>
    using Buffer = std::tuple_element_t<I + 1, Arguments>;
    using BufferIndices = std::make_index_sequence<n_buffers>;
};

template <class Pointer>
constexpr BufferSignature buffer_signature() {
    static_assert(std::is_pointer_v<Pointer>, "between params and GRID_IDS a kernel takes pointers");
    using T = std::remove_pointer_t<Pointer>;
    return {uint32_t(sizeof(T)), uint32_t(alignof(T)), !std::is_const_v<T>};
}

template <class S, size_t... I>
const BufferSignature* buffer_signatures(std::index_sequence<I...>) {
    static constexpr BufferSignature all[S::n_buffers + 1] = {buffer_signature<typename S::template Buffer<I>>()...,
                                                              BufferSignature{}};
    return all;
}

// The facts of kernel F, without the function that runs it.
template <auto F>
KernelInfo describe_kernel(const char* name) {
    using S = Signature<decltype(F)>;
    return {name, uint32_t(sizeof(typename S::Params)), uint32_t(S::n_buffers),
            buffer_signatures<S>(typename S::BufferIndices())};
}

}  // namespace zinc::msl

#define ZINC_MSL_JOIN_(a, b) a##b
#define ZINC_MSL_JOIN(a, b) ZINC_MSL_JOIN_(a, b)
#define KERNEL(name, ...) KERNEL_UNROLLED(1, name, __VA_ARGS__)
#define KERNEL_UNROLLED(n, name, ...)                                                                                  \
    static const ::zinc::msl::Registration<&__VA_ARGS__, n> ZINC_MSL_JOIN(kernel_registration_, __COUNTER__){name};

#define GRID_IDS                                                                                                       \
    [[maybe_unused]] ::metal::uint3 tg, [[maybe_unused]] ::metal::uint3 n_tg, [[maybe_unused]] ::metal::uint tid,      \
        [[maybe_unused]] ::metal::uint sg, [[maybe_unused]] ::metal::uint lane, [[maybe_unused]] ::metal::uint n_sg
