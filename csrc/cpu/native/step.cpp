// Native begin of a step: what the host has described becomes what kernels read. And the end of one with drafts.
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

void begin_step(const NativeLaunch& l, uint64_t, uint64_t) {
    const auto& p = l.as<BeginParams>();
    Step& step = *l.buffer<Step>(8);
    const uint32_t number = step.number + 1, place = number % STEP_RING;
    step = l.buffer<const Step>(1)[place];
    step.number = number;
    const PageWrite* writes = l.buffer<const PageWrite>(4) + size_t(place) * p.max_page_writes;
    uint32_t* pages = l.buffer<uint32_t>(12);
    for (uint32_t i = 0; i < step.n_page_writes; i++) pages[writes[i].at] = writes[i].page;
    std::memcpy(l.buffer<uint32_t>(11), l.buffer<const uint32_t>(3) + place * MAX_OUT, step.n_out * sizeof(uint32_t));
    std::memcpy(l.buffer<Draw>(13), l.buffer<const Draw>(5) + place * MAX_OUT, step.n_out * sizeof(Draw));
    const Row* from = l.buffer<const Row>(2) + size_t(place) * p.max_rows;
    for (uint32_t t = 0; t < step.n_tokens; t++) {
        Row row = from[t];
        int32_t id = row.token;
        if (row.token < 0) {
            const uint32_t output = uint32_t(-1 - row.token);
            const uint32_t later = row.drafted ? std::min(l.buffer<const uint32_t>(7)[output], row.drafted) : 0;
            id = l.buffer<const int32_t>(6)[output + later];
            row.pos += later;
        }
        l.buffer<Row>(9)[t] = row;
        l.buffer<int32_t>(10)[t] = id;
        const size_t cache_row = size_t(pages[row.pages + row.pos / KV_PAGE]) * KV_PAGE + row.pos % KV_PAGE;
        l.buffer<int32_t>(14)[cache_row] = id;
    }
}

// From the last output on, each counts one more than the next one, or none.
void accept_drafts(const NativeLaunch& l, uint64_t, uint64_t) {
    const Step& step = *l.buffer<const Step>(1);
    const Row* rows = l.buffer<const Row>(2);
    const int32_t *tokens = l.buffer<const int32_t>(3), *chosen = l.buffer<const int32_t>(5);
    const uint32_t *out_rows = l.buffer<const uint32_t>(4), n_out = std::min(step.n_out, l.as<AcceptParams>().outs);
    uint32_t* accepted = l.buffer<uint32_t>(6);
    Choice* results = l.buffer<Choice>(7) + step.number % STEP_RING * MAX_OUT;
    uint32_t n = 0;
    for (uint32_t i = n_out; i-- > 0;) {
        const uint32_t row = out_rows[i];
        const bool right = row + 1 < rows[row].end && chosen[i] >= 0 && tokens[row + 1] == chosen[i];
        n = right ? n + 1 : 0;
        results[i].accepted = accepted[i] = n;
    }
}

}  // namespace

NATIVE_TABLE(step) = {
    {"begin_step", begin_step, 1},
    {"accept_drafts", accept_drafts, 1},
    {},
};

}  // namespace zinc
