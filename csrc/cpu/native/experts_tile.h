// A tile of slots of one expert, as routing writes it and products read it.
#pragma once

#include <cstdint>

namespace zinc {

// slots[first .. end) are an expert's.
struct ExpertTile {
    int32_t expert, first, end, reserved;
};

}  // namespace zinc
