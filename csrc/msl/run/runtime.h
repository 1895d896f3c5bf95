// The calls of a compiled kernel to its executor, and the entry by which it registers.
// Only plain types here: kernel files include this before MSL's keywords become macros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zinc::msl {

// The place of a collective in a kernel's source.
struct Site {
    const char* operation;
    const char* file;
    uint32_t line;
};

constexpr uint32_t simd_width = 32;
constexpr uint32_t max_threads = 1024;
#ifdef ZINC_CUDA  // launch shapes for NVIDIA's GPUs, on the CPU: tests/mutants/mutants.py
constexpr uint32_t max_threadgroup_bytes = 48 * 1024;
#else
constexpr uint32_t max_threadgroup_bytes = 32 * 1024;
#endif
constexpr uint32_t max_exchange_bytes = 32;  // of one lane's value in a simdgroup operation

enum MemoryClass : uint32_t { orders_none = 0, orders_device = 1, orders_threadgroup = 2 };

// Computes all 32 results of a simdgroup operation from the 32 values that the lanes brought.
using SimdRule = void (*)(const void* values, const uint32_t* arguments, void* results);

// The values that the lanes of a simdgroup leave for each other: arrays with one element per lane.
struct SimdSlots {
    uint32_t arguments[simd_width];
    alignas(64) unsigned char values[simd_width * max_exchange_bytes];
    alignas(64) unsigned char results[simd_width * max_exchange_bytes];
};

// The kernel thread that runs on this OS thread: the face of its executor.
struct Running {
    uint32_t thread = 0;
    SimdSlots* slots = nullptr;
};
#ifdef __ELF__
__attribute__((tls_model("initial-exec")))  // or the first access of a thread allocates, and may end the process
#endif
extern __thread Running* running;

void threadgroup_barrier(uint32_t orders, Site site);
void simdgroup_barrier(uint32_t orders, Site site);
// Waits until every lane has left its value and argument in the slots. The last lane applies the rule.
void simd_meet(Running& here, SimdRule rule, const Site& site);
// All lanes come here. Only the checked build waits for them.
void simd_arrive(Site site);
void* threadgroup_array(size_t bytes, size_t alignment, const char* name);
// The checked build: a thread asks a vector of n components for a component that it does not have.
void no_component(uint32_t i, uint32_t n);

struct ThreadArguments {
    const void* params;
    void* const* buffers;
    uint32_t tg[3], n_tg[3];
    uint32_t tid, sg, lane, n_sg;
};

// CUDA: bytes that a kernel reads and no kernel writes. It fetches them into the cache while it waits for the kernel
// before it. Addresses and sizes are multiples of 16.
struct Ahead {
    static constexpr uint32_t N = 4, MAX_BYTES = 32 << 20;  // ranges; the largest size that is worth it
    const void* at[N];
    uint32_t bytes[N];
};

struct BufferSignature {
    uint32_t element_bytes;
    uint32_t alignment;
    bool writable;
};

struct KernelInfo {
    const char* name;
    uint32_t params_bytes;
    uint32_t n_buffers;
    const BufferSignature* buffers;
    void (*thread)(const ThreadArguments&) = nullptr;  // CPU: runs one thread
    const void* global = nullptr;                      // CUDA: takes params, Ahead, then the buffers
};

void register_kernel(const KernelInfo& kernel);

}  // namespace zinc::msl
