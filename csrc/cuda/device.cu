// The CUDA device: weights in device memory, a recording as a CUDA graph whose edges are the plan's barriers. Shared
// buffers are pinned host memory, which kernels read and write themselves. So the host copies nothing between tokens.
#include <algorithm>
#include <array>
#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cuda/graph.h"

namespace zinc {
namespace {

using namespace cuda;

constexpr uint64_t MAX_BUFFER = 4ull << 30;  // size of an upload's pieces: the caller can show progress
constexpr uint32_t MAX_GRID_YZ = 65535;

class CudaRecording : public Recording {
  public:
    CudaRecording(std::vector<Dispatch> dispatches, Edges edges, cudaStream_t stream);
    ~CudaRecording() override { synchronize(stream_); }  // work in flight uses the buffers

    cudaError_t launch() const { return cudaGraphLaunch(executable_.get(), stream_); }

  private:
    GraphExec build(Edges allowed) const;

    cudaStream_t stream_;
    std::vector<Dispatch> dispatches_;  // keeps the buffers
    GraphExec executable_;
};

CudaRecording::CudaRecording(std::vector<Dispatch> dispatches, Edges edges, cudaStream_t stream)
    : stream_(stream), dispatches_(std::move(dispatches)) {
    executable_ = build(edges);
    check(cudaGraphUpload(executable_.get(), stream_), "a graph");
}

// True if nearly every kernel stands alone between two barriers. Only then are kernels launched early: a graph with
// early launches runs no two kernels side by side. With them, on an H100, a decode step takes 8% less time, and a
// prefill of 512 tokens takes 10% more.
bool one_by_one(const std::vector<Dispatch>& dispatches) {
    const auto barriers =
        std::count_if(dispatches.begin(), dispatches.end(), [](const Dispatch& d) { return d.barrier; });
    return size_t(barriers) * 8 >= dispatches.size() * 7;
}

GraphExec CudaRecording::build(Edges allowed) const {
    const bool early = allowed == Edges::early && one_by_one(dispatches_);
    GraphBuilder graph;
    for (const Dispatch& d : dispatches_) {
        if (d.barrier) graph.barrier();
        // A kernel that does not fit at once gains nothing by waiting on the device: with early launches its step is 2%
        // slower.
        graph.add_kernel(d, early && fits_at_once(d) ? Edges::early : Edges::full);
    }
    return graph.instantiate();
}

// ---- The device -----------------------------------------------------------------------------------------------------

class CudaDevice : public Device {
  public:
    CudaDevice();
    ~CudaDevice() override { synchronize(stream_.get()); }

    DeviceInfo info() const override;
    std::shared_ptr<Buffer> alloc(size_t bytes, bool shared) override {
        return std::make_shared<CudaBuffer>(bytes, shared, stream_);
    }
    std::shared_ptr<Buffer> wrap(void* pointer, size_t bytes) override;
    std::shared_ptr<Pipeline> pipeline(const std::string& kernel) override;
    std::vector<std::string> kernel_names() const override { return msl::kernel_names(); }
    std::unique_ptr<Recording> record(std::vector<Dispatch> dispatches) override;
    uint64_t submit(Recording& recording, const Poll& poll) override;
    RunTimes wait(uint64_t ticket, const Poll& poll) override;
    void copy(const std::vector<Copy>& copies) override;
    std::vector<double> time_each(const std::vector<Dispatch>& dispatches) override;

  private:
    struct Slot {
        Event start, end;
    };
    static constexpr uint64_t IN_FLIGHT = 4;

    void check_dispatches(const std::vector<Dispatch>& dispatches) const;
    cudaError_t await(cudaEvent_t event, const Poll& poll);
    void keep_failure(cudaError_t status, const char* what);  // throws, now and at every later call
    void throw_if_failed() const;

    Stream stream_;
    std::optional<Upload> upload_;  // until the first recording: then the weights are there
    cudaDeviceProp properties_{};
    Edges edges_ = Edges::full;
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
    check(cudaGetDeviceProperties(&properties_, 0), "the GPU's properties");
    stream_ = make_stream();
    for (Slot& slot : slots_) slot = {make_event(), make_event()};
    // Before compute capability 9 kernels do not wait by themselves. Drivers before CUDA 12.3 lack early edges.
    check(cudaDriverGetVersion(&driver), "the driver's version");
    edges_ = properties_.major >= 9 && driver >= 12030 && CUDART_VERSION >= 12030 ? Edges::early : Edges::full;
}

DeviceInfo CudaDevice::info() const {
    DeviceInfo info;
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "the GPU's memory");
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
        {"L2 cache", std::to_string(properties_.l2CacheSize)},
        {"early launches", edges_ == Edges::early ? "yes" : "no"}};
    return info;
}

std::shared_ptr<Buffer> CudaDevice::wrap(void* pointer, size_t bytes) {
    auto buffer = std::make_shared<CudaBuffer>(bytes, false, stream_);
    buffer->read_only = true;
    if (!upload_) upload_.emplace(stream_.get());
    upload_->copy(buffer->memory(), pointer, bytes);
    return buffer;
}

std::shared_ptr<Pipeline> CudaDevice::pipeline(const std::string& kernel) {
    auto pipeline = std::make_shared<CudaPipeline>();
    pipeline->name = kernel;
    pipeline->kernel = msl::find_kernel(kernel.c_str());
    if (!pipeline->kernel) throw DeviceError("there is no kernel named " + kernel);
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, pipeline->kernel->global),
          "kernel " + kernel + " was not built for this GPU");
    pipeline->limits = {uint32_t(attributes.maxThreadsPerBlock), msl::simd_width, uint32_t(attributes.sharedSizeBytes)};
    return pipeline;
}

void CudaDevice::check_dispatches(const std::vector<Dispatch>& dispatches) const {
    for (size_t i = 0; i < dispatches.size(); i++) {
        const Dispatch& d = dispatches[i];
        check_dispatch(d, i);
        const std::string who = dispatch_name(d, i);
        const auto* pipeline = dynamic_cast<const CudaPipeline*>(d.pipeline.get());
        if (!pipeline) throw DeviceError(who + "its pipeline is another device's");
        const msl::KernelInfo& kernel = *pipeline->kernel;
        if (d.params.size() != kernel.params_bytes || d.bindings.size() != kernel.n_buffers)
            throw DeviceError(who + "it takes " + std::to_string(kernel.params_bytes) + " bytes of parameters and " +
                              std::to_string(kernel.n_buffers) + " buffers");
        if (d.grid[1] > MAX_GRID_YZ || d.grid[2] > MAX_GRID_YZ)
            throw DeviceError(who + "CUDA takes at most 65535 threadgroups along y and z");
        for (size_t b = 0; b < d.bindings.size(); b++)
            if (!dynamic_cast<CudaBuffer*>(d.bindings[b].buffer.get()))
                throw DeviceError(binding_name(who, b) + "is another device's");
    }
}

std::unique_ptr<Recording> CudaDevice::record(std::vector<Dispatch> dispatches) {
    check_dispatches(dispatches);
    upload_.reset();
    return std::make_unique<CudaRecording>(std::move(dispatches), edges_, stream_.get());
}

// Waits for an event as the driver does, by asking for it again and again. A long wait yields the core.
cudaError_t CudaDevice::await(cudaEvent_t event, const Poll& poll) {
    if (!poll) return cudaEventSynchronize(event);
    using Clock = std::chrono::steady_clock;
    const auto patient = Clock::now() + std::chrono::milliseconds(20);
    for (;;) {
        const cudaError_t status = cudaEventQuery(event);
        if (status != cudaErrorNotReady) return status;
        poll();
        if (Clock::now() > patient) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}

uint64_t CudaDevice::submit(Recording& base, const Poll& poll) {
    const auto* recording = dynamic_cast<const CudaRecording*>(&base);
    if (!recording) throw DeviceError("this recording is another device's");
    const std::lock_guard lock(mutex_);
    throw_if_failed();
    Slot& slot = slots_[(submitted_ + 1) % IN_FLIGHT];
    keep_failure(await(slot.end.get(), poll), "the GPU");  // of IN_FLIGHT tickets ago
    keep_failure(cudaEventRecord(slot.start.get(), stream_.get()), "submitting");
    keep_failure(recording->launch(), "submitting");
    keep_failure(cudaEventRecord(slot.end.get(), stream_.get()), "submitting");
    return ++submitted_;
}

RunTimes CudaDevice::wait(uint64_t ticket, const Poll& poll) {
    std::unique_lock lock(mutex_);
    throw_if_failed();
    if (ticket + IN_FLIGHT <= submitted_) return {};  // submit() has waited for it
    const Slot& slot = slots_[ticket % IN_FLIGHT];
    lock.unlock();  // another thread may submit during the wait
    const cudaError_t status = await(slot.end.get(), poll);
    lock.lock();
    keep_failure(status, "the GPU");
    if (ticket + IN_FLIGHT <= submitted_) return {};  // the slot is in use again
    float milliseconds = 0;
    keep_failure(cudaEventElapsedTime(&milliseconds, slot.start.get(), slot.end.get()), "the GPU's clock");
    return {0, milliseconds * 1e-3};
}

// The stream keeps the order, so the host waits for nothing. Buffers that were copied wait when they are released.
void CudaDevice::copy(const std::vector<Copy>& copies) {
    const std::lock_guard lock(mutex_);
    throw_if_failed();
    for (const Copy& c : copies) {
        const auto* to = dynamic_cast<const CudaBuffer*>(c.to.get());
        const auto* from = dynamic_cast<const CudaBuffer*>(c.from.get());
        if (!to || !from) throw DeviceError("a buffer of a copy is another device's");
        to->copied = from->copied = true;
        keep_failure(cudaMemcpyAsync(static_cast<char*>(to->memory()) + c.offset,
                                     static_cast<const char*>(from->memory()) + c.from_offset, c.bytes,
                                     cudaMemcpyDefault, stream_.get()),
                     "a copy");
    }
}

std::vector<double> CudaDevice::time_each(const std::vector<Dispatch>& dispatches) {
    check_dispatches(dispatches);
    std::vector<Event> events;
    GraphBuilder graph;
    const auto stamp = [&] {
        graph.barrier();
        graph.add_event(events.emplace_back(make_event()).get());
        graph.barrier();
    };
    stamp();
    for (const Dispatch& d : dispatches) {
        graph.add_kernel(d, Edges::full);
        stamp();
    }
    const GraphExec executable = graph.instantiate();
    const std::lock_guard lock(mutex_);
    throw_if_failed();
    keep_failure(cudaGraphLaunch(executable.get(), stream_.get()), "submitting");
    keep_failure(cudaStreamSynchronize(stream_.get()), "the GPU");
    std::vector<double> seconds;
    for (size_t i = 0; i < dispatches.size(); i++) {
        float milliseconds = 0;
        keep_failure(cudaEventElapsedTime(&milliseconds, events[i].get(), events[i + 1].get()), "the GPU's clock");
        seconds.push_back(milliseconds * 1e-3);
    }
    return seconds;
}

void CudaDevice::keep_failure(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    failure_ = std::string(what) + ": " + describe(status) + "; the process must be restarted to use this GPU again";
    throw DeviceError(failure_);
}

void CudaDevice::throw_if_failed() const {
    if (!failure_.empty()) throw DeviceError(failure_);
}

}  // namespace

std::unique_ptr<Device> open_device(const DeviceOptions&) { return std::make_unique<CudaDevice>(); }

}  // namespace zinc
