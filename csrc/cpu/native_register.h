// What every native kernel file includes. A file is compiled once per instruction set, with NATIVE_ISA naming it, and
// exports one table of its kernels: constant data, because code of this set must not run before the machine is asked.
#pragma once

#include "../../kernels/params.h"
#include "native.h"
#include "native_simd.h"

#define NATIVE_JOIN2(a, b) a##_##b
#define NATIVE_JOIN(a, b) NATIVE_JOIN2(a, b)
// NATIVE_TABLE(mul_mv) = {{"name", fn, grain}, ...}; ends with a kernel without a name.
#define NATIVE_TABLE(family)                                                                                           \
    extern const NativeKernel NATIVE_JOIN(native_##family, NATIVE_ISA)[];                                              \
    const NativeKernel NATIVE_JOIN(native_##family, NATIVE_ISA)[]
