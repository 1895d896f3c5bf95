// A compiled plan: made ready on a device, and replayed step after step.
#pragma once

#include <memory>
#include <vector>

#include "core/device.h"

namespace zinc {

// One step's dispatches, for up to max_tokens rows and n_out outputs, made ready on a device.
class Plan {
  public:
    Plan(std::shared_ptr<Device> device, std::vector<Dispatch> dispatches, uint32_t max_tokens, uint32_t n_out);

    const std::shared_ptr<Device> device;
    const uint32_t max_tokens, n_out, n_dispatches, n_barriers;
    const std::vector<const FileDamage*> files;  // mapped files that it reads
    const std::unique_ptr<Recording> recording;
};

}  // namespace zinc
