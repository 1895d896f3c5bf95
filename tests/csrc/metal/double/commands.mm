// Queues, command buffers and encoders, with the order in which Metal wants their methods called.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "conditions.h"
#include "foundation.h"
#include "objects.h"
#include "rules.h"
#include "runtime.h"

using namespace metal_double;

NSErrorDomain const MTLCommandBufferErrorDomain = @"MTLCommandBufferErrorDomain";
NSErrorUserInfoKey const MTLCommandBufferEncoderInfoErrorKey = @"MTLCommandBufferEncoderInfoErrorKey";

namespace metal_double {

class Timeline : public std::enable_shared_from_this<Timeline> {
  public:
    // The command buffer is kept until it has ended.
    void add(DoubleCommandBuffer* buffer) {
        const std::lock_guard lock(mutex_);
        if (pending_.empty() && !started_) {
            started_ = true;
            std::thread([self = shared_from_this()] { self->run(); }).detach();
        }
        busy_.push_back(std::make_unique<Busy>());
        pending_.push_back(buffer);
        if (pending_.size() + running_ > MAX_COMMAND_BUFFERS)
            broken("queue-full", "more than %lu command buffers of a queue have not ended", MAX_COMMAND_BUFFERS);
        changed_.notify_all();
    }

    void close() {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        changed_.notify_all();
    }

  private:
    void run() {
        Runner runner;
        for (;;) {
            std::unique_ptr<Busy> busy;
            {
                std::unique_lock lock(mutex_);
                running_ = 0;
                changed_.wait(lock, [this] { return closed_ || !pending_.empty(); });
                if (pending_.empty()) return;
                busy = std::move(busy_.front());
                busy_.pop_front();
                running_ = 1;
            }
            end_one(runner);
        }
    }

    void end_one(Runner& runner) {
        @autoreleasepool {
            DoubleCommandBuffer* buffer;
            {
                const std::lock_guard lock(mutex_);
                buffer = pending_.front();
                pending_.pop_front();
            }
            [buffer runOn:runner];
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<DoubleCommandBuffer*> pending_;
    std::deque<std::unique_ptr<Busy>> busy_;
    size_t running_ = 0;
    bool started_ = false, closed_ = false;
};

// What a capture is of.
static __unsafe_unretained id capturing;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace metal_double

// ---- queues

@implementation DoubleQueue
@synthesize label;

- (instancetype)init {
    timeline = std::make_shared<Timeline>();
    return self;
}
- (void)dealloc {
    timeline->close();
}
- (id<MTLCommandBuffer>)commandBuffer {
    MTLCommandBufferDescriptor* descriptor = [[MTLCommandBufferDescriptor alloc] init];
    return [self commandBufferWithDescriptor:descriptor];
}
- (id<MTLCommandBuffer>)commandBufferWithDescriptor:(MTLCommandBufferDescriptor*)descriptor {
    if (is_due("command_buffer")) return nil;
    if (capturing == self) count(&Totals::captured);
    DoubleCommandBuffer* buffer = [[DoubleCommandBuffer alloc] init];
    buffer.queue = self;
    buffer.retainedReferences = descriptor.retainedReferences;
    buffer->options = descriptor.errorOptions;
    return buffer;
}
- (void)addResidencySet:(id<MTLResidencySet>)set {
    need_macos(15.0, "addResidencySet:");
    residency.push_back(static_cast<DoubleResidencySet*>(set));
}
- (void)removeResidencySet:(id<MTLResidencySet>)set {
    const auto found = std::find(residency.begin(), residency.end(), set);
    if (found == residency.end()) broken("residency", "a set is removed from a queue that does not have it");
    residency.erase(found);
}
@end

// ---- captures

@implementation MTLCaptureDescriptor
@end

@implementation MTLCaptureManager {
    NSURL* target;
}
+ (MTLCaptureManager*)sharedCaptureManager {
    return [[MTLCaptureManager alloc] init];
}
- (BOOL)isCapturing {
    return capturing != nil;
}
- (BOOL)supportsDestination:(MTLCaptureDestination)destination {
    return destination == MTLCaptureDestinationGPUTraceDocument && condition("capture") != "none";
}
- (BOOL)startCaptureWithDescriptor:(MTLCaptureDescriptor*)descriptor error:(NSError* __autoreleasing*)error {
    if (capturing) broken("capture", "a capture begins while there is one");
    if (![self supportsDestination:descriptor.destination]) broken("capture", "a capture that is not supported");
    const std::string path = text(descriptor.outputURL.path);
    if (!path.ends_with(".gputrace") || std::filesystem::exists(path)) {
        if (error) *error = metal_double::error(@"MTLCaptureErrorDomain", 3, "Invalid descriptor");
        return NO;
    }
    std::ofstream(path) << "metal double trace\n";
    capturing = descriptor.captureObject;
    return YES;
}
- (void)stopCapture {
    if (!capturing) broken("capture", "a capture ends that did not begin");
    capturing = nil;
}
@end

// ---- command buffers

@implementation MTLCommandBufferDescriptor
- (instancetype)init {
    self.retainedReferences = YES;
    return self;
}
@end

@interface DoubleEncoderInfo : NSObject <MTLCommandBufferEncoderInfo>
@property(readwrite, copy, nonatomic) NSString* label;
@property(readwrite, nonatomic) MTLCommandEncoderErrorState errorState;
@end
@implementation DoubleEncoderInfo
@end

// What macOS says of each code. 3: the driver's word for a command buffer that another one took down.
static NSString* words_of(NSInteger code) {
    static const std::map<NSInteger, const char*> words = {
        {1, "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"},
        {2, "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"},
        {3, "Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault)"},
        {4, "Ignored (for causing prior/excessive GPU errors) "
            "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"},
        {8, "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"}};
    const auto found = words.find(code);
    return string(found == words.end() ? "code " + std::to_string(code) : found->second);
}

// The driver's own errors, which come under Metal's codes for other things too.
static const std::map<std::string, std::pair<NSInteger, const char*>> DRIVER = {
    {"victim",
     {1, "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"}},
    {"display", {1, "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"}},
    {"display15", {14, "Internal Error (0000000e:Internal Error)"}},
    {"ignored",
     {1, "Ignored (for causing prior/excessive GPU errors) "
         "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"}},
    {"timeout", {1, "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"}},
    {"memory", {1, "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"}}};

// The rule that a kernel's failure breaks: the fibres say it in words.
static const char* rule_of(const std::string& failure) {
    if (failure.find("of threadgroup memory") != std::string::npos) return "threadgroup-memory";
    return failure.find("no barrier between dispatch") != std::string::npos ? "missing-barrier" : "kernel";
}

@implementation DoubleCommandBuffer {
    std::mutex mutex;
    std::condition_variable changed;
}
@synthesize label;

- (id<MTLCommandQueue>)commandQueue {
    return self.queue;
}

- (void)checkOpen:(const char*)what {
    if (self.status >= MTLCommandBufferStatusCommitted) broken("after-commit", "%s a committed command buffer", what);
}

- (id<MTLComputeCommandEncoder>)computeCommandEncoder {
    return [self computeCommandEncoderWithDispatchType:MTLDispatchTypeSerial];
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoderWithDispatchType:(MTLDispatchType)type {
    [self checkOpen:"an encoder of"];
    if (open_encoder) broken("two-encoders", "an encoder begins before the one before it ended");
    if (is_due("encoder")) return nil;
    DoubleEncoder* encoder = [[DoubleEncoder alloc] initWithCommandBuffer:self type:type];
    open_encoder = encoder;
    count(&Totals::encoders);
    return encoder;
}

- (id<MTLBlitCommandEncoder>)blitCommandEncoder {
    [self checkOpen:"an encoder of"];
    if (open_encoder) broken("two-encoders", "an encoder begins before the one before it ended");
    if (is_due("encoder")) return nil;
    DoubleCopier* copier = [[DoubleCopier alloc] initWithCommandBuffer:self];
    open_encoder = copier;
    count(&Totals::encoders);
    return copier;
}

- (void)addCompletedHandler:(MTLCommandBufferHandler)block {
    [self checkOpen:"a completion handler for"];
    handlers.push_back(block);
}

- (void)use:(id)object in:(std::set<const void*>&)set {
    if (set.insert((__bridge const void*)object).second && self.retainedReferences) retained.push_back(object);
}

// Every object that the command buffer uses is still there.
- (void)checkAlive {
    for (const auto* set : {&buffers, &pipelines})
        for (const void* object : *set)
            if (!metal_double_is_live(object))
                broken("resource-lifetime", "a command buffer uses a %s that is gone, and did not retain it",
                       set == &buffers ? "buffer" : "pipeline");
    for (const void* buffer : buffers) [(__bridge DoubleBuffer*)buffer checkMapped];
}

- (void)commit {
    [self checkOpen:"commit of"];
    if (open_encoder) broken("commit-before-end", "a command buffer is committed before endEncoding of its encoder");
    [self checkAlive];
    for (DoubleResidencySet* set : self.queue->residency)
        if (set.hasStagedChanges)
            broken("residency",
                   "a command buffer is committed while its queue's residency set has changes that are not");
    for (const void* buffer : buffers) ((__bridge DoubleBuffer*)buffer)->in_flight++;
    self.status = MTLCommandBufferStatusCommitted;
    count(&Totals::command_buffers);
    self.queue->timeline->add(self);
}

- (void)waitUntilCompleted {
    if (self.status < MTLCommandBufferStatusCommitted)
        broken("wait-before-commit", "waitUntilCompleted of a command buffer that is not committed");
    std::unique_lock lock(mutex);
    changed.wait(lock, [self] { return self.status >= MTLCommandBufferStatusCompleted; });
}

- (NSError*)failureWithCode:(const std::string&)name {
    const auto driver = DRIVER.find(name);
    const NSInteger code = driver == DRIVER.end() ? std::stol(name) : driver->second.first;
    const std::string words = driver == DRIVER.end() ? text(words_of(code)) : driver->second.second;
    if (!(options & MTLCommandBufferErrorOptionEncoderExecutionStatus))
        return error(MTLCommandBufferErrorDomain, code, words);
    std::vector<id> infos;  // the last encoder is to blame
    for (const std::string& name : encoder_labels) {
        DoubleEncoderInfo* info = [[DoubleEncoderInfo alloc] init];
        info.label = string(name);
        const bool last = infos.size() + 1 == encoder_labels.size();
        info.errorState = last ? MTLCommandEncoderErrorStateFaulted : MTLCommandEncoderErrorStateCompleted;
        infos.push_back(info);
    }
    return error(MTLCommandBufferErrorDomain, code, words, MTLCommandBufferEncoderInfoErrorKey, array(infos));
}

- (void)runOn:(Runner&)runner {
    if (is_due("hang")) {  // never ends: it and what it uses stay as they are
        (void)(__bridge_retained void*)self;
        return;
    }
    if (const auto slow = condition("slow")) std::this_thread::sleep_for(std::chrono::milliseconds(std::stol(*slow)));
    static double gpu_clock = 0;  // of the one queue that has a pace
    const auto pace = condition("pace");
    self.GPUStartTime = pace ? std::max(now(), gpu_clock) : now();
    std::string code;
    if (is_due("gpu", &code)) {
        self.error = [self failureWithCode:code];
    } else {
        [self checkAlive];
        const std::string failure = runner.run(work);
        if (!failure.empty()) broken(rule_of(failure), "%s", failure.c_str());
    }
    self.GPUEndTime = now();
    if (pace) {
        gpu_clock = self.GPUStartTime + std::stod(*pace) * 1e-6 * double(work.size());
        self.GPUEndTime = gpu_clock;
        note_longest(self.GPUEndTime - self.GPUStartTime);
    }
    [self end];
}

- (void)end {
    [self checkAlive];
    for (const void* buffer : buffers) ((__bridge DoubleBuffer*)buffer)->in_flight--;
    {
        const std::lock_guard lock(mutex);
        self.status = self.error ? MTLCommandBufferStatusError : MTLCommandBufferStatusCompleted;
        changed.notify_all();
    }
    for (MTLCommandBufferHandler handler : handlers) handler(self);
    handlers.clear();
}
@end

// ---- encoders

namespace {

struct Argument {
    const void* buffer = nullptr;  // a DoubleBuffer, not retained
    NSUInteger offset = 0;
    bool set = false;
};

// What a dispatch of a concurrent encoder reads and writes, until the next barrier.
struct Access {
    const void* place;
    bool writes;
    std::string kernel;
};

}  // namespace

@implementation DoubleEncoder {
    DoubleCommandBuffer* commands;
    MTLDispatchType type;
    bool ended, barrier;
    __unsafe_unretained DoublePipeline* pipeline;
    Argument arguments[BUFFER_INDEXES];
    std::vector<uint8_t> bytes[BUFFER_INDEXES];
    std::vector<Access> unordered;
}
@synthesize label;

- (instancetype)initWithCommandBuffer:(DoubleCommandBuffer*)buffer type:(MTLDispatchType)dispatch_type {
    commands = buffer;
    type = dispatch_type;
    barrier = true;  // encoders of a command buffer are ordered by what they share, which here is taken as all
    return self;
}
- (void)dealloc {
    if (!ended) broken("encoder-not-ended", "an encoder goes without endEncoding");
}
- (id<MTLDevice>)device {
    return commands.queue.device;
}
- (MTLDispatchType)dispatchType {
    return type;
}
- (void)checkOpen:(const char*)what {
    if (ended) broken("after-end-encoding", "%s an encoder that has ended", what);
}
- (void)endEncoding {
    [self checkOpen:"endEncoding of"];
    ended = true;
    commands->open_encoder = nil;
    commands->encoder_labels.push_back(text(self.label));
}

- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
    [self checkOpen:"setComputePipelineState: of"];
    if (!state) broken("no-pipeline", "setComputePipelineState: of nil");
    pipeline = static_cast<DoublePipeline*>(state);
    if (pipeline.device != commands.queue.device) broken("other-device", "a pipeline of another device");
    [commands use:state in:commands->pipelines];
}

- (Argument&)argument:(NSUInteger)index {
    if (index >= BUFFER_INDEXES)
        broken("buffer-index", "index %lu; the argument table has %lu buffers", index, BUFFER_INDEXES);
    return arguments[index];
}

- (void)setBytes:(const void*)from length:(NSUInteger)length atIndex:(NSUInteger)index {
    [self checkOpen:"setBytes: of"];
    if (!from || length == 0) broken("set-bytes", "no bytes for index %lu", index);
    if (length > MAX_SET_BYTES) broken("set-bytes", "%lu bytes; at most %lu can be set", length, MAX_SET_BYTES);
    [self argument:index] = {nullptr, 0, true};
    const auto* begin = static_cast<const uint8_t*>(from);
    bytes[index].assign(begin, begin + length);
}

- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
    [self checkOpen:"setBuffer: of"];
    Argument& argument = [self argument:index];
    argument = {};
    if (!buffer) return;
    if (buffer.device != commands.queue.device) broken("other-device", "a buffer of another device");
    argument = {(__bridge const void*)buffer, 0, true};
    [self setBufferOffset:offset atIndex:index];
}

- (void)setBufferOffset:(NSUInteger)offset atIndex:(NSUInteger)index {
    [self checkOpen:"setBufferOffset: of"];
    Argument& argument = [self argument:index];
    if (!argument.buffer) broken("buffer-offset", "index %lu holds no buffer whose offset could be set", index);
    auto* buffer = (__bridge DoubleBuffer*)argument.buffer;
    if (offset >= buffer.length)
        broken("buffer-offset", "offset %lu into a buffer of %lu bytes", offset, buffer.length);
    argument.offset = offset;
}

- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
    [self checkOpen:"memoryBarrierWithScope: of"];
    if (!(scope & MTLBarrierScopeBuffers)) broken("barrier-scope", "a barrier that is not for buffers");
    barrier = true;
    unordered.clear();
    count(&Totals::barriers);
}

- (void)dispatchThreadgroups:(MTLSize)grid threadsPerThreadgroup:(MTLSize)threads {
    [self checkOpen:"a dispatch of"];
    if (!pipeline) broken("no-pipeline", "a dispatch without a pipeline");
    Work work;
    work.kernel = pipeline->kernel;
    [self checkThreads:threads grid:grid];
    work.threads = uint32_t(threads.width);
    work.grid[0] = uint32_t(grid.width), work.grid[1] = uint32_t(grid.height), work.grid[2] = uint32_t(grid.depth);
    [self bindParameters:work];
    for (uint32_t i = 1; i <= work.kernel->n_buffers; i++) [self bind:i of:work];
    if (type == MTLDispatchTypeConcurrent) [self checkOrder:work];
    work.after_barrier = std::exchange(barrier, false) || type == MTLDispatchTypeSerial;
    commands->work.push_back(std::move(work));
    count(&Totals::dispatches);
}

- (void)checkThreads:(MTLSize)threads grid:(MTLSize)grid {
    const char* kernel = pipeline->kernel->name;
    const NSUInteger total = threads.width * threads.height * threads.depth;
    if (total == 0 || grid.width * grid.height * grid.depth == 0)
        broken("grid", "%s: an empty grid or threadgroup", kernel);
    if (total > pipeline.maxTotalThreadsPerThreadgroup)
        broken("threads", "%s: %lu threads in a threadgroup; its pipeline takes %lu", kernel, total,
               pipeline.maxTotalThreadsPerThreadgroup);
    if (pipeline->whole_simdgroups && total % WIDTH)
        broken("threads", "%s: %lu threads, but its pipeline was promised whole simdgroups", kernel, total);
    if (threads.height != 1 || threads.depth != 1) broken("threads", "%s: kernels here have one dimension", kernel);
}

- (void)bindParameters:(Work&)work {
    if (!arguments[0].set || arguments[0].buffer) broken("unbound", "%s: no bytes at index 0", work.kernel->name);
    if (bytes[0].size() < work.kernel->params_bytes)
        broken("argument-size", "%s: index 0 holds %zu bytes of a struct of %u", work.kernel->name, bytes[0].size(),
               work.kernel->params_bytes);
    work.params = bytes[0];
}

- (void)bind:(uint32_t)index of:(Work&)work {
    const Argument& argument = arguments[index];
    const zinc::msl::BufferSignature& signature = work.kernel->buffers[index - 1];
    if (!argument.buffer) broken("unbound", "%s: no buffer at index %u", work.kernel->name, index);
    if (!metal_double_is_live(argument.buffer))
        broken("resource-lifetime", "%s: the buffer at index %u is gone", work.kernel->name, index);
    auto* buffer = (__bridge DoubleBuffer*)argument.buffer;
    // In the device address space: the alignment of the type. (In the constant one, macOS asks for more.)
    if (argument.offset % signature.alignment)
        broken("offset-alignment", "%s: offset %lu at index %u, where the type asks for %u", work.kernel->name,
               argument.offset, index, signature.alignment);
    if (buffer.length - argument.offset < signature.element_bytes)
        broken("argument-size", "%s: %lu bytes at index %u, less than one element of %u", work.kernel->name,
               buffer.length - argument.offset, index, signature.element_bytes);
    if (buffer.hazardTrackingMode != MTLHazardTrackingModeTracked)
        broken("untracked", "%s: the buffer at index %u is untracked, and no fence orders command buffers",
               work.kernel->name, index);
    work.buffers.push_back(buffer->memory + argument.offset);
    work.bytes.push_back(buffer.length - argument.offset);
    [commands use:buffer in:commands->buffers];
}

// Metal is not told how far a kernel reaches: what begins at one place is taken to be the same. (The checked build
// follows every access.)
- (void)checkOrder:(const Work&)work {
    std::vector<Access> mine;
    for (uint32_t i = 0; i < work.kernel->n_buffers; i++)
        mine.push_back({work.buffers[i], work.kernel->buffers[i].writable, work.kernel->name});
    for (const Access& before : unordered)
        for (const Access& access : mine)
            if (before.place == access.place && (before.writes || access.writes))
                broken("missing-barrier", "%s and %s share a buffer that one of them writes, with no barrier between",
                       before.kernel.c_str(), access.kernel.c_str());
    unordered.insert(unordered.end(), mine.begin(), mine.end());
}
@end

@implementation DoubleCopier {
    DoubleCommandBuffer* commands;
    bool ended;
}
@synthesize label;

- (instancetype)initWithCommandBuffer:(DoubleCommandBuffer*)buffer {
    commands = buffer;
    return self;
}
- (void)dealloc {
    if (!ended) broken("encoder-not-ended", "an encoder goes without endEncoding");
}
- (id<MTLDevice>)device {
    return commands.queue.device;
}
- (void)checkOpen:(const char*)what {
    if (ended) broken("after-end-encoding", "%s an encoder that has ended", what);
}
- (void)endEncoding {
    [self checkOpen:"endEncoding of"];
    ended = true;
    commands->open_encoder = nil;
    commands->encoder_labels.push_back(text(self.label));
}

- (uint8_t*)use:(id<MTLBuffer>)any from:(NSUInteger)offset size:(NSUInteger)size {
    if (!any) broken("copy", "a copy of no buffer");
    auto* buffer = static_cast<DoubleBuffer*>(any);
    if (buffer.device != commands.queue.device) broken("other-device", "a buffer of another device");
    if (offset % 4 || size % 4 || size == 0) broken("copy", "%lu bytes at %lu: no whole words", size, offset);
    if (size > buffer.length || offset > buffer.length - size)
        broken("copy", "%lu bytes at %lu of a buffer of %lu", size, offset, buffer.length);
    if (buffer.hazardTrackingMode != MTLHazardTrackingModeTracked)
        broken("untracked", "a copy of an untracked buffer, and no fence orders command buffers");
    [commands use:buffer in:commands->buffers];
    return buffer->memory + offset;
}

- (void)copyFromBuffer:(id<MTLBuffer>)source
          sourceOffset:(NSUInteger)from
              toBuffer:(id<MTLBuffer>)destination
     destinationOffset:(NSUInteger)offset
                  size:(NSUInteger)size {
    [self checkOpen:"a copy of"];
    Work work;
    work.buffers = {[self use:source from:from size:size], [self use:destination from:offset size:size]};
    work.bytes = {size, size};
    work.after_barrier = true;
    if (source == destination && from < offset + size && offset < from + size)
        broken("copy", "bytes %lu and %lu of one buffer overlap", from, offset);
    commands->work.push_back(std::move(work));
}
@end
