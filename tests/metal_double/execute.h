// Runs kernels as the CPU lane does: fibres, or a native kernel where there is one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "msl/runtime.h"

namespace metal_double {

using zinc::msl::KernelInfo;

// Null where this module has no such kernel.
const KernelInfo* find_kernel(const std::string& name);

// One dispatch. Every argument's memory is known up to the end of its buffer, which is all that Metal is told.
struct Work {
    const KernelInfo* kernel = nullptr;
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
};
Totals encoded();
void count(uint64_t Totals::* what, int64_t n = 1);
// A queue's thread is at work while one of these exists.
struct Busy {
    Busy();
    ~Busy();
};
void wait_until_idle();

}  // namespace metal_double
