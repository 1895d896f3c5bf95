#include "core/plan.h"

#include <algorithm>
#include <utility>

namespace zinc {

namespace {

uint32_t count_barriers(const std::vector<Dispatch>& dispatches) {
    return uint32_t(std::count_if(dispatches.begin(), dispatches.end(), [](const Dispatch& d) { return d.barrier; }));
}

std::vector<const FileDamage*> mapped_files(const std::vector<Dispatch>& dispatches) {
    std::vector<const FileDamage*> files;
    for (const Dispatch& d : dispatches)
        for (const Binding& b : d.bindings)
            if (b.buffer && b.buffer->file && std::find(files.begin(), files.end(), b.buffer->file) == files.end())
                files.push_back(b.buffer->file);
    return files;
}

}  // namespace

Plan::Plan(std::shared_ptr<Device> device, std::vector<Dispatch> dispatches, uint32_t max_tokens, uint32_t n_out)
    : device(std::move(device)), max_tokens(max_tokens), n_out(n_out), n_dispatches(uint32_t(dispatches.size())),
      n_barriers(count_barriers(dispatches)), files(mapped_files(dispatches)),
      recording(this->device->record(std::move(dispatches))) {}

}  // namespace zinc
