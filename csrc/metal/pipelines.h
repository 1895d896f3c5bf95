// Kernels made ready for the GPU, each once for all devices of a process.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "metal/archive.h"
#include "metal/library.h"
#include "metal/objc.h"
#include "metal/portable/check_arguments.h"
#include "metal/portable/limits.h"

namespace zinc {

class MetalPipeline final : public Pipeline {
  public:
    ~MetalPipeline() override {
        if (process_.is_another()) leave_behind(state);
    }

    id<MTLComputePipelineState> state;
    std::vector<BufferArgument> arguments;

  private:
    const OpeningProcess process_;
};

inline bool supports(id<MTLDevice> device, const MetalFamily& family) {
    return [device supportsFamily:static_cast<MTLGPUFamily>(family.value)];
}

// The newest Apple family, which includes the older ones.
inline std::string family_of(id<MTLDevice> device) {
    for (const MetalFamily& family : METAL_FAMILIES) {
        if (*family.chips && supports(device, family)) return std::string(family.name) + " (" + family.chips + ")";
    }
    return "older than Apple7";
}

inline std::vector<BufferArgument> arguments_of(MTLComputePipelineReflection* reflection) {
    std::vector<BufferArgument> arguments;
    if (@available(macOS 13.0, *)) {
        for (id<MTLBinding> binding in reflection.bindings) {
            if (binding.type != MTLBindingTypeBuffer || !binding.used) continue;
            id<MTLBufferBinding> buffer = static_cast<id<MTLBufferBinding>>(binding);
            arguments.push_back({text(buffer.name), static_cast<uint32_t>(buffer.index), buffer.bufferAlignment,
                                 buffer.bufferDataSize});
        }
    }
    return arguments;
}

class Pipelines {
  public:
    Pipelines(id<MTLDevice> device, const KernelChoice& choice, Times& times)
        : device_(device), library_(device, choice, times), times_(times) {}

    // The kernel for threadgroups of that many threads. 0: as many as its registers allow.
    std::shared_ptr<MetalPipeline> get(const std::string& kernel, uint32_t threads = 0) {
        Entry& entry = entry_of(kernel, threads);
        const std::lock_guard lock(entry.mutex);
        if (!entry.pipeline) guarded([&] { entry.pipeline = build(kernel, threads); });
        return entry.pipeline;
    }

    // Makes the kernels of a plan at once: Metal's compiler is another process, and takes several.
    void prepare(const std::vector<std::string>& kernels) {
        const std::vector<std::string> missing = without_pipeline(kernels);
        if (missing.empty()) return;
        guarded([&] { library_.prepare(missing); });
        std::atomic<size_t> next{0};
        const auto work = [&] {
            for (size_t i; (i = next++) < missing.size();) {
                try {
                    get(missing[i]);
                } catch (const std::exception&) {  // thrown when the kernel is asked for
                }
            }
        };
        std::vector<std::thread> helpers;
        const size_t cores = std::max(1u, std::thread::hardware_concurrency());
        const size_t n_helpers = std::min({MOST_THREADS, std::max<size_t>(2, cores), missing.size()}) - 1;
        try {
            for (size_t i = 0; i < n_helpers; ++i) helpers.emplace_back(work);
        } catch (const std::system_error&) {  // no thread can be started: fewer threads do it
        }
        work();
        for (std::thread& helper : helpers) helper.join();
        guarded([&] { archive().save(); });
    }

    std::vector<std::string> names() {
        std::vector<std::string> names;
        guarded([&] { names = library_.names(); });
        return names;
    }

    const KernelLibrary& library() const { return library_; }

    // The state of the archive, once a kernel was asked for.
    std::string archive_state() {
        const std::lock_guard lock(mutex_);
        return archive_ ? archive_->state() : "not looked at";
    }

  private:
    static constexpr size_t MOST_THREADS = 8;

    struct Entry {
        std::mutex mutex;
        std::shared_ptr<MetalPipeline> pipeline;
    };

    Entry& entry_of(const std::string& kernel, uint32_t threads) {
        const std::lock_guard lock(mutex_);
        std::unique_ptr<Entry>& entry = entries_[{kernel, threads}];
        if (!entry) entry = std::make_unique<Entry>();
        return *entry;
    }

    std::vector<std::string> without_pipeline(std::vector<std::string> kernels) {
        std::sort(kernels.begin(), kernels.end());
        kernels.erase(std::unique(kernels.begin(), kernels.end()), kernels.end());
        std::erase_if(kernels, [this](const std::string& kernel) {
            Entry& entry = entry_of(kernel, 0);
            const std::lock_guard lock(entry.mutex);
            return entry.pipeline != nullptr;
        });
        return kernels;
    }

    Archive& archive() {
        const std::lock_guard lock(mutex_);
        if (!archive_) archive_.emplace(device_, library_.hash(), times_);
        return *archive_;
    }

    std::shared_ptr<MetalPipeline> build(const std::string& kernel, uint32_t threads) {
        MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
        descriptor.label = ns_string(kernel);
        descriptor.computeFunction = library_.function(kernel);
        descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth = YES;  // check_dispatch sees to it
        if (threads) descriptor.maxTotalThreadsPerThreadgroup = threads;
        const Stopwatch watch;
        NSError* error = nil;
        auto pipeline = std::make_shared<MetalPipeline>();
        const bool archived = archive().serve(descriptor) &&
                              make_state(*pipeline, descriptor, MTLPipelineOptionFailOnBinaryArchiveMiss, nil);
        if (!archived && !make_state(*pipeline, descriptor, MTLPipelineOptionNone, &error)) {
            throw DeviceError("kernel '" + kernel + "' does not build for " + text(device_.name) + ", family " +
                              family_of(device_) + ": " + describe(error));
        }
        check_width(kernel, pipeline->state);
        if (!archived) archive().add(descriptor);
        times_.note_pipeline(kernel, watch.seconds(), archived);
        const id<MTLComputePipelineState> state = pipeline->state;
        pipeline->name = kernel;
        pipeline->limits = {static_cast<uint32_t>(state.maxTotalThreadsPerThreadgroup),
                            static_cast<uint32_t>(state.threadExecutionWidth),
                            static_cast<uint32_t>(state.staticThreadgroupMemoryLength)};
        return pipeline;
    }

    bool make_state(MetalPipeline& pipeline, MTLComputePipelineDescriptor* descriptor, MTLPipelineOption options,
                    NSError* __autoreleasing* error) const {
        // Binding and buffer type information, by value: the first was renamed in the macOS 15 SDK.
        const auto with_arguments = static_cast<MTLPipelineOption>(1 << 0 | 1 << 1 | options);
        MTLAutoreleasedComputePipelineReflection reflection = nil;
        pipeline.state = [device_ newComputePipelineStateWithDescriptor:descriptor
                                                                options:with_arguments
                                                             reflection:&reflection
                                                                  error:error];
        if (pipeline.state) pipeline.arguments = arguments_of(reflection);
        return pipeline.state != nil;
    }

    void check_width(const std::string& kernel, id<MTLComputePipelineState> state) const {
        if (state.threadExecutionWidth == SIMDGROUP_THREADS) return;
        throw DeviceError("kernel '" + kernel + "': simdgroups have " + std::to_string(state.threadExecutionWidth) +
                          " threads on " + text(device_.name) + "; the kernels need 32 (Apple Silicon)");
    }

    const id<MTLDevice> device_;
    KernelLibrary library_;
    Times& times_;
    std::mutex mutex_;
    std::map<std::pair<std::string, uint32_t>, std::unique_ptr<Entry>> entries_;  // by name and threads
    std::optional<Archive> archive_;
};

}  // namespace zinc
