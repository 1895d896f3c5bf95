// Registers the tables that the native kernel files export, one per family and instruction set. Compiled for the
// machine that everything else is compiled for.
#include "native.h"

namespace zinc {

#define TABLES(isa)                                                                                                    \
    extern const NativeKernel native_mul_mv_##isa[], native_mul_mm_##isa[], native_attention_##isa[],                  \
        native_rows_##isa[], native_moe_mm_##isa[];
#define REGISTER(isa)                                                                                                  \
    register_table(native_mul_mv_##isa, Isa::isa), register_table(native_mul_mm_##isa, Isa::isa),                      \
        register_table(native_attention_##isa, Isa::isa), register_table(native_rows_##isa, Isa::isa),                 \
        register_table(native_moe_mm_##isa, Isa::isa);

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
