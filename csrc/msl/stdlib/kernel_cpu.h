// TG_ARRAY and barriers for the CPU, and the call of a kernel's thread there.
#pragma once

#include "kernel_common.h"

namespace metal {

METAL_FUNC void threadgroup_barrier(mem_flags flags, const char* file = __builtin_FILE(),
                                    uint line = __builtin_LINE()) {
    zinc::msl::threadgroup_barrier(uint(flags), {"threadgroup_barrier", file, line});
}
METAL_FUNC void simdgroup_barrier(mem_flags flags, const char* file = __builtin_FILE(), uint line = __builtin_LINE()) {
    zinc::msl::simdgroup_barrier(uint(flags), {"simdgroup_barrier", file, line});
}

METAL_FUNC void copy_eight(vec<uint, 2>* to, const vec<uint, 2>* from) { *to = *from; }
METAL_FUNC void end_copies() {}
template <uint N>
METAL_FUNC void wait_for_copies() {}

}  // namespace metal

namespace zinc::msl {

template <auto F>
struct Entry {
    using S = Signature<decltype(F)>;

    template <size_t... I>
    static void call(const ThreadArguments& a, std::index_sequence<I...>) {
        F(*static_cast<const typename S::Params*>(a.params),
          static_cast<typename S::template Buffer<I>>(a.buffers[I])..., metal::uint3(a.tg[0], a.tg[1], a.tg[2]),
          metal::uint3(a.n_tg[0], a.n_tg[1], a.n_tg[2]), a.tid, a.sg, a.lane, a.n_sg);
    }
    static void thread(const ThreadArguments& a) { call(a, typename S::BufferIndices()); }
};

template <auto F, uint32_t STEPS>
struct Registration {
    explicit Registration(const char* name) {
        KernelInfo info = describe_kernel<F>(name);
        info.thread = &Entry<F>::thread;
        register_kernel(info);
    }
};

template <class T, size_t n>
METAL_FUNC T (&threadgroup_array_of(const char* name))[n] {
    return *static_cast<T(*)[n]>(threadgroup_array(sizeof(T) * n, alignof(T), name));
}

}  // namespace zinc::msl

#define TG_ARRAY(T, name, n) T(&name)[n] = ::zinc::msl::threadgroup_array_of<T, (n)>(#name)
