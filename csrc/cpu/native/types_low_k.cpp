#define SOURCE_TYPES(T) LOW_K_TYPES(T)
#define NATIVE_GROUP _low_k
#include "cpu/native/quant_low.h"
#include "cpu/native/kernels_of_types.h"
