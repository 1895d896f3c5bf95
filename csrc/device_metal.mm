// The Metal backend: the only file that sees Metal. Objective-C++ under ARC; in Objective-C++ ARC also releases when a
// C++ exception unwinds (-fobjc-arc-exceptions is on by default).
#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <future>
#include <map>
#include <mutex>

#include "device.h"
#include "metal_in_flight.h"
#include "metal_launches.h"
#include "metal_rules.h"
#include "metal_source.h"

#if !__has_feature(objc_arc)
#error "device_metal.mm needs -fobjc-arc"
#endif

// Residency sets and math modes came with the macOS 15 SDK; an older SDK builds a backend without them.
#if __has_include(<Metal/MTLResidencySet.h>)
#define ZINC_SDK_15 1
#else
#define ZINC_SDK_15 0
#endif

namespace zinc {
namespace {

// Enough to let the CPU encode ahead of the GPU, and fewer than the 64 at which a Metal queue blocks without a time
// limit.
constexpr uint32_t MAX_IN_FLIGHT = 8;
constexpr double DEFAULT_PATIENCE_SECONDS = 120;

std::string text(NSString* string) { return string.UTF8String ? std::string(string.UTF8String) : std::string(); }

NSString* ns_string(const std::string& string) {
    NSString* result = [[NSString alloc] initWithBytes:string.data()
                                                length:string.size()
                                              encoding:NSUTF8StringEncoding];
    if (!result) throw DeviceError("not valid UTF-8: " + string);
    return result;
}

std::string describe(NSError* error) { return error ? text(error.localizedDescription) : "no reason given"; }

// Runs body in an autorelease pool. A C++ exception that crossed the pool's scope would leave it undrained, and an
// NSException must not leave this file: both come out as C++ exceptions behind the pool.
template <class Body>
void guarded(Body body) {
    std::exception_ptr failure;
    @autoreleasepool {
        try {
            @try {
                body();
            } @catch (NSException* exception) {
                throw DeviceError("Metal raised " + text(exception.name) + ": " + text(exception.reason));
            } @catch (id) {
                throw DeviceError("Metal raised an object that is no NSException");
            }
        } catch (...) {
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

// ---------------------------------------------------------------------------------------------- residency

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

// What the device shares with its buffers and recordings; the last of them to go releases it.
struct Context {
    Context(id<MTLDevice> device, id<MTLCommandQueue> queue)
        : device(device), queue(queue), residency(device, queue),
          debug(std::getenv("ZINCMETAL_METAL_DEBUG") != nullptr),
          in_flight(std::make_shared<InFlight>(MAX_IN_FLIGHT, patience())) {}

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
        : context(std::move(owner)), metal(buffer), resident_(context->residency.add(buffer)) {
        host = contents;
        bytes = buffer.length;
    }

    // Nothing in flight uses the buffer: recordings hold it, and wait for the GPU before they let go.
    ~MetalBuffer() override {
        try {
            guarded([&] {
                if (resident_) context->residency.remove(metal);
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

// ---------------------------------------------------------------------------------------------- kernel library

// The kernels of a folder, by name: from zincmetal.metallib where it loads, else compiled from the sources.
class KernelLibrary {
  public:
    KernelLibrary(id<MTLDevice> device, const std::filesystem::path& folder) : device_(device) {
        std::string failure;
        if (!load(folder / "zincmetal.metallib", failure)) compile_all(folder, failure);
    }

    id<MTLFunction> function(const std::string& name) const {
        const auto found = by_name_.find(name);
        if (found == by_name_.end()) throw DeviceError(missing_kernel_text(name, names()));
        id<MTLFunction> function = [found->second newFunctionWithName:ns_string(name)];
        if (!function) throw DeviceError("the kernel library lists '" + name + "' but does not give it");
        return function;
    }

    std::vector<std::string> names() const {
        std::vector<std::string> names;
        for (const auto& entry : by_name_) names.push_back(entry.first);
        return names;
    }

    const std::string& origin() const { return origin_; }

  private:
    bool load(const std::filesystem::path& file, std::string& failure) {
        std::error_code unreadable;
        if (!std::filesystem::exists(file, unreadable)) return false;
        NSError* error = nil;
        id<MTLLibrary> library = [device_ newLibraryWithURL:[NSURL fileURLWithPath:ns_string(file.string())]
                                                      error:&error];
        if (!library) {
            failure = file.string() + " does not load: " + describe(error);
            return false;
        }
        add(library);
        origin_ = "zincmetal.metallib";
        return true;
    }

    // All files at once: the compiler is another process and takes a second or so for each.
    void compile_all(const std::filesystem::path& folder, const std::string& metallib_failure) {
        const std::vector<std::string> files = kernel_files(folder);
        std::vector<std::string> failures;
        if (!metallib_failure.empty()) failures.push_back(metallib_failure);
        if (files.empty()) {
            failures.push_back("no kernel sources in " + folder.string() + "; reinstall zincmetal");
            throw DeviceError(join(failures, "; "));
        }
        const auto how = std::launch::async | std::launch::deferred;  // deferred where no thread is to be had
        std::vector<std::future<id<MTLLibrary>>> jobs;
        for (const std::string& file : files) {
            jobs.push_back(std::async(how, [this, &folder, &file] { return compile(folder, file); }));
        }
        origin_ = std::to_string(files.size()) + " source files" + (failures.empty() ? "" : " (" + failures[0] + ")");
        bool failed = false;
        for (auto& job : jobs) {
            try {
                add(job.get());
            } catch (const std::exception& error) {
                failures.push_back(error.what());
                failed = true;
            }
        }
        if (failed) throw DeviceError(join(failures, "\n"));
    }

    id<MTLLibrary> compile(const std::filesystem::path& folder, const std::string& file) const {
        id<MTLLibrary> library;
        guarded([&] {
            NSString* source = ns_string(SourceFlattener(folder).flatten(file));
            NSError* error = nil;
            library = [device_ newLibraryWithSource:source options:compile_options() error:&error];
            // With a library the error holds warnings at most.
            if (!library) throw DeviceError(file + " does not compile: " + describe(error));
            library.label = ns_string(file);
        });
        return library;
    }

    static MTLCompileOptions* compile_options() {
        MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
        if (@available(macOS 14.0, *)) {
            options.languageVersion = MTLLanguageVersion3_1;  // of macOS 14, the oldest we support
        } else {
            throw DeviceError(
                "the kernels are written in Metal Shading Language 3.1, which needs macOS 14; this is macOS " +
                text(NSProcessInfo.processInfo.operatingSystemVersionString));
        }
        use_safe_math(options);
        return options;
    }

    // Safe math: masks are infinities and NaN must reach the logits to be seen, both of which fast math may assume
    // away. (preserveInvariance concerns vertex positions only.)
    static void use_safe_math(MTLCompileOptions* options) {
#if ZINC_SDK_15
        if (@available(macOS 15.0, *)) {
            options.mathMode = MTLMathModeSafe;
            options.mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise;
            return;
        }
#endif
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wdeprecated-declarations"
        options.fastMathEnabled = NO;
#pragma clang diagnostic pop
    }

    void add(id<MTLLibrary> library) {
        for (NSString* name in library.functionNames) by_name_[text(name)] = library;
    }

    const id<MTLDevice> device_;
    std::map<std::string, id<MTLLibrary>> by_name_;
    std::string origin_;
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
void completed(id<MTLCommandBuffer> command_buffer, InFlight& in_flight) noexcept {
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
    in_flight.finished(start, end, failure);
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
        const std::shared_ptr<InFlight> in_flight = context_->in_flight;
        on_completed_ = ^(id<MTLCommandBuffer> command_buffer) {
          completed(command_buffer, *in_flight);
        };
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
                            options:shared ? MTLResourceStorageModeShared : MTLResourceStorageModePrivate];
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
                                                                      options:MTLResourceStorageModeShared
                                                                  deallocator:nil];
            if (!buffer) throw DeviceError(refusal("wrap", bytes));
            result = std::make_shared<MetalBuffer>(context_, buffer, pointer);
        });
        return result;
    }

    std::shared_ptr<Pipeline> pipeline(const std::string& kernel) override {
        context_->in_flight->check();
        const std::lock_guard lock(mutex_);
        std::shared_ptr<MetalPipeline>& pipeline = pipelines_[kernel];
        if (!pipeline) guarded([&] { pipeline = build(kernel); });
        return pipeline;
    }

    std::vector<std::string> kernel_names() const override { return library_.names(); }

    std::unique_ptr<Recording> record(std::vector<Dispatch> dispatches, Encoding encoding) override {
        context_->in_flight->check();
        for (size_t i = 0; i < dispatches.size(); ++i) check(dispatches[i], i);
        std::unique_ptr<Recording> recording;
        guarded([&] {
            context_->residency.commit();
            recording = std::make_unique<MetalRecording>(context_, std::move(dispatches), encoding);
        });
        return recording;
    }

    void submit(Recording& recording) override {
        const auto* work = dynamic_cast<const MetalRecording*>(&recording);
        if (!work || work->context != context_) throw DeviceError("the recording belongs to another device");
        context_->in_flight->begin();
        try {
            guarded([&] { commit(*work); });
        } catch (...) {
            context_->in_flight->abandon();
            throw;
        }
    }

    RunTimes wait() override { return context_->in_flight->settle(); }

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
        if (context_->debug) list.emplace_back("debug", "one encoder per dispatch");
        list.emplace_back("macOS", text(NSProcessInfo.processInfo.operatingSystemVersionString));
        return list;
    }

    std::string refusal(const char* verb, size_t bytes) const {
        return refusal_text(verb, bytes, context_->device.currentAllocatedSize,
                            context_->device.recommendedMaxWorkingSetSize);
    }

    std::shared_ptr<MetalPipeline> build(const std::string& kernel) const {
        MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
        descriptor.label = ns_string(kernel);
        descriptor.computeFunction = library_.function(kernel);
        descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth = YES;  // check_dispatch sees to it
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
        if (state.threadExecutionWidth != METAL_SIMD_WIDTH) {
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

    // Buffers keep Metal's hazard tracking, which orders the command buffers that share them; within a concurrent
    // encoder it does not act, and the recording's barriers do.
    void commit(const MetalRecording& work) {
        context_->residency.commit();
        id<MTLCommandBuffer> command_buffer = [context_->queue commandBufferWithDescriptor:descriptor_];
        if (!command_buffer) throw DeviceError("Metal gave no command buffer; close other GPU programs");
        work.encode(command_buffer);
        [command_buffer addCompletedHandler:on_completed_];
        [command_buffer commit];
    }

    const std::shared_ptr<Context> context_;
    const KernelLibrary library_;
    MTLCommandBufferDescriptor* descriptor_;
    MTLCommandBufferHandler on_completed_;
    std::mutex mutex_;
    std::map<std::string, std::shared_ptr<MetalPipeline>> pipelines_;
};

id<MTLDevice> select_device() {
    // The default device needs a process linked with CoreGraphics; the list does not.
    id<MTLDevice> device = MTLCreateSystemDefaultDevice();
    if (!device) device = MTLCopyAllDevices().firstObject;
    if (!device) {
        throw DeviceError("no Metal device: this Mac gives none to this process; it takes an Apple Silicon Mac and a "
                          "process that may use the GPU (not every virtual machine or sandbox does)");
    }
    return device;
}

}  // namespace

std::unique_ptr<Device> open_device(const DeviceOptions& options) {
    std::unique_ptr<Device> result;
    guarded([&] {
        id<MTLDevice> device = select_device();
        id<MTLCommandQueue> queue = [device newCommandQueue];
        if (!queue) throw DeviceError("Metal gave no command queue on " + text(device.name));
        queue.label = @"zincmetal";
        result = std::make_unique<MetalDevice>(device, queue, options.kernel_folder);
    });
    return result;
}

}  // namespace zinc
