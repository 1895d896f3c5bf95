#define SOURCE_TYPES(T) IQ3_TYPES(T)
#define NATIVE_GROUP _iq3
#include "cpu/native/quant_points.h"
#include "cpu/native/kernels_of_types.h"
