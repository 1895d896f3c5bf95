// The CUDA device: weights in device memory, a recording as a CUDA graph whose edges are the plan's barriers. A small
// shared buffer has a mirror in pinned host memory, which a recording that writes the buffer brings up to date as its
// last act: nothing has to be asked of the device between tokens.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device.h"
#include "msl/executor.h"

namespace zinc {
namespace {

constexpr size_t MIRROR_BYTES = 64 << 10;    // a shared buffer up to this size has a mirror
constexpr size_t STAGE_BYTES = 64 << 20;     // of either half of the upload's staging memory
constexpr uint64_t MAX_BUFFER = 4ull << 30;  // a file's map is uploaded in such pieces: its caller can show progress

void check(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    throw DeviceError(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

class CudaBuffer : public Buffer {
  public:
    CudaBuffer(size_t nbytes, bool with_mirror, cudaStream_t stream) : stream_(stream) {
        bytes = nbytes;
        size_t free = 0, total = 0;
        cudaMemGetInfo(&free, &total);
        if (cudaMalloc(&memory, std::max<size_t>(nbytes, 1)) != cudaSuccess) {
            cudaGetLastError();
            throw DeviceError("the GPU has no room for " + std::to_string(nbytes) + " bytes: " + std::to_string(free) +
                              " of its " + std::to_string(total) +
                              " are free; use a smaller context or model, or close other programs");
        }
        if (with_mirror && cudaMallocHost(&mirror, nbytes) != cudaSuccess) {
            cudaGetLastError();
            mirror = nullptr;  // reads will copy
        }
    }
    ~CudaBuffer() override {
        cudaFree(memory);
        if (mirror) cudaFreeHost(mirror);
    }

    bool copies() const override { return true; }
    void write(size_t offset, const void* from, size_t n) override {
        check(cudaMemcpyAsync(static_cast<char*>(memory) + offset, from, n, cudaMemcpyHostToDevice, stream_), "upload");
        check(cudaStreamSynchronize(stream_), "upload");
        mirrored = false;
    }
    void read(size_t offset, void* to, size_t n) const override {
        if (mirrored) {
            std::memcpy(to, static_cast<const char*>(mirror) + offset, n);
            return;
        }
        check(cudaMemcpyAsync(to, static_cast<const char*>(memory) + offset, n, cudaMemcpyDeviceToHost, stream_),
              "read");
        check(cudaStreamSynchronize(stream_), "read");
    }

    void* memory = nullptr;
    void* mirror = nullptr;
    bool mirrored = false;  // the mirror is what the last recording in flight leaves

  private:
    cudaStream_t stream_;
};

// Copies pageable memory to the device through two pinned halves: while one is on its way, threads fill the other.
class Upload {
  public:
    explicit Upload(cudaStream_t stream) : stream_(stream) {
        for (Half& half : halves_) {
            check(cudaMallocHost(&half.memory, STAGE_BYTES), "staging memory");
            check(cudaEventCreateWithFlags(&half.sent, cudaEventDisableTiming), "staging memory");
        }
    }
    ~Upload() {
        for (Half& half : halves_) {
            cudaEventDestroy(half.sent);
            cudaFreeHost(half.memory);
        }
    }
    Upload(const Upload&) = delete;
    Upload& operator=(const Upload&) = delete;

    void copy(void* to, const void* from, size_t n) {
        for (size_t at = 0; at < n; at += STAGE_BYTES, next_ ^= 1) {
            Half& half = halves_[next_];
            const size_t part = std::min(STAGE_BYTES, n - at);
            check(cudaEventSynchronize(half.sent), "upload");
            fill(half.memory, static_cast<const char*>(from) + at, part);
            check(cudaMemcpyAsync(static_cast<char*>(to) + at, half.memory, part, cudaMemcpyHostToDevice, stream_),
                  "upload");
            check(cudaEventRecord(half.sent, stream_), "upload");
        }
        check(cudaStreamSynchronize(stream_), "upload");
    }

  private:
    struct Half {
        void* memory = nullptr;
        cudaEvent_t sent = nullptr;
    };

    static void fill(void* to, const char* from, size_t n) {
        const size_t threads = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 8);
        const size_t each = (n + threads - 1) / threads;
        std::vector<std::thread> others;
        for (size_t at = each; at < n; at += each)
            others.emplace_back([=] { std::memcpy(static_cast<char*>(to) + at, from + at, std::min(each, n - at)); });
        std::memcpy(to, from, std::min(each, n));
        for (std::thread& other : others) other.join();
    }

    cudaStream_t stream_;
    Half halves_[2];
    int next_ = 0;
};

// ---- Recordings -----------------------------------------------------------------------------------------------------

class CudaPipeline : public Pipeline {
  public:
    const msl::KernelInfo* kernel = nullptr;
};

class CudaRecording : public Recording {
  public:
    CudaRecording(std::vector<Dispatch> dispatches, Encoding encoding, cudaStream_t stream);
    ~CudaRecording() override {
        cudaStreamSynchronize(stream_);  // what is in flight uses the buffers
        if (executable) cudaGraphExecDestroy(executable);
        if (graph_) cudaGraphDestroy(graph_);
    }

    // From now on the mirrors are what this recording leaves in them.
    void announce() const {
        for (CudaBuffer* buffer : mirrored_) buffer->mirrored = true;
        for (CudaBuffer* buffer : written_) buffer->mirrored = false;
    }

    cudaGraphExec_t executable = nullptr;

  private:
    using Nodes = std::vector<cudaGraphNode_t>;

    cudaGraphNode_t add_kernel(const Dispatch& d, const Nodes& after);
    // One node that waits for all: an edge from each to each of the next would be many more.
    Nodes join(const Nodes& nodes);
    void add_mirrors(const Nodes& after);
    void note_written(const Dispatch& d);

    cudaStream_t stream_;
    cudaGraph_t graph_ = nullptr;
    std::vector<Dispatch> dispatches_;   // keeps the buffers
    std::vector<CudaBuffer*> mirrored_;  // shared and written
    std::vector<CudaBuffer*> written_;   // written, and with no mirror
};

CudaRecording::CudaRecording(std::vector<Dispatch> dispatches, Encoding encoding, cudaStream_t stream)
    : stream_(stream), dispatches_(std::move(dispatches)) {
    check(cudaGraphCreate(&graph_, 0), "a graph");
    Nodes before, since;  // the last barrier; the nodes after it
    for (const Dispatch& d : dispatches_) {
        if ((d.barrier || encoding == Encoding::serial) && !since.empty()) {
            before = join(since);
            since.clear();
        }
        since.push_back(add_kernel(d, before));
        note_written(d);
    }
    add_mirrors(join(since));
    check(cudaGraphInstantiate(&executable, graph_, 0),
          "a graph of " + std::to_string(dispatches_.size()) + " kernels");
    check(cudaGraphUpload(executable, stream_), "a graph");
}

cudaGraphNode_t CudaRecording::add_kernel(const Dispatch& d, const Nodes& after) {
    const msl::KernelInfo& kernel = *static_cast<const CudaPipeline&>(*d.pipeline).kernel;
    std::vector<void*> addresses;
    for (const Binding& b : d.bindings)
        addresses.push_back(static_cast<char*>(static_cast<CudaBuffer&>(*b.buffer).memory) + b.offset);
    std::vector<void*> arguments{const_cast<uint8_t*>(d.params.data())};
    for (void*& address : addresses) arguments.push_back(&address);
    cudaKernelNodeParams params{};
    params.func = const_cast<void*>(kernel.global);
    params.gridDim = dim3(d.grid[0], d.grid[1], d.grid[2]);
    params.blockDim = dim3(d.threads);
    params.kernelParams = arguments.data();
    cudaGraphNode_t node;
    check(cudaGraphAddKernelNode(&node, graph_, after.data(), after.size(), &params), "kernel " + d.pipeline->name);
    return node;
}

CudaRecording::Nodes CudaRecording::join(const Nodes& nodes) {
    if (nodes.size() < 2) return nodes;
    cudaGraphNode_t node;
    check(cudaGraphAddEmptyNode(&node, graph_, nodes.data(), nodes.size()), "a barrier");
    return {node};
}

void CudaRecording::note_written(const Dispatch& d) {
    const msl::KernelInfo& kernel = *static_cast<const CudaPipeline&>(*d.pipeline).kernel;
    for (size_t i = 0; i < d.bindings.size(); i++) {
        auto* buffer = static_cast<CudaBuffer*>(d.bindings[i].buffer.get());
        std::vector<CudaBuffer*>& list = buffer->mirror ? mirrored_ : written_;
        if (kernel.buffers[i].writable && std::find(list.begin(), list.end(), buffer) == list.end())
            list.push_back(buffer);
    }
}

void CudaRecording::add_mirrors(const Nodes& after) {
    for (const CudaBuffer* buffer : mirrored_) {
        cudaGraphNode_t node;
        check(cudaGraphAddMemcpyNode1D(&node, graph_, after.data(), after.size(), buffer->mirror, buffer->memory,
                                       buffer->bytes, cudaMemcpyDeviceToHost),
              "a mirror");
    }
}

// ---- The device -----------------------------------------------------------------------------------------------------

class CudaDevice : public Device {
  public:
    CudaDevice();
    ~CudaDevice() override {
        cudaStreamSynchronize(stream_);
        for (Slot& slot : slots_) {
            cudaEventDestroy(slot.start);
            cudaEventDestroy(slot.end);
        }
        cudaStreamDestroy(stream_);
    }

    DeviceInfo info() const override;
    std::shared_ptr<Buffer> alloc(size_t bytes, Storage storage) override {
        const bool mirrored = storage == Storage::shared && bytes <= MIRROR_BYTES;
        return std::make_shared<CudaBuffer>(bytes, mirrored, stream_);
    }
    std::shared_ptr<Buffer> wrap(void* pointer, size_t bytes) override;
    std::shared_ptr<Pipeline> pipeline(const std::string& kernel) override;
    std::vector<std::string> kernel_names() const override { return msl::kernel_names(); }
    std::unique_ptr<Recording> record(std::vector<Dispatch> dispatches, Encoding encoding) override;
    uint64_t submit(Recording& recording) override;
    RunTimes wait(uint64_t ticket) override;

  private:
    struct Slot {
        cudaEvent_t start = nullptr, end = nullptr;
    };
    static constexpr uint64_t IN_FLIGHT = 4;

    void check_dispatch(const Dispatch& d) const;
    void check(cudaError_t status, const char* what);  // a failure stays
    void throw_if_failed() const;

    cudaStream_t stream_ = nullptr;
    cudaDeviceProp properties_{};
    std::array<Slot, IN_FLIGHT> slots_;
    std::mutex mutex_;
    uint64_t submitted_ = 0;
    std::string failure_;
};

CudaDevice::CudaDevice() {
    if (!msl::registry_error().empty()) throw DeviceError(msl::registry_error());
    int count = 0, driver = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) {
        cudaDriverGetVersion(&driver);
        const std::string why = status == cudaSuccess ? "no NVIDIA GPU was found" : cudaGetErrorString(status);
        const std::string has = driver == 0 ? "no driver"
                                            : "a driver for CUDA " + std::to_string(driver / 1000) + "." +
                                                  std::to_string(driver % 1000 / 10);
        throw DeviceError("CUDA cannot be used: " + why + " (this machine has " + has + ", CUDA " +
                          std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
                          " was built for); install a newer driver, or choose device=\"cpu\"");
    }
    zinc::check(cudaGetDeviceProperties(&properties_, 0), "the GPU's properties");
    zinc::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
    for (Slot& slot : slots_) {
        zinc::check(cudaEventCreate(&slot.start), "an event");
        zinc::check(cudaEventCreate(&slot.end), "an event");
    }
}

DeviceInfo CudaDevice::info() const {
    DeviceInfo info;
    size_t free = 0, total = 0;
    zinc::check(cudaMemGetInfo(&free, &total), "the GPU's memory");
    info.name = properties_.name;
    info.backend = "cuda";
    info.working_set_bytes = free;
    info.max_buffer_bytes = MAX_BUFFER;
    info.max_threadgroup_bytes = uint32_t(properties_.sharedMemPerBlock);
    info.page_bytes = 4096;
    info.asynchronous = true;
    info.features = {
        {"compute capability", std::to_string(properties_.major) + "." + std::to_string(properties_.minor)},
        {"multiprocessors", std::to_string(properties_.multiProcessorCount)},
        {"memory", std::to_string(total)},
        {"L2 cache", std::to_string(properties_.l2CacheSize)}};
    return info;
}

std::shared_ptr<Buffer> CudaDevice::wrap(void* pointer, size_t bytes) {
    auto buffer = std::make_shared<CudaBuffer>(bytes, false, stream_);
    buffer->read_only = true;
    Upload(stream_).copy(buffer->memory, pointer, bytes);
    return buffer;
}

std::shared_ptr<Pipeline> CudaDevice::pipeline(const std::string& kernel) {
    auto pipeline = std::make_shared<CudaPipeline>();
    pipeline->name = kernel;
    pipeline->kernel = msl::find_kernel(kernel.c_str());
    if (!pipeline->kernel) throw DeviceError("there is no kernel named " + kernel);
    cudaFuncAttributes attributes{};
    zinc::check(cudaFuncGetAttributes(&attributes, pipeline->kernel->global),
                "kernel " + kernel + " was not built for this GPU");
    pipeline->limits = {uint32_t(attributes.maxThreadsPerBlock), msl::simd_width, uint32_t(attributes.sharedSizeBytes)};
    return pipeline;
}

void CudaDevice::check_dispatch(const Dispatch& d) const {
    const auto* pipeline = dynamic_cast<const CudaPipeline*>(d.pipeline.get());
    if (!pipeline) throw DeviceError("a dispatch has no pipeline of this device");
    const std::string who = "kernel " + d.pipeline->name + ": ";
    const msl::KernelInfo& kernel = *pipeline->kernel;
    if (d.params.size() != kernel.params_bytes || d.bindings.size() != kernel.n_buffers)
        throw DeviceError(who + "it takes " + std::to_string(kernel.params_bytes) + " bytes of parameters and " +
                          std::to_string(kernel.n_buffers) + " bindings");
    if (d.threads == 0 || d.threads % msl::simd_width || d.threads > pipeline->limits.max_threads)
        throw DeviceError(who + std::to_string(d.threads) + " threads are no multiple of 32 up to " +
                          std::to_string(pipeline->limits.max_threads));
    for (const Binding& b : d.bindings) {
        if (!dynamic_cast<CudaBuffer*>(b.buffer.get()))
            throw DeviceError(who + "a binding has no buffer of this device");
        if (b.offset > b.buffer->bytes || b.bytes > b.buffer->bytes - b.offset)
            throw DeviceError(who + "a binding is outside its buffer");
    }
}

std::unique_ptr<Recording> CudaDevice::record(std::vector<Dispatch> dispatches, Encoding encoding) {
    throw_if_failed();
    for (const Dispatch& d : dispatches) check_dispatch(d);
    return std::make_unique<CudaRecording>(std::move(dispatches), encoding, stream_);
}

uint64_t CudaDevice::submit(Recording& base) {
    auto& recording = static_cast<CudaRecording&>(base);
    const std::lock_guard lock(mutex_);
    throw_if_failed();
    Slot& slot = slots_[(submitted_ + 1) % IN_FLIGHT];
    check(cudaEventSynchronize(slot.end), "the GPU");  // of IN_FLIGHT tickets ago
    check(cudaEventRecord(slot.start, stream_), "submitting");
    check(cudaGraphLaunch(recording.executable, stream_), "submitting");
    check(cudaEventRecord(slot.end, stream_), "submitting");
    recording.announce();
    return ++submitted_;
}

RunTimes CudaDevice::wait(uint64_t ticket) {
    const std::lock_guard lock(mutex_);
    throw_if_failed();
    if (ticket + IN_FLIGHT <= submitted_) return {};  // submit() has waited for it
    Slot& slot = slots_[ticket % IN_FLIGHT];
    check(cudaEventSynchronize(slot.end), "the GPU");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, slot.start, slot.end), "the GPU's clock");
    return {0, milliseconds * 1e-3};
}

void CudaDevice::check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    failure_ = std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
               "); the process must be restarted to use this GPU again";
    throw DeviceError(failure_);
}

void CudaDevice::throw_if_failed() const {
    if (!failure_.empty()) throw DeviceError(failure_);
}

}  // namespace

std::unique_ptr<Device> open_device(const DeviceOptions&) { return std::make_unique<CudaDevice>(); }

}  // namespace zinc
