// The kernels of this module, by name; static initialisers of the kernel files fill it.
#include <algorithm>
#include <cstring>

#include "msl/run/executor.h"

namespace zinc::msl {
namespace {

struct Registry {
    std::vector<KernelInfo> kernels;
    std::string error;
};

Registry& registry() {
    static auto& all = *new Registry;  // never destroyed: threads may still use it at the end of the process
    return all;
}

}  // namespace

void register_kernel(const KernelInfo& kernel) {
    for (const KernelInfo& other : registry().kernels)
        if (!strcmp(other.name, kernel.name)) registry().error = std::string("two kernels are named ") + kernel.name;
    registry().kernels.push_back(kernel);
}

const KernelInfo* find_kernel(const char* name) {
    for (const KernelInfo& kernel : registry().kernels)
        if (!strcmp(kernel.name, name)) return &kernel;
    return nullptr;
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const KernelInfo& kernel : registry().kernels) names.emplace_back(kernel.name);
    std::sort(names.begin(), names.end());
    return names;
}

const std::string& registry_error() { return registry().error; }

}  // namespace zinc::msl
