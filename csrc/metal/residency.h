// Memory that stays resident between command buffers, if the system can do that.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <cstdint>
#include <mutex>

#include "metal/objc.h"
#include "metal/portable/coverage.h"

namespace zinc {

// Keeps the memory of all buffers of a process resident between command buffers (macOS 15). Without it the first touch
// of mapped weights, and every touch after some idle time, waits for the operating system to wire pages. Older systems
// need nothing: they make buffers bound with setBuffer resident for their command buffer (useResource is for indirect
// use).
class Residency {
  public:
#if ZINC_SDK_15
    explicit Residency(id<MTLDevice> device) : limit_(device.recommendedMaxWorkingSetSize) {
        if (![device supportsFamily:MTLGPUFamilyApple6]) return;  // virtual machines: there the call is an error
        if (@available(macOS 15.0, *)) {
            MTLResidencySetDescriptor* descriptor = [[MTLResidencySetDescriptor alloc] init];
            descriptor.label = @"zincmetal";
            set_ = [device newResidencySetWithDescriptor:descriptor error:nil];
        }
    }

    ~Residency() {
        try {
            guarded([&] { let_go(); });
        } catch (...) {  // a destructor has nobody to tell
        }
    }

    // The command buffers of this queue find the memory resident.
    void attach(id<MTLCommandQueue> queue) {
        if (@available(macOS 15.0, *)) {
            if (set_) [queue addResidencySet:set_];
        }
    }
    void detach(id<MTLCommandQueue> queue) {
        if (@available(macOS 15.0, *)) {
            if (set_) [queue removeResidencySet:set_];
        }
    }

    // False if the buffer is left to the driver: no sets on this system, or more bytes than the device wants resident.
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

    // Makes new buffers resident and releases removed buffers, in bulk, right before work is submitted. Not earlier:
    // macOS keeps a set wired if its residency was requested in a process that then gives the GPU no work.
    void commit() {
        if (@available(macOS 15.0, *)) {
            const std::lock_guard lock(mutex_);
            if (!set_ || (requested_ && !changed_)) return;
            const id<MTLResidencySet> set = set_;
            [set commit];
            [set requestResidency];
            changed_ = false;
            requested_ = true;
        }
    }

    // macOS takes the memory back about a second after the last command buffer, unless residency is requested again.
    void keep() {
        if (@available(macOS 15.0, *)) {
            const std::lock_guard lock(mutex_);
            const id<MTLResidencySet> set = set_;
            if (requested_ && !changed_) [set requestResidency];
        }
    }

    void let_go() {
        if (@available(macOS 15.0, *)) {
            const std::lock_guard lock(mutex_);
            const id<MTLResidencySet> set = set_;
            if (requested_) [set endResidency];
            requested_ = false;
        }
    }

    bool available() const { return set_ != nil; }

  private:
    id set_;  // id<MTLResidencySet>, a type that exists from macOS 15
    const uint64_t limit_;
    std::mutex mutex_;
    Coverage resident_;
    bool changed_ = false, requested_ = false;
#else
    explicit Residency(id<MTLDevice>) {}
    void attach(id<MTLCommandQueue>) {}
    void detach(id<MTLCommandQueue>) {}
    bool add(id<MTLBuffer>, const void*) { return false; }
    void remove(id<MTLBuffer>, const void*) {}
    void commit() {}
    void keep() {}
    void let_go() {}
    bool available() const { return false; }
#endif
};

}  // namespace zinc
