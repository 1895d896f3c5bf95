// Pages of keys and the online softmax, for the native attention kernels.
#pragma once

#include "cpu/native/quants.h"
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

constexpr float LOWEST_SCORE = -1e38f;

// The positions that a row sees.
struct KeyRange {
    uint32_t begin, end;
};

// Calls f(page, keys) for the pages of a range, with the range's keys in the page, counted from the page's first key.
template <class F>
INLINE void for_pages(KeyRange range, F&& f) {
    for (uint32_t page = range.begin / KV_PAGE; page * KV_PAGE < range.end; page++) {
        const uint32_t first = page * KV_PAGE;
        f(page, KeyRange{range.begin > first ? range.begin - first : 0,
                         range.end - first < KV_PAGE ? range.end - first : KV_PAGE});
    }
}

// A head vector as floats: `dequantise` takes one group at a time.
template <class T>
INLINE void unpack_head(const uint8_t* head, uint32_t dim, float* out) {
    for (uint32_t first = 0; first < dim; first += GROUP)
        dequantise<T>(head, first, dim - first < GROUP ? dim - first : GROUP, out + first);
}

// Turns n scores into weights relative to the running maximum. Returns the factor by which the sums so far shrink.
INLINE float softmax_step(float* scores, uint32_t n, float& max_score, float& sum) {
    float top = max_score;
    for (uint32_t i = 0; i < n; i++) top = scores[i] > top ? scores[i] : top;
    vf part{};
    const uint32_t whole = n / W * W;
    for (uint32_t i = 0; i < whole; i += W) {
        const vf weight = exp(load<vf>(scores + i) - top);
        part += weight;
        store(scores + i, weight);
    }
    if (whole < n) {
        float tail[W];
        for (uint32_t i = 0; i < W; i++) tail[i] = whole + i < n ? scores[whole + i] : -HUGE_VALF;
        const vf weight = exp(load<vf>(tail) - top);
        part += weight;
        store(tail, weight);
        std::memcpy(scores + whole, tail, (n - whole) * sizeof(float));
    }
    const float factor = exp(splat(max_score - top))[0];
    sum = sum * factor + sum_lanes(part);
    max_score = top;
    return factor;
}

// The place in a page, which begins at position `first`, of a position: 0 before the page, KV_PAGE after it.
INLINE uint32_t in_page(uint32_t position, uint32_t first) {
    return position < first ? 0 : position - first < KV_PAGE ? position - first : KV_PAGE;
}

}  // namespace
}  // namespace zinc
