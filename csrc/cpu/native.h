// The contract of native CPU kernels: same name, bindings and parameters as the MSL kernel that they replace.
// A native source file is compiled once per instruction set and registers what it has for that set.
#pragma once

#include <cstdint>

namespace zinc {

enum class Isa { plain, neon, avx2, avx512 };

// The best instruction set that this machine has; the environment variable ZINCMETAL_ISA (plain, neon, avx2, avx512)
// caps it.
Isa detected_isa();
const char* isa_name(Isa isa);

struct Launch {
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

// Does the work of threadgroups [begin, end), numbered with x fastest. Runs on any thread of the pool.
using NativeFn = void (*)(const Launch& launch, uint64_t begin, uint64_t end);

struct NativeKernel {
    const char* name;
    NativeFn fn;
    uint32_t grain;  // begin and end are multiples of this (end may be the grid's); 0: whole x-lines of the grid
};

// Makes a version known. Called from static initialisers.
void register_native(const char* name, Isa isa, NativeFn fn, uint32_t grain);
// The version of the best instruction set that the machine has and the environment allows; null when there is none.
const NativeKernel* find_native(const char* name);

struct NativeRegistration {
    NativeRegistration(const char* name, Isa isa, NativeFn fn, uint32_t grain) {
        register_native(name, isa, fn, grain);
    }
};

}  // namespace zinc
