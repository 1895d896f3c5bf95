#define SOURCE_TYPES(T) FP4_TYPES(T)
#include "quant_table_blocks.h"
#include "kernels_of_types.h"
