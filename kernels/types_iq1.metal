#define SOURCE_TYPES(T) IQ1_TYPES(T)
#include "quant_grid_blocks.h"
#include "kernels_of_types.h"
