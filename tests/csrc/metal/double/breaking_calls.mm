// Programs that break the rules of command buffers and encoders.
#include "breaking.h"

namespace breaking {

const Programs ARGUMENTS = {
    {"set-bytes/4097 bytes",
     [](Bench& t) {
         t.begin();
         [t.encoder setBytes:std::vector<char>(4097).data() length:4097 atIndex:0];
     }},
    {"set-bytes/no bytes",
     [](Bench& t) {
         t.begin();
         [t.encoder setBytes:"" length:0 atIndex:0];
     }},
    {"buffer-index/31",
     [](Bench& t) {
         t.begin();
         [t.encoder setBuffer:t.a offset:0 atIndex:31];
     }},
    {"buffer-offset/the end of the buffer",
     [](Bench& t) {
         t.begin();
         [t.encoder setBuffer:t.a offset:BYTES atIndex:1];
     }},
    {"buffer-offset/beyond the end, later",
     [](Bench& t) {
         t.begin();
         [t.encoder setBuffer:t.a offset:0 atIndex:1];
         [t.encoder setBufferOffset:BYTES + 4 atIndex:1];
     }},
    {"buffer-offset/of no buffer",
     [](Bench& t) {
         t.begin();
         [t.encoder setBufferOffset:0 atIndex:1];
     }},
    {"offset-alignment/2 where floats are",
     [](Bench& t) {
         t.begin();
         t.bind();
         [t.encoder setBufferOffset:2 atIndex:2];
         t.dispatch();
     }},
    {"argument-size/less than an element",
     [](Bench& t) {
         t.begin();
         t.bind();
         [t.encoder setBufferOffset:BYTES - 4 atIndex:1];
         t.dispatch();
     }},
    {"argument-size/half of the parameters",
     [](Bench& t) {
         t.begin();
         t.bind();
         [t.encoder setBytes:"ab" length:2 atIndex:0];
         t.dispatch();
     }},
    {"unbound/a buffer",
     [](Bench& t) {
         t.begin();
         t.bind();
         [t.encoder setBuffer:nil offset:0 atIndex:3];
         t.dispatch();
     }},
    {"unbound/the parameters",
     [](Bench& t) {
         t.begin();
         t.bind();
         [t.encoder setBuffer:t.a offset:0 atIndex:0];
         t.dispatch();
     }},
    {"unbound/all, in a new encoder",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         t.end();
         t.encoder = [t.commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
         [t.encoder setComputePipelineState:t.add];
         t.dispatch();
     }},
    {"no-pipeline/set",
     [](Bench& t) {
         t.begin();
         t.dispatch();
     }},
    {"no-pipeline/nil",
     [](Bench& t) {
         t.begin();
         t.add = nil;
         [t.encoder setComputePipelineState:t.add];
     }},
    {"other-device/buffer",
     [](Bench& t) {
         Bench other;
         t.begin();
         [t.encoder setBuffer:other.a offset:0 atIndex:1];
     }},
    {"other-device/pipeline",
     [](Bench& t) {
         Bench other;
         t.begin();
         [t.encoder setComputePipelineState:other.pipeline(@"add")];
     }},
    {"copy/half a word",
     [](Bench& t) {
         t.commands = [t.queue commandBuffer];
         [[t.commands blitCommandEncoder] copyFromBuffer:t.a sourceOffset:0 toBuffer:t.b destinationOffset:2 size:4];
     }},
    {"copy/beyond the end",
     [](Bench& t) {
         t.commands = [t.queue commandBuffer];
         [[t.commands blitCommandEncoder] copyFromBuffer:t.a
                                            sourceOffset:8
                                                toBuffer:t.b
                                       destinationOffset:0
                                                    size:BYTES - 4];
     }},
    {"copy/onto itself",
     [](Bench& t) {
         t.commands = [t.queue commandBuffer];
         [[t.commands blitCommandEncoder] copyFromBuffer:t.a sourceOffset:0 toBuffer:t.a destinationOffset:4 size:8];
     }},
    {"untracked/buffer",
     [](Bench& t) {
         t.begin();
         t.other = t.buffer(BYTES, MTLResourceHazardTrackingModeUntracked);
         t.bind(t.other, t.b, t.out);
         t.dispatch();
     }},
};

const Programs DISPATCHES = {
    {"threads/more than the device has",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch(1056);
     }},
    {"threads/more than the pipeline takes",
     [](Bench& t) {
         metal_double_set("threads=add:256");
         t.add = t.pipeline(@"add");
         require(t.add.maxTotalThreadsPerThreadgroup == 256, "limited");
         t.begin();
         t.bind();
         t.dispatch(512);
     }},
    {"threads/half a simdgroup",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch(48);
     }},
    {"grid/no threads",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch(0);
     }},
    {"grid/no threadgroups",
     [](Bench& t) {
         t.begin();
         t.bind();
         [t.encoder dispatchThreadgroups:MTLSizeMake(1, 0, 1) threadsPerThreadgroup:MTLSizeMake(32, 1, 1)];
     }},
    {"threadgroup-memory/33 KiB",
     [](Bench& t) {  // of the checked double
         t.add = t.pipeline(@"probe_fault_TOO_MUCH_THREADGROUP_MEMORY");
         t.begin();
         t.bind();
         const std::vector<char> bytes(64);
         [t.encoder setBytes:bytes.data() length:bytes.size() atIndex:0];
         t.dispatch(64);
         t.run();
     }},
    {"missing-barrier/write, then read",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         t.bind(t.out, t.b, t.a);
         t.dispatch();
     }},
    {"missing-barrier/read, then write",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         t.bind(t.b, t.b, t.a);
         t.dispatch();
     }},
    {"missing-barrier/write twice",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.dispatch();
         t.bind(t.b, t.b, t.out);
         t.dispatch();
     }},
    {"missing-barrier/in part, which only the checked double sees",
     [](Bench& t) {
         metal_double_set("native=0");
         t.begin();
         t.bind();
         t.dispatch();
         t.other = t.buffer(2 * BYTES);
         t.bind(t.out, t.b, t.other);
         const ElementwiseParams params = {64};
         [t.encoder setBytes:&params length:sizeof(params) atIndex:0];
         [t.encoder setBufferOffset:256 atIndex:2];
         t.dispatch();
         t.run();
     }},
    {"barrier-scope/textures",
     [](Bench& t) {
         t.begin();
         [t.encoder memoryBarrierWithScope:MTLBarrierScopeTextures];
     }},
};

const Programs STATES = {
    {"two-encoders/at once",
     [](Bench& t) {
         t.begin();
         (void)[t.commands computeCommandEncoder];
     }},
    {"encoder-not-ended/released",
     [](Bench& t) {
         @autoreleasepool {
             t.begin();
             t.encoder = nil;
         }
     }},
    {"after-end-encoding/a dispatch",
     [](Bench& t) {
         t.begin();
         t.bind();
         t.end();
         t.dispatch();
     }},
    {"after-end-encoding/a pipeline",
     [](Bench& t) {
         t.begin();
         t.end();
         [t.encoder setComputePipelineState:t.add];
     }},
    {"after-end-encoding/bytes",
     [](Bench& t) {
         t.begin();
         t.end();
         [t.encoder setBytes:"ab" length:2 atIndex:0];
     }},
    {"after-end-encoding/a buffer",
     [](Bench& t) {
         t.begin();
         t.end();
         [t.encoder setBuffer:t.a offset:0 atIndex:1];
     }},
    {"after-end-encoding/a barrier",
     [](Bench& t) {
         t.begin();
         t.end();
         [t.encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
     }},
    {"after-end-encoding/the end",
     [](Bench& t) {
         t.begin();
         t.end();
         t.end();
     }},
    {"commit-before-end/of the encoder",
     [](Bench& t) {
         t.begin();
         t.commit();
     }},
    {"after-commit/commit",
     [](Bench& t) {
         t.begin();
         t.run();
         t.commit();
     }},
    {"after-commit/an encoder",
     [](Bench& t) {
         t.begin();
         t.run();
         (void)[t.commands computeCommandEncoder];
     }},
    {"after-commit/a handler",
     [](Bench& t) {
         t.begin();
         t.run();
         [t.commands addCompletedHandler:^(id<MTLCommandBuffer>){
         }];
     }},
    {"wait-before-commit/waits for ever",
     [](Bench& t) {
         t.begin();
         t.end();
         [t.commands waitUntilCompleted];
     }},
    {"queue-full/65 in flight",
     [](Bench& t) {
         metal_double_set("slow=10000");  // milliseconds: a hang would let the others end, sometimes in time
         for (int i = 0; i < 66; i++) {
             t.begin();
             t.end();
             t.commit();
         }
     }},
    {"residency/commit with changes",
     [](Bench& t) {
         id<MTLResidencySet> set = residency_set(t);
         [t.queue addResidencySet:set];
         [set addAllocation:t.a];
         t.begin();
         t.run();
     }},
    {"residency/request before commit",
     [](Bench& t) {
         id<MTLResidencySet> set = residency_set(t);
         [set addAllocation:t.a];
         [set requestResidency];
     }},
    {"residency/a GPU without",
     [](Bench& t) {
         metal_double_set("family=Apple5");
         residency_set(t);
     }},
    {"residency/end without work",
     [](Bench& t) {
         id<MTLResidencySet> set = residency_set(t);
         [set addAllocation:t.a];
         [set commit];
         [set requestResidency];
         [set endResidency];
     }},
    {"residency/remove what is not held", [](Bench& t) { [residency_set(t) removeAllocation:t.a]; }},
    {"residency/a buffer goes before the set",
     [](Bench& t) {
         id<MTLResidencySet> set = residency_set(t);
         [set addAllocation:t.a];
         [set commit];
         t.a = nil;
     }},
    {"residency/a buffer goes before its removal is committed",
     [](Bench& t) {
         id<MTLResidencySet> set = residency_set(t);
         [set addAllocation:t.a];
         [set commit];
         [set removeAllocation:t.a];
         t.a = nil;
     }},
    {"residency/a set that the queue does not have", [](Bench& t) { [t.queue removeResidencySet:residency_set(t)]; }},
};

}  // namespace breaking
