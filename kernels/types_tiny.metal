#define SOURCE_TYPES(T) TINY_TYPES(T)
#include "quant_table_blocks.h"
#include "kernels_of_types.h"
