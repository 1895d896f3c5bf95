// Dispatches and their barriers as a CUDA graph.
#pragma once

#include <cstdint>
#include <vector>

#include "core/check_dispatch.h"
#include "msl/run/executor.h"
#include "cuda/memory.h"

namespace zinc::cuda {

class CudaPipeline : public Pipeline {
  public:
    const msl::KernelInfo* kernel = nullptr;
};

inline CudaBuffer& buffer_of(const Binding& b) { return static_cast<CudaBuffer&>(*b.buffer); }
inline const msl::KernelInfo& kernel_of(const Dispatch& d) {
    return *static_cast<const CudaPipeline&>(*d.pipeline).kernel;
}

// True if the threadgroups of a dispatch can all be on the device at once.
inline bool fits_at_once(const Dispatch& d) {
    int device = 0, processors = 0, each = 0;
    check(cudaGetDevice(&device), "the GPU");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "the GPU's processors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel_of(d).global, int(d.threads), 0), "occupancy");
    return uint64_t(d.grid[0]) * d.grid[1] * d.grid[2] <= uint64_t(each) * uint64_t(processors);
}

// The edge that holds a kernel back until the one before it has ended.
enum class Edges {
    full,   // it is launched when the other has ended
    early,  // it is launched while the other runs, and waits for its end (msl/stdlib/kernel_cuda.h)
};

// Builds a graph: a node that is added after a barrier waits for all nodes added before it.
class GraphBuilder {
  public:
    GraphBuilder() : graph_(make_graph()) {}

    void barrier() {
        if (!waiting_.empty() || !since_.empty()) close_group();
    }
    // The dispatch lives until the next barrier. Edges are early if exactly one kernel follows exactly one other.
    void add_kernel(const Dispatch& d, Edges edges) { waiting_.push_back({&d, edges}); }
    void add_event(cudaEvent_t event);
    GraphExec instantiate();

  private:
    using Nodes = std::vector<cudaGraphNode_t>;
    struct Waiting {
        const Dispatch* dispatch;
        Edges edges;
    };

    void close_group();
    cudaGraphNode_t add_now(const Dispatch& d, Edges edges);
    void connect_early(cudaGraphNode_t node);

    Graph graph_;
    Nodes before_;                  // the last barrier
    bool after_kernel_ = false;     // which is the end of one kernel
    Nodes since_;                   // nodes added after it,
    std::vector<Waiting> waiting_;  // and kernels that are still to be added
};

inline void GraphBuilder::close_group() {
    const bool one_kernel = waiting_.size() == 1 && since_.empty();
    for (const auto& [dispatch, edges] : waiting_)
        since_.push_back(add_now(*dispatch, after_kernel_ && one_kernel ? edges : Edges::full));
    waiting_.clear();
    if (since_.size() == 1) {
        before_ = std::move(since_);
    } else {  // one node that waits for all: edges from each to each of the next would be many more
        cudaGraphNode_t all;
        check(cudaGraphAddEmptyNode(&all, graph_.get(), since_.data(), since_.size()), "a barrier");
        before_ = {all};
    }
    since_.clear();
    after_kernel_ = one_kernel;
}

// The weights of a dispatch. No kernel writes them, so they can be fetched before the kernels before it have ended.
// Tables of experts or embeddings are left out: most of their bytes would be fetched in vain.
inline msl::Ahead weights_of(const Dispatch& d) {
    msl::Ahead ahead{};
    const std::string& kernel = d.pipeline->name;
    if (kernel.starts_with("moe_") || kernel.starts_with("embed_")) return ahead;
    size_t n = 0;
    for (const Binding& b : d.bindings) {
        if (!b.buffer->read_only || b.bytes < 32 || b.bytes > msl::Ahead::MAX_BYTES || n == msl::Ahead::N) continue;
        const auto at = reinterpret_cast<uintptr_t>(buffer_of(b).memory()) + b.offset;
        const uintptr_t aligned = (at + 15) / 16 * 16;
        ahead.at[n] = reinterpret_cast<const void*>(aligned);
        ahead.bytes[n++] = uint32_t((b.bytes - (aligned - at)) / 16 * 16);
    }
    return ahead;
}

inline cudaGraphNode_t GraphBuilder::add_now(const Dispatch& d, Edges edges) {
    std::vector<void*> addresses;
    for (const Binding& b : d.bindings) addresses.push_back(static_cast<char*>(buffer_of(b).memory()) + b.offset);
    msl::Ahead ahead{};
    std::vector<void*> arguments{const_cast<uint8_t*>(d.params.data()), &ahead};
    for (void*& address : addresses) arguments.push_back(&address);
    cudaKernelNodeParams params{};
    params.func = const_cast<void*>(kernel_of(d).global);
    params.gridDim = dim3(d.grid[0], d.grid[1], d.grid[2]);
    params.blockDim = dim3(d.threads);
    params.kernelParams = arguments.data();

    const bool early = edges == Edges::early;
    if (early) ahead = weights_of(d);
    cudaGraphNode_t node;
    check(cudaGraphAddKernelNode(&node, graph_.get(), before_.data(), early ? 0 : before_.size(), &params),
          "kernel " + d.pipeline->name);
    if (early) connect_early(node);
    return node;
}

inline void GraphBuilder::connect_early(cudaGraphNode_t node) {
#if CUDART_VERSION >= 12030
    cudaGraphEdgeData edge{};
    edge.from_port = cudaGraphKernelNodePortProgrammatic;
    edge.type = cudaGraphDependencyTypeProgrammatic;
#if CUDART_VERSION >= 13000
    check(cudaGraphAddDependencies(graph_.get(), before_.data(), &node, &edge, 1), "an early launch");
#else
    check(cudaGraphAddDependencies_v2(graph_.get(), before_.data(), &node, &edge, 1), "an early launch");
#endif
#endif
}

inline void GraphBuilder::add_event(cudaEvent_t event) {
    cudaGraphNode_t node;
    check(cudaGraphAddEventRecordNode(&node, graph_.get(), before_.data(), before_.size(), event), "an event");
    since_.push_back(node);
}

inline GraphExec GraphBuilder::instantiate() {
    barrier();
    cudaGraphExec_t executable;
    check(cudaGraphInstantiate(&executable, graph_.get(), 0), "a graph");
    return GraphExec(executable);
}

}  // namespace zinc::cuda
