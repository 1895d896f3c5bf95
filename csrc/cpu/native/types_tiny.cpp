#define SOURCE_TYPES(T) TINY_TYPES(T)
#define NATIVE_GROUP _tiny
#include "cpu/native/quant_tables.h"
#include "cpu/native/kernels_of_types.h"
