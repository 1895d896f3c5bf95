// Registers the tables that the native kernel files export, one per family and instruction set. Compiled with
// the flags of all other files, and not for an instruction set.
//
// A family has one name here, in plan/lower/ and in tests/kernels/. Its kernels keep the names of their operations:
//   products    mul_mv*, mul_few*, mul_mm*, mul_heads*
//   experts     moe_*
//   attention   attention_*, rope_latent_*
//   recurrent   ssm_*, short_conv
//   mamba2      mamba2_*
//   step        begin_step
//   embed       embed*
//   rows        rms_norm*, rope_kv*, add, swiglu*, geglu*, relu2, scale, take_rows, keep_rows_*, pair_rows_*
//   output      argmax_*
//   draw        draw_*
#include "cpu/native/kernel.h"

namespace zinc {

// clang-format off
// Of a group of types, see quant_types.h.
#define FAMILIES_OF_TYPES(F, group, isa)                                                                               \
    F(products_mv##group, isa) F(products_few##group, isa) F(products_mm##group, isa)                                  \
    F(experts_mv##group, isa) F(experts_few##group, isa) F(experts_mm##group, isa)                                     \
    F(embed##group, isa)
#define FAMILIES(F, isa)                                                                                               \
    FAMILIES_OF_TYPES(F, , isa)                                                                                        \
    FAMILIES_OF_TYPES(F, _iq4, isa)                                                                                    \
    FAMILIES_OF_TYPES(F, _iq3, isa)                                                                                    \
    FAMILIES_OF_TYPES(F, _low_k, isa)                                                                                  \
    FAMILIES_OF_TYPES(F, _iq2, isa)                                                                                    \
    FAMILIES_OF_TYPES(F, _iq1, isa)                                                                                    \
    FAMILIES_OF_TYPES(F, _fp4, isa)                                                                                    \
    FAMILIES_OF_TYPES(F, _tiny, isa)                                                                                   \
    F(experts_route, isa) F(attention, isa) F(attention_latent, isa)                                                  \
    F(recurrent, isa) F(recurrent_short_conv, isa)                                                                     \
    F(mamba2, isa)                                                                                                     \
    F(step, isa) F(rows, isa) F(output, isa)                                                                           \
    F(draw, isa)
// clang-format on
#define TABLE(family, isa) extern const NativeKernel native_##family##_##isa[];
#define REGISTER_TABLE(family, isa) register_table(native_##family##_##isa, Isa::isa);
#define TABLES(isa) FAMILIES(TABLE, isa)
#define REGISTER(isa) FAMILIES(REGISTER_TABLE, isa)

#if !defined(NATIVE_NONE)  // a build of mutants, which are of Metal text
TABLES(plain)
#endif
#if defined(NATIVE_NONE) || defined(NATIVE_ONLY_PLAIN)  // a build with sanitizers, which takes long to compile
#elif defined(__x86_64__)
TABLES(avx2)
TABLES(avx512)
#elif defined(__aarch64__)
TABLES(neon)
#endif

namespace {

[[maybe_unused]] void register_table(const NativeKernel* table, Isa isa) {
    for (; table->name; table++) register_native(table->name, isa, table->fn, table->grain);
}

[[maybe_unused]] const bool registered = [] {
#if !defined(NATIVE_NONE)
    REGISTER(plain)
#endif
#if defined(NATIVE_NONE) || defined(NATIVE_ONLY_PLAIN)
#elif defined(__x86_64__)
    REGISTER(avx2)
    REGISTER(avx512)
#elif defined(__aarch64__)
    REGISTER(neon)
#endif
    return true;
}();

}  // namespace
}  // namespace zinc
