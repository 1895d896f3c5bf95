// A bench for programs that keep or break one rule of Metal each. A test runs one in a process of its own, by its name:
// RULE/what it does.
#pragma once

#import <Metal/Metal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "conditions.h"
#include "params.h"

namespace breaking {

constexpr NSUInteger N = 1024, BYTES = N * sizeof(float);
constexpr MTLResourceOptions SHARED = MTLResourceStorageModeShared;
inline const NSUInteger PAGE = NSUInteger(getpagesize());

// A device with what it takes to run the kernel add: out = a + b.
struct Bench {
    Bench() {
        MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
        options.mathMode = MTLMathModeSafe;
        options.mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise;
        NSString* source = @"[[host_name(\"add\")]] "
                           @"[[host_name(\"probe_fault_TOO_MUCH_THREADGROUP_MEMORY\")]]";
        library = [device newLibraryWithSource:source options:options error:nil];
        static_cast<Step*>(step.contents)->n_tokens = 1;
        for (NSUInteger i = 0; i < N; i++) floats(a)[i] = float(i), floats(b)[i] = 1;
    }

    static float* floats(id<MTLBuffer> buffer) { return static_cast<float*>(buffer.contents); }
    id<MTLBuffer> buffer(NSUInteger bytes = BYTES, MTLResourceOptions options = SHARED) const {
        return [device newBufferWithLength:bytes options:options];
    }
    id<MTLComputePipelineState> pipeline(NSString* name, NSUInteger max_threads = 0) const {
        MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
        descriptor.computeFunction = [library newFunctionWithName:name];
        descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth = YES;
        descriptor.maxTotalThreadsPerThreadgroup = max_threads;
        return [device newComputePipelineStateWithDescriptor:descriptor
                                                     options:MTLPipelineOptionNone
                                                  reflection:nil
                                                       error:nil];
    }

    // ---- the calls of a command buffer, in their order

    void begin(MTLDispatchType type = MTLDispatchTypeConcurrent, BOOL retained = NO) {
        MTLCommandBufferDescriptor* descriptor = [[MTLCommandBufferDescriptor alloc] init];
        descriptor.retainedReferences = retained;
        commands = [queue commandBufferWithDescriptor:descriptor];
        encoder = [commands computeCommandEncoderWithDispatchType:type];
    }
    void bind(id<MTLBuffer> x, id<MTLBuffer> y, id<MTLBuffer> sum) {
        const ElementwiseParams params = {u32(N)};
        [encoder setComputePipelineState:add];
        [encoder setBytes:&params length:sizeof(params) atIndex:0];
        NSUInteger index = 1;
        for (id<MTLBuffer> each : {step, x, y, sum}) [encoder setBuffer:each offset:0 atIndex:index++];
    }
    void bind() { bind(a, b, out); }
    void dispatch(NSUInteger threads = 256) {
        [encoder dispatchThreadgroups:MTLSizeMake(1, 1, 1) threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
    }
    void end() { [encoder endEncoding]; }
    void commit() { [commands commit]; }
    void run() {
        end();
        commit();
        [commands waitUntilCompleted];
    }

    id<MTLDevice> device = MTLCreateSystemDefaultDevice();
    id<MTLCommandQueue> queue = [device newCommandQueue];
    id<MTLLibrary> library;
    id<MTLBuffer> step = buffer(), a = buffer(), b = buffer(), out = buffer(), other;
    id<MTLComputePipelineState> add;
    id<MTLCommandBuffer> commands;
    id<MTLComputeCommandEncoder> encoder;
};

inline void require(bool condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "not so: %s\n", what);
    exit(3);
}

inline void* pages(NSUInteger n) {
    return mmap(nullptr, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

inline id<MTLBuffer> wrap(const Bench& bench, void* pointer, NSUInteger bytes, MTLResourceOptions options = SHARED) {
    return [bench.device newBufferWithBytesNoCopy:pointer length:bytes options:options deallocator:nil];
}

inline id<MTLResidencySet> residency_set(const Bench& bench) {
    return [bench.device newResidencySetWithDescriptor:[[MTLResidencySetDescriptor alloc] init] error:nil];
}

using Program = std::function<void(Bench&)>;
using Programs = std::map<std::string, Program>;
extern const Programs KEPT, BUFFERS, OBJECTS, ARGUMENTS, DISPATCHES, STATES;

}  // namespace breaking
