// Runs the threadgroups of a kernel on one OS thread, every thread of a threadgroup as a fibre.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "msl/run/checker.h"
#include "msl/run/fibre.h"
#include "msl/run/runtime.h"

namespace zinc::msl {

const KernelInfo* find_kernel(const char* name);
std::vector<std::string> kernel_names();
// The reason why the kernels of this module cannot be used (two have one name), or empty.
const std::string& registry_error();

struct Job {
    const KernelInfo* kernel = nullptr;
    const void* params = nullptr;
    void* const* buffers = nullptr;
    const uint64_t* bytes = nullptr;
    uint32_t grid[3] = {1, 1, 1};
    uint32_t threads = simd_width;
    uint32_t number = 0;  // in its recording, for messages

    void position(uint64_t threadgroup, uint32_t tg[3]) const {
        tg[0] = uint32_t(threadgroup % grid[0]);
        tg[1] = uint32_t(threadgroup / grid[0] % grid[1]);
        tg[2] = uint32_t(threadgroup / grid[0] / grid[1]);
    }
};

class Executor : public Running {
  public:
    Executor();
    // Runs threadgroups [begin, end), numbered with x fastest. False: one failed, and error() describes it.
    bool run(const Job& job, uint64_t begin, uint64_t end);
    const char* error() const { return error_; }
    void reserve(uint32_t threads) { stacks_.reserve(threads); }
#ifdef ZINC_CHECKED
    Checker& checker() { return checker_; }
#endif

    // Called by fibres, through runtime.h.
    static Executor* current() { return static_cast<Executor*>(running); }
    static Executor& of(Running& here) { return static_cast<Executor&>(here); }
    void threadgroup_barrier(uint32_t orders, Site site);
    void simd_collective(SimdRule rule, uint32_t orders, const Site& site);
    void* threadgroup_array(size_t bytes, size_t alignment, const char* name);
    uint32_t thread() const { return Running::thread; }
    Stack stack() const { return fibres_[thread()].stack; }
    const void* arena() const { return arena_.get(); }
    // The fields of this object that kernel code reads.
    ByteRange face() const {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(static_cast<const Running*>(this));
        return {begin, begin + sizeof(Running)};
    }
    // The values of simdgroup operations: kernel code computes their results in place.
    ByteRange exchange_area() const {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(simdgroups_.get());
        return {begin, begin + sizeof(Simdgroup) * (max_threads / simd_width)};
    }
    // Gives up the threadgroup: its fibres are never resumed (kernel code owns nothing that would leak).
    [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));

  private:
    struct Fibre {
        void* stack_pointer = nullptr;
        Stack stack;
        uint32_t arena_used = 0, arena_asked = 0;
    };
    // SIMD lanes as bits. A lane is ready, at a simdgroup operation, at a threadgroup barrier, or done.
    struct Simdgroup {
        uint32_t ready = 0, started = 0, at_simd = 0, at_barrier = 0, done = 0;
        SimdRule rule = nullptr;
        Site site{};
        uint32_t orders = 0;
        SimdSlots slots;
    };

    bool run_threadgroup();
    static void fibre_entry();
    [[noreturn]] void run_fibre();
    void run_kernel_thread();
    void wait_for_others();
    bool pick_next(uint32_t& next) const;
    void make_current(uint32_t next);
    void switch_from(uint32_t old_thread);
    [[noreturn]] void leave_to_main();
    [[noreturn]] void report_stuck();
    const char* describe_wait(uint32_t thread, char* text, size_t bytes) const;
    Simdgroup& simdgroup() { return simdgroups_[thread() / simd_width]; }
    uint32_t lane_bit() const { return 1u << thread() % simd_width; }

    Job job_;
    uint32_t tg_[3] = {};
    uint32_t n_done_ = 0, n_at_barrier_ = 0;
    Site barrier_site_{};
    uint32_t barrier_orders_ = 0;
    bool failed_ = false;
    void* main_stack_pointer_ = nullptr;
    StackPool stacks_;
    std::unique_ptr<Fibre[]> fibres_;
    std::unique_ptr<Simdgroup[]> simdgroups_;
    struct FreeArena {
        void operator()(void* p) const;
    };
    std::unique_ptr<unsigned char, FreeArena> arena_;
    char error_[1024] = "";
#ifdef ZINC_CHECKED
    Checker checker_{*this};
#endif
};

}  // namespace zinc::msl
