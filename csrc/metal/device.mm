// The Metal backend: with the headers in metal/ the only file that sees Metal. It is Objective-C++ under ARC. There ARC
// also releases when a C++ exception unwinds (-fobjc-arc-exceptions is on by default).
#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <unistd.h>

#include <array>
#include <mutex>

#include "core/device.h"
#include "metal/capture.h"
#include "metal/context.h"
#include "metal/objc.h"
#include "metal/pipelines.h"
#include "metal/recording.h"
#include "metal/portable/errors.h"
#include "metal/portable/check_arguments.h"
#include "metal/portable/limits.h"

namespace zinc {
namespace {

// Tracking orders command buffers of one queue that share a buffer. So a step follows the one before it without the
// host. It is Metal's default for buffers that a device allocates. It is set here because the steps depend on it.
constexpr MTLResourceOptions TRACKED = MTLResourceHazardTrackingModeTracked;

// ---------------------------------------------------------------------------------------------- completion

Failure failure_of(id<MTLCommandBuffer> command_buffer) {
    if (command_buffer.status != MTLCommandBufferStatusError) return {};
    NSError* error = command_buffer.error;
    std::vector<EncoderEnd> ends;
    NSArray<id<MTLCommandBufferEncoderInfo>>* encoders = error.userInfo[MTLCommandBufferEncoderInfoErrorKey];
    for (id<MTLCommandBufferEncoderInfo> encoder in encoders) {
        ends.push_back({text(encoder.label), static_cast<long>(encoder.errorState)});
    }
    const bool domain_is_metal = [error.domain isEqualToString:MTLCommandBufferErrorDomain];
    return command_buffer_failure(domain_is_metal, error.code, describe(error), ends);
}

// Runs on a thread of Metal's. An exception there would end the process.
void completed(id<MTLCommandBuffer> command_buffer, InFlight& in_flight, uint32_t place) noexcept {
    double start = 0, end = 0;
    Failure failure;
    try {
        guarded([&] {
            failure = failure_of(command_buffer);
            start = command_buffer.GPUStartTime;
            end = command_buffer.GPUEndTime;
        });
    } catch (...) {
        failure.text = "GPU error";  // short enough to need no allocation
    }
    in_flight.finished(place, start, end, failure);
}

// ---------------------------------------------------------------------------------------------- device

class MetalDevice final : public Device {
  public:
    MetalDevice(std::shared_ptr<Context> shared, std::string watchdog)
        : context_(std::move(shared)), queue_(std::make_shared<Queue>(context_)), watchdog_(std::move(watchdog)) {
        descriptor_ = [[MTLCommandBufferDescriptor alloc] init];
        descriptor_.retainedReferences = NO;  // recordings keep everything alive, see ~MetalRecording
        if (queue_->debug) descriptor_.errorOptions = MTLCommandBufferErrorOptionEncoderExecutionStatus;
        for (uint32_t place = 0; place < InFlight::limit; ++place) {
            const std::shared_ptr<InFlight> in_flight = queue_->in_flight;
            on_completed_[place] = ^(id<MTLCommandBuffer> command_buffer) {
              completed(command_buffer, *in_flight, place);
            };
        }
    }

    ~MetalDevice() override {
        if (!queue_->process.is_another()) {
            if (!queue_->in_flight->idle()) new auto(std::move(copied_));  // a lost GPU may still write to them
            return;
        }
        new auto(std::move(copied_));
        leave_behind(queue_);
        leave_behind(descriptor_);
        for (MTLCommandBufferHandler handler : on_completed_) leave_behind(handler);
    }

    DeviceInfo info() const override {
        DeviceInfo info;
        guarded([&] {
            id<MTLDevice> device = context_->device;
            info.name = text(device.name);
            info.backend = "metal";
            info.unified_memory = device.hasUnifiedMemory;
            info.working_set_bytes = device.recommendedMaxWorkingSetSize;
            info.allocated_bytes = device.currentAllocatedSize;
            info.max_buffer_bytes = device.maxBufferLength;
            info.max_threadgroup_bytes = static_cast<uint32_t>(device.maxThreadgroupMemoryLength);
            info.page_bytes = static_cast<uint32_t>(getpagesize());
            info.asynchronous = true;
            info.features = features();
        });
        return info;
    }

    // The host sees all memory: its storage mode is shared.
    std::shared_ptr<Buffer> alloc(size_t bytes, bool) override {
        queue_->in_flight->check();
        release_copied();
        std::shared_ptr<Buffer> result;
        guarded([&] {
            check_length(bytes, context_->device.maxBufferLength);
            id<MTLBuffer> buffer = [context_->device newBufferWithLength:bytes
                                                                 options:TRACKED | MTLResourceStorageModeShared];
            if (!buffer) throw OutOfMemoryError(refusal("allocate", bytes));
            result = std::make_shared<MetalBuffer>(queue_, buffer, buffer.contents);
        });
        return result;
    }

    std::shared_ptr<Buffer> wrap(void* pointer, size_t bytes) override {
        queue_->in_flight->check();
        check_wrap(pointer, bytes, static_cast<uint64_t>(getpagesize()), context_->device.maxBufferLength);
        std::shared_ptr<Buffer> result;
        guarded([&] {
            id<MTLBuffer> buffer = [context_->device newBufferWithBytesNoCopy:pointer
                                                                       length:bytes
                                                                      options:TRACKED | MTLResourceStorageModeShared
                                                                  deallocator:nil];
            if (!buffer) throw OutOfMemoryError(refusal("wrap", bytes));
            result = std::make_shared<MetalBuffer>(queue_, buffer, pointer);
        });
        return result;
    }

    std::shared_ptr<Pipeline> pipeline(const std::string& kernel) override {
        queue_->in_flight->check();
        return context_->pipelines.get(kernel);
    }

    void prepare(const std::vector<std::string>& kernels) override {
        queue_->in_flight->check();
        context_->pipelines.prepare(kernels);
    }

    std::vector<std::string> kernel_names() const override { return context_->pipelines.names(); }

    std::unique_ptr<Recording> record(std::vector<Dispatch> dispatches) override {
        queue_->in_flight->check();
        for (size_t i = 0; i < dispatches.size(); ++i) {
            widen(dispatches[i]);
            check(dispatches[i], i);
        }
        return std::make_unique<MetalRecording>(queue_, std::move(dispatches));
    }

    // Work that fails or is interrupted ends before the exception leaves: none of it is in flight then.
    uint64_t submit(Recording& recording, const Poll& poll) override {
        auto* work = dynamic_cast<MetalRecording*>(&recording);
        if (!work || work->queue != queue_) throw DeviceError("the recording belongs to another device");
        const Context::Use use(*context_);
        release_copied();
        const std::lock_guard lock(submit_mutex_);  // tickets are given in the order of commits
        const uint64_t ticket = queue_->in_flight->begin(poll);
        try {
            remember(ticket, work->pieces);
            guarded([&] { context_->residency.commit(); });
            submit_pieces(*work, poll);
        } catch (...) {
            queue_->in_flight->drop();
            work->pieces->learn(*queue_->in_flight);
            throw;
        }
        return ticket;
    }

    RunTimes wait(uint64_t ticket, const Poll& poll) override {
        Context::Use use(*context_);
        const auto pieces = remembered(ticket);
        try {
            const RunTimes times = queue_->in_flight->wait(ticket, poll);
            if (pieces) pieces->learn(*queue_->in_flight);
            use.worked();
            return times;
        } catch (...) {
            if (pieces) pieces->learn(*queue_->in_flight);
            throw;
        }
    }

    void copy(const std::vector<Copy>& copies) override {
        for (const Copy& c : copies)
            if (!is_ours(c.to.get()) || !is_ours(c.from.get()))
                throw DeviceError("a copy uses a buffer of another device");
        const Context::Use use(*context_);
        release_copied();
        const std::lock_guard lock(submit_mutex_);
        queue_->in_flight->begin({}, false);
        guarded([&] { context_->residency.commit(); });
        const uint64_t number = queue_->in_flight->begin_command_buffer();
        try {
            keep_copied(number, copies);
            queue_->last_copies = number;
            guarded([&] {
                commit(number, [&](id<MTLCommandBuffer> commands) {
                    MetalCopier copier(commands);
                    for (const Copy& c : copies) copier.copy(c);
                });
            });
        } catch (...) {
            queue_->in_flight->abandon(number);
            throw;
        }
    }

    bool captures() const override { return true; }
    void start_capture(const std::string& path) override {
        guarded([&] { start_capture_of(queue_->metal, path); });
    }
    void stop_capture() override {
        guarded([] { stop_capture_of_any(); });
    }

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
        list.emplace_back("kernels", context_->pipelines.library().summary());
        list.emplace_back("tensor operations", yes_no(context_->pipelines.library().has_cooperative_kernels()));
        list.emplace_back("kernel archive", context_->pipelines.archive_state());
        if (queue_->debug) list.emplace_back("debug", "one encoder per dispatch");
        list.emplace_back("watchdog", watchdog_);
        list.emplace_back("macOS", text(NSProcessInfo.processInfo.operatingSystemVersionString));
        for (const auto& [what, words] : context_->pipelines.library().words()) list.emplace_back(what, words);
        for (const auto& [what, time] : context_->times.list()) list.emplace_back(what, time);
        return list;
    }

    std::string refusal(const char* verb, size_t bytes) const {
        return refusal_text(verb, bytes, context_->device.currentAllocatedSize,
                            context_->device.recommendedMaxWorkingSetSize);
    }

    // A kernel whose registers allow fewer threads than are launched is compiled again to use fewer registers.
    void widen(Dispatch& d) {
        if (!d.pipeline || d.threads <= d.pipeline->limits.max_threads) return;
        if (d.threads <= context_->device.maxThreadsPerThreadgroup.width)
            d.pipeline = context_->pipelines.get(d.pipeline->name, d.threads);
    }

    bool is_ours(const Buffer* buffer) const {
        const auto* own = dynamic_cast<const MetalBuffer*>(buffer);
        return own && own->queue == queue_;
    }

    void check(const Dispatch& d, size_t position) const {
        const auto* pipeline = dynamic_cast<const MetalPipeline*>(d.pipeline.get());
        check_dispatch(d, pipeline ? pipeline->arguments : std::vector<BufferArgument>(), position);
        bool ours = pipeline != nullptr;
        for (const Binding& binding : d.bindings) ours = ours && is_ours(binding.buffer.get());
        if (!ours) {
            throw DeviceError("dispatch " + std::to_string(position) + " uses a kernel or buffer of another device");
        }
    }

    // The last submissions, by ticket. Their times are known after a wait for them, and forgotten soon after.
    void remember(uint64_t ticket, const std::shared_ptr<Pieces>& pieces) {
        const std::lock_guard lock(submitted_mutex_);
        submitted_[ticket % InFlight::limit] = {ticket, pieces};
    }
    std::shared_ptr<Pieces> remembered(uint64_t ticket) {
        const std::lock_guard lock(submitted_mutex_);
        const auto& [known, pieces] = submitted_[ticket % InFlight::limit];
        return known == ticket ? pieces : nullptr;
    }

    // Command buffers do not retain the buffers that they copy. A place is used again when its command buffer has
    // ended.
    void keep_copied(uint64_t number, const std::vector<Copy>& copies) {
        const std::lock_guard lock(copied_mutex_);
        copied_[number % InFlight::limit] = {number, copies};
    }

    // Buffers are released after the lock: that of a mapped file waits for the interpreter's lock.
    void release_copied() {
        std::array<std::vector<Copy>, InFlight::limit> ended;
        const std::lock_guard lock(copied_mutex_);
        for (uint32_t place = 0; place < InFlight::limit; ++place) {
            InFlight::Ended times{};
            auto& [number, copies] = copied_[place];
            if (!copies.empty() && queue_->in_flight->state_of(number, times) != InFlight::State::running)
                ended[place].swap(copies);
        }
    }

    // One command buffer after another. The poll is called between them.
    void submit_pieces(MetalRecording& work, const Poll& poll) {
        InFlight& in_flight = *queue_->in_flight;
        size_t begin = 0;
        do {
            if (begin > 0 && poll) poll();
            const uint64_t number = in_flight.begin_command_buffer(poll);
            work.pieces->learn(in_flight);
            const size_t end = work.pieces->end_of(begin);
            try {
                guarded(
                    [&] { commit(number, [&](id<MTLCommandBuffer> commands) { work.encode(commands, begin, end); }); });
            } catch (...) {
                in_flight.abandon(number);
                throw;
            }
            work.pieces->committed(begin, end, number);
            begin = end;
        } while (begin < work.pieces->size());
    }

    // Within a concurrent encoder hazard tracking does not act, and the recording's barriers do.
    template <class Encode>
    void commit(uint64_t number, const Encode& encode) {
        id<MTLCommandBuffer> command_buffer = [queue_->metal commandBufferWithDescriptor:descriptor_];
        if (!command_buffer) throw DeviceError("Metal gave no command buffer; close other GPU programs");
        encode(command_buffer);
        [command_buffer addCompletedHandler:on_completed_[number % InFlight::limit]];
        [command_buffer commit];
    }

    const std::shared_ptr<Context> context_;
    const std::shared_ptr<Queue> queue_;
    const std::string watchdog_;
    MTLCommandBufferDescriptor* descriptor_;
    std::array<MTLCommandBufferHandler, InFlight::limit> on_completed_;  // made once, so that a commit allocates none
    std::mutex submit_mutex_, submitted_mutex_, copied_mutex_;
    std::array<std::pair<uint64_t, std::shared_ptr<Pieces>>, InFlight::limit> submitted_;
    std::array<std::pair<uint64_t, std::vector<Copy>>, InFlight::limit> copied_;
};

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

// A fork does not copy the state that Metal and its compiler have in a process. Opening a device in the child may hang.
void check_fork() {
    static const OpeningProcess first;
    if (first.is_another())
        throw DeviceError("Metal was used before a fork, and cannot be used in the child; start the child anew "
                          "(multiprocessing: the method \"spawn\"), or load models in children only");
}

// The facts of the first device of the process.
const std::string& watchdog_at_first() {
    static const std::string words = watchdog_words(driver_is_loaded());
    return words;
}

}  // namespace

std::unique_ptr<Device> open_device(const DeviceOptions& options) {
    check_fork();
    std::unique_ptr<Device> result;
    guarded([&] {
        const Stopwatch opening;
        const std::string& watchdog = watchdog_at_first();  // before Metal is called
        const auto context = Context::of(select_device(), KernelChoice::of(options.kernel_folder), opening);
        result = std::make_unique<MetalDevice>(context, watchdog);
    });
    return result;
}

}  // namespace zinc
