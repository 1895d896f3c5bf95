// The choice of a row's experts, for the native kernels that route.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/native/kernel.h"
#include "cpu/native/simd.h"
#include "params.h"

namespace zinc {
namespace {

constexpr float LEAST_WEIGHTS = 6.103515625e-5f;  // sums of weights below this do not divide them

// True if a number comes before another: NaN after all numbers.
INLINE bool before(float a, float b) { return a > b || (a == a && b != b); }

// The best n of the values, in order; the lowest id among equals.
INLINE void best_of(const float* values, uint32_t n_values, uint32_t n, int32_t* ids) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < n_values; i++) {
        if (found == n && !before(values[i], values[ids[n - 1]])) continue;
        uint32_t at = found < n ? found++ : n - 1;
        for (; at > 0 && before(values[i], values[ids[at - 1]]); at--) ids[at] = ids[at - 1];
        ids[at] = int32_t(i);
    }
}

// The scores of a row's experts, of kind SCORE_*.
class Scores {
  public:
    Scores(const TopKParams& p, const float* logits) : kind(p.score) {
        if (kind != SCORE_SOFTMAX) return;
        largest = -HUGE_VALF;
        for (uint32_t i = 0; i < p.n_expert; i++) largest = logits[i] > largest ? logits[i] : largest;
        for (uint32_t i = 0; i < p.n_expert; i++)
            if (logits[i] == logits[i]) total += std::exp(logits[i] - largest);
    }
    float of(float logit) const {
        if (kind == SCORE_SIGMOID) return 1 / (1 + std::exp(-logit));
        return kind == SCORE_SOFTMAX ? std::exp(logit - largest) / total : logit;
    }

  private:
    uint32_t kind;
    float largest = 0, total = 0;
};

// The sum of the two largest of n values. NaN counts as 0.
INLINE float two_largest(const float* values, uint32_t n) {
    int32_t best[2] = {};
    best_of(values, n, 2, best);
    const float a = values[best[0]], b = values[best[1]];
    return (a == a ? a : 0) + (b == b ? b : 0);
}

// Makes the values of all groups NaN but those of the n_group_used best.
INLINE void keep_groups(const TopKParams& p, float* values) {
    float sums[MAX_GROUPS];
    int32_t kept[MAX_GROUPS];
    const uint32_t size = p.n_expert / p.n_group;
    for (uint32_t g = 0; g < p.n_group; g++) sums[g] = two_largest(values + g * size, size);
    best_of(sums, p.n_group, p.n_group_used, kept);
    for (uint32_t g = 0; g < p.n_group; g++)
        if (std::find(kept, kept + p.n_group_used, int32_t(g)) == kept + p.n_group_used)
            std::fill_n(values + g * size, size, NAN);
}

// The values by which a row's experts are chosen. Scores grow with their logits: without biases and groups, the logits
// themselves decide.
INLINE const float* values_of(const TopKParams& p, const float* logits, const float* bias) {
    if (!p.has_bias && p.n_group == 1) return logits;
    const Scores scores(p, logits);
    auto* values = workspace().sums.take<float>(p.n_expert);
    for (uint32_t i = 0; i < p.n_expert; i++) values[i] = scores.of(logits[i]) + (p.has_bias ? bias[i] : 0);
    if (p.n_group > 1) keep_groups(p, values);
    return values;
}

// The weights of the n chosen experts of a row. A NaN logit has no share.
INLINE void weights_of(const TopKParams& p, const Scores& scores, const float* logits, const int32_t* ids, uint32_t n,
                       float* weights) {
    float largest = -HUGE_VALF, total = 0;
    for (uint32_t j = 0; j < n; j++) largest = logits[ids[j]] > largest ? logits[ids[j]] : largest;
    for (uint32_t j = 0; j < n; j++) {
        const float logit = logits[ids[j]];
        weights[j] = logit != logit ? 0 : p.score == SCORE_LOGIT ? std::exp(logit - largest) : scores.of(logit);
        total += weights[j];
    }
    if (p.score != SCORE_LOGIT) total = p.normalised ? std::max(total, LEAST_WEIGHTS) : 1;
    for (uint32_t j = 0; j < n; j++) weights[j] *= p.scale / total;
}

// The operands of a router.
struct Router {
    const TopKParams& p;
    const float *logits, *shared, *bias, *scales;

    // Chooses the experts of row t of the logits.
    void choose(size_t t, int32_t* ids) const {
        const float* row = logits + t * p.n_expert;
        best_of(values_of(p, row, bias), p.n_expert, std::min(p.n_used, p.n_expert), ids);
    }

    // Finds the weights of the experts that were chosen for row t, and of its shared expert.
    void weigh(size_t t, const int32_t* ids, float* weights) const {
        const uint32_t n = std::min(p.n_used, p.n_expert);
        const float* row = logits + t * p.n_expert;
        weights_of(p, Scores(p, row), row, ids, n, weights);
        for (uint32_t j = 0; p.has_scales && j < n; j++) weights[j] *= scales[ids[j]];
        const float gate = p.shared == SHARED_GATED ? 1 / (1 + std::exp(-shared[t])) : 1;
        weights[p.n_used] = p.shared == SHARED_NONE ? 0 : gate;
    }
};

}  // namespace
}  // namespace zinc
