#define SOURCE_TYPES(T) IQ2_TYPES(T)
#define NATIVE_GROUP _iq2
#include "cpu/native/quant_points.h"
#include "cpu/native/kernels_of_types.h"
