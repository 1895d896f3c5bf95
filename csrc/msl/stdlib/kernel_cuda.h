// TG_ARRAY and barriers for CUDA, and the __global__ function that launches a kernel there. Its parameters are the
// kernel's params by value, Ahead, then the buffers in order.
#pragma once

#include "kernel_common.h"

#if CUDART_VERSION >= 12040
#define ZINC_MAX_REGISTERS(n) __maxnreg__(n)
#else  // slower: without it the compiler keeps a kernel to few registers
#define ZINC_MAX_REGISTERS(n)
#endif

namespace metal {

// Both order device memory among the threads that wait, too.
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

// Copies to shared memory that need no registers.
METAL_FUNC void copy_eight(vec<uint, 2>* to, const vec<uint, 2>* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(uint(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
}
METAL_FUNC void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <uint N>
METAL_FUNC void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace metal

namespace zinc::msl {

// A kernel may have been launched while the one before it still runs. Then it fetches this threadgroup's share of the
// weights and waits for the end of all kernels before it. Then it lets the next kernel be launched.
__device__ inline void take_turn(const Ahead& ahead) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x < Ahead::N) {
        const uint32_t i = threadIdx.x, n = gridDim.x * gridDim.y * gridDim.z;
        const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        const uint32_t each = (ahead.bytes[i] / n + 16) / 16 * 16;
        const uint64_t first = uint64_t(block) * each;
        if (first < ahead.bytes[i]) {
            const uint32_t bytes = min(each, ahead.bytes[i] - uint32_t(first));
            const char* at = static_cast<const char*>(ahead.at[i]) + first;
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes));
        }
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <auto F, class... Arguments>
__device__ void run_in_turn(const Ahead& ahead, const Arguments&... arguments) {
    take_turn(ahead);
    F(arguments..., metal::uint3(blockIdx.x, blockIdx.y, blockIdx.z), metal::uint3(gridDim.x, gridDim.y, gridDim.z),
      threadIdx.x, threadIdx.x / simd_width, threadIdx.x % simd_width, blockDim.x / simd_width);
}

template <auto F, class Params, class... Buffers>
__global__ void global_function(const __grid_constant__ Params params, const __grid_constant__ Ahead ahead,
                                Buffers... buffers) {
    run_in_turn<F>(ahead, params, buffers...);
}

// By default the compiler saves registers for occupancy, and delays loads until their values are used. With a given
// number of registers it loads first.
template <auto F, uint32_t REGISTERS, class Params, class... Buffers>
__global__ void ZINC_MAX_REGISTERS(REGISTERS)
    global_function_in(const __grid_constant__ Params params, const __grid_constant__ Ahead ahead, Buffers... buffers) {
    run_in_turn<F>(ahead, params, buffers...);
}

constexpr uint32_t STEP_REGISTERS = 32;  // of a step of two rows of weights, and their activations

template <auto F, uint32_t STEPS, class S, size_t... I>
const void* global_function_of(std::index_sequence<I...>) {
    if constexpr (STEPS > 1)
        return reinterpret_cast<const void*>(
            &global_function_in<F, STEP_REGISTERS * STEPS, typename S::Params, typename S::template Buffer<I>...>);
    else
        return reinterpret_cast<const void*>(
            &global_function<F, typename S::Params, typename S::template Buffer<I>...>);
}

template <auto F, uint32_t STEPS>
struct Registration {
    explicit Registration(const char* name) {
        using S = Signature<decltype(F)>;
        KernelInfo info = describe_kernel<F>(name);
        info.global = global_function_of<F, STEPS, S>(typename S::BufferIndices());
        register_kernel(info);
    }
};

}  // namespace zinc::msl

#define TG_ARRAY(T, name, n) __shared__ T name[n]
