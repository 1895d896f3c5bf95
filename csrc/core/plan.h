// A compiled plan: made ready on a device, and replayed step after step.
#pragma once

#include <memory>
#include <vector>

#include "core/device.h"

namespace zinc {

// One step's dispatches, for up to max_tokens rows, made ready on a device.
class Plan {
  public:
    // has_argmax: the last dispatch writes the arg max, and with it the next step, into the step buffer. Then the
    // plan can follow itself without the host.
    Plan(std::shared_ptr<Device> device, std::vector<Dispatch> dispatches, uint32_t max_tokens, bool has_argmax);

    const std::shared_ptr<Device> device;
    const uint32_t max_tokens, n_dispatches, n_barriers;
    const bool has_argmax;
    const std::vector<const FileDamage*> files;  // mapped files that it reads
    const std::unique_ptr<Recording> recording;
};

}  // namespace zinc
