#define SOURCE_TYPES(T) LOW_K_TYPES(T)
#include "quant_low_blocks.h"
#include "kernels_of_types.h"
