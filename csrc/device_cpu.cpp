// The CPU device: a recording is a list of jobs that the threads of a pool walk together, a few threadgroups at a time.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "cpu/native.h"
#include "cpu/pool.h"
#include "device.h"
#include "msl/executor.h"

namespace zinc {
namespace {

constexpr size_t max_params_bytes = 4096;  // Metal's limit for setBytes

size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

// host is null for private storage, as on a GPU with its own memory, so that misuse shows here too.
class CpuBuffer : public Buffer {
  public:
    CpuBuffer(size_t n, Storage storage) : mapped_(std::max(n, size_t(1))) {
        void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw DeviceError("the CPU device cannot allocate " + std::to_string(n) + " bytes");
        memory = static_cast<uint8_t*>(p);
        host = storage == Storage::shared ? p : nullptr;
        bytes = n;
    }
    CpuBuffer(void* pointer, size_t n) : memory(static_cast<uint8_t*>(pointer)) {
        host = pointer;
        bytes = n;
    }
    ~CpuBuffer() override {
        if (mapped_) munmap(memory, mapped_);
    }
    uint8_t* memory = nullptr;

  private:
    size_t mapped_ = 0;
};

class CpuPipeline : public Pipeline {
  public:
    const msl::KernelInfo* msl = nullptr;
    const NativeKernel* native = nullptr;
};

// A dispatch with everything resolved; the counters are reset before each run.
struct CpuJob {
    msl::Job msl;
    const NativeKernel* native = nullptr;
    Launch launch{};
    uint64_t n_threadgroups = 0;
    uint64_t chunk = 1;  // threadgroups handed out at a time
    uint32_t segment = 0;
    std::vector<std::shared_ptr<Buffer>> keep;  // alive as long as the recording
    std::vector<void*> buffers;
    std::vector<uint64_t> bytes;
    std::vector<uint8_t> params;
};

// Jobs between two barriers. n_left counts threadgroups that have not finished.
struct Segment {
    uint32_t begin = 0, end = 0;
    uint64_t n_threadgroups = 0;
#ifdef ZINC_CHECKED
    std::vector<msl::ByteRange> written;
#endif
};

struct alignas(64) Counter {
    std::atomic<uint64_t> value{0};
};

class CpuRecording : public Recording {
  public:
    std::vector<CpuJob> jobs;
    std::vector<Segment> segments;
    std::unique_ptr<Counter[]> next;    // per job: the first threadgroup that nobody has taken
    std::unique_ptr<Counter[]> n_left;  // per segment: threadgroups that have not finished
    uint32_t msl_threads = 0;           // the most that a fibre job has in a threadgroup
};

class CpuDevice : public Device {
  public:
    explicit CpuDevice(const DeviceOptions& options);

    DeviceInfo info() const override;
    std::shared_ptr<Buffer> alloc(size_t bytes, Storage storage) override;
    std::shared_ptr<Buffer> wrap(void* pointer, size_t bytes) override;
    std::shared_ptr<Pipeline> pipeline(const std::string& kernel) override;
    std::vector<std::string> kernel_names() const override { return msl::kernel_names(); }
    std::unique_ptr<Recording> record(std::vector<Dispatch> dispatches, Encoding encoding) override;
    void submit(Recording& recording) override;
    RunTimes wait() override;

  private:
    CpuJob make_job(const Dispatch& dispatch, uint32_t number) const;
    void make_segments(CpuRecording& recording, const std::vector<bool>& barrier) const;
    void run_alone(CpuRecording& recording);
    void walk(CpuRecording& recording, int worker);
    void walk_segment(CpuRecording& recording, size_t segment, int worker);
    void fail(const std::string& error);  // the first one stays
    void run_chunk(const CpuJob& job, uint64_t begin, uint64_t end, int worker);
    void throw_if_failed() const;

    const bool native_;
    Pool pool_;
    std::vector<std::unique_ptr<msl::Executor>> executors_;  // one per thread of the pool
    std::atomic<bool> failed_{false};
    std::mutex run_mutex_;  // the pool and the executors serve one recording at a time
    std::mutex error_mutex_;
    std::string error_;
    RunTimes times_;
    bool timed_ = false;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int pool_threads(const DeviceOptions& options) {
    constexpr int most = 1024;
    if (options.threads < 0 || options.threads > most)
        throw DeviceError("threads must be 0 (the cores there are) to " + std::to_string(most) + ", not " +
                          std::to_string(options.threads));
#ifdef ZINC_CHECKED
    return 1;  // the checker's memory of who touched what belongs to one thread
#endif
    return options.threads > 0 ? options.threads : usable_cores();
}

CpuDevice::CpuDevice(const DeviceOptions& options) : native_(options.native), pool_(pool_threads(options)) {
    if (!msl::registry_error().empty()) throw DeviceError(msl::registry_error());
    for (int i = 0; i < pool_.threads(); i++) executors_.push_back(std::make_unique<msl::Executor>());
}

DeviceInfo CpuDevice::info() const {
    DeviceInfo info;
    const std::string isa = isa_name(detected_isa()), threads = std::to_string(pool_.threads());
    info.name = "CPU (" + isa + ", " + threads + (pool_.threads() == 1 ? " thread)" : " threads)");
    info.backend = "cpu";
    info.unified_memory = true;
    info.working_set_bytes = usable_memory();
    info.max_buffer_bytes = info.working_set_bytes;
    info.max_threadgroup_bytes = msl::max_threadgroup_bytes;
    info.page_bytes = uint32_t(page_bytes());
    const std::vector<std::string> kernels = kernel_names();
    const auto is_native = [this](const std::string& name) { return native_ && find_native(name.c_str()); };
    const size_t n_native = size_t(std::count_if(kernels.begin(), kernels.end(), is_native));
    const std::string native = std::to_string(n_native) + " of " + std::to_string(kernels.size());
    info.features = {{"isa", isa}, {"threads", threads}, {"native kernels", native}};
    return info;
}

std::shared_ptr<Buffer> CpuDevice::alloc(size_t bytes, Storage storage) {
    return std::make_shared<CpuBuffer>(bytes, storage);
}

std::shared_ptr<Buffer> CpuDevice::wrap(void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % page_bytes() || bytes % page_bytes())
        throw DeviceError("wrap() takes whole pages of " + std::to_string(page_bytes()) + " bytes");
    return std::make_shared<CpuBuffer>(pointer, bytes);
}

std::shared_ptr<Pipeline> CpuDevice::pipeline(const std::string& kernel) {
    auto pipeline = std::make_shared<CpuPipeline>();
    pipeline->name = kernel;
    pipeline->msl = msl::find_kernel(kernel.c_str());
    if (!pipeline->msl) throw DeviceError("there is no kernel named " + kernel);
    if (native_) pipeline->native = find_native(kernel.c_str());
    pipeline->limits = {msl::max_threads, msl::simd_width, 0};
    return pipeline;
}

std::string binding_name(const Dispatch& d, size_t i) {
    return "kernel " + d.pipeline->name + ": binding " + std::to_string(i + 1);
}

void check_dispatch(const Dispatch& d, const msl::KernelInfo& kernel) {
    const std::string who = "kernel " + d.pipeline->name + ": ";
    if (d.params.size() != kernel.params_bytes || d.params.size() > max_params_bytes)
        throw DeviceError(who + "its parameters have " + std::to_string(kernel.params_bytes) + " bytes, not " +
                          std::to_string(d.params.size()));
    if (d.bindings.size() != kernel.n_buffers)
        throw DeviceError(who + "it has " + std::to_string(kernel.n_buffers) + " bindings, not " +
                          std::to_string(d.bindings.size()));
    if (d.threads == 0 || d.threads % msl::simd_width || d.threads > msl::max_threads)
        throw DeviceError(who + std::to_string(d.threads) + " threads are no multiple of 32 up to 1024");
    uint64_t total = 1;
    for (uint32_t n : d.grid)
        if (n == 0 || __builtin_mul_overflow(total, uint64_t(n), &total))
            throw DeviceError(who + "a grid of " + std::to_string(d.grid[0]) + " x " + std::to_string(d.grid[1]) +
                              " x " + std::to_string(d.grid[2]) + " threadgroups");
}

void check_binding(const Dispatch& d, size_t i, const msl::BufferSignature& signature) {
    const Binding& b = d.bindings[i];
    const std::string who = binding_name(d, i);
    if (!dynamic_cast<CpuBuffer*>(b.buffer.get())) throw DeviceError(who + " has no buffer of this device");
    if (b.offset > b.buffer->bytes || b.bytes > b.buffer->bytes - b.offset)
        throw DeviceError(who + " spans bytes " + std::to_string(b.offset) + " to " +
                          std::to_string(b.offset + b.bytes) + " of a buffer of " + std::to_string(b.buffer->bytes));
    if (b.bytes < signature.element_bytes)
        throw DeviceError(who + " has " + std::to_string(b.bytes) + " bytes, less than one element of " +
                          std::to_string(signature.element_bytes));
    const auto address = reinterpret_cast<uintptr_t>(static_cast<CpuBuffer&>(*b.buffer).memory) + b.offset;
    if (address % signature.alignment)
        throw DeviceError(who + " at offset " + std::to_string(b.offset) + " is not aligned to " +
                          std::to_string(signature.alignment) + " bytes");
}

// Threadgroups per turn of a thread: enough turns that an uneven machine stays busy, whole grains of a native kernel.
uint64_t chunk_size(const CpuJob& job, int threads) {
    constexpr uint64_t turns_per_thread = 6;
    const uint64_t grain = !job.native ? 1 : job.native->grain ? job.native->grain : job.launch.grid[0];
    const uint64_t n_grains = (job.n_threadgroups + grain - 1) / grain;
    return std::max<uint64_t>(1, n_grains / (uint64_t(threads) * turns_per_thread)) * grain;
}

CpuJob CpuDevice::make_job(const Dispatch& d, uint32_t number) const {
    const auto* pipeline = dynamic_cast<const CpuPipeline*>(d.pipeline.get());
    if (!pipeline) throw DeviceError("dispatch " + std::to_string(number) + " has no pipeline of this device");
    const msl::KernelInfo& kernel = *pipeline->msl;
    check_dispatch(d, kernel);
    CpuJob job;
    for (size_t i = 0; i < d.bindings.size(); i++) {
        check_binding(d, i, kernel.buffers[i]);
        job.keep.push_back(d.bindings[i].buffer);
        job.buffers.push_back(static_cast<CpuBuffer&>(*d.bindings[i].buffer).memory + d.bindings[i].offset);
        job.bytes.push_back(d.bindings[i].bytes);
    }
    job.params = d.params;
    job.native = pipeline->native;
    job.n_threadgroups = uint64_t(d.grid[0]) * d.grid[1] * d.grid[2];
    job.launch = {job.params.data(), uint32_t(job.params.size()),       job.buffers.data(),
                  job.bytes.data(),  {d.grid[0], d.grid[1], d.grid[2]}, d.threads};
    job.msl = {
        &kernel, job.params.data(), job.buffers.data(), job.bytes.data(), {d.grid[0], d.grid[1], d.grid[2]}, d.threads,
        number};
    job.chunk = chunk_size(job, pool_.threads());
    return job;
}

void CpuDevice::make_segments(CpuRecording& recording, const std::vector<bool>& barrier) const {
    for (uint32_t i = 0; i < recording.jobs.size(); i++) {
        if (i == 0 || barrier[i]) recording.segments.push_back({});
        Segment& segment = recording.segments.back();
        if (segment.n_threadgroups == 0) segment.begin = i;
        segment.end = i + 1;
        CpuJob& job = recording.jobs[i];
        segment.n_threadgroups += job.n_threadgroups;
        if (!job.native) recording.msl_threads = std::max(recording.msl_threads, job.msl.threads);
#ifdef ZINC_CHECKED
        for (uint32_t b = 0; b < job.msl.kernel->n_buffers; b++) {
            const auto begin = reinterpret_cast<uintptr_t>(job.buffers[b]);
            if (job.msl.kernel->buffers[b].writable) segment.written.push_back({begin, begin + job.bytes[b]});
        }
#endif
    }
}

std::unique_ptr<Recording> CpuDevice::record(std::vector<Dispatch> dispatches, Encoding encoding) {
    throw_if_failed();
    auto recording = std::make_unique<CpuRecording>();
    std::vector<bool> barrier;
    for (const Dispatch& d : dispatches) {
        recording->jobs.push_back(make_job(d, uint32_t(recording->jobs.size())));
        barrier.push_back(d.barrier || encoding == Encoding::serial);
    }
    make_segments(*recording, barrier);
    recording->next = std::make_unique<Counter[]>(recording->jobs.size());
    recording->n_left = std::make_unique<Counter[]>(recording->segments.size());
    const std::lock_guard lock(run_mutex_);
    for (auto& executor : executors_) executor->reserve(recording->msl_threads);
    return recording;
}

void CpuDevice::submit(Recording& base) {
    throw_if_failed();
    auto& recording = static_cast<CpuRecording&>(base);
    const std::lock_guard lock(run_mutex_);
    const double start = now();
    if (pool_.threads() == 1) {
        run_alone(recording);
    } else {
        for (size_t i = 0; i < recording.jobs.size(); i++) recording.next[i].value.store(0, std::memory_order_relaxed);
        for (size_t s = 0; s < recording.segments.size(); s++)
            recording.n_left[s].value.store(recording.segments[s].n_threadgroups, std::memory_order_relaxed);
        struct Context {
            CpuDevice* device;
            CpuRecording* recording;
        } context{this, &recording};
        pool_.run(
            [](void* c, int worker) {
                auto& [device, walked] = *static_cast<Context*>(c);
                device->walk(*walked, worker);
            },
            &context);
    }
    if (!timed_) times_.gpu_start = start;
    timed_ = true;
    times_.gpu_end = now();
}

void CpuDevice::run_alone(CpuRecording& recording) {
    for (Segment& segment : recording.segments) {
#ifdef ZINC_CHECKED
        executors_[0]->checker().begin_segment(segment.written);
#endif
        for (uint32_t i = segment.begin; i < segment.end; i++)
            run_chunk(recording.jobs[i], 0, recording.jobs[i].n_threadgroups, 0);
    }
}

// Every worker walks all segments; nobody enters one before the work of the last is done, whoever did it.
void CpuDevice::walk(CpuRecording& recording, int worker) {
    for (size_t s = 0; s < recording.segments.size(); s++) {
        walk_segment(recording, s, worker);
        for (Backoff backoff; recording.n_left[s].value.load(std::memory_order_acquire) != 0;) backoff.pause();
    }
}

void CpuDevice::walk_segment(CpuRecording& recording, size_t s, int worker) {
    const Segment& segment = recording.segments[s];
    for (uint32_t i = segment.begin; i < segment.end; i++) {
        const CpuJob& job = recording.jobs[i];
        std::atomic<uint64_t>& next = recording.next[i].value;
        while (next.load(std::memory_order_relaxed) < job.n_threadgroups) {
            const uint64_t begin = next.fetch_add(job.chunk, std::memory_order_relaxed);
            if (begin >= job.n_threadgroups) break;
            const uint64_t end = std::min(begin + job.chunk, job.n_threadgroups);
            run_chunk(job, begin, end, worker);
            recording.n_left[s].value.fetch_sub(end - begin, std::memory_order_acq_rel);
        }
    }
}

void CpuDevice::run_chunk(const CpuJob& job, uint64_t begin, uint64_t end, int worker) {
    if (failed_.load(std::memory_order_relaxed)) return;
    if (job.native) {
        try {
            job.native->fn(job.launch, begin, end);
        } catch (const std::exception&) {  // bad_alloc is all that they throw; nothing may leave a pool's thread
            fail("kernel " + std::string(job.msl.kernel->name) + ": no memory for its tiles; free some and load again");
        }
        return;
    }
    msl::Executor& executor = *executors_[size_t(worker)];
    if (!executor.run(job.msl, begin, end)) fail(executor.error());
}

void CpuDevice::fail(const std::string& error) {
    const std::lock_guard lock(error_mutex_);
    if (!failed_) error_ = error;
    failed_ = true;
}

RunTimes CpuDevice::wait() {
    throw_if_failed();
    const std::lock_guard lock(run_mutex_);
    timed_ = false;
    return times_;
}

void CpuDevice::throw_if_failed() const {
    if (failed_) throw DeviceError(error_);
}

}  // namespace

std::unique_ptr<Device> open_device(const DeviceOptions& options) { return std::make_unique<CpuDevice>(options); }

}  // namespace zinc
