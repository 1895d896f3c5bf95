// Buffers, and dispatches that are ready to be encoded.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/device.h"
#include "metal/context.h"
#include "metal/objc.h"
#include "metal/pipelines.h"
#include "metal/portable/launches.h"
#include "metal/portable/pieces.h"

namespace zinc {

class MetalBuffer final : public Buffer {
  public:
    MetalBuffer(std::shared_ptr<Queue> owner, id<MTLBuffer> buffer, void* contents)
        : queue(std::move(owner)), metal(buffer), resident_(queue->context->residency.add(buffer, contents)) {
        host = contents;
        bytes = buffer.length;
        queue->context->count_buffer();
    }

    // No work in flight uses the buffer: recordings hold it, and wait for the GPU before they release it.
    ~MetalBuffer() override {
        if (queue->process.is_another()) {
            leave_behind(metal);
            leave_behind(queue);
            return;
        }
        try {
            guarded([&] {
                if (resident_) queue->context->residency.remove(metal, host);
                metal = nil;  // inside the pool
            });
            queue->context->forget_buffer();
        } catch (...) {  // a destructor has nobody to tell
        }
    }

    void write(size_t offset, const void* from, size_t n) override {
        end_copies();
        Buffer::write(offset, from, n);
    }
    void read(size_t offset, void* to, size_t n) const override {
        end_copies();
        Buffer::read(offset, to, n);
    }

    const std::shared_ptr<Queue> queue;
    id<MTLBuffer> metal;

  private:
    // Host and GPU share the memory, so the host waits for copies before it touches the bytes itself.
    void end_copies() const {
        const uint64_t last = queue->last_copies;
        if (last == 0) return;
        queue->in_flight->wait_for(last);
        queue->in_flight->check();
    }

    const bool resident_;
};

// An encoder of one command buffer. Metal aborts if an encoder is released without endEncoding, so every path ends it.
class MetalEncoder {
  public:
    MetalEncoder(id<MTLCommandBuffer> command_buffer, NSString* label)
        : encoder_([command_buffer computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent]) {
        if (!encoder_) throw DeviceError("Metal gave no compute encoder; close other GPU programs");
        encoder_.label = label;
    }
    ~MetalEncoder() { [encoder_ endEncoding]; }
    MetalEncoder(const MetalEncoder&) = delete;

    void barrier() { [encoder_ memoryBarrierWithScope:MTLBarrierScopeBuffers]; }
    void set_pipeline(const Pipeline& pipeline) {
        [encoder_ setComputePipelineState:static_cast<const MetalPipeline&>(pipeline).state];
    }
    void set_params(const std::vector<uint8_t>& params) {
        [encoder_ setBytes:params.data() length:params.size() atIndex:0];
    }
    void set_buffer(const Buffer& buffer, uint64_t offset, uint32_t index) {
        [encoder_ setBuffer:static_cast<const MetalBuffer&>(buffer).metal offset:offset atIndex:index];
    }
    void set_offset(uint64_t offset, uint32_t index) { [encoder_ setBufferOffset:offset atIndex:index]; }
    void dispatch(const Dispatch& d) {
        [encoder_ dispatchThreadgroups:MTLSizeMake(d.grid[0], d.grid[1], d.grid[2])
                 threadsPerThreadgroup:MTLSizeMake(d.threads, 1, 1)];
    }

  private:
    const id<MTLComputeCommandEncoder> encoder_;
};

// An encoder of copies. Metal runs a command buffer after those before it on the queue that share a buffer with it, and
// before those after it: all buffers are tracked. So copies need no barrier and no fence.
class MetalCopier {
  public:
    explicit MetalCopier(id<MTLCommandBuffer> command_buffer) : encoder_([command_buffer blitCommandEncoder]) {
        if (!encoder_) throw DeviceError("Metal gave no blit encoder; close other GPU programs");
        encoder_.label = @"zincmetal copies";
    }
    ~MetalCopier() { [encoder_ endEncoding]; }
    MetalCopier(const MetalCopier&) = delete;

    void copy(const Copy& c) {
        [encoder_ copyFromBuffer:static_cast<const MetalBuffer&>(*c.from).metal
                    sourceOffset:c.from_offset
                        toBuffer:static_cast<const MetalBuffer&>(*c.to).metal
               destinationOffset:c.offset
                            size:c.bytes];
    }

  private:
    const id<MTLBlitCommandEncoder> encoder_;
};

class MetalRecording final : public Recording {
  public:
    MetalRecording(std::shared_ptr<Queue> owner, std::vector<Dispatch> dispatches)
        : queue(std::move(owner)), pieces(std::make_shared<Pieces>(dispatches)), dispatches_(std::move(dispatches)) {}

    // Command buffers do not retain their resources. This object does, so it stays until the GPU is done. A lost GPU
    // may still write to these buffers, so they are leaked on purpose.
    ~MetalRecording() override {
        if (queue->process.is_another()) leave_behind(queue);
        if (queue->process.is_another() || !queue->in_flight->idle()) new std::vector<Dispatch>(std::move(dispatches_));
    }

    void encode(id<MTLCommandBuffer> command_buffer, size_t begin, size_t end) const {
        encode_dispatches(dispatches_, begin, end, queue->debug, [&](const Dispatch& first) {
            NSString* label = @"zincmetal";
            if (queue->debug) label = static_cast<const MetalPipeline&>(*first.pipeline).state.label;
            return MetalEncoder(command_buffer, label);
        });
    }

    const std::shared_ptr<Queue> queue;
    const std::shared_ptr<Pieces> pieces;

  private:
    std::vector<Dispatch> dispatches_;  // owns the pipelines, buffers and parameters
};

}  // namespace zinc
