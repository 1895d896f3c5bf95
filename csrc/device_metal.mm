// The Metal backend: with the headers in metal/ the only file that sees Metal. Objective-C++ under ARC; in
// Objective-C++ ARC also releases when a C++ exception unwinds (-fobjc-arc-exceptions is on by default).
#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <unistd.h>

#include <array>
#include <cstdlib>
#include <map>
#include <mutex>

#include "device.h"
#include "metal/library.h"
#include "metal/objc.h"
#include "metal/residency.h"
#include "metal_in_flight.h"
#include "metal_launches.h"
#include "metal_rules.h"

namespace zinc {
namespace {

constexpr double DEFAULT_PATIENCE_SECONDS = 120;
// Tracking orders command buffers of one queue that share a buffer, which is what lets a step follow the one before it
// without the host. It is Metal's default for what a device allocates; said here since the steps depend on it.
constexpr MTLResourceOptions TRACKED = MTLResourceHazardTrackingModeTracked;

// What the device shares with its buffers and recordings; the last of them to go releases it.
struct Context {
    Context(id<MTLDevice> device, id<MTLCommandQueue> queue)
        : device(device), queue(queue), residency(device, queue),
          debug(std::getenv("ZINCMETAL_METAL_DEBUG") != nullptr), in_flight(std::make_shared<InFlight>(patience())) {}

    static double patience() {
        const char* seconds = std::getenv("ZINCMETAL_METAL_TIMEOUT");
        const double value = seconds ? std::atof(seconds) : 0;
        return value > 0 ? value : DEFAULT_PATIENCE_SECONDS;
    }

    const id<MTLDevice> device;
    const id<MTLCommandQueue> queue;
    Residency residency;
    const bool debug;  // one encoder per dispatch, so that an error names the kernel
    const std::shared_ptr<InFlight> in_flight;
};

class MetalBuffer final : public Buffer {
  public:
    MetalBuffer(std::shared_ptr<Context> owner, id<MTLBuffer> buffer, void* contents)
        : context(std::move(owner)), metal(buffer), resident_(context->residency.add(buffer, contents)) {
        host = contents;
        bytes = buffer.length;
    }

    // Nothing in flight uses the buffer: recordings hold it, and wait for the GPU before they let go.
    ~MetalBuffer() override {
        try {
            guarded([&] {
                if (resident_) context->residency.remove(metal, host);
                metal = nil;  // inside the pool
            });
        } catch (...) {  // a destructor has nobody to tell
        }
    }

    const std::shared_ptr<Context> context;
    id<MTLBuffer> metal;

  private:
    const bool resident_;
};

class MetalPipeline final : public Pipeline {
  public:
    id<MTLComputePipelineState> state;
    std::vector<BufferArgument> arguments;
};

// ---------------------------------------------------------------------------------------------- recording

class MetalRecording final : public Recording {
  public:
    MetalRecording(std::shared_ptr<Context> owner, std::vector<Dispatch> dispatches, Encoding encoding)
        : context(std::move(owner)), dispatches_(std::move(dispatches)),
          type_(encoding == Encoding::concurrent ? MTLDispatchTypeConcurrent : MTLDispatchTypeSerial),
          launches_(launches_of(dispatches_, encoding, context->debug)) {}

    // Command buffers do not retain what they use; this object does, so it stays until the GPU is done. If the GPU is
    // lost, it may yet write to these buffers: they are leaked on purpose.
    ~MetalRecording() override {
        if (!context->in_flight->idle()) new std::vector<Dispatch>(std::move(dispatches_));
    }

    void encode(id<MTLCommandBuffer> command_buffer) const {
        for (size_t i = 0; i < launches_.size();) {
            const Encoder encoder(command_buffer, type_);
            encoder.metal.label = context->debug ? pipeline_of(launches_[i]).label : @"zincmetal";
            do {
                encode(encoder.metal, launches_[i++]);
            } while (i < launches_.size() && !launches_[i].new_encoder);
        }
    }

    const std::shared_ptr<Context> context;

  private:
    // Metal aborts when an encoder goes away without endEncoding, so it is ended on every path.
    struct Encoder {
        Encoder(id<MTLCommandBuffer> command_buffer, MTLDispatchType type)
            : metal([command_buffer computeCommandEncoderWithDispatchType:type]) {
            if (!metal) throw DeviceError("Metal gave no compute encoder; close other GPU programs");
        }
        ~Encoder() { [metal endEncoding]; }
        Encoder(const Encoder&) = delete;
        const id<MTLComputeCommandEncoder> metal;
    };

    static id<MTLComputePipelineState> pipeline_of(const Launch& launch) {
        return static_cast<const MetalPipeline&>(*launch.dispatch->pipeline).state;
    }

    static void encode(id<MTLComputeCommandEncoder> encoder, const Launch& launch) {
        const Dispatch& d = *launch.dispatch;
        if (launch.barrier) [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
        if (launch.new_pipeline) [encoder setComputePipelineState:pipeline_of(launch)];
        [encoder setBytes:d.params.data() length:d.params.size() atIndex:0];
        for (const Bind& bind : launch.binds) {
            if (bind.buffer) {
                [encoder setBuffer:static_cast<const MetalBuffer*>(bind.buffer)->metal
                            offset:bind.offset
                           atIndex:bind.index];
            } else {
                [encoder setBufferOffset:bind.offset atIndex:bind.index];
            }
        }
        [encoder dispatchThreadgroups:MTLSizeMake(d.grid[0], d.grid[1], d.grid[2])
                threadsPerThreadgroup:MTLSizeMake(d.threads, 1, 1)];
    }

    std::vector<Dispatch> dispatches_;  // owns the pipelines, buffers and parameters of the launches
    const MTLDispatchType type_;
    const std::vector<Launch> launches_;
};

// ---------------------------------------------------------------------------------------------- completion

std::string failure_of(id<MTLCommandBuffer> command_buffer) {
    if (command_buffer.status != MTLCommandBufferStatusError) return "";
    NSError* error = command_buffer.error;
    std::vector<EncoderEnd> ends;
    NSArray<id<MTLCommandBufferEncoderInfo>>* encoders = error.userInfo[MTLCommandBufferEncoderInfoErrorKey];
    for (id<MTLCommandBufferEncoderInfo> encoder in encoders) {
        ends.push_back({text(encoder.label), static_cast<long>(encoder.errorState)});
    }
    const bool domain_is_metal = [error.domain isEqualToString:MTLCommandBufferErrorDomain];
    return command_buffer_failure(domain_is_metal, error.code, describe(error), ends);
}

// Runs on a thread of Metal's, where a throw would end the process.
void completed(id<MTLCommandBuffer> command_buffer, InFlight& in_flight, uint32_t place) noexcept {
    double start = 0, end = 0;
    std::string failure;
    try {
        guarded([&] {
            failure = failure_of(command_buffer);
            start = command_buffer.GPUStartTime;
            end = command_buffer.GPUEndTime;
        });
    } catch (...) {
        failure = "GPU error";  // short enough to need no allocation
    }
    in_flight.finished(place, start, end, failure);
}

// ---------------------------------------------------------------------------------------------- device

bool supports(id<MTLDevice> device, const MetalFamily& family) {
    return [device supportsFamily:static_cast<MTLGPUFamily>(family.value)];
}

// The newest Apple family, which includes the older ones.
std::string family_of(id<MTLDevice> device) {
    for (const MetalFamily& family : METAL_FAMILIES) {
        if (*family.chips && supports(device, family)) return std::string(family.name) + " (" + family.chips + ")";
    }
    return "older than Apple7";
}

std::vector<BufferArgument> arguments_of(MTLComputePipelineReflection* reflection) {
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

class MetalDevice final : public Device {
  public:
    MetalDevice(id<MTLDevice> device, id<MTLCommandQueue> queue, const std::string& kernel_folder)
        : context_(std::make_shared<Context>(device, queue)), library_(device, kernel_folder) {
        descriptor_ = [[MTLCommandBufferDescriptor alloc] init];
        descriptor_.retainedReferences = NO;  // recordings keep everything alive, see ~MetalRecording
        if (context_->debug) descriptor_.errorOptions = MTLCommandBufferErrorOptionEncoderExecutionStatus;
        for (uint32_t place = 0; place < InFlight::limit; ++place) {
            const std::shared_ptr<InFlight> in_flight = context_->in_flight;
            on_completed_[place] = ^(id<MTLCommandBuffer> command_buffer) {
              completed(command_buffer, *in_flight, place);
            };
        }
    }

    ~MetalDevice() override { context_->in_flight->idle(); }

    DeviceInfo info() const override {
        DeviceInfo info;
        guarded([&] {
            id<MTLDevice> device = context_->device;
            info.name = text(device.name);
            info.backend = "metal";
            info.unified_memory = device.hasUnifiedMemory;
            info.working_set_bytes = device.recommendedMaxWorkingSetSize;
            info.max_buffer_bytes = device.maxBufferLength;
            info.max_threadgroup_bytes = static_cast<uint32_t>(device.maxThreadgroupMemoryLength);
            info.page_bytes = static_cast<uint32_t>(getpagesize());
            info.asynchronous = true;
            info.features = features();
        });
        return info;
    }

    std::shared_ptr<Buffer> alloc(size_t bytes, Storage storage) override {
        context_->in_flight->check();
        std::shared_ptr<Buffer> result;
        guarded([&] {
            const bool shared = storage == Storage::shared;
            check_length(bytes, context_->device.maxBufferLength);
            id<MTLBuffer> buffer = [context_->device
                newBufferWithLength:bytes
                            options:TRACKED | (shared ? MTLResourceStorageModeShared : MTLResourceStorageModePrivate)];
            if (!buffer) throw DeviceError(refusal("allocate", bytes));
            result = std::make_shared<MetalBuffer>(context_, buffer, shared ? buffer.contents : nullptr);
        });
        return result;
    }

    std::shared_ptr<Buffer> wrap(void* pointer, size_t bytes) override {
        context_->in_flight->check();
        check_wrap(pointer, bytes, static_cast<uint64_t>(getpagesize()), context_->device.maxBufferLength);
        std::shared_ptr<Buffer> result;
        guarded([&] {
            id<MTLBuffer> buffer = [context_->device newBufferWithBytesNoCopy:pointer
                                                                       length:bytes
                                                                      options:TRACKED | MTLResourceStorageModeShared
                                                                  deallocator:nil];
            if (!buffer) throw DeviceError(refusal("wrap", bytes));
            result = std::make_shared<MetalBuffer>(context_, buffer, pointer);
        });
        return result;
    }

    std::shared_ptr<Pipeline> pipeline(const std::string& kernel) override { return pipeline(kernel, 0); }

    std::vector<std::string> kernel_names() const override { return library_.names(); }

    std::unique_ptr<Recording> record(std::vector<Dispatch> dispatches, Encoding encoding) override {
        context_->in_flight->check();
        for (size_t i = 0; i < dispatches.size(); ++i) {
            widen(dispatches[i]);
            check(dispatches[i], i);
        }
        std::unique_ptr<Recording> recording;
        guarded([&] { recording = std::make_unique<MetalRecording>(context_, std::move(dispatches), encoding); });
        return recording;
    }

    uint64_t submit(Recording& recording, const Poll&) override {
        const auto* work = dynamic_cast<const MetalRecording*>(&recording);
        if (!work || work->context != context_) throw DeviceError("the recording belongs to another device");
        const std::lock_guard lock(submit_mutex_);  // tickets are given in the order of commits
        const uint64_t ticket = context_->in_flight->begin();
        try {
            guarded([&] { commit(*work, ticket); });
        } catch (...) {
            context_->in_flight->abandon(ticket);
            throw;
        }
        return ticket;
    }

    RunTimes wait(uint64_t ticket, const Poll&) override { return context_->in_flight->wait(ticket); }

  private:
    std::vector<std::pair<std::string, std::string>> features() const {
        id<MTLDevice> device = context_->device;
        std::vector<std::pair<std::string, std::string>> list = {{"family", family_of(device)}};
        const auto yes_no = [](bool value) { return std::string(value ? "yes" : "no"); };
        for (const MetalFamily& family : METAL_FAMILIES)
            list.emplace_back(family.name, yes_no(supports(device, family)));
        if (@available(macOS 14.0, *)) list.emplace_back("architecture", text(device.architecture.name));
        list.emplace_back("ray tracing", yes_no(device.supportsRaytracing));
        list.emplace_back("threads per threadgroup", std::to_string(device.maxThreadsPerThreadgroup.width));
        list.emplace_back("residency set", yes_no(context_->residency.available()));
        list.emplace_back("kernels", std::to_string(library_.names().size()) + " from " + library_.origin());
        for (const auto& [file, words] : library_.broken()) list.emplace_back(file, words);
        if (context_->debug) list.emplace_back("debug", "one encoder per dispatch");
        list.emplace_back("macOS", text(NSProcessInfo.processInfo.operatingSystemVersionString));
        return list;
    }

    std::string refusal(const char* verb, size_t bytes) const {
        return refusal_text(verb, bytes, context_->device.currentAllocatedSize,
                            context_->device.recommendedMaxWorkingSetSize);
    }

    // The kernel for threadgroups of that many threads, or of as many as its registers leave it: 0.
    std::shared_ptr<MetalPipeline> pipeline(const std::string& kernel, uint32_t threads) {
        context_->in_flight->check();
        const std::lock_guard lock(mutex_);
        std::shared_ptr<MetalPipeline>& pipeline = pipelines_[{kernel, threads}];
        if (!pipeline) guarded([&] { pipeline = build(kernel, threads); });
        return pipeline;
    }

    // Where the registers of a kernel leave it fewer threads than are launched, it is compiled again to use fewer.
    void widen(Dispatch& d) {
        if (!d.pipeline || d.threads <= d.pipeline->limits.max_threads) return;
        if (d.threads <= context_->device.maxThreadsPerThreadgroup.width)
            d.pipeline = pipeline(d.pipeline->name, d.threads);
    }

    std::shared_ptr<MetalPipeline> build(const std::string& kernel, uint32_t threads) const {
        MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
        descriptor.label = ns_string(kernel);
        descriptor.computeFunction = library_.function(kernel);
        descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth = YES;  // check_dispatch sees to it
        if (threads) descriptor.maxTotalThreadsPerThreadgroup = threads;
        // Binding and buffer type information, by value: the first was renamed in the macOS 15 SDK.
        const auto with_arguments = static_cast<MTLPipelineOption>(1 << 0 | 1 << 1);
        MTLAutoreleasedComputePipelineReflection reflection = nil;
        NSError* error = nil;
        id<MTLComputePipelineState> state = [context_->device newComputePipelineStateWithDescriptor:descriptor
                                                                                            options:with_arguments
                                                                                         reflection:&reflection
                                                                                              error:&error];
        if (!state) {
            throw DeviceError("kernel '" + kernel + "' does not build for " + text(context_->device.name) +
                              ", family " + family_of(context_->device) + ": " + describe(error));
        }
        if (state.threadExecutionWidth != SIMDGROUP_THREADS) {
            throw DeviceError("kernel '" + kernel + "': simdgroups have " + std::to_string(state.threadExecutionWidth) +
                              " threads on " + text(context_->device.name) + "; the kernels need 32 (Apple Silicon)");
        }
        auto pipeline = std::make_shared<MetalPipeline>();
        pipeline->name = kernel;
        pipeline->limits = {static_cast<uint32_t>(state.maxTotalThreadsPerThreadgroup),
                            static_cast<uint32_t>(state.threadExecutionWidth),
                            static_cast<uint32_t>(state.staticThreadgroupMemoryLength)};
        pipeline->state = state;
        pipeline->arguments = arguments_of(reflection);
        return pipeline;
    }

    void check(const Dispatch& d, size_t position) const {
        const auto* pipeline = dynamic_cast<const MetalPipeline*>(d.pipeline.get());
        check_dispatch(d, pipeline ? pipeline->arguments : std::vector<BufferArgument>(), position);
        bool ours = pipeline != nullptr;
        for (const Binding& binding : d.bindings) {
            const auto* buffer = dynamic_cast<const MetalBuffer*>(binding.buffer.get());
            ours = ours && buffer && buffer->context == context_;
        }
        if (!ours) {
            throw DeviceError("dispatch " + std::to_string(position) + " uses a kernel or buffer of another device");
        }
    }

    // Within a concurrent encoder hazard tracking does not act, and the recording's barriers do.
    void commit(const MetalRecording& work, uint64_t ticket) {
        context_->residency.commit();
        id<MTLCommandBuffer> command_buffer = [context_->queue commandBufferWithDescriptor:descriptor_];
        if (!command_buffer) throw DeviceError("Metal gave no command buffer; close other GPU programs");
        work.encode(command_buffer);
        [command_buffer addCompletedHandler:on_completed_[ticket % InFlight::limit]];
        [command_buffer commit];
    }

    const std::shared_ptr<Context> context_;
    const KernelLibrary library_;
    MTLCommandBufferDescriptor* descriptor_;
    std::array<MTLCommandBufferHandler, InFlight::limit> on_completed_;  // made once, so that a commit allocates none
    std::mutex mutex_, submit_mutex_;
    std::map<std::pair<std::string, uint32_t>, std::shared_ptr<MetalPipeline>> pipelines_;  // by name and threads
};

// macOS 26 stops a command buffer that keeps the display waiting ("Impacting Interactivity"), and a prompt's can take
// seconds. The driver reads this when it makes its first device of the process; what a user has set stays.
void ask_for_patience() { setenv("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1", 0); }

id<MTLDevice> select_device() {
    // The default device needs a process linked with CoreGraphics; the list does not.
    id<MTLDevice> device = MTLCreateSystemDefaultDevice();
    if (!device) device = MTLCopyAllDevices().firstObject;
    if (!device) {
        throw DeviceError("no Metal device: this Mac gives none to this process; it takes an Apple Silicon Mac and a "
                          "process that may use the GPU (not every virtual machine or sandbox does); "
                          "ZINCMETAL_DEVICE=cpu runs without");
    }
    return device;
}

}  // namespace

std::unique_ptr<Device> open_device(const DeviceOptions& options) {
    std::unique_ptr<Device> result;
    guarded([&] {
        ask_for_patience();
        id<MTLDevice> device = select_device();
        id<MTLCommandQueue> queue = [device newCommandQueue];
        if (!queue) throw DeviceError("Metal gave no command queue on " + text(device.name));
        queue.label = @"zincmetal";
        result = std::make_unique<MetalDevice>(device, queue, options.kernel_folder);
    });
    return result;
}

}  // namespace zinc
