// The machine code of kernels that this Mac has compiled before.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <mutex>
#include <string>

#include "metal/objc.h"
#include "metal/times.h"
#include "metal_cache.h"

namespace zinc {

// A binary archive in the user's cache folder. Its file is of one GPU, one build of macOS and one set of kernels; what
// does not load is passed over and written anew. It serves the first start of another program: Metal has a cache of its
// own for each.
class Archive {
  public:
    Archive(id<MTLDevice> device, uint64_t kernels, Times& times)
        : file_(CacheFile::of(text(device.name) + "\n" + system() + "\n" + std::to_string(kernels))), times_(times) {
        if (file_.path.empty()) {
            state_ = "off";
            return;
        }
        if (file_.exists()) open(device);
        if (!archive_) create(device);
    }

    // Takes from the archive what it holds; false where it holds nothing of use.
    bool serve(MTLComputePipelineDescriptor* descriptor) const {
        if (!archive_ || !loaded_) return false;
        descriptor.binaryArchives = @[ archive_ ];
        return true;
    }

    // What was just compiled belongs to the next start.
    void add(MTLComputePipelineDescriptor* descriptor) {
        const std::lock_guard lock(mutex_);
        if (!archive_) return;
        descriptor.binaryArchives = nil;
        changed_ = [archive_ addComputePipelineFunctionsWithDescriptor:descriptor error:nil] || changed_;
    }

    void save() {
        const std::lock_guard lock(mutex_);
        if (!archive_ || !changed_) return;
        changed_ = false;
        const Stopwatch watch;
        const std::string failure = file_.replace([this](const std::filesystem::path& path) {
            NSError* error = nil;
            NSURL* url = [NSURL fileURLWithPath:ns_string(path.string())];
            return [archive_ serializeToURL:url error:&error] ? std::string() : describe(error);
        });
        state_ = failure.empty() ? "written to " + file_.path.string() : "not written: " + failure;
        times_.note("write the archive", watch.seconds());
    }

    std::string state() const {
        const std::lock_guard lock(mutex_);
        return state_;
    }

  private:
    // With the build, which changes with every update: machine code is of one driver.
    static std::string system() { return text(NSProcessInfo.processInfo.operatingSystemVersionString); }

    void open(id<MTLDevice> device) {
        const Stopwatch watch;
        MTLBinaryArchiveDescriptor* descriptor = [[MTLBinaryArchiveDescriptor alloc] init];
        descriptor.url = [NSURL fileURLWithPath:ns_string(file_.path.string())];
        NSError* error = nil;
        archive_ = [device newBinaryArchiveWithDescriptor:descriptor error:&error];
        loaded_ = archive_ != nil;
        state_ = loaded_ ? "loaded from " + file_.path.string() : "passed over: " + describe(error);
        if (!loaded_) file_.remove();
        times_.note("load the archive", watch.seconds());
    }

    void create(id<MTLDevice> device) {
        NSError* error = nil;
        archive_ = [device newBinaryArchiveWithDescriptor:[[MTLBinaryArchiveDescriptor alloc] init] error:&error];
        if (!archive_) state_ = "none: " + describe(error);
        if (archive_ && state_.empty()) state_ = "none yet";
    }

    const CacheFile file_;
    Times& times_;
    mutable std::mutex mutex_;
    id<MTLBinaryArchive> archive_;
    bool loaded_ = false, changed_ = false;
    std::string state_;
};

}  // namespace zinc
