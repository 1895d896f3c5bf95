#include "blocks.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "rules.h"

extern "C" {
void* _NSConcreteStackBlock[32];
void* _NSConcreteMallocBlock[32];
void* _NSConcreteGlobalBlock[32];
void* objc_retain(void* object);
void objc_release(void* object);
}

namespace {

struct Descriptor {
    unsigned long reserved, bytes;
    void (*copy)(void* to, const void* from);  // these two where HAS_HELPERS says so
    void (*dispose)(const void* block);
};
struct Block {
    void* isa;
    int flags;
    int reserved;
    void (*invoke)();
    const Descriptor* descriptor;
};
enum Flags { ON_HEAP = 1 << 24, HAS_HELPERS = 1 << 25, IS_GLOBAL = 1 << 28 };
enum Field { IS_OBJECT = 3, IS_BLOCK = 7, IS_BYREF = 8 };

constexpr int COUNT_MASK = 0xfffe, ONE = 2;  // the count lies in the flags

std::atomic<long> on_heap{0};

std::atomic_ref<int> flags_of(const void* block) {
    return std::atomic_ref<int>(static_cast<Block*>(const_cast<void*>(block))->flags);
}

}  // namespace

extern "C" {

void* _Block_copy(const void* from) {
    const auto* block = static_cast<const Block*>(from);
    if (block->flags & IS_GLOBAL) return const_cast<void*>(from);
    if (block->flags & ON_HEAP) {
        flags_of(from) += ONE;
        return const_cast<void*>(from);
    }
    auto* copy = static_cast<Block*>(malloc(block->descriptor->bytes));
    if (!copy) throw std::bad_alloc();
    memcpy(static_cast<void*>(copy), block, block->descriptor->bytes);
    copy->isa = _NSConcreteMallocBlock;
    copy->flags = (block->flags & ~COUNT_MASK) | ON_HEAP | ONE;
    if (copy->flags & HAS_HELPERS) copy->descriptor->copy(copy, from);
    on_heap++;
    return copy;
}

void _Block_release(const void* from) {
    const auto* block = static_cast<const Block*>(from);
    if (!block || !(block->flags & ON_HEAP)) return;
    const int before = flags_of(from).fetch_sub(ONE);
    if ((before & COUNT_MASK) == 0) metal_double::broken("use-after-release", "release of a block that is gone");
    if ((before & COUNT_MASK) != ONE) return;
    if (block->flags & HAS_HELPERS) block->descriptor->dispose(block);
    on_heap--;
    free(const_cast<void*>(from));
}

void _Block_object_assign(void* to, const void* from, int field) {
    if (field & IS_BYREF) metal_double::broken("block", "__block variables are not part of this runtime");
    void* object = const_cast<void*>(from);
    *static_cast<void**>(to) = (field & IS_BLOCK) == IS_BLOCK && object ? _Block_copy(object) : objc_retain(object);
}

void _Block_object_dispose(const void* object, int field) {
    if ((field & IS_BLOCK) == IS_BLOCK)
        _Block_release(object);
    else
        objc_release(const_cast<void*>(object));
}

}  // extern "C"

namespace metal_double {

bool is_block_class(const void* isa) {
    return isa == _NSConcreteStackBlock || isa == _NSConcreteMallocBlock || isa == _NSConcreteGlobalBlock;
}

long live_blocks() { return on_heap; }

}  // namespace metal_double
