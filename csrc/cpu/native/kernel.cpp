#include "cpu/native/kernel.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string_view>
#include <vector>

namespace zinc {
namespace {

struct Registered {
    NativeKernel kernel;
    Isa isa;
};

// The versions of each kernel. Never destroyed: threads may still use it at the end of the process.
std::map<std::string_view, std::vector<Registered>>& registry() {
    static auto& all = *new std::map<std::string_view, std::vector<Registered>>;
    return all;
}

Isa isa_of_machine() {
#if defined(__x86_64__)
    // The compiler's own test also asks the operating system if it keeps the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::plain;
#elif defined(__aarch64__)
    return Isa::neon;
#else
    return Isa::plain;
#endif
}

// Whether a machine that has `best` runs kernels of `isa`: those of another processor it does not.
bool runs_on(Isa isa, Isa best) {
    return isa == Isa::plain || (isa <= best && (isa == Isa::neon) == (best == Isa::neon));
}

Isa isa_allowed() {
    const Isa machine = isa_of_machine();
    if (const char* cap = getenv("ZINCMETAL_ISA"))
        for (Isa isa : {Isa::plain, Isa::neon, Isa::avx2, Isa::avx512})
            if (!strcmp(cap, isa_name(isa)) && runs_on(isa, machine)) return isa;
    return machine;
}

}  // namespace

__thread Workspace* thread_workspace = nullptr;

Scratch::~Scratch() { free(base_); }

void Scratch::grow(size_t bytes) {
    free(base_);
    base_ = malloc(bytes);
    bytes_ = base_ ? bytes : 0;
    if (!base_) throw std::bad_alloc();
}

const char* isa_name(Isa isa) {
    switch (isa) {
    case Isa::plain:
        return "plain";
    case Isa::neon:
        return "neon";
    case Isa::avx2:
        return "avx2";
    case Isa::avx512:
        return "avx512";
    }
    return "?";
}

Isa detected_isa() { return isa_allowed(); }

// All versions are kept: the environment caps the instruction set when a device opens, after static initialisation.
void register_native(const char* name, Isa isa, NativeFn fn, uint32_t grain) {
    registry()[name].push_back({{name, fn, grain}, isa});
}

const NativeKernel* find_native(const char* name) {
    const auto found = registry().find(name);
    if (found == registry().end()) return nullptr;
    const Isa allowed = detected_isa();
    const Registered* best = nullptr;
    for (const Registered& r : found->second)
        if (runs_on(r.isa, allowed) && (!best || r.isa > best->isa)) best = &r;
    return best ? &best->kernel : nullptr;
}

}  // namespace zinc
