// Buffers and residency sets.
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "conditions.h"
#include "foundation.h"
#include "objects.h"
#include "rules.h"

using metal_double::broken;

static NSUInteger whole_pages(NSUInteger bytes) {
    const auto page = NSUInteger(getpagesize());
    return (bytes + page - 1) / page * page;
}

static bool is_mapped(void* pointer, NSUInteger bytes) {
    return msync(pointer, bytes, MS_ASYNC) == 0 || errno != ENOMEM;
}

@implementation DoubleBuffer
@synthesize label, storageMode, hazardTrackingMode, length;

- (instancetype)initWithDevice:(DoubleDevice*)device length:(NSUInteger)bytes options:(MTLResourceOptions)options {
    length = bytes;
    mapped = whole_pages(bytes);
    // A page that nobody may touch follows, so that a host that runs over the end is stopped.
    void* p = mmap(nullptr, mapped + NSUInteger(getpagesize()), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        mapped = 0;
        return nil;
    }
    mprotect(p, mapped, PROT_READ | PROT_WRITE);
    memory = static_cast<uint8_t*>(p);
    [self setDevice:device options:options];
    return self;
}

- (instancetype)initWithDevice:(DoubleDevice*)device
                       pointer:(void*)pointer
                        length:(NSUInteger)bytes
                       options:(MTLResourceOptions)options
                   deallocator:(void (^)(void*, NSUInteger))block {
    const auto page = NSUInteger(getpagesize());
    if (reinterpret_cast<uintptr_t>(pointer) % page)
        broken("no-copy-alignment", "pointer %p is no multiple of the page size, %lu", pointer, page);
    if (bytes % page) broken("no-copy-alignment", "length %lu is no multiple of the page size, %lu", bytes, page);
    if (options & MTLResourceStorageModePrivate)
        broken("no-copy-storage", "memory that the host has is wrapped with private storage");
    if (!is_mapped(pointer, bytes)) broken("no-copy-memory", "%p, %lu bytes, is not all mapped", pointer, bytes);
    length = bytes;
    memory = static_cast<uint8_t*>(pointer);
    deallocator = block;
    [self setDevice:device options:options];
    return self;
}

- (void)setDevice:(DoubleDevice*)device options:(MTLResourceOptions)options {
    owner = device;
    owner->allocated += length;
    storageMode = MTLStorageMode(options >> 4 & 15);
    const auto tracking = MTLHazardTrackingMode(options >> 8 & 3);
    hazardTrackingMode = tracking == MTLHazardTrackingModeDefault ? MTLHazardTrackingModeTracked : tracking;
}

- (void)dealloc {
    if (!owner) return;  // an allocation that failed
    if (in_flight) broken("resource-lifetime", "a buffer goes while a command buffer in flight uses it");
    if (in_residency) broken("residency", "a buffer goes while a residency set holds it");
    [self checkMapped];
    owner->allocated -= length;
    if (mapped) munmap(memory, mapped + NSUInteger(getpagesize()));
    if (deallocator) deallocator(memory, length);
}

- (void)checkMapped {
    if (!mapped && !is_mapped(memory, length))
        broken("no-copy-memory", "the memory of a no-copy buffer (%p, %lu bytes) was unmapped before the buffer went",
               static_cast<void*>(memory), length);
}

- (id<MTLDevice>)device {
    return owner;
}
- (NSUInteger)allocatedSize {
    return whole_pages(length);
}
- (void*)contents {
    if (storageMode == MTLStorageModePrivate) broken("private-contents", "contents of a buffer with private storage");
    return memory;
}
@end

@implementation MTLResidencySetDescriptor
@end

// Sets need no lock of their own: Apple leaves it to the caller, and the threads of queues only look at them on commit.
@implementation DoubleResidencySet
- (void)addAllocation:(id<MTLAllocation>)allocation {
    auto* buffer = static_cast<DoubleBuffer*>(allocation);
    const bool leaving = staged_out.erase(buffer);
    if (leaving || committed.count(buffer) || !staged_in.insert(buffer).second) return;
    buffer->in_residency++;
}

- (void)removeAllocation:(id<MTLAllocation>)allocation {
    auto* buffer = static_cast<DoubleBuffer*>(allocation);
    if (staged_in.erase(buffer)) {
        buffer->in_residency--;
    } else if (!committed.count(buffer)) {
        broken("residency", "a buffer is removed from a set that does not hold it");
    } else {
        staged_out.insert(buffer);
    }
}

// This and the count include what is not committed.
- (BOOL)containsAllocation:(id<MTLAllocation>)allocation {
    auto* buffer = static_cast<DoubleBuffer*>(allocation);
    return committed.count(buffer) || staged_in.count(buffer);
}

- (void)commit {
    const uint64_t before = self.allocatedSize;
    for (DoubleBuffer* buffer : staged_in) committed.insert(buffer);
    for (DoubleBuffer* buffer : staged_out) {
        committed.erase(buffer);
        buffer->in_residency--;
    }
    staged_in.clear();
    staged_out.clear();
    metal_double::count(&metal_double::Totals::resident_bytes, int64_t(self.allocatedSize - before));
}

- (void)dealloc {
    if (requested) broken("residency", "a set goes whose residency was requested and not ended");
    for (DoubleBuffer* buffer : committed) buffer->in_residency--;
    for (DoubleBuffer* buffer : staged_in) buffer->in_residency--;
    metal_double::count(&metal_double::Totals::resident_bytes, -int64_t(self.allocatedSize));
}

- (void)requestResidency {
    if (self.hasStagedChanges)
        broken("residency", "residency is requested before the changes of the set are committed");
    metal_double::count(&metal_double::Totals::residency_requests);
    if (!requested) metal_double::count(&metal_double::Totals::wired_sets);
    requested = true;
}
- (void)endResidency {
    if (requested && !metal_double::encoded().command_buffers)
        broken("residency", "a set ends that was requested and no command buffer followed: its memory stays wired");
    if (requested) metal_double::count(&metal_double::Totals::wired_sets, -1);
    requested = false;
}
- (BOOL)hasStagedChanges {
    return !staged_in.empty() || !staged_out.empty();
}
- (NSUInteger)allocationCount {
    return committed.size() + staged_in.size();
}
- (uint64_t)allocatedSize {
    uint64_t bytes = 0;
    for (DoubleBuffer* buffer : committed) bytes += buffer.allocatedSize;
    return bytes;
}
@end
