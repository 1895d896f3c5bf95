#include "msl/run/executor.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

namespace zinc::msl {
namespace {

bool same_text(const char* a, const char* b) { return a == b || !strcmp(a, b); }

bool same_place(const Site& a, const Site& b) {
    return a.line == b.line && same_text(a.operation, b.operation) && same_text(a.file, b.file);
}

const char* file_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

}  // namespace

// Set while this OS thread runs kernel threads.
__thread Running* running = nullptr;

void threadgroup_barrier(uint32_t orders, Site site) { Executor::current()->threadgroup_barrier(orders, site); }
void simdgroup_barrier(uint32_t orders, Site site) { Executor::current()->simd_collective(nullptr, orders, site); }
void simd_meet(Running& here, SimdRule rule, const Site& site) {
    Executor::of(here).simd_collective(rule, orders_none, site);
}
void simd_arrive([[maybe_unused]] Site site) {
#ifdef ZINC_CHECKED
    Executor::current()->simd_collective(nullptr, orders_none, site);
#endif
}
void* threadgroup_array(size_t bytes, size_t alignment, const char* name) {
    return Executor::current()->threadgroup_array(bytes, alignment, name);
}

void Executor::FreeArena::operator()(void* p) const { free(p); }

Executor::Executor()
    : fibres_(new Fibre[max_threads]), simdgroups_(new Simdgroup[max_threads / simd_width]),
      arena_(static_cast<unsigned char*>(aligned_alloc(4096, Checker::arena_bytes))) {
    if (!arena_) throw std::bad_alloc();
}

bool Executor::run(const Job& job, uint64_t begin, uint64_t end) {
    job_ = job;
    Running* const outer = running;
    running = this;
    bool ok = true;
    for (uint64_t threadgroup = begin; threadgroup < end && ok; threadgroup++) {
        job.position(threadgroup, tg_);
#ifdef ZINC_CHECKED
        checker_.begin_threadgroup(job, threadgroup);
#endif
        ok = run_threadgroup();
    }
    running = outer;
    return ok;
}

bool Executor::run_threadgroup() {
    for (uint32_t sg = 0; sg < job_.threads / simd_width; sg++) {
        Simdgroup& group = simdgroups_[sg];
        group.ready = ~0u;
        group.started = group.at_simd = group.at_barrier = group.done = 0;
    }
    n_done_ = n_at_barrier_ = 0;
    failed_ = false;
    make_current(0);
    Fibre& first = fibres_[0];
    first.stack = stacks_.take();
    simdgroups_[0].started |= 1;
    zinc_msl_switch(&main_stack_pointer_, prepare_fibre(first.stack, fibre_entry));
    if (failed_)
        stacks_.give_all();
    else
        stacks_.give(fibres_[thread()].stack);
    return !failed_;
}

void Executor::fibre_entry() { Executor::current()->run_fibre(); }

// Runs the current thread to its end. Then, on its stack, it runs threads that have not begun: a kernel without
// collectives never switches.
void Executor::run_fibre() {
    for (;;) {
        run_kernel_thread();
        simdgroup().ready &= ~lane_bit();
        simdgroup().done |= lane_bit();
        if (++n_done_ == job_.threads) leave_to_main();
        uint32_t next;
        if (!pick_next(next)) report_stuck();
        const uint32_t old_thread = thread();
        make_current(next);
        if (!(simdgroup().started & lane_bit())) {
            simdgroup().started |= lane_bit();
            fibres_[next].stack = fibres_[old_thread].stack;
            continue;
        }
        stacks_.give(fibres_[old_thread].stack);
        switch_from(old_thread);
    }
}

void Executor::run_kernel_thread() {
    ThreadArguments a{
        job_.params, job_.buffers,          {tg_[0], tg_[1], tg_[2]}, {job_.grid[0], job_.grid[1], job_.grid[2]},
        thread(),    thread() / simd_width, thread() % simd_width,    job_.threads / simd_width};
    fibres_[thread()].arena_used = fibres_[thread()].arena_asked = 0;
    job_.kernel->thread(a);
}

// The lowest ready lane of the running simdgroup, or else of the next simdgroup that has one.
bool Executor::pick_next(uint32_t& next) const {
    const uint32_t n_simdgroups = job_.threads / simd_width;
    uint32_t sg = thread() / simd_width;
    for (uint32_t i = 0; i < n_simdgroups; i++) {
        if (const uint32_t ready = simdgroups_[sg].ready) {
            next = sg * simd_width + uint32_t(__builtin_ctz(ready));
            return true;
        }
        sg = sg + 1 == n_simdgroups ? 0 : sg + 1;
    }
    return false;
}

void Executor::wait_for_others() {
    const uint32_t old_thread = thread();
    uint32_t next;
    if (!pick_next(next)) report_stuck();
    make_current(next);
    switch_from(old_thread);
}

void Executor::make_current(uint32_t next) {
    Running::thread = next;
    slots = &simdgroups_[next / simd_width].slots;
}

void Executor::switch_from(uint32_t old_thread) {
    Fibre& fibre = fibres_[thread()];
    if (!(simdgroup().started & lane_bit())) {
        simdgroup().started |= lane_bit();
        fibre.stack = stacks_.take();
        fibre.stack_pointer = prepare_fibre(fibre.stack, fibre_entry);
    }
    zinc_msl_switch(&fibres_[old_thread].stack_pointer, fibre.stack_pointer);
}

void Executor::leave_to_main() {
    void* never_resumed;
    zinc_msl_switch(&never_resumed, main_stack_pointer_);
    __builtin_unreachable();
}

void Executor::threadgroup_barrier(uint32_t orders, Site site) {
    if (n_at_barrier_ == 0) {
        barrier_site_ = site;
        barrier_orders_ = orders;
    } else if (!same_place(site, barrier_site_)) {
        fail("is at the threadgroup_barrier of %s:%u while others wait at that of %s:%u", file_name(site.file),
             site.line, file_name(barrier_site_.file), barrier_site_.line);
    }
    barrier_orders_ &= orders;
    simdgroup().ready &= ~lane_bit();
    simdgroup().at_barrier |= lane_bit();
    if (++n_at_barrier_ < job_.threads) return wait_for_others();
    n_at_barrier_ = 0;
    for (uint32_t sg = 0; sg < job_.threads / simd_width; sg++) {
        simdgroups_[sg].ready = ~0u;
        simdgroups_[sg].at_barrier = 0;
    }
#ifdef ZINC_CHECKED
    checker_.threadgroup_ordered(barrier_orders_);
#endif
}

void Executor::simd_collective(SimdRule rule, uint32_t orders, const Site& site) {
    Simdgroup& group = simdgroup();
    if (group.at_simd == 0) {
        group.site = site;
        group.rule = rule;
        group.orders = orders;
    } else if (!same_place(site, group.site) || rule != group.rule) {
        fail("is at the %s of %s:%u while other lanes of its simdgroup wait at the %s of %s:%u", site.operation,
             file_name(site.file), site.line, group.site.operation, file_name(group.site.file), group.site.line);
    }
    group.orders &= orders;
    group.ready &= ~lane_bit();
    group.at_simd |= lane_bit();
    if (group.at_simd != ~0u) return wait_for_others();
    if (rule) rule(group.slots.values, group.slots.arguments, group.slots.results);
    group.at_simd = 0;
    group.ready = ~0u;
#ifdef ZINC_CHECKED
    checker_.simdgroup_ordered(group.orders);
#endif
}

// Every thread runs the same declarations in the same order, so an array gets one place for all threads.
void* Executor::threadgroup_array(size_t bytes, size_t alignment, const char* name) {
    Fibre& fibre = fibres_[thread()];
    const size_t at = (fibre.arena_used + alignment - 1) / alignment * alignment;
    if (bytes + fibre.arena_asked > max_threadgroup_bytes || at + bytes > Checker::arena_bytes)
        fail("asks for %zu bytes of threadgroup memory with `%s`; there are %u in all", bytes + fibre.arena_asked, name,
             max_threadgroup_bytes);
    fibre.arena_asked += uint32_t(bytes);
    fibre.arena_used = uint32_t(at + bytes) + Checker::gap_bytes;
#ifdef ZINC_CHECKED
    checker_.array_declared(name, uint32_t(at), uint32_t(bytes));
#endif
    return arena_.get() + at;
}

void Executor::fail(const char* format, ...) {
    int n = snprintf(error_, sizeof(error_), "kernel %s, threadgroup (%u, %u, %u), thread %u ", job_.kernel->name,
                     tg_[0], tg_[1], tg_[2], thread());
    n = std::clamp(n, 0, int(sizeof(error_)) - 1);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_ + n, sizeof(error_) - size_t(n), format, arguments);
    va_end(arguments);
    failed_ = true;
    leave_to_main();
}

const char* Executor::describe_wait(uint32_t thread, char* text, size_t bytes) const {
    const Simdgroup& group = simdgroups_[thread / simd_width];
    const uint32_t bit = 1u << thread % simd_width;
    if (group.done & bit) return "has returned";
    const Site& site = group.at_simd & bit ? group.site : barrier_site_;
    snprintf(text, bytes, "waits at the %s of %s:%u", site.operation, file_name(site.file), site.line);
    return text;
}

// No thread can run: one thread waits at a collective, and another will never come to it. Names one of each.
void Executor::report_stuck() {
    char text[256], other[256];
    for (uint32_t sg = 0; sg < job_.threads / simd_width; sg++) {
        const Simdgroup& group = simdgroups_[sg];
        if (!group.at_simd) continue;
        const uint32_t missing = sg * simd_width + uint32_t(__builtin_ctz(~group.at_simd));
        make_current(sg * simd_width + uint32_t(__builtin_ctz(group.at_simd)));
        fail("%s, which thread %u of its simdgroup does not reach: it %s", describe_wait(thread(), text, sizeof(text)),
             missing, describe_wait(missing, other, sizeof(other)));
    }
    uint32_t waiting = 0, missing = 0;
    for (uint32_t t = job_.threads; t-- > 0;) {
        const bool waits = simdgroups_[t / simd_width].at_barrier >> t % simd_width & 1;
        (waits ? waiting : missing) = t;
    }
    make_current(waiting);
    fail("%s, which thread %u does not reach: it %s", describe_wait(waiting, text, sizeof(text)), missing,
         describe_wait(missing, other, sizeof(other)));
}

}  // namespace zinc::msl
