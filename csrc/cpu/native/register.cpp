// Registers the tables that the native kernel files export, one per family and instruction set. Compiled with
// the flags of all other files, and not for an instruction set.
//
// A family has one name here, in plan/lower/ and in tests/kernels/. Its kernels keep the names of their operations:
//   products    mul_mv*, mul_mm*
//   experts     moe_*
//   attention   attention_*
//   recurrent   ssm_*
//   rows        embed*, rms_norm*, rope_kv*, add, swiglu, geglu, take_last_row
//   output      argmax_*, candidates_*
#include "cpu/native/kernel.h"

namespace zinc {

#define FAMILIES(F, isa)                                                                                               \
    F(products_mv, isa)                                                                                                \
    F(products_mm, isa)                                                                                                \
    F(experts_mv, isa) F(experts_mm, isa) F(attention, isa) F(recurrent, isa) F(rows, isa) F(output, isa)
#define TABLE(family, isa) extern const NativeKernel native_##family##_##isa[];
#define REGISTER_TABLE(family, isa) register_table(native_##family##_##isa, Isa::isa);
#define TABLES(isa) FAMILIES(TABLE, isa)
#define REGISTER(isa) FAMILIES(REGISTER_TABLE, isa)

TABLES(plain)
#if defined(__x86_64__)
TABLES(avx2)
TABLES(avx512)
#elif defined(__aarch64__)
TABLES(neon)
#endif

namespace {

void register_table(const NativeKernel* table, Isa isa) {
    for (; table->name; table++) register_native(table->name, isa, table->fn, table->grain);
}

[[maybe_unused]] const bool registered = [] {
    REGISTER(plain)
#if defined(__x86_64__)
    REGISTER(avx2)
    REGISTER(avx512)
#elif defined(__aarch64__)
    REGISTER(neon)
#endif
    return true;
}();

}  // namespace
}  // namespace zinc
