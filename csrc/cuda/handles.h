// Owners for CUDA's handles, and CUDA's errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <type_traits>

#include "core/device.h"

namespace zinc::cuda {

inline std::string describe(cudaError_t status) {
    return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

inline void check(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // said once, here
    throw DeviceError(what + ": " + describe(status));
}

// The process that first used CUDA here. A child of it can wait for nothing and release nothing.
inline const OpeningProcess& cuda_process() {
    static const OpeningProcess first{};
    return first;
}

inline void synchronize(cudaStream_t stream) {
    if (!cuda_process().is_another()) cudaStreamSynchronize(stream);
}

template <auto destroy>
struct Destroy {
    template <class T>
    void operator()(T* handle) const {
        if (!cuda_process().is_another()) destroy(handle);
    }
};

template <class Handle, auto destroy>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy<destroy>>;

using Stream = std::shared_ptr<std::remove_pointer_t<cudaStream_t>>;  // its buffers may outlive the device
using Event = Owned<cudaEvent_t, cudaEventDestroy>;
using Graph = Owned<cudaGraph_t, cudaGraphDestroy>;
using GraphExec = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;
using DeviceMemory = Owned<void*, cudaFree>;
using PinnedMemory = Owned<void*, cudaFreeHost>;

inline Event make_event(unsigned flags = cudaEventDefault) {
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, flags), "an event");
    return Event(event);
}

inline Stream make_stream() {
    cuda_process();
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    return Stream(stream, Destroy<cudaStreamDestroy>{});
}

inline Graph make_graph() {
    cudaGraph_t graph;
    check(cudaGraphCreate(&graph, 0), "a graph");
    return Graph(graph);
}

inline DeviceMemory make_memory(size_t nbytes) {
    void* memory = nullptr;
    if (cudaMalloc(&memory, nbytes > 0 ? nbytes : 1) == cudaSuccess) return DeviceMemory(memory);
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw OutOfMemoryError("the GPU has no room for " + std::to_string(nbytes) + " bytes: " + std::to_string(free) +
                           " of its " + std::to_string(total) +
                           " are free; use a smaller context or model, or close other programs");
}

// Pinned memory of the host that kernels use. It is not write-combined, since the host also reads it.
inline PinnedMemory make_mapped(size_t nbytes) {
    void* memory = nullptr;
    if (cudaHostAlloc(&memory, nbytes > 0 ? nbytes : 1, cudaHostAllocMapped) == cudaSuccess)
        return PinnedMemory(memory);
    cudaGetLastError();
    throw OutOfMemoryError("the system pins no " + std::to_string(nbytes) +
                           " bytes for the GPU; close other programs, or raise the limit of locked memory");
}

// Null if the driver gives none.
inline PinnedMemory make_pinned(size_t nbytes) {
    void* memory = nullptr;
    if (cudaMallocHost(&memory, nbytes) != cudaSuccess) cudaGetLastError();
    return PinnedMemory(memory);
}

}  // namespace zinc::cuda
