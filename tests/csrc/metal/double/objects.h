// The double's Metal classes, as they see each other.
#pragma once

#import <Metal/Metal.h>

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "execute.h"

namespace metal_double {

constexpr NSUInteger MAX_SET_BYTES = 4096;      // of setBytes:length:atIndex:
constexpr NSUInteger BUFFER_INDEXES = 31;       // of the buffer argument table
constexpr NSUInteger MAX_THREADS = 1024;        // in a threadgroup
constexpr NSUInteger MAX_COMMAND_BUFFERS = 64;  // of a queue, that have not ended
constexpr NSUInteger WIDTH = 32;                // threads of a simdgroup

// Command buffers of one queue, run in order on a thread of its own.
class Timeline;

}  // namespace metal_double

@interface DoubleDevice : NSObject <MTLDevice> {
  @public
    std::atomic<uint64_t> allocated;
}
@property(readonly) uint64_t memory;
@end

@interface DoubleBuffer : NSObject <MTLBuffer> {
  @public
    DoubleDevice* owner;
    uint8_t* memory;
    NSUInteger mapped;  // bytes of our own, 0 where the memory is the caller's
    void (^deallocator)(void*, NSUInteger);
    std::atomic<int> in_flight;     // command buffers that the GPU has not ended
    std::atomic<int> in_residency;  // sets that hold it
}
- (instancetype)initWithDevice:(DoubleDevice*)device length:(NSUInteger)length options:(MTLResourceOptions)options;
- (instancetype)initWithDevice:(DoubleDevice*)device
                       pointer:(void*)pointer
                        length:(NSUInteger)length
                       options:(MTLResourceOptions)options
                   deallocator:(void (^)(void*, NSUInteger))block;
// Names the misuse where the caller's memory has gone.
- (void)checkMapped;
@end

@interface DoubleResidencySet : NSObject <MTLResidencySet> {
  @public
    std::set<__unsafe_unretained DoubleBuffer*> staged_in, staged_out,
        committed;  // not retained: the caller keeps what it adds
    bool requested;
}
@property(nullable, copy, nonatomic) NSString* label;
@property(readonly) BOOL hasStagedChanges;
@end

@interface DoubleLibrary : NSObject <MTLLibrary>
- (instancetype)initWithNames:(const std::vector<std::string>&)names;
@end

@interface DoubleFunction : NSObject <MTLFunction>
@property(readwrite, copy) NSString* name;
@end

@interface DoublePipeline : NSObject <MTLComputePipelineState> {
  @public
    const metal_double::KernelInfo* kernel;
    bool whole_simdgroups;
}
@property(readwrite, strong) DoubleDevice* device;
@property(nullable, readwrite, copy) NSString* label;
@property(readwrite) NSUInteger maxTotalThreadsPerThreadgroup;
@end

@interface DoubleArchive : NSObject <MTLBinaryArchive> {
  @public
    std::set<std::string> entries;
}
@property(readwrite, strong) DoubleDevice* device;
- (BOOL)readFrom:(const std::string&)path;
- (BOOL)holds:(MTLComputePipelineDescriptor*)descriptor;
@end

@interface DoubleQueue : NSObject <MTLCommandQueue> {
  @public
    std::shared_ptr<metal_double::Timeline> timeline;
    std::vector<DoubleResidencySet*> residency;
}
@property(readwrite, strong) DoubleDevice* device;
@end

@interface DoubleCommandBuffer : NSObject <MTLCommandBuffer> {
  @public
    std::vector<metal_double::Work> work;
    std::vector<std::string> encoder_labels;
    std::vector<size_t> encoder_ends;  // in work
    // What it uses. Command buffers keep none of it alive, unless retained references are asked for.
    std::set<const void*> buffers, pipelines;
    std::vector<id> retained;
    std::vector<MTLCommandBufferHandler> handlers;
    MTLCommandBufferErrorOption options;
    __unsafe_unretained id open_encoder;
}
@property(readwrite, strong) DoubleQueue* queue;
@property(readwrite) BOOL retainedReferences;
@property(readwrite) MTLCommandBufferStatus status;
@property(readwrite) CFTimeInterval GPUStartTime;
@property(readwrite) CFTimeInterval GPUEndTime;
@property(readwrite, strong) NSError* error;
- (void)use:(id)object in:(std::set<const void*>&)set;
- (void)runOn:(metal_double::Runner&)runner;  // by the queue's thread
@end

@interface DoubleEncoder : NSObject <MTLComputeCommandEncoder>
- (instancetype)initWithCommandBuffer:(DoubleCommandBuffer*)buffer type:(MTLDispatchType)type;
@end

@interface DoubleCopier : NSObject <MTLBlitCommandEncoder>
- (instancetype)initWithCommandBuffer:(DoubleCommandBuffer*)buffer;
@end
