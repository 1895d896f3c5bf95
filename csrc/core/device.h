// The whole device surface on one page. Exactly one backend is linked into each extension module:
// metal/device.mm, cpu/device.cpp or cuda/device.cu defines open_device() and derives these classes.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/file_map.h"

namespace zinc {

// Any failure of a device: absent, refused an allocation, failed while running. Python sees
// zincmetal.errors.DeviceError.
struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// No memory is left for the request. Python sees zincmetal.errors.OutOfMemoryError.
struct OutOfMemoryError : DeviceError {
    using DeviceError::DeviceError;
};

// The process that opened a device. A forked child has a copy of its memory, but not its threads and not the driver's
// state. In the child the device must not be used, waited for or released.
class OpeningProcess {
  public:
    bool is_another() const { return getpid() != id_; }
    void check() const {
        if (is_another())
            throw DeviceError("the device was opened before a fork, and is the parent's: load the model in the child, "
                              "or with Metal start processes by multiprocessing's \"spawn\"");
    }

  private:
    const pid_t id_ = getpid();
};

// Throws DeviceError if a mapped file has lost pages that were read.
inline void check_file(const FileDamage& file) {
    if (file.damaged.load(std::memory_order_relaxed))
        throw DeviceError(std::string("the file ") + file.path +
                          " was cut or became unreadable while it was in use; load it again");
}

struct DeviceInfo {
    std::string name;     // "Apple M4 Max", "CPU (avx512, 2 threads)"
    std::string backend;  // "metal", "cpu", "cuda"
    bool unified_memory = false;
    uint64_t working_set_bytes = 0;  // resident memory at most, by the device's recommendation
    uint64_t allocated_bytes = 0;    // of these, taken by the process so far; 0 if the device does not tell
    uint64_t max_buffer_bytes = 0;
    uint32_t max_threadgroup_bytes = 0;
    uint32_t page_bytes = 0;    // alignment that wrap() asks of a pointer and a length
    bool asynchronous = false;  // submit() returns while the work goes on
    // Name and value of every further query, in the order of the start-up log: family, ray tracing, ISA, threads ...
    std::vector<std::pair<std::string, std::string>> features;
};

struct DeviceOptions {
    int threads = 0;            // CPU: 0 takes all cores
    bool native = true;         // CPU: use native kernels
    std::string kernel_folder;  // Metal: the folder of zincmetal.metallib or the .metal sources
};

class Device;

// Device memory. host is null if the host cannot see it: on a device with its own memory, unless it was allocated as
// shared. A wrapped buffer borrows its memory, and the owner outlives the buffer.
class Buffer {
  public:
    virtual ~Buffer() = default;
    // True if write() and read() work. [offset, offset + n) lies in the buffer. Both come after the copies that were
    // asked for before (Device::copy). The caller makes sure of two things, and may ignore steps in flight otherwise:
    // no step in flight uses the bytes that write() changes, and none writes the bytes that read() returns. Other bytes
    // of the same buffer may be in use: a page of a cache is written while steps work on other pages.
    virtual bool copies() const { return host != nullptr; }
    virtual void write(size_t offset, const void* from, size_t n) {
        std::memcpy(static_cast<char*>(host) + offset, from, n);
    }
    virtual void read(size_t offset, void* to, size_t n) const {
        std::memcpy(to, static_cast<const char*>(host) + offset, n);
    }
    void* host = nullptr;
    size_t bytes = 0;
    bool read_only = false;            // a mapped file: the host must not write
    const FileDamage* file = nullptr;  // of the mapped file that it lies in, or null
    std::weak_ptr<Device> device;      // that copies it; set by the binding
};

// A copy of bytes from one buffer to another, or within one buffer between ranges that do not overlap.
struct Copy {
    std::shared_ptr<Buffer> to;
    uint64_t offset = 0;
    std::shared_ptr<const Buffer> from;
    uint64_t from_offset = 0;
    uint64_t bytes = 0;
};

// Metal copies words on macOS: offsets and sizes of a copy are multiples of this, on every device.
constexpr uint64_t COPY_MULTIPLE = 4;

struct PipelineLimits {
    uint32_t max_threads = 0;        // threads in a threadgroup, for this pipeline on this device
    uint32_t simd_width = 0;         // 32, or these kernels cannot run on the device
    uint32_t threadgroup_bytes = 0;  // static threadgroup memory
};

// A compiled kernel.
class Pipeline {
  public:
    virtual ~Pipeline() = default;
    std::string name;
    PipelineLimits limits;
};

struct Binding {
    std::shared_ptr<Buffer> buffer;
    uint64_t offset = 0;
    uint64_t bytes = 0;  // the extent that the kernel may touch, from offset
};

// One kernel launch. params go to buffer index 0 by value (setBytes, at most 4 KiB), bindings to 1, 2, ...
struct Dispatch {
    std::shared_ptr<Pipeline> pipeline;
    std::vector<uint8_t> params;
    std::vector<Binding> bindings;
    uint32_t grid[3] = {1, 1, 1};  // threadgroups
    uint32_t threads = 32;         // per threadgroup, a multiple of 32
    bool barrier = false;          // results of all earlier dispatches are visible to this dispatch and to all after it
};

// Dispatches made ready for replay, as one command buffer. Dispatches between two barriers may run at once. A recording
// may be in flight twice. Its destructor waits for the device.
class Recording {
  public:
    virtual ~Recording() = default;
};

struct RunTimes {
    double gpu_start = 0, gpu_end = 0;  // seconds, on the device's clock
};

// Called now and then on the caller's thread while a call waits for the device or does its work. It throws to end the
// call, for example on Ctrl-C. Then what this call submits is dropped: none of it is in flight, and some of it may have
// run. What was submitted before stays in flight. It can be waited for again, or dropped.
using Poll = std::function<void()>;

class Device {
  public:
    virtual ~Device() = default;
    virtual DeviceInfo info() const = 0;
    const OpeningProcess process{};  // the binding checks it before every call; destructors check it too

    // shared: the host sees the memory too. It always does where host and device have one memory (CPU, Metal).
    virtual std::shared_ptr<Buffer> alloc(size_t bytes, bool shared = false) = 0;
    // No copy: pointer and length are multiples of info().page_bytes.
    virtual std::shared_ptr<Buffer> wrap(void* pointer, size_t bytes) = 0;
    virtual std::shared_ptr<Pipeline> pipeline(const std::string& kernel) = 0;
    virtual std::vector<std::string> kernel_names() const = 0;
    // Makes these kernels at once, if that is faster than one by one. pipeline() throws the errors.
    virtual void prepare(const std::vector<std::string>& kernels) { (void)kernels; }

    virtual std::unique_ptr<Recording> record(std::vector<Dispatch> dispatches) = 0;
    // Commits the recording and returns its ticket: 1, 2, ... Recordings run in this order, each after the end of the
    // one before. At least two may be in flight. Beyond the device's limit, submit() waits. Our code makes no heap
    // allocation here.
    virtual uint64_t submit(Recording& recording, const Poll& poll = {}) = 0;
    // Waits for this recording and all before it. A recording that failed throws here. If the device can go on, all
    // work in flight is lost and the next submission works. Otherwise every later call throws too. The times of the
    // last two recordings are known. The times of older recordings are zero.
    virtual RunTimes wait(uint64_t ticket, const Poll& poll = {}) = 0;

    // Nobody wants the results of this recording, which is in flight or has ended. The rest of its work may be skipped.
    // The caller still waits for it.
    virtual void drop(uint64_t ticket) { (void)ticket; }
    // Copies after all work submitted before, and before all work submitted later. The copies of one call have no
    // order: none reads or writes what another writes. They are buffers of this device, and ranges are multiples of
    // COPY_MULTIPLE within them. May return before the copies end. The device keeps the buffers until then. A copy that
    // fails makes a later submission or wait throw.
    virtual void copy(const std::vector<Copy>& copies) = 0;

    // Runs the dispatches once, each alone after the end of the one before, for a profile. Returns the seconds of each,
    // on the device's clock. Memory holds the results of a usual run.
    virtual std::vector<double> time_each(const std::vector<Dispatch>& dispatches) {
        std::vector<double> seconds;
        for (const Dispatch& d : dispatches) {
            const auto alone = record({d});
            const RunTimes times = wait(submit(*alone));
            seconds.push_back(times.gpu_end - times.gpu_start);
        }
        return seconds;
    }

    // True if the device can write the work submitted between the two calls below to a file for its own tools.
    virtual bool captures() const { return false; }
    virtual void start_capture(const std::string& path) { (void)path; }
    virtual void stop_capture() {}
};

std::unique_ptr<Device> open_device(const DeviceOptions& options);

}  // namespace zinc
