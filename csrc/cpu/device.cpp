// The CPU device: a recording is a list of jobs. The threads of a pool walk it together, a few threadgroups at a time.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>

#include "cpu/native/kernel.h"
#include "cpu/pool.h"
#include "core/device.h"
#include "core/check_dispatch.h"
#include "msl/run/executor.h"

namespace zinc {
namespace {

size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

class CpuBuffer : public Buffer {
  public:
    explicit CpuBuffer(size_t n) : mapped_(std::max(n, size_t(1))) {
        void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            throw OutOfMemoryError("the CPU device cannot allocate " + std::to_string(n) + " bytes; use a smaller " +
                                   "context or model, or close other programs");
        host = p;
        bytes = n;
    }
    CpuBuffer(void* pointer, size_t n) {
        host = pointer;
        bytes = n;
    }
    ~CpuBuffer() override {
        if (mapped_) munmap(host, mapped_);
    }

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
    NativeLaunch launch{};
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

// The progress of one command buffer.
struct Progress {
    Progress(size_t n_jobs, size_t n_segments)
        : next(std::make_unique<Counter[]>(n_jobs)), n_left(std::make_unique<Counter[]>(n_segments)) {}

    std::unique_ptr<Counter[]> next;    // per job: the first threadgroup that nobody has taken
    std::unique_ptr<Counter[]> n_left;  // per segment: threadgroups that have not finished
};

// The first failure, kept for good. Setting it allocates nothing: it may be a failure of memory.
class Failure {
  public:
    bool any() const { return failed_.load(std::memory_order_relaxed); }

    void set(const char* before, const char* error, const char* after = "") noexcept {
        const std::lock_guard lock(mutex_);
        if (!failed_) snprintf(error_, sizeof(error_), "%s%s%s", before, error, after);
        failed_ = true;
    }
    void set_no_memory(const char* kernel) noexcept {
        no_memory_ = no_memory_ || !failed_;
        set("kernel ", kernel, ": no memory for its tiles; free some and load again");
    }

    void check() {
        if (!failed_) return;
        const std::lock_guard lock(mutex_);
        if (no_memory_) throw OutOfMemoryError(error_);
        throw DeviceError(error_);
    }

  private:
    std::atomic<bool> failed_{false}, no_memory_{false};
    std::mutex mutex_;
    char error_[1280] = "";
};

// The objects of the device that its recordings share. The last owner ends the threads.
struct Crew {
    explicit Crew(int threads) : executors(size_t(threads)), workspaces(size_t(threads)), pool(threads) {
        for (auto& executor : executors) executor = std::make_unique<msl::Executor>();
    }

    std::vector<std::unique_ptr<msl::Executor>> executors;  // one per thread of the pool
    std::vector<Workspace> workspaces;                      // likewise
    Failure failure;
    Pool pool;  // last: its threads use the others
};

class CpuRecording : public Recording, public Pool::Job {
  public:
    CpuRecording(std::shared_ptr<Crew> crew, std::vector<CpuJob> jobs, const std::vector<bool>& barrier);
    ~CpuRecording() override {
        crew->pool.alone([] {});
    }

    void prepare(uint32_t set) override;
    void run(const Pool::Turn& turn) noexcept override;

    const std::shared_ptr<Crew> crew;

  private:
    void make_segments(const std::vector<bool>& barrier);
    uint32_t msl_threads() const;
    void run_alone(const Pool::Turn& turn);
    void walk_segment(size_t segment, const Pool::Turn& turn);
    void run_chunk(const CpuJob& job, uint64_t begin, uint64_t end, const Pool::Turn& turn);

    std::vector<CpuJob> jobs_;
    std::vector<Segment> segments_;
    std::vector<Progress> progress_;  // one for each replay that may be in flight
};

class CpuDevice : public Device {
  public:
    explicit CpuDevice(const DeviceOptions& options);

    DeviceInfo info() const override;
    std::shared_ptr<Buffer> alloc(size_t bytes, bool shared) override;
    std::shared_ptr<Buffer> wrap(void* pointer, size_t bytes) override;
    std::shared_ptr<Pipeline> pipeline(const std::string& kernel) override;
    std::vector<std::string> kernel_names() const override { return msl::kernel_names(); }
    std::unique_ptr<Recording> record(std::vector<Dispatch> dispatches) override;
    uint64_t submit(Recording& recording, const Poll& poll) override;
    RunTimes wait(uint64_t ticket, const Poll& poll) override;
    void drop(uint64_t ticket) override { crew_->pool.drop(ticket); }
    void copy(const std::vector<Copy>& copies) override;

  private:
    CpuJob make_job(const Dispatch& dispatch, uint32_t number) const;

    const bool native_;
    const std::shared_ptr<Crew> crew_;
    const std::string n_native_;  // "17 of 20": kernels with a native version
};

int pool_threads(const DeviceOptions& options) {
    constexpr int most = 1024;
    if (options.threads < 0 || options.threads > most)
        throw DeviceError("threads must be 0 (the cores there are) to " + std::to_string(most) + ", not " +
                          std::to_string(options.threads));
#ifdef ZINC_CHECKED
    return 1;  // the checker's memory of accesses belongs to one thread
#endif
    return options.threads > 0 ? options.threads : usable_cores();
}

std::string count_native(bool native) {
    const std::vector<std::string> kernels = msl::kernel_names();
    const auto is_native = [native](const std::string& name) { return native && find_native(name.c_str()); };
    const size_t n = size_t(std::count_if(kernels.begin(), kernels.end(), is_native));
    return std::to_string(n) + " of " + std::to_string(kernels.size());
}

CpuDevice::CpuDevice(const DeviceOptions& options)
    : native_(options.native), crew_(std::make_shared<Crew>(pool_threads(options))),
      n_native_(count_native(options.native)) {
    if (!msl::registry_error().empty()) throw DeviceError(msl::registry_error());
}

DeviceInfo CpuDevice::info() const {
    DeviceInfo info;
    const std::string isa = isa_name(detected_isa()), threads = std::to_string(crew_->pool.threads());
    info.name = "CPU (" + isa + ", " + threads + (threads == "1" ? " thread)" : " threads)");
    info.backend = "cpu";
    info.unified_memory = true;
    info.working_set_bytes = usable_memory();
    info.max_buffer_bytes = info.working_set_bytes;
    info.max_threadgroup_bytes = msl::max_threadgroup_bytes;
    info.page_bytes = uint32_t(page_bytes());
    info.asynchronous = crew_->pool.threads() > 1;
    info.features = {{"isa", isa}, {"threads", threads}, {"native kernels", n_native_}};
    return info;
}

// The host sees all memory.
std::shared_ptr<Buffer> CpuDevice::alloc(size_t bytes, bool) { return std::make_shared<CpuBuffer>(bytes); }

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

void check_signature(const Dispatch& d, const msl::KernelInfo& kernel, const std::string& who) {
    if (d.params.size() != kernel.params_bytes)
        throw DeviceError(who + "its parameters have " + std::to_string(kernel.params_bytes) + " bytes, not " +
                          std::to_string(d.params.size()));
    if (d.bindings.size() != kernel.n_buffers)
        throw DeviceError(who + "it has " + std::to_string(kernel.n_buffers) + " buffers, not " +
                          std::to_string(d.bindings.size()));
}

void check_binding(const Binding& b, const msl::BufferSignature& signature, const std::string& which) {
    if (!dynamic_cast<CpuBuffer*>(b.buffer.get())) throw DeviceError(which + "is of another device");
    if (b.bytes < signature.element_bytes)
        throw DeviceError(which + "has " + std::to_string(b.bytes) + " bytes, less than one element of " +
                          std::to_string(signature.element_bytes));
    const auto address = reinterpret_cast<uintptr_t>(b.buffer->host) + b.offset;
    if (address % signature.alignment)
        throw DeviceError(which + "at offset " + std::to_string(b.offset) + " is not aligned to " +
                          std::to_string(signature.alignment) + " bytes");
}

// Threadgroups per turn of a thread. Enough turns keep an uneven machine busy. A turn is whole grains of a native
// kernel.
uint64_t chunk_size(const CpuJob& job, int threads) {
    constexpr uint64_t turns_per_thread = 6;
    const uint64_t grain = !job.native ? 1 : job.native->grain ? job.native->grain : job.launch.grid[0];
    const uint64_t n_grains = (job.n_threadgroups + grain - 1) / grain;
    return std::max<uint64_t>(1, n_grains / (uint64_t(threads) * turns_per_thread)) * grain;
}

CpuJob CpuDevice::make_job(const Dispatch& d, uint32_t number) const {
    const auto* pipeline = dynamic_cast<const CpuPipeline*>(d.pipeline.get());
    check_dispatch(d, number);
    const std::string who = dispatch_name(d, number);
    if (!pipeline) throw DeviceError(who + "the kernel is of another device");
    const msl::KernelInfo& kernel = *pipeline->msl;
    check_signature(d, kernel, who);
    CpuJob job;
    for (size_t i = 0; i < d.bindings.size(); i++) {
        check_binding(d.bindings[i], kernel.buffers[i], binding_name(who, i));
        job.keep.push_back(d.bindings[i].buffer);
        job.buffers.push_back(static_cast<uint8_t*>(d.bindings[i].buffer->host) + d.bindings[i].offset);
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
    job.chunk = chunk_size(job, crew_->pool.threads());
    return job;
}

std::unique_ptr<Recording> CpuDevice::record(std::vector<Dispatch> dispatches) {
    crew_->failure.check();
    std::vector<CpuJob> jobs;
    std::vector<bool> barrier;
    for (const Dispatch& d : dispatches) {
        jobs.push_back(make_job(d, uint32_t(jobs.size())));
        barrier.push_back(d.barrier);
    }
    return std::make_unique<CpuRecording>(crew_, std::move(jobs), barrier);
}

uint64_t CpuDevice::submit(Recording& recording, const Poll& poll) {
    crew_->failure.check();
    return crew_->pool.submit(static_cast<CpuRecording&>(recording), poll);
}

RunTimes CpuDevice::wait(uint64_t ticket, const Poll& poll) {
    const RunTimes times = crew_->pool.wait(ticket, poll);
    crew_->failure.check();
    return times;
}

// The calling thread copies, once all jobs in flight are done.
void CpuDevice::copy(const std::vector<Copy>& copies) {
    crew_->failure.check();
    crew_->pool.alone([&copies] {
        for (const Copy& c : copies)
            std::memcpy(static_cast<char*>(c.to->host) + c.offset,
                        static_cast<const char*>(c.from->host) + c.from_offset, c.bytes);
    });
    crew_->failure.check();
}

// ---- recording

CpuRecording::CpuRecording(std::shared_ptr<Crew> owner, std::vector<CpuJob> jobs, const std::vector<bool>& barrier)
    : crew(std::move(owner)), jobs_(std::move(jobs)) {
    make_segments(barrier);
    for (uint32_t i = 0; i < Pool::depth; i++) progress_.emplace_back(jobs_.size(), segments_.size());
    crew->pool.alone([this] {
        for (auto& executor : crew->executors) executor->reserve(msl_threads());
    });
}

void CpuRecording::make_segments(const std::vector<bool>& barrier) {
    for (uint32_t i = 0; i < jobs_.size(); i++) {
        if (i == 0 || barrier[i]) segments_.push_back({i, i, 0});
        Segment& segment = segments_.back();
        segment.end = i + 1;
        segment.n_threadgroups += jobs_[i].n_threadgroups;
#ifdef ZINC_CHECKED
        const CpuJob& job = jobs_[i];
        for (uint32_t b = 0; b < job.msl.kernel->n_buffers; b++) {
            const auto begin = reinterpret_cast<uintptr_t>(job.buffers[b]);
            if (job.msl.kernel->buffers[b].writable) segment.written.push_back({begin, begin + job.bytes[b]});
        }
#endif
    }
}

// The most threads that a threadgroup of fibres has.
uint32_t CpuRecording::msl_threads() const {
    uint32_t most = 0;
    for (const CpuJob& job : jobs_)
        if (!job.native) most = std::max(most, job.msl.threads);
    return most;
}

void CpuRecording::prepare(uint32_t set) {
    Progress& progress = progress_[set];
    for (size_t i = 0; i < jobs_.size(); i++) progress.next[i].value.store(0, std::memory_order_relaxed);
    for (size_t s = 0; s < segments_.size(); s++)
        progress.n_left[s].value.store(segments_[s].n_threadgroups, std::memory_order_relaxed);
}

// Every worker walks all segments. No worker enters a segment before all work of the one before is done.
void CpuRecording::run(const Pool::Turn& turn) noexcept {
    const WorkspaceScope lent(crew->workspaces[size_t(turn.worker)]);
    if (crew->pool.threads() == 1) return run_alone(turn);
    for (size_t s = 0; s < segments_.size() && !turn.is_over(); s++) {
        walk_segment(s, turn);
        const std::atomic<uint64_t>& n_left = progress_[turn.set].n_left[s].value;
        for (Backoff backoff; n_left.load(std::memory_order_acquire) != 0 && !turn.is_over(); backoff.pause())
            if (turn.inquiry && backoff.exhausted()) turn.inquiry->make();
    }
}

void CpuRecording::run_alone(const Pool::Turn& turn) {
    for (Segment& segment : segments_) {
#ifdef ZINC_CHECKED
        crew->executors[0]->checker().begin_segment(segment.written);
#endif
        for (uint32_t i = segment.begin; i < segment.end; i++) {
            const uint64_t n = jobs_[i].n_threadgroups, chunk = turn.inquiry ? jobs_[i].chunk : n;
            for (uint64_t at = 0; at < n && !turn.is_over(); at += chunk)
                run_chunk(jobs_[i], at, std::min(at + chunk, n), turn);
        }
    }
}

void CpuRecording::walk_segment(size_t s, const Pool::Turn& turn) {
    const Segment& segment = segments_[s];
    Progress& progress = progress_[turn.set];
    for (uint32_t i = segment.begin; i < segment.end; i++) {
        const CpuJob& job = jobs_[i];
        std::atomic<uint64_t>& next = progress.next[i].value;
        while (next.load(std::memory_order_relaxed) < job.n_threadgroups && !turn.is_over()) {
            const uint64_t begin = next.fetch_add(job.chunk, std::memory_order_relaxed);
            if (begin >= job.n_threadgroups) break;
            const uint64_t end = std::min(begin + job.chunk, job.n_threadgroups);
            run_chunk(job, begin, end, turn);
            progress.n_left[s].value.fetch_sub(end - begin, std::memory_order_acq_rel);
        }
    }
}

// Skips the work if the job was dropped or something failed.
void CpuRecording::run_chunk(const CpuJob& job, uint64_t begin, uint64_t end, const Pool::Turn& turn) {
    if (turn.inquiry) turn.inquiry->make();
    Failure& failure = crew->failure;
    if (failure.any() || turn.dropped.load(std::memory_order_relaxed)) return;
    try {
        msl::Executor& executor = *crew->executors[size_t(turn.worker)];
        if (job.native)
            job.native->fn(job.launch, begin, end);
        else if (!executor.run(job.msl, begin, end))
            failure.set("", executor.error());
    } catch (...) {  // only std::bad_alloc is thrown; no exception may leave a thread of the pool
        failure.set_no_memory(job.msl.kernel->name);
    }
}

}  // namespace

std::unique_ptr<Device> open_device(const DeviceOptions& options) { return std::make_unique<CpuDevice>(options); }

}  // namespace zinc
