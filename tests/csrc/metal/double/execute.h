// Runs kernels as the CPU lane does: fibres, or a native kernel where there is one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "msl/run/runtime.h"

namespace metal_double {

using zinc::msl::KernelInfo;

// Null where this module has no such kernel.
const KernelInfo* find_kernel(const std::string& name);

// One dispatch. Every argument's memory is known up to the end of its buffer, which is all that Metal is told.
// Or a copy: from buffers[0] to buffers[1].
struct Work {
    const KernelInfo* kernel = nullptr;  // of a dispatch
    std::vector<uint8_t> params;
    std::vector<void*> buffers;
    std::vector<uint64_t> bytes;
    uint32_t grid[3] = {1, 1, 1};
    uint32_t threads = 0;
    bool after_barrier = false;  // ordered after all before it
};

class Runner {
  public:
    Runner();
    ~Runner();
    // Runs one after the other. In the checked build a missing barrier is an error; empty: all went well.
    std::string run(const std::vector<Work>& work);

  private:
    struct State;
    const std::unique_ptr<State> state_;
};

// ---- what all queues did

struct Totals {
    uint64_t command_buffers = 0, encoders = 0, dispatches = 0, barriers = 0, resident_bytes = 0;
    uint64_t residency_requests = 0, wired_sets = 0;      // asked for; and not ended yet
    uint64_t compiled = 0, built = 0, archived = 0;       // sources; pipelines, and those from an archive
    uint64_t residency_sets = 0, captured = 0;            // made; command buffers in a trace
    uint64_t activities = 0, efforts = 0, n_efforts = 0;  // not ended yet, and begun
    uint64_t longest = 0;                                 // microseconds on the GPU of a command buffer
};
Totals encoded();
void count(uint64_t Totals::* what, int64_t n = 1);
void note_longest(double seconds);
uint64_t take_longest();
// Returns when so many threads are in it at a time.
void meet(long n);
// A queue's thread is at work while one of these exists.
struct Busy {
    Busy();
    ~Busy();
};
void wait_until_idle();

}  // namespace metal_double
