// The contract of native CPU kernels: same name, bindings and parameters as the MSL kernel that they replace.
// A native source file is compiled once per instruction set and registers its kernels for that set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zinc {

enum class Isa { plain, neon, avx2, avx512 };

// The best instruction set that this machine has; the environment variable ZINCMETAL_ISA (plain, neon, avx2, avx512)
// caps it.
Isa detected_isa();
const char* isa_name(Isa isa);

struct NativeLaunch {
    const void* params;
    uint32_t params_bytes;
    void* const* buffers;   // bindings 1, 2, ... of the kernel at index 0, 1, ...
    const uint64_t* bytes;  // the extent of each
    uint32_t grid[3];       // threadgroups
    uint32_t threads;       // of the MSL kernel, per threadgroup

    template <class P>
    const P& as() const {
        return *static_cast<const P*>(params);
    }
    // The pointer of binding `index` as kernels count them: the first after the parameters is 1.
    template <class T>
    T* buffer(int index) const {
        return static_cast<T*>(buffers[index - 1]);
    }
};

// Memory that only grows: a kernel allocates in its first runs and never again.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch();

    // 64-byte aligned, uninitialised, valid until the next call. Throws std::bad_alloc. Always inline: the
    // linker would take a separate copy from any file, in the instruction set of that file.
    template <class T>
    __attribute__((always_inline)) T* take(size_t count) {
        const size_t bytes = count * sizeof(T) + 64;
        if (bytes > bytes_) grow(bytes);
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(base_) + 63) & ~uintptr_t(63));
    }

  private:
    void grow(size_t bytes);

    void* base_ = nullptr;
    size_t bytes_ = 0;
};

// Scratch memory of one thread that runs native kernels. It belongs to the runner of the kernels. The runtime would
// allocate thread-local variables, and ends the process if there is no memory.
struct Workspace {
    Scratch rows, weights, panel, sums, tokens, result[2];
};

#ifdef __ELF__
#define ZINC_STATIC_TLS __attribute__((tls_model("initial-exec")))  // there from the start of every thread
#else
#define ZINC_STATIC_TLS
#endif
extern ZINC_STATIC_TLS __thread Workspace* thread_workspace;

// Lends a workspace to the kernels that this thread runs.
class WorkspaceScope {
  public:
    explicit WorkspaceScope(Workspace& workspace) : outer_(thread_workspace) { thread_workspace = &workspace; }
    WorkspaceScope(const WorkspaceScope&) = delete;
    WorkspaceScope& operator=(const WorkspaceScope&) = delete;
    ~WorkspaceScope() { thread_workspace = outer_; }

  private:
    Workspace* const outer_;
};

// Does the work of threadgroups [begin, end), numbered with x fastest. Runs on any thread of the pool, in a
// WorkspaceScope. Throws only std::bad_alloc.
using NativeFn = void (*)(const NativeLaunch& launch, uint64_t begin, uint64_t end);

struct NativeKernel {
    const char* name;
    NativeFn fn;
    uint32_t grain;  // begin and end are multiples of this (end may be the grid's); 0: whole x-lines of the grid
};

// Makes a version known. Called from static initialisers.
void register_native(const char* name, Isa isa, NativeFn fn, uint32_t grain);
// The version for the best instruction set that the machine has and the environment allows, or null.
const NativeKernel* find_native(const char* name);

struct NativeRegistration {
    NativeRegistration(const char* name, Isa isa, NativeFn fn, uint32_t grain) {
        register_native(name, isa, fn, grain);
    }
};

}  // namespace zinc
