// Device memory as buffers, and the upload of a mapped file.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "cuda/handles.h"

namespace zinc::cuda {

constexpr size_t STAGE_BYTES = 64 << 20;  // of either half of the upload's staging memory

class CudaBuffer : public Buffer {
  public:
    CudaBuffer(size_t nbytes, bool with_mirror, cudaStream_t stream) : stream_(stream) {
        bytes = nbytes;
        void* pointer = nullptr;
        if (cudaMalloc(&pointer, std::max<size_t>(nbytes, 1)) != cudaSuccess) {
            cudaGetLastError();
            size_t free = 0, total = 0;
            cudaMemGetInfo(&free, &total);
            throw OutOfMemoryError("the GPU has no room for " + std::to_string(nbytes) +
                                   " bytes: " + std::to_string(free) + " of its " + std::to_string(total) +
                                   " are free; use a smaller context or model, or close other programs");
        }
        memory_.reset(pointer);
        if (with_mirror) mirror_ = make_pinned(nbytes);  // without one, reads will copy
    }

    void* memory() const { return memory_.get(); }
    void* mirror() const { return mirror_.get(); }

    bool copies() const override { return true; }
    void write(size_t offset, const void* from, size_t n) override {
        check(cudaMemcpyAsync(at(offset), from, n, cudaMemcpyHostToDevice, stream_), "upload");
        check(cudaStreamSynchronize(stream_), "upload");
        mirrored = false;
    }
    // Reads the mirror if it is up to date. While a step is in flight, the host may read only bytes that the step
    // before wrote and this step does not write: the places of Step's ring.
    void read(size_t offset, void* to, size_t n) const override {
        if (mirrored) {
            std::memcpy(to, static_cast<const char*>(mirror()) + offset, n);
            return;
        }
        check(cudaMemcpyAsync(to, at(offset), n, cudaMemcpyDeviceToHost, stream_), "read");
        check(cudaStreamSynchronize(stream_), "read");
    }

    bool mirrored = false;  // the mirror holds the results of the last recording in flight

  private:
    char* at(size_t offset) const { return static_cast<char*>(memory()) + offset; }

    DeviceMemory memory_;
    PinnedMemory mirror_;
    cudaStream_t stream_;
};

// Copies pageable memory to the device through two pinned halves: while one is on its way, threads fill the other.
class Upload {
  public:
    explicit Upload(cudaStream_t stream) : stream_(stream) {
        for (Half& half : halves_) {
            half.memory = make_pinned(STAGE_BYTES);
            if (!half.memory) throw DeviceError("there is no pinned memory to stage uploads in; close other programs");
            half.sent = make_event(cudaEventDisableTiming);
        }
    }

    void copy(void* to, const void* from, size_t n) {
        for (size_t done = 0; done < n; done += STAGE_BYTES, next_ ^= 1) {
            Half& half = halves_[next_];
            const size_t part = std::min(STAGE_BYTES, n - done);
            check(cudaEventSynchronize(half.sent.get()), "upload");
            fill(half.memory.get(), static_cast<const char*>(from) + done, part);
            check(cudaMemcpyAsync(static_cast<char*>(to) + done, half.memory.get(), part, cudaMemcpyHostToDevice,
                                  stream_),
                  "upload");
            check(cudaEventRecord(half.sent.get(), stream_), "upload");
        }
        check(cudaStreamSynchronize(stream_), "upload");
    }

  private:
    struct Half {
        PinnedMemory memory;
        Event sent;
    };

    static void fill(void* to, const char* from, size_t n) {
        const size_t threads = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 8);
        const size_t each = (n + threads - 1) / threads;
        const auto part = [=](size_t at) {
            std::memcpy(static_cast<char*>(to) + at, from + at, std::min(each, n - at));
        };
        std::vector<std::jthread> others;  // joined even if one more cannot start
        others.reserve(threads);
        size_t at = each;
        try {
            for (; at < n; at += each) others.emplace_back([=] { part(at); });
        } catch (const std::exception&) {
            for (; at < n; at += each) part(at);
        }
        part(0);
    }

    cudaStream_t stream_;
    Half halves_[2];
    int next_ = 0;
};

}  // namespace zinc::cuda
