#define SOURCE_TYPES(T) FP4_TYPES(T)
#define NATIVE_GROUP _fp4
#include "cpu/native/quant_tables.h"
#include "cpu/native/kernels_of_types.h"
