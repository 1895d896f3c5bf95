#define SOURCE_TYPES(T) IQ4_TYPES(T)
#define NATIVE_GROUP _iq4
#include "cpu/native/quant_tables.h"
#include "cpu/native/kernels_of_types.h"
