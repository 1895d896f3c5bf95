// The kernels of this module, by name; static initialisers of the kernel files fill it.
#include <map>
#include <string_view>

#include "msl/run/executor.h"

namespace zinc::msl {
namespace {

struct Registry {
    std::map<std::string_view, KernelInfo> kernels;
    std::string error;
};

Registry& registry() {
    static auto& all = *new Registry;  // never destroyed: threads may still use it at the end of the process
    return all;
}

}  // namespace

void register_kernel(const KernelInfo& kernel) {
    if (!registry().kernels.emplace(kernel.name, kernel).second)
        registry().error = std::string("two kernels are named ") + kernel.name;
}

const KernelInfo* find_kernel(const char* name) {
    const auto found = registry().kernels.find(name);
    return found == registry().kernels.end() ? nullptr : &found->second;
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const auto& [name, kernel] : registry().kernels) names.emplace_back(name);
    return names;
}

const std::string& registry_error() { return registry().error; }

}  // namespace zinc::msl
