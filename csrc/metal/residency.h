// Memory that stays resident between command buffers, where the system can do that.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <cstdint>
#include <mutex>

#include "metal/objc.h"

namespace zinc {

// Keeps the memory of all buffers resident between command buffers (macOS 15); without it the first touch of mapped
// weights, and every touch after some idle time, waits for the kernel to wire pages. On older systems nothing has to be
// done: buffers bound with setBuffer are made resident for their command buffer (useResource is for indirect ones).
class Residency {
  public:
#if ZINC_SDK_15
    Residency(id<MTLDevice> device, id<MTLCommandQueue> queue)
        : queue_(queue), limit_(device.recommendedMaxWorkingSetSize) {
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
    bool add(id<MTLBuffer> buffer) {
        if (@available(macOS 15.0, *)) {
            const std::lock_guard lock(mutex_);
            if (!set_ || bytes_ + buffer.length > limit_) return false;
            const id<MTLResidencySet> set = set_;
            [set addAllocation:buffer];
            bytes_ += buffer.length;
            changed_ = true;
            return true;
        }
        return false;
    }

    // At once, since the owner of a no-copy buffer may unmap its memory next.
    void remove(id<MTLBuffer> buffer) {
        if (@available(macOS 15.0, *)) {
            const std::lock_guard lock(mutex_);
            const id<MTLResidencySet> set = set_;
            [set removeAllocation:buffer];
            [set commit];
            bytes_ -= buffer.length;
        }
    }

    // Makes resident what was added since; done in bulk, before work is recorded or submitted.
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
    uint64_t bytes_ = 0;
    bool changed_ = false;
#else
    Residency(id<MTLDevice>, id<MTLCommandQueue>) {}
    bool add(id<MTLBuffer>) { return false; }
    void remove(id<MTLBuffer>) {}
    void commit() {}
    bool available() const { return false; }
#endif
};

}  // namespace zinc
