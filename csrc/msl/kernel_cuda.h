// TG_ARRAY and barriers for CUDA, and the __global__ function through which a kernel is launched there: its parameters
// are the kernel's params by value, then the buffers in order.
#pragma once

#include "kernel_common.h"

namespace metal {

// Both order device memory among the threads that wait, too.
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

}  // namespace metal

namespace zinc::msl {

template <auto F, class Params, class... Buffers>
__global__ void global_function(const __grid_constant__ Params params, Buffers... buffers) {
    F(params, buffers..., metal::uint3(blockIdx.x, blockIdx.y, blockIdx.z),
      metal::uint3(gridDim.x, gridDim.y, gridDim.z), threadIdx.x, threadIdx.x / simd_width, threadIdx.x % simd_width,
      blockDim.x / simd_width);
}

template <auto F, class S, size_t... I>
const void* global_function_of(std::index_sequence<I...>) {
    return reinterpret_cast<const void*>(&global_function<F, typename S::Params, typename S::template Buffer<I>...>);
}

template <auto F>
struct Registration {
    explicit Registration(const char* name) {
        using S = Signature<decltype(F)>;
        KernelInfo info = describe_kernel<F>(name);
        info.global = global_function_of<F, S>(typename S::BufferIndices());
        register_kernel(info);
    }
};

}  // namespace zinc::msl

#define TG_ARRAY(T, name, n) __shared__ T name[n]
