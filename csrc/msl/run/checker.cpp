#ifdef ZINC_CHECKED

#include "msl/run/checker.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "msl/run/executor.h"

namespace zinc::msl {
namespace {

// The address range of this module: kernels read its constants.
ByteRange own_module() {
    static const char here = 0;
    struct Search {
        uintptr_t here;
        ByteRange found;
    } search{reinterpret_cast<uintptr_t>(&here), {}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            Search& s = *static_cast<Search*>(data);
            ByteRange all{UINTPTR_MAX, 0};
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& segment = info->dlpi_phdr[i];
                if (segment.p_type != PT_LOAD) continue;
                all.begin = std::min<uintptr_t>(all.begin, info->dlpi_addr + segment.p_vaddr);
                all.end = std::max<uintptr_t>(all.end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
            }
            if (!all.contains(s.here, 1)) return 0;
            s.found = all;
            return 1;
        },
        &search);
    return search.found;
}

const char* verb(AccessKind kind) {
    return kind == AccessKind::read ? "reads" : kind == AccessKind::atomic ? "changes" : "writes";
}

uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace

Checker::Checker(Executor& executor) : executor_(executor), module_(own_module()), arena_cells_(arena_bytes) {}

Checker::~Checker() {
    if (cells_) munmap(static_cast<void*>(cells_), n_cells_ * sizeof(Cell));
}

void Checker::reserve_cells(size_t count) {
    if (count <= n_cells_) return;
    if (cells_) munmap(static_cast<void*>(cells_), n_cells_ * sizeof(Cell));
    cells_ = nullptr;
    n_cells_ = 0;
    // Zero pages that exist once touched: often little of a large buffer is written.
    void* memory =
        mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    cells_ = static_cast<Cell*>(memory);
    n_cells_ = count;
}

void Checker::begin_segment(std::vector<ByteRange> written) {
    std::sort(written.begin(), written.end(), [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });
    tracked_.clear();
    size_t n_bytes = 0;
    for (const ByteRange& range : written) {
        if (!tracked_.empty() && range.begin <= tracked_.back().range.end) {
            ByteRange& last = tracked_.back().range;
            if (range.end > last.end) n_bytes += range.end - last.end, last.end = range.end;
        } else {
            tracked_.push_back({range, n_bytes});
            n_bytes += range.end - range.begin;
        }
    }
    reserve_cells(n_bytes);
    if (clock_ > UINT32_MAX / 2) {  // times start over: the contents of the cells must go
        clock_ = 0;
        std::fill(arena_cells_.begin(), arena_cells_.end(), Cell());
        if (cells_) madvise(static_cast<void*>(cells_), n_cells_ * sizeof(Cell), MADV_DONTNEED);
    }
    segment_begin_ = ++clock_;
    begun_.clear();
}

void Checker::begin_threadgroup(const Job& job, uint64_t threadgroup) {
    job_ = &job;
    bindings_.clear();
    for (uint32_t i = 0; i < job.kernel->n_buffers; i++)
        bindings_.push_back({address(job.buffers[i]), address(job.buffers[i]) + job.bytes[i]});
    threadgroup_begin_ = ++clock_;
    begun_.push_back({clock_, job.number, &job, threadgroup});
    threadgroup_ordered(orders_device | orders_threadgroup);
    n_arrays_ = 0;
    memset(const_cast<void*>(executor_.arena()), 0xff, arena_bytes);
}

void Checker::array_declared(const char* name, uint32_t offset, uint32_t bytes) {
    for (size_t i = 0; i < n_arrays_; i++) {
        const Array& known = arrays_[i];
        if (known.offset == offset && known.bytes == bytes && !strcmp(known.name, name)) return;
        if (offset < known.offset + known.bytes && known.offset < offset + bytes)
            executor_.fail("declares the threadgroup array `%s` where another thread declares `%s`", name, known.name);
    }
    if (n_arrays_ == max_arrays) executor_.fail("declares more than %zu threadgroup arrays", max_arrays);
    arrays_[n_arrays_++] = {name, offset, bytes};
}

void Checker::threadgroup_ordered(uint32_t orders) {
    clock_++;
    for (int space = 0; space < n_spaces; space++) {
        if (!(orders & (space == space_device ? orders_device : orders_threadgroup))) continue;
        threadgroup_clock_[space] = clock_;
        std::fill(std::begin(simdgroup_clock_[space]), std::end(simdgroup_clock_[space]), clock_);
    }
}

void Checker::simdgroup_ordered(uint32_t orders) {
    clock_++;
    if (orders & orders_threadgroup) simdgroup_clock_[space_threadgroup][my_simdgroup()] = clock_;
    if (orders & orders_device) simdgroup_clock_[space_device][my_simdgroup()] = clock_;
}

uint32_t Checker::my_simdgroup() const { return executor_.thread() / simd_width; }

void Checker::access(const void* pointer, size_t bytes, AccessKind kind) {
    const Place place{address(pointer), bytes, kind};
    const Stack stack = executor_.stack();
    if (ByteRange{address(stack.bottom), address(stack.top)}.contains(place.at, bytes)) return;
    const uintptr_t arena = address(executor_.arena());
    if (place.at >= arena && place.at < arena + arena_bytes) return access_array(place);
    if (in_bindings(place)) return access_device(place);
    if (executor_.exchange_area().contains(place.at, bytes)) return;
    if (kind == AccessKind::read) {
        const ByteRange params{address(job_->params), address(job_->params) + job_->kernel->params_bytes};
        const ByteRange pointers{address(job_->buffers), address(job_->buffers + job_->kernel->n_buffers)};
        const ByteRange pointer_to_us{address(&running), address(&running + 1)};
        for (const ByteRange& range : {params, pointers, pointer_to_us, executor_.face(), module_})
            if (range.contains(place.at, bytes)) return;
    }
    report_outside(place);
}

bool Checker::in_bindings(const Place& place) {
    bool readable = false;
    for (size_t i = 0; i < bindings_.size(); i++) {
        if (!bindings_[i].contains(place.at, place.bytes)) continue;
        if (place.kind == AccessKind::read || job_->kernel->buffers[i].writable) return true;
        readable = true;
    }
    if (!readable) return false;
    executor_.fail("%s %s, which its signature only reads", verb(place.kind), describe(place).text);
}

void Checker::access_array(const Place& place) {
    const uint32_t offset = uint32_t(place.at - address(executor_.arena()));
    const Array* array = nullptr;
    for (size_t i = 0; i < n_arrays_; i++)
        if (offset >= arrays_[i].offset && offset + place.bytes <= arrays_[i].offset + arrays_[i].bytes)
            array = &arrays_[i];
    if (!array) report_outside(place);
    const bool reads = place.kind == AccessKind::read || place.kind == AccessKind::atomic;
    for (size_t i = 0; i < place.bytes; i++) {
        Cell& cell = arena_cells_[offset + i];
        if (reads && cell.write.when < threadgroup_begin_) report_unwritten(place);
        touch(cell, space_threadgroup, place);
    }
}

void Checker::access_device(const Place& place) {
    for (const Tracked& tracked : tracked_) {
        const uintptr_t begin = std::max(place.at, tracked.range.begin);
        const uintptr_t end = std::min(place.at + place.bytes, tracked.range.end);
        for (uintptr_t at = begin; at < end; at++)
            touch(cells_[tracked.first_cell + (at - tracked.range.begin)], space_device, place);
    }
}

// True if a barrier lies between the other thread's access, in this threadgroup, and now.
bool Checker::ordered(const Touch& other, Space space) const {
    if (other.when < threadgroup_clock_[space]) return true;
    const uint32_t sg = my_simdgroup();
    return other.thread / simd_width == sg && other.when < simdgroup_clock_[space][sg];
}

void Checker::touch(Cell& cell, Space space, const Place& place) {
    const uint32_t scope = space == space_device ? segment_begin_ : threadgroup_begin_;
    const uint16_t me = uint16_t(executor_.thread());
    const uint32_t my_clock = simdgroup_clock_[space][my_simdgroup()];
    const bool atomic = place.kind == AccessKind::atomic || place.kind == AccessKind::atomic_store;

    const Touch& w = cell.write;
    if (w.when >= scope && !(atomic && (w.flags & by_atomic))) {
        const bool same_threadgroup = w.when >= threadgroup_begin_;
        if (!same_threadgroup || (w.thread != me && !ordered(w, space))) report_race(w, "wrote", place);
    }
    Touch& r = cell.reads;
    const bool same_threadgroup = r.when >= threadgroup_begin_, same_segment = r.when >= scope;
    if (place.kind == AccessKind::read) return note_read(r, my_clock, space, same_threadgroup, same_segment);
    if (same_segment) {
        if (!same_threadgroup || (r.flags & several_threadgroups)) report_race(r, "read", place);
        const bool several = r.flags & (several_simdgroups | several_threads);
        const bool after_barrier =
            r.flags & several_simdgroups ? r.when < threadgroup_clock_[space] : ordered(r, space);
        if (!after_barrier && (several || r.thread != me)) report_race(r, "read", place);
    }
    cell.write = {my_clock, me, uint16_t(atomic ? by_atomic : 0)};
}

// Keeps one reader, and the spread of the readers since the last barrier.
void Checker::note_read(Touch& reads, uint32_t my_clock, Space space, bool same_threadgroup, bool same_segment) const {
    const uint16_t me = uint16_t(executor_.thread());
    uint16_t flags = 0;
    if (same_segment) flags = same_threadgroup ? reads.flags & several_threadgroups : uint16_t(several_threadgroups);
    if (same_threadgroup && reads.when >= threadgroup_clock_[space]) {
        const bool same_simdgroup = reads.thread / simd_width == me / simd_width;
        flags |= reads.flags & several_simdgroups;
        if (!same_simdgroup)
            flags |= several_simdgroups;
        else if (reads.when == my_clock && reads.thread != me)
            flags |= several_threads;
        else if (reads.when == my_clock)
            flags |= reads.flags & several_threads;
        my_clock = std::max(my_clock, reads.when);
    }
    reads = {my_clock, me, flags};
}

// The distance of the place from the range; 0 inside.
static uintptr_t distance(const ByteRange& range, uintptr_t at, size_t bytes) {
    return at < range.begin ? range.begin - at : at + bytes > range.end ? at + bytes - range.end : 0;
}

// Describes a place relative to the nearest array or binding.
Checker::Words Checker::describe(const Place& place) const {
    Words words;
    const auto n = (unsigned long long)place.bytes;
    const uintptr_t arena = address(executor_.arena());
    const bool in_arena = place.at >= arena && place.at < arena + arena_bytes;
    ByteRange nearest{};
    size_t index = 0;
    uintptr_t nearest_distance = UINTPTR_MAX;
    for (size_t i = 0; i < (in_arena ? n_arrays_ : bindings_.size()); i++) {
        const ByteRange range = in_arena
                                    ? ByteRange{arena + arrays_[i].offset, arena + arrays_[i].offset + arrays_[i].bytes}
                                    : bindings_[i];
        const uintptr_t d = distance(range, place.at, place.bytes);
        if (d < nearest_distance) nearest = range, index = i, nearest_distance = d;
    }
    constexpr uintptr_t far = 1u << 20;
    if (nearest_distance > far) {
        snprintf(words.text, sizeof(words.text), "%llu bytes at %#llx, far from every binding", n,
                 (unsigned long long)place.at);
        return words;
    }
    char what[80];
    if (in_arena)
        snprintf(what, sizeof(what), "threadgroup array `%.50s`", arrays_[index].name);
    else
        snprintf(what, sizeof(what), "binding %zu", index + 1);
    snprintf(words.text, sizeof(words.text), "%llu bytes at byte %lld of %s (%llu bytes)", n,
             (long long)(place.at - nearest.begin), what, (unsigned long long)(nearest.end - nearest.begin));
    return words;
}

void Checker::report_outside(const Place& place) {
    executor_.fail("%s %s: out of bounds", verb(place.kind), describe(place).text);
}

void Checker::report_unwritten(const Place& place) {
    executor_.fail("reads %s, which no thread has written", describe(place).text);
}

void Checker::misaligned(const void* pointer, size_t bytes) {
    const Place place{address(pointer), bytes, AccessKind::read};
    executor_.fail("touches %s, which is not aligned to %zu bytes as its type asks", describe(place).text, bytes);
}

void Checker::report_race(const Touch& other, const char* did, const Place& place) {
    const Words words = describe(place);
    const char* text = words.text;
    if (other.when >= threadgroup_begin_ && !(other.flags & several_threadgroups))
        executor_.fail("%s %s, which thread %u %s, with no barrier between", verb(place.kind), text,
                       unsigned(other.thread), did);
    const Begun* who = &begun_.front();
    for (const Begun& b : begun_)
        if (b.when <= other.when) who = &b;
    if (who->when == threadgroup_begin_)
        executor_.fail("%s %s, which another threadgroup %s", verb(place.kind), text, did);
    uint32_t tg[3];
    who->job->position(who->threadgroup, tg);
    if (who->dispatch == job_->number)
        executor_.fail("%s %s, which threadgroup (%u, %u, %u) of the same dispatch %s", verb(place.kind), text, tg[0],
                       tg[1], tg[2], did);
    executor_.fail(
        "%s %s, which kernel %s (dispatch %u, threadgroup (%u, %u, %u)) %s, with no barrier between dispatch %u "
        "and this one, %u",
        verb(place.kind), text, who->job->kernel->name, who->dispatch, tg[0], tg[1], tg[2], did, who->dispatch,
        job_->number);
}

}  // namespace zinc::msl

#endif
