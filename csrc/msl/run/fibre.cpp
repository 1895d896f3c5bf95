#include "msl/run/fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifdef __APPLE__
#define SYMBOL(name) "_" name
#define HIDE(name) ".private_extern " SYMBOL(name) "\n"
#else
#define SYMBOL(name) name
#define HIDE(name) ".hidden " SYMBOL(name) "\n"
#endif

// Only the registers that a callee must keep are saved: for the compiler a switch is a function call. It ends in a real
// return: all fibres wait at one place in the code, so the processor predicts it.
#if defined(__x86_64__)
asm(".text\n" HIDE("zinc_msl_switch") ".globl " SYMBOL("zinc_msl_switch") "\n" SYMBOL(
    "zinc_msl_switch") ":\n"
                       "  pushq %rbp\n"
                       "  pushq %rbx\n"
                       "  pushq %r12\n"
                       "  pushq %r13\n"
                       "  pushq %r14\n"
                       "  pushq %r15\n"
                       "  movq %rsp, (%rdi)\n"
                       "  movq %rsi, %rsp\n"
                       "  popq %r15\n"
                       "  popq %r14\n"
                       "  popq %r13\n"
                       "  popq %r12\n"
                       "  popq %rbx\n"
                       "  popq %rbp\n"
                       "  ret\n");
namespace {
constexpr size_t n_saved = 8;  // six registers, the address to go on at, and a return address that is never used
constexpr size_t entry_at = 6;
}  // namespace
#elif defined(__aarch64__)
asm(".text\n.p2align 2\n" HIDE("zinc_msl_switch") ".globl " SYMBOL("zinc_msl_switch") "\n" SYMBOL(
    "zinc_msl_switch") ":\n"
                       "  stp x19, x20, [sp, #-160]!\n"
                       "  stp x21, x22, [sp, #16]\n"
                       "  stp x23, x24, [sp, #32]\n"
                       "  stp x25, x26, [sp, #48]\n"
                       "  stp x27, x28, [sp, #64]\n"
                       "  stp x29, x30, [sp, #80]\n"
                       "  stp d8, d9, [sp, #96]\n"
                       "  stp d10, d11, [sp, #112]\n"
                       "  stp d12, d13, [sp, #128]\n"
                       "  stp d14, d15, [sp, #144]\n"
                       "  mov x9, sp\n"
                       "  str x9, [x0]\n"
                       "  mov sp, x1\n"
                       "  ldp x21, x22, [sp, #16]\n"
                       "  ldp x23, x24, [sp, #32]\n"
                       "  ldp x25, x26, [sp, #48]\n"
                       "  ldp x27, x28, [sp, #64]\n"
                       "  ldp x29, x30, [sp, #80]\n"
                       "  ldp d8, d9, [sp, #96]\n"
                       "  ldp d10, d11, [sp, #112]\n"
                       "  ldp d12, d13, [sp, #128]\n"
                       "  ldp d14, d15, [sp, #144]\n"
                       "  ldp x19, x20, [sp], #160\n"
                       "  ret\n");
namespace {
constexpr size_t n_saved = 20;
constexpr size_t entry_at = 11;  // x30
}  // namespace
#else
#error "the fibre executor has no context switch for this processor"
#endif

namespace zinc::msl {
namespace {

constexpr size_t stack_bytes = 128 * 1024;

// Tops are staggered, or the frames of all fibres would share a few cache sets.
constexpr size_t stagger_bytes = 320, n_staggers = 12;

}  // namespace

StackPool::~StackPool() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    for (const Stack& stack : all_) munmap(stack.bottom - page, stack_bytes + page);
}

void StackPool::reserve(size_t count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    all_.reserve(count);
    free_.reserve(count);
    while (all_.size() < count) {
        void* memory = mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        if (mprotect(memory, page, PROT_NONE)) {  // splits the map, which may take memory
            munmap(memory, stack_bytes + page);
            throw std::bad_alloc();
        }
        char* bottom = static_cast<char*>(memory) + page;
        const size_t stagger = all_.size() % n_staggers * stagger_bytes;
        all_.push_back({bottom, bottom + stack_bytes - stagger});
        free_.push_back(all_.back());
    }
}

Stack StackPool::take() {
    if (free_.empty()) reserve(all_.size() + 1);
    const Stack stack = free_.back();
    free_.pop_back();
    return stack;
}

void* prepare_fibre(Stack stack, void (*entry)()) {
    const uintptr_t top = reinterpret_cast<uintptr_t>(stack.top) & ~uintptr_t(15);
    void** saved = reinterpret_cast<void**>(top) - n_saved;
    memset(static_cast<void*>(saved), 0, n_saved * sizeof(void*));
    saved[entry_at] = reinterpret_cast<void*>(entry);
    return saved;
}

}  // namespace zinc::msl
