// Programs that keep every rule, those about memory and objects, and what runs one.
#include "breaking.h"

#include <pthread/qos.h>
#include <sys/wait.h>

#include <cstring>
#include <optional>
#include <thread>

#include "execute.h"
#include "rules.h"
#include "runtime.h"

extern "C" {
void objc_release(void* object);
void* objc_autorelease(void* object);
void* objc_retain(void* object);
}

namespace breaking {

const Programs KEPT = {
    {"kept/a sum",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         t.run();
         for (NSUInteger i = 0; i < N; i++) require(t.floats(t.out)[i] == float(i) + 1, "out = a + b");
         require(t.commands.status == MTLCommandBufferStatusCompleted, "completed");
         require(t.commands.GPUEndTime >= t.commands.GPUStartTime && t.commands.GPUStartTime > 0, "times");
     }},
    {"kept/a barrier between what depends",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         [t.encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
         t.bind(t.out, t.b, t.a);
         t.dispatch();
         t.run();
         require(t.floats(t.a)[5] == 7, "a = a + b + b");
     }},
    {"kept/a serial encoder needs no barrier",
     [](Bench& t) {
         t.begin(MTLDispatchTypeSerial);
         t.bind();
         t.dispatch();
         t.bind(t.out, t.b, t.a);
         t.dispatch();
         t.run();
         require(t.floats(t.a)[5] == 7, "a = a + b + b");
     }},
    {"kept/two encoders after each other",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         t.end();
         t.encoder = [t.commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
         t.bind(t.out, t.b, t.a);
         t.dispatch();
         t.run();
         require(t.floats(t.a)[5] == 7, "a = a + b + b");
     }},
    {"kept/a copy, and a sum of it",
     [](Bench& t) {
         t.commands = [t.queue commandBuffer];
         id<MTLBlitCommandEncoder> copier = [t.commands blitCommandEncoder];
         [copier copyFromBuffer:t.a sourceOffset:16 toBuffer:t.b destinationOffset:0 size:64];
         [copier copyFromBuffer:t.b sourceOffset:0 toBuffer:t.b destinationOffset:64 size:64];
         [copier endEncoding];
         t.encoder = [t.commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
         t.bind();
         t.dispatch();
         t.run();
         require(t.floats(t.out)[0] == 4 && t.floats(t.out)[16] == 20, "a + the copy of a");
     }},
    {"kept/readers of one buffer need no order",
     [](Bench& t) {
         t.begin();
         t.bind(t.a, t.a, t.out);
         t.dispatch();
         t.other = t.buffer();
         t.bind(t.a, t.b, t.other);
         t.dispatch();
         t.run();
     }},
    {"kept/retained references keep a buffer",
     [](Bench& t) {
         t.begin(MTLDispatchTypeConcurrent, YES);
         t.bind();
         t.dispatch();
         t.out = nil;
         t.run();
     }},
    {"kept/no-copy memory and its deallocator",
     [](Bench& t) {
         static int calls = 0;
         static void* memory = pages(2);
         @autoreleasepool {
             id<MTLBuffer> buffer = [t.device newBufferWithBytesNoCopy:memory
                                                                length:2 * PAGE
                                                               options:SHARED
                                                           deallocator:^(void* pointer, NSUInteger length) {
                                                             require(pointer == memory && length == 2 * PAGE, "what");
                                                             calls++;
                                                           }];
             require(buffer.contents == memory, "no copy");
             require(calls == 0, "not before the buffer goes");
         }
         require(calls == 1, "once");
     }},
    {"kept/completion handlers run",
     [](Bench& t) {
         static int calls = 0;
         t.begin();
         t.bind();
         t.dispatch();
         [t.commands addCompletedHandler:^(id<MTLCommandBuffer> ended) {
           require(ended.status == MTLCommandBufferStatusCompleted, "ended");
           calls++;
         }];
         t.run();
         for (int i = 0; i < 1000 && calls == 0; i++) usleep(1000);
         require(calls == 1, "once");
     }},
    {"kept/a residency set",
     [](Bench& t) {
         id<MTLResidencySet> set = residency_set(t);
         [t.queue addResidencySet:set];
         [set addAllocation:t.a];
         require([set containsAllocation:t.a] && set.allocationCount == 1 && set.allocatedSize == 0, "before commit");
         [set commit];
         [set requestResidency];
         require([set containsAllocation:t.a] && set.allocationCount == 1 && set.allocatedSize >= BYTES, "after it");
         t.begin();
         t.bind();
         t.dispatch();
         t.run();
         [set removeAllocation:t.a];
         [set commit];
         [t.queue removeResidencySet:set];
         [set endResidency];
     }},
    {"kept/an archive serves what it holds",
     [](Bench& t) {
         MTLBinaryArchiveDescriptor* file = [[MTLBinaryArchiveDescriptor alloc] init];
         id<MTLBinaryArchive> archive = [t.device newBinaryArchiveWithDescriptor:file error:nil];
         MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
         descriptor.computeFunction = [t.library newFunctionWithName:@"add"];
         descriptor.binaryArchives = @[ archive ];
         const auto build = [&] {
             return [t.device newComputePipelineStateWithDescriptor:descriptor
                                                            options:MTLPipelineOptionFailOnBinaryArchiveMiss
                                                         reflection:nil
                                                              error:nil];
         };
         require(!build(), "an empty one serves nothing");
         [archive addComputePipelineFunctionsWithDescriptor:descriptor error:nil];
         require(build(), "what was added is served");
     }},
    {"kept/an activity, and a better quality of service",
     [](Bench&) {
         id<NSObject> activity =
             [NSProcessInfo.processInfo beginActivityWithOptions:NSActivityUserInitiatedAllowingIdleSystemSleep
                                                          reason:@"a test"];
         pthread_override_qos_class_end_np(
             pthread_override_qos_class_start_np(pthread_self(), QOS_CLASS_USER_INITIATED, 0));
         [NSProcessInfo.processInfo endActivity:activity];
     }},
};

void capture(const Bench& bench, const std::string& path) {
    MTLCaptureDescriptor* descriptor = [[MTLCaptureDescriptor alloc] init];
    descriptor.captureObject = bench.queue;
    descriptor.destination = MTLCaptureDestinationGPUTraceDocument;
    descriptor.outputURL = [NSURL fileURLWithPath:[NSString stringWithUTF8String:path.c_str()]];
    [MTLCaptureManager.sharedCaptureManager startCaptureWithDescriptor:descriptor error:nil];
}

const Programs BUFFERS = {
    {"no-copy-alignment/pointer", [](Bench& t) { wrap(t, static_cast<char*>(pages(2)) + 64, PAGE); }},
    {"no-copy-alignment/length", [](Bench& t) { wrap(t, pages(2), PAGE + 64); }},
    {"no-copy-storage/private", [](Bench& t) { wrap(t, pages(1), PAGE, MTLResourceStorageModePrivate); }},
    {"no-copy-memory/unmapped before",
     [](Bench& t) {
         void* memory = pages(1);
         munmap(memory, PAGE);
         wrap(t, memory, PAGE);
     }},
    {"no-copy-memory/unmapped while the buffer lives",
     [](Bench& t) {
         void* memory = pages(2);
         t.a = wrap(t, memory, 2 * PAGE);
         munmap(static_cast<char*>(memory) + PAGE, PAGE);
         t.a = nil;
     }},
    {"no-copy-memory/unmapped before it is used",
     [](Bench& t) {
         void* memory = pages(1);
         t.begin();
         t.other = wrap(t, memory, PAGE);
         t.bind(t.other, t.b, t.out);
         t.dispatch();
         munmap(memory, PAGE);
         t.run();
     }},
    {"buffer-length/zero", [](Bench& t) { t.buffer(0); }},
    {"buffer-length/more than maxBufferLength", [](Bench& t) { t.buffer(t.device.maxBufferLength + 1); }},
    {"private-contents/asked for", [](Bench& t) { (void)[t.buffer(BYTES, MTLResourceStorageModePrivate) contents]; }},
    {"resource-lifetime/a buffer that is gone at dispatch",
     [](Bench& t) {
         t.begin();
         @autoreleasepool {
             t.bind(t.a, t.b, t.buffer());
         }
         t.dispatch();
     }},
    {"resource-lifetime/a buffer that is gone at commit",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         t.out = nil;
         t.end();
         t.commit();
     }},
    {"resource-lifetime/a buffer that goes in flight",
     [](Bench& t) {
         metal_double_set("hang=1");
         t.begin();
         t.bind();
         t.dispatch();
         t.end();
         t.commit();
         t.out = nil;
     }},
    {"resource-lifetime/a pipeline that is gone at commit",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         t.add = nil;
         t.end();
         t.commit();
     }},
};

const Programs OBJECTS = {
    {"use-after-release/a message",
     [](Bench& t) {
         __unsafe_unretained id<MTLBuffer> gone;
         @autoreleasepool {
             id<MTLBuffer> buffer = t.buffer();
             gone = buffer;
         }
         (void)gone.length;
     }},
    {"use-after-release/one release too many",
     [](Bench& t) {
         void* buffer = (__bridge_retained void*)t.buffer();
         objc_release(buffer);
         objc_release(buffer);
     }},
    {"use-after-release/an autorelease too many",
     [](Bench& t) {
         @autoreleasepool {
             void* buffer = (__bridge_retained void*)t.buffer();
             objc_autorelease(buffer);
             objc_autorelease(buffer);
         }
     }},
    {"fork/a message in the child",
     [](Bench& t) {
         if (fork() == 0) (void)t.a.length;
         wait(nullptr);
         abort();
     }},
    {"fork/a release in the child",
     [](Bench& t) {
         if (fork() == 0) t.a = nil;
         wait(nullptr);
         abort();
     }},
    {"leak/a retain too many", [](Bench& t) { (void)(__bridge_retained void*)t.buffer(); }},
    {"not-an-object/any memory",
     [](Bench&) {
         alignas(16) static char memory[256];
         void* pointer = memory + 64;
         *reinterpret_cast<void**>(pointer) = (__bridge void*)NSObject.class;
         objc_retain(pointer);
     }},
    {"unrecognized-selector/a method of another class", [](Bench& t) { (void)[(id)t.a UTF8String]; }},
    {"availability/residency sets before macOS 15",
     [](Bench& t) {
         metal_double_set("macos=14.6");
         residency_set(t);
     }},
    {"availability/math modes before macOS 15",
     [](Bench&) {
         metal_double_set("macos=14.6");
         [[MTLCompileOptions alloc] init].mathMode = MTLMathModeSafe;
     }},
    {"availability/MSL 3.1 before macOS 14",
     [](Bench&) {
         metal_double_set("macos=13.5");
         [[MTLCompileOptions alloc] init].languageVersion = MTLLanguageVersion3_1;
     }},
    {"availability/architecture before macOS 14",
     [](Bench& t) {
         metal_double_set("macos=13.5");
         (void)t.device.architecture;
     }},
    {"fast-math/by default",
     [](Bench& t) { (void)[t.device newLibraryWithSource:@"" options:[[MTLCompileOptions alloc] init] error:nil]; }},
    {"activity/without a reason",
     [](Bench&) {
         [NSProcessInfo.processInfo beginActivityWithOptions:NSActivityUserInitiatedAllowingIdleSystemSleep reason:@""];
     }},
    {"activity/keeps the machine awake",
     [](Bench&) { [NSProcessInfo.processInfo beginActivityWithOptions:NSActivityUserInitiated reason:@"a test"]; }},
    {"capture/ends that did not begin", [](Bench&) { [MTLCaptureManager.sharedCaptureManager stopCapture]; }},
    {"capture/where there is none",
     [](Bench& t) {
         metal_double_set("capture=none");
         capture(t, "/tmp/no.gputrace");
     }},
    {"capture/two at a time",
     [](Bench& t) {
         const std::string path = "/tmp/metal_double_" + std::to_string(getpid()) + ".gputrace";
         capture(t, path);
         unlink(path.c_str());
         capture(t, path);
     }},
    {"quality/of an interface",
     [](Bench&) { pthread_override_qos_class_start_np(pthread_self(), QOS_CLASS_DEFAULT, 0); }},
    {"quality/ends on another thread",
     [](Bench&) {
         const auto override_ = pthread_override_qos_class_start_np(pthread_self(), QOS_CLASS_USER_INITIATED, 0);
         std::thread([&] { pthread_override_qos_class_end_np(override_); }).join();
     }},
    {"residency/goes while it is requested",
     [](Bench& t) {
         id<MTLResidencySet> set = residency_set(t);
         [set requestResidency];
         set = nil;
     }},
    {"pipeline/without a function", [](Bench& t) { t.pipeline(@"no such kernel"); }},
    {"pipeline/for too many threads", [](Bench& t) { t.pipeline(@"add", 2048); }},
};

}  // namespace breaking

using namespace breaking;

extern "C" __attribute__((visibility("default"))) void metal_double_run(const char* name) {
    if (!strcmp(name, "autorelease-pool/none in place"))
        objc_autorelease((__bridge_retained void*)[[NSObject alloc] init]);
    for (const Programs* programs : {&KEPT, &BUFFERS, &ARGUMENTS, &DISPATCHES, &STATES, &OBJECTS}) {
        const auto found = programs->find(name);
        if (found == programs->end()) continue;
        std::optional<Bench> bench;
        @autoreleasepool {
            bench.emplace();
            bench->add = bench->pipeline(@"add");
        }
        @autoreleasepool {
            found->second(*bench);
        }
        bench.reset();
        metal_double::wait_until_idle();
        for (const auto& [kind, n] : metal_double::live_objects())
            metal_double::broken("leak", "%ld of %s are left", n, kind.c_str());
        return;
    }
    fprintf(stderr, "there is no program %s\n", name);
    exit(2);
}
