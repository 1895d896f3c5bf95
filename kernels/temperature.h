// Queries that grow with their position.
#pragma once

#include "common.h"

// The factor of q at a position. P has temperature and temperature_length.
template <class P>
METAL_FUNC float q_scale(constant P& p, uint position) {
    if (p.temperature == 0.0f) return 1.0f;
    return 1.0f + p.temperature * precise::log(float(1 + position / p.temperature_length));
}
