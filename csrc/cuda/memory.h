// Device memory as buffers, and the upload of a mapped file.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/handles.h"

namespace zinc::cuda {

constexpr size_t STAGE_BYTES = 64 << 20;  // of either half of the upload's staging memory

// Memory of the device; or pinned memory of the host, which kernels use by the same pointer.
class CudaBuffer : public Buffer {
  public:
    CudaBuffer(size_t nbytes, bool shared, Stream stream) : stream_(std::move(stream)) {
        bytes = nbytes;
        if (shared) {
            pinned_ = make_mapped(nbytes);
            host = pinned_.get();
        } else {
            memory_ = make_memory(nbytes);
        }
    }
    ~CudaBuffer() override {
        if (copied) synchronize(stream_.get());  // steps hold their buffers and wait; copies do not
    }

    void* memory() const { return host ? host : memory_.get(); }

    bool copies() const override { return true; }
    // Device memory is written and read between the work submitted before and later, so the host waits for that.
    // Shared memory is written and read at once, after copies.
    void write(size_t offset, const void* from, size_t n) override {
        if (host) {
            if (copied) check(cudaStreamSynchronize(stream_.get()), "upload");
            return Buffer::write(offset, from, n);
        }
        check(cudaMemcpyAsync(at(offset), from, n, cudaMemcpyHostToDevice, stream_.get()), "upload");
        check(cudaStreamSynchronize(stream_.get()), "upload");
    }
    void read(size_t offset, void* to, size_t n) const override {
        if (host) {
            if (copied) check(cudaStreamSynchronize(stream_.get()), "read");
            return Buffer::read(offset, to, n);
        }
        check(cudaMemcpyAsync(to, at(offset), n, cudaMemcpyDeviceToHost, stream_.get()), "read");
        check(cudaStreamSynchronize(stream_.get()), "read");
    }

    mutable bool copied = false;  // a copy from it or to it was submitted

  private:
    char* at(size_t offset) const { return static_cast<char*>(memory()) + offset; }

    DeviceMemory memory_;
    PinnedMemory pinned_;
    Stream stream_;
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
