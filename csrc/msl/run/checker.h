// The checked build. Every memory access of a kernel comes here (hooks.cpp). It is compared with the kernel's bindings,
// and with the accesses of other threads that no barrier separates from it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace zinc::msl {

class Executor;
struct Job;

struct ByteRange {
    uintptr_t begin, end;
    bool contains(uintptr_t at, size_t bytes) const { return at >= begin && at + bytes <= end; }
};

#ifdef ZINC_CHECKED

enum class AccessKind { read, write, atomic, atomic_store };

class Checker {
  public:
    static constexpr uint32_t gap_bytes = 64;  // between threadgroup arrays, so that none runs into the next
    static constexpr uint32_t arena_bytes = 64 * 1024;

    explicit Checker(Executor& executor);
    Checker(const Checker&) = delete;
    Checker& operator=(const Checker&) = delete;
    ~Checker();

    // Threadgroups that run until the next call have no order. `written` is the memory that any of them may write.
    void begin_segment(std::vector<ByteRange> written);
    void begin_threadgroup(const Job& job, uint64_t threadgroup);
    void array_declared(const char* name, uint32_t offset, uint32_t bytes);
    void threadgroup_ordered(uint32_t orders);
    void simdgroup_ordered(uint32_t orders);
    void access(const void* address, size_t bytes, AccessKind kind);
    void misaligned(const void* address, size_t bytes);

  private:
    // Threadgroup memory and device memory are ordered independently: a barrier names the memory that it orders.
    enum Space { space_threadgroup, space_device, n_spaces };

    // The thread that touched a byte. `when` is the clock of its simdgroup: the time of the last barrier that it
    // passed.
    struct Touch {
        uint32_t when = 0;
        uint16_t thread = 0;
        uint16_t flags = 0;
    };
    enum TouchFlags : uint16_t { by_atomic = 1, several_threads = 2, several_simdgroups = 4, several_threadgroups = 8 };
    struct Cell {
        Touch write, reads;
    };
    struct Tracked {
        ByteRange range;
        size_t first_cell;
    };
    struct Array {
        const char* name;
        uint32_t offset, bytes;
    };
    struct Begun {
        uint32_t when, dispatch;
        const Job* job;
        uint64_t threadgroup;
    };
    struct Place {  // of an access, for messages
        uintptr_t at;
        size_t bytes;
        AccessKind kind;
    };
    struct Words {
        char text[160];
    };
    static constexpr size_t max_arrays = 64;

    bool in_bindings(const Place& place);
    void access_array(const Place& place);
    void access_device(const Place& place);
    void touch(Cell& cell, Space space, const Place& place);
    void note_read(Touch& reads, uint32_t my_clock, Space space, bool same_threadgroup, bool same_segment) const;
    bool ordered(const Touch& other, Space space) const;
    [[noreturn]] void report_outside(const Place& place);
    [[noreturn]] void report_unwritten(const Place& place);
    [[noreturn]] void report_race(const Touch& other, const char* did, const Place& place);
    Words describe(const Place& place) const;
    void reserve_cells(size_t count);
    uint32_t my_simdgroup() const;

    Executor& executor_;
    const Job* job_ = nullptr;
    ByteRange module_{};  // the module's own constants
    std::vector<ByteRange> bindings_;
    uint32_t clock_ = 0, segment_begin_ = 0, threadgroup_begin_ = 0;
    uint32_t threadgroup_clock_[n_spaces] = {};
    uint32_t simdgroup_clock_[n_spaces][32] = {};
    std::vector<Cell> arena_cells_;
    Array arrays_[max_arrays];
    size_t n_arrays_ = 0;
    std::vector<Tracked> tracked_;
    Cell* cells_ = nullptr;
    size_t n_cells_ = 0;
    std::vector<Begun> begun_;
};

#else

class Checker {  // the plain build only shares the size of the arena
  public:
    static constexpr uint32_t gap_bytes = 0;
    static constexpr uint32_t arena_bytes = 32 * 1024;
};

#endif

}  // namespace zinc::msl
