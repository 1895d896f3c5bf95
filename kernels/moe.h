// Shared by the kernels of a mixture of experts.
#pragma once

#include "common.h"

// Bytes from the first expert's matrix to another's. The id comes from a kernel and may be any number: the clamp keeps
// reads inside the tensor.
template <class P>
METAL_FUNC ulong expert_offset(constant P& p, int id) {
    return ulong(min(uint(id), p.n_expert - 1)) * p.expert_bytes;
}
