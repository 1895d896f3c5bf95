// Native begin of a step: what the host has described becomes what kernels read.
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

void begin_step(const NativeLaunch& l, uint64_t, uint64_t) {
    const auto& p = l.as<BeginParams>();
    Step& step = *l.buffer<Step>(7);
    const uint32_t number = step.number + 1, place = number % STEP_RING;
    step = l.buffer<const Step>(1)[place];
    step.number = number;
    const PageWrite* writes = l.buffer<const PageWrite>(4) + size_t(place) * p.max_page_writes;
    uint32_t* pages = l.buffer<uint32_t>(11);
    for (uint32_t i = 0; i < step.n_page_writes; i++) pages[writes[i].at] = writes[i].page;
    std::memcpy(l.buffer<uint32_t>(10), l.buffer<const uint32_t>(3) + place * MAX_OUT, step.n_out * sizeof(uint32_t));
    std::memcpy(l.buffer<Draw>(12), l.buffer<const Draw>(5) + place * MAX_OUT, step.n_out * sizeof(Draw));
    const Row* from = l.buffer<const Row>(2) + size_t(place) * p.max_rows;
    for (uint32_t t = 0; t < step.n_tokens; t++) {
        const Row row = from[t];
        const int32_t id = row.token >= 0 ? row.token : l.buffer<const int32_t>(6)[-1 - row.token];
        l.buffer<Row>(8)[t] = row;
        l.buffer<int32_t>(9)[t] = id;
        const size_t cache_row = size_t(pages[row.pages + row.pos / KV_PAGE]) * KV_PAGE + row.pos % KV_PAGE;
        l.buffer<int32_t>(13)[cache_row] = id;
    }
}

}  // namespace

NATIVE_TABLE(step) = {
    {"begin_step", begin_step, 1},
    {},
};

}  // namespace zinc
