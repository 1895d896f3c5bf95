// Names that both CUDA and Metal claim. Included before all our headers and after every header of C++ and CUDA.
#pragma once

#include <cuda_runtime.h>

// CUDA's own vectors are global, so that `using namespace metal` would make each of these names ambiguous.
#define char2 msl_char2
#define char3 msl_char3
#define char4 msl_char4
#define uchar2 msl_uchar2
#define uchar3 msl_uchar3
#define uchar4 msl_uchar4
#define short2 msl_short2
#define short3 msl_short3
#define short4 msl_short4
#define ushort2 msl_ushort2
#define ushort3 msl_ushort3
#define ushort4 msl_ushort4
#define int2 msl_int2
#define int3 msl_int3
#define int4 msl_int4
#define uint2 msl_uint2
#define uint3 msl_uint3
#define uint4 msl_uint4
#define long2 msl_long2
#define long3 msl_long3
#define long4 msl_long4
#define ulong2 msl_ulong2
#define ulong3 msl_ulong3
#define ulong4 msl_ulong4
#define float2 msl_float2
#define float3 msl_float3
#define float4 msl_float4

// CUDA spells this attribute __attribute__((device)), but `device` is a keyword of MSL, and so an empty macro.
#undef __device__
#define __device__ __attribute__((__device__))
