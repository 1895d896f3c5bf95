#define SOURCE_TYPES(T) IQ1_TYPES(T)
#define NATIVE_GROUP _iq1
#include "cpu/native/quant_points.h"
#include "cpu/native/kernels_of_types.h"
