// The choice of a row's experts, for the kernels that route.
#pragma once

#include "params.h"
#include "shapes.h"
#include "sort_key.h"

// Chooses the experts of a row, the n_used with the largest scores, or sums of score and bias (NaN after all numbers;
// the lowest id among equals), and their weights. A simdgroup takes a row, and its lanes keep all keys of the row. With
// so few keys, reading and exchanging them costs more than comparing.

// Sums of weights below this do not divide them (as in llama.cpp: the least normal half).
constant constexpr float LEAST_WEIGHTS = 6.103515625e-5f;

// The scores of a row's experts.
struct ExpertScores {
    uint kind;             // SCORE_*
    float largest, total;  // of SCORE_SOFTMAX: the largest logit, and the sum of all exp(logit - largest)

    template <class T>
    METAL_FUNC void of_row(uint score, device const T* logits, uint n_expert, uint lane) {
        kind = score;
        largest = total = 0.0f;
        if (score != SCORE_SOFTMAX) return;
        uint key = 0;
        for (uint i = lane; i < n_expert; i += SIMD) key = max(key, sort_key(logits[i]));
        largest = value_of_sort_key(simd_max(key));
        for (uint i = lane; i < n_expert; i += SIMD) {
            if (sort_key(logits[i]) != 0) total += precise::exp(float(logits[i]) - largest);
        }
        total = simd_sum(total);
    }

    METAL_FUNC float of(float logit) const {
        if (kind == SCORE_SIGMOID) return 1.0f / (1.0f + precise::exp(-logit));
        return kind == SCORE_SOFTMAX ? precise::exp(logit - largest) / total : logit;
    }
};

// A lane's share of the keys of a row of up to MAX experts.
template <uint MAX>
struct LaneKeys {
    static constant constexpr uint N = MAX / SIMD;
    static constant constexpr uint NEVER = 1;  // of experts that are not to be chosen, and of NaN

    uint of[N];  // of expert lane + j * SIMD: 0 if there is none or it has been taken, else a sort key + 1

    // Scores grow with their logits: without biases and groups, the logits themselves decide.
    template <class T>
    METAL_FUNC void load(constant TopKParams& p, device const T* logits, device const T* bias, ExpertScores scores,
                         uint lane) {
        const bool by_logit = p.has_bias == 0 && p.n_group == 1;
        UNROLL for (uint j = 0; j < N; j++) {
            const uint i = lane + j * SIMD;
            of[j] = 0;
            if (i >= p.n_expert) continue;
            const float logit = logits[i];
            of[j] = sort_key(by_logit ? logit : scores.of(logit) + (p.has_bias != 0 ? float(bias[i]) : 0.0f)) + 1;
        }
    }

    // The sum of the two largest of a group of experts, those from `first` to before `end`. NaN counts as 0.
    METAL_FUNC float two_largest(uint first, uint end, uint lane) const {
        uint best = 0, next = 0;
        UNROLL for (uint j = 0; j < N; j++) {
            const uint i = lane + j * SIMD, key = i >= first && i < end ? of[j] : 0;
            next = max(next, min(best, key));
            best = max(best, key);
        }
        const uint largest = simd_max(best);
        const uint owner = simd_min(best == largest ? lane : uint(SIMD));
        const uint second = simd_max(lane == owner ? next : best);
        return (largest > NEVER ? value_of_sort_key(largest - 1) : 0.0f) +
               (second > NEVER ? value_of_sort_key(second - 1) : 0.0f);
    }

    // Keeps the experts of the n_group_used best groups.
    METAL_FUNC void keep_groups(constant TopKParams& p, uint lane) {
        const uint size = p.n_expert / p.n_group;
        uint mine = 0;  // the key of group `lane`, + 1; 0 if there is none or it is kept
        for (uint g = 0; g < p.n_group; g++) {
            const uint key = sort_key(two_largest(g * size, (g + 1) * size, lane)) + 1;
            if (lane == g) mine = key;
        }
        uint kept = 0;  // bit g: group g
        for (uint rank = 0; rank < p.n_group_used; rank++) {
            const uint largest = simd_max(mine);
            const uint group = simd_min(mine == largest ? lane : SIMD - 1);
            if (lane == group) mine = 0;
            kept |= 1u << group;
        }
        UNROLL for (uint j = 0; j < N; j++) {
            const uint group = (lane + j * SIMD) / size;
            if (of[j] != 0 && (group >= SIMD || (kept >> group & 1) == 0)) of[j] = NEVER;
        }
    }

    // Returns the first expert with the largest key of the simdgroup, which is then taken.
    METAL_FUNC uint take_largest(uint lane) {
        uint mine = of[0], slot = 0;
        UNROLL for (uint j = 1; j < N; j++) {
            if (of[j] > mine) {
                mine = of[j];
                slot = j;
            }
        }
        const uint largest = simd_max(mine);
        const uint expert = simd_min(mine == largest ? lane + slot * SIMD : MAX);
        UNROLL for (uint j = 0; j < N; j++) {
            if (expert == lane + j * SIMD) of[j] = 0;
        }
        return expert;
    }
};

// The weight of the expert of rank `lane`, whose logit is given; 0 for other lanes. A NaN logit has no share.
METAL_FUNC float expert_weight(constant TopKParams& p, ExpertScores scores, float logit, uint lane) {
    const uint key = lane < p.n_used ? sort_key(logit) : 0;
    float share = 0.0f;
    if (p.score == SCORE_LOGIT) {
        const float largest = value_of_sort_key(simd_max(key));
        if (key != 0) share = precise::exp(logit - largest);
    } else if (key != 0) {
        share = scores.of(logit);
    }
    const float total = simd_sum(share);
    if (p.score == SCORE_LOGIT) return share / total;
    return p.normalised != 0 ? share / max(total, LEAST_WEIGHTS) : share;
}

// Chooses the experts of row t. bias and scales, [n_expert], are not read without has_bias and has_scales. Afterwards
// the keys of the chosen are 0.
template <class T, uint MAX>
METAL_FUNC void choose_experts(constant TopKParams& p, uint t, device const T* logits, device const T* shared_logit,
                               device const T* bias, device const T* scales, device int* ids, device T* weights,
                               thread LaneKeys<MAX>& keys, uint lane) {
    const float shared = p.shared == SHARED_GATED ? float(shared_logit[t]) : 0.0f;
    logits += ulong(t) * p.n_expert;
    ExpertScores scores;
    scores.of_row(p.score, logits, p.n_expert, lane);
    keys.load(p, logits, bias, scores, lane);
    if (p.n_group > 1) keys.keep_groups(p, lane);
    uint expert = 0;  // of rank `lane`
    for (uint rank = 0; rank < p.n_used; rank++) {
        const uint chosen = keys.take_largest(lane);
        if (lane == rank) expert = chosen;
    }

    const float weight = expert_weight(p, scores, logits[expert], lane);
    device T* out = weights + ulong(t) * (p.n_used + 1);
    if (lane < p.n_used) {
        ids[ulong(t) * p.n_used + lane] = int(expert);
        out[lane] = p.scale * (p.has_scales != 0 ? float(scales[expert]) : 1.0f) * weight;
    }
    const float gate = p.shared == SHARED_GATED ? 1.0f / (1.0f + precise::exp(-shared)) : 1.0f;
    if (lane == 0) out[p.n_used] = p.shared == SHARED_NONE ? 0.0f : gate;
}
