// The machine code of kernels that this Mac has compiled before.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <mutex>
#include <string>
#include <vector>

#include "metal/objc.h"
#include "metal/times.h"
#include "metal/portable/cache.h"

namespace zinc {

// A binary archive in the user's cache folder. Its file is of one GPU, one build of macOS and one set of kernels. A
// file that does not load is skipped and written again. It serves the first start of another program: Metal has a
// separate cache for each program.
class Archive {
  public:
    Archive(id<MTLDevice> device, uint64_t kernels, Times& times)
        : device_(device), file_(CacheFile::of(text(device.name) + "\n" + system() + "\n" + std::to_string(kernels))),
          times_(times) {
        if (file_.path.empty()) {
            state_ = "off";
            return;
        }
        if (!file_.exists()) return;
        const Stopwatch watch;
        const std::string failure = failure_of([&] {
            NSError* error = nil;
            served_ = archive(file_.path, &error);
            return served_ ? std::string() : describe(error);
        });
        state_ = served_ ? "loaded from " + file_.path.string() : "passed over: " + failure;
        if (!served_) file_.remove();
        times_.note("load the archive", watch.seconds());
    }

    // Takes the kernel from the archive; false if the archive does not hold it.
    bool serve(MTLComputePipelineDescriptor* descriptor) const {
        if (!served_) return false;
        descriptor.binaryArchives = @[ served_ ];
        return true;
    }

    // Adds a kernel that was just compiled, for the next start.
    void add(MTLComputePipelineDescriptor* descriptor) {
        const std::lock_guard lock(mutex_);
        if (file_.path.empty()) return;
        descriptor.binaryArchives = nil;
        fresh_.push_back(descriptor);
    }

    // Writes the new kernels together with the old kernels, to another archive: the first may be serving kernels.
    void save() {
        const std::lock_guard lock(mutex_);
        if (fresh_.empty()) return;
        const Stopwatch watch;
        const std::string failure = failure_of([&] { return write(); });
        fresh_.clear();
        state_ = failure.empty() ? "written to " + file_.path.string() : "not written: " + failure;
        times_.note("write the archive", watch.seconds());
    }

    std::string state() const {
        const std::lock_guard lock(mutex_);
        return state_;
    }

  private:
    // Includes the build, which changes with every update: machine code belongs to one driver.
    static std::string system() { return text(NSProcessInfo.processInfo.operatingSystemVersionString); }

    // Returns the error, or nothing. Kernels run without an archive. So an error of Metal's (on a virtual machine it is
    // an exception) is only reported.
    template <class Attempt>
    static std::string failure_of(const Attempt& attempt) {
        std::string failure;
        try {
            guarded([&] { failure = attempt(); });
        } catch (const std::exception& error) {
            failure = error.what();
        }
        return failure;
    }

    std::string write() const {
        NSError* error = nil;
        id<MTLBinaryArchive> all = archive(file_.exists() ? file_.path : "", &error);
        if (!all) all = archive("", &error);
        if (!all) return describe(error);
        size_t n_added = 0;
        for (MTLComputePipelineDescriptor* descriptor : fresh_)
            n_added += [all addComputePipelineFunctionsWithDescriptor:descriptor error:&error] ? 1 : 0;
        if (!n_added) return describe(error);
        return file_.replace([&](const std::filesystem::path& path) {
            NSError* refusal = nil;
            NSURL* url = [NSURL fileURLWithPath:ns_string(path.string())];
            return [all serializeToURL:url error:&refusal] ? std::string() : describe(refusal);
        });
    }

    // The archive of a file, or an empty one.
    id<MTLBinaryArchive> archive(const std::filesystem::path& path, NSError* __autoreleasing* error) const {
        MTLBinaryArchiveDescriptor* descriptor = [[MTLBinaryArchiveDescriptor alloc] init];
        if (!path.empty()) descriptor.url = [NSURL fileURLWithPath:ns_string(path.string())];
        return [device_ newBinaryArchiveWithDescriptor:descriptor error:error];
    }

    const id<MTLDevice> device_;
    const CacheFile file_;
    Times& times_;
    mutable std::mutex mutex_;
    id<MTLBinaryArchive> served_;
    std::vector<MTLComputePipelineDescriptor*> fresh_;
    std::string state_ = "none yet";
};

}  // namespace zinc
