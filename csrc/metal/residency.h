// Memory that stays resident between command buffers, where the system can do that.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>

#include "metal/objc.h"

namespace zinc {

// Memory that buffers cover, where they may overlap: several no-copy buffers of one file share pages.
class Coverage {
  public:
    // What the buffer would add. Private memory has no address, and is shared by nothing.
    uint64_t added_by(const void* contents, uint64_t bytes) const {
        if (!contents) return bytes;
        uintptr_t at = reinterpret_cast<uintptr_t>(contents);
        const uintptr_t end = at + bytes;
        uint64_t fresh = 0;
        for (const auto& [from, to] : ranges_) {  // sorted by where they begin
            if (from >= end) break;
            if (from > at) fresh += from - at;
            at = std::max(at, std::min(to, end));
        }
        return fresh + (end - at);
    }
    void add(const void* contents, uint64_t bytes) {
        bytes_ += added_by(contents, bytes);
        if (contents)
            ranges_.emplace(reinterpret_cast<uintptr_t>(contents), reinterpret_cast<uintptr_t>(contents) + bytes);
    }
    void remove(const void* contents, uint64_t bytes) {
        const auto begin = reinterpret_cast<uintptr_t>(contents);
        for (auto [at, last] = ranges_.equal_range(begin); at != last; ++at) {
            if (at->second != begin + bytes) continue;
            ranges_.erase(at);
            break;
        }
        bytes_ -= added_by(contents, bytes);
    }
    uint64_t bytes() const { return bytes_; }

  private:
    std::multimap<uintptr_t, uintptr_t> ranges_;  // begin and end
    uint64_t bytes_ = 0;
};

// Keeps the memory of all buffers resident between command buffers (macOS 15); without it the first touch of mapped
// weights, and every touch after some idle time, waits for the kernel to wire pages. On older systems nothing has to be
// done: buffers bound with setBuffer are made resident for their command buffer (useResource is for indirect ones).
class Residency {
  public:
#if ZINC_SDK_15
    Residency(id<MTLDevice> device, id<MTLCommandQueue> queue)
        : queue_(queue), limit_(device.recommendedMaxWorkingSetSize) {
        if (![device supportsFamily:MTLGPUFamilyApple6]) return;  // as of virtual machines: there the call is an error
        if (@available(macOS 15.0, *)) {
            MTLResidencySetDescriptor* descriptor = [[MTLResidencySetDescriptor alloc] init];
            descriptor.label = @"zincmetal";
            id<MTLResidencySet> set = [device newResidencySetWithDescriptor:descriptor error:nil];
            if (set) [queue addResidencySet:set];
            set_ = set;
        }
    }

    ~Residency() {
        try {
            if (set_) guarded([&] { end(); });
        } catch (...) {  // a destructor has nobody to tell
        }
    }

    // False where the buffer is left to the driver: no sets on this system, or more than the device wants resident.
    bool add(id<MTLBuffer> buffer, const void* contents) {
        if (@available(macOS 15.0, *)) {
            const std::lock_guard lock(mutex_);
            const uint64_t bytes = buffer.length;
            if (!set_ || resident_.bytes() + resident_.added_by(contents, bytes) > limit_) return false;
            const id<MTLResidencySet> set = set_;
            [set addAllocation:buffer];
            resident_.add(contents, bytes);
            changed_ = true;
            return true;
        }
        return false;
    }

    // At once, since the owner of a no-copy buffer may unmap its memory next.
    void remove(id<MTLBuffer> buffer, const void* contents) {
        if (@available(macOS 15.0, *)) {
            const std::lock_guard lock(mutex_);
            const id<MTLResidencySet> set = set_;
            [set removeAllocation:buffer];
            [set commit];
            resident_.remove(contents, buffer.length);
        }
    }

    // Makes resident what was added since; done in bulk, right before work is submitted. Not earlier: macOS keeps the
    // memory of a set wired whose residency was requested in a process that then gives the GPU no work.
    void commit() {
        if (@available(macOS 15.0, *)) {
            const std::lock_guard lock(mutex_);
            if (!changed_) return;
            const id<MTLResidencySet> set = set_;
            [set commit];
            [set requestResidency];
            changed_ = false;
        }
    }

    bool available() const { return set_ != nil; }

  private:
    void end() {
        if (@available(macOS 15.0, *)) {
            const id<MTLResidencySet> set = set_;
            [queue_ removeResidencySet:set];
            [set endResidency];
        }
    }

    const id<MTLCommandQueue> queue_;
    id set_;  // id<MTLResidencySet>, a type that exists from macOS 15
    const uint64_t limit_;
    std::mutex mutex_;
    Coverage resident_;
    bool changed_ = false;
#else
    Residency(id<MTLDevice>, id<MTLCommandQueue>) {}
    bool add(id<MTLBuffer>, const void*) { return false; }
    void remove(id<MTLBuffer>, const void*) {}
    void commit() {}
    bool available() const { return false; }
#endif
};

}  // namespace zinc
