// The choice of a row's experts, for the kernels that route.
#pragma once

#include "params.h"
#include "shapes.h"
#include "sort_key.h"

// Chooses the experts of a row, the n_used with the largest scores, or sums of score and bias (NaN after all numbers;
// the lowest id among equals), and their weights. A simdgroup takes a row, and its lanes keep the keys of a block of
// experts. With so few keys, reading and exchanging them costs more than comparing.

constant constexpr uint CHOICE_KEYS = 8;  // of a lane at a time: registers of products are enough for them

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

// Without biases and groups the logits themselves decide: scores grow with them.
METAL_FUNC bool chooses_by_logit(constant TopKParams& p) { return p.has_bias == 0 && p.n_group == 1; }

// The keys that a row's experts are chosen by: 0 of one that is not there or has been taken, else a sort key + 1.
template <class T>
struct ExpertKeys {
    static constant constexpr uint NEVER = 1;  // of experts that are not to be chosen, and of NaN

    device const T* logits;  // of the row
    device const T* bias;
    ExpertScores scores;
    uint groups;  // bit g: experts of group g may be chosen

    METAL_FUNC uint of_any_group(constant TopKParams& p, uint i) const {
        const float logit = logits[i];
        if (chooses_by_logit(p)) return sort_key(logit) + 1;
        return sort_key(scores.of(logit) + (p.has_bias != 0 ? float(bias[i]) : 0.0f)) + 1;
    }

    METAL_FUNC uint of(constant TopKParams& p, uint i) const {
        if (i >= p.n_expert) return 0;
        if (p.n_group > 1) {
            const uint group = i / (p.n_expert / p.n_group);
            if (group >= SIMD || (groups >> group & 1) == 0) return NEVER;
        }
        return of_any_group(p, i);
    }

    // The sum of the two largest of a group of experts, those from `first` to before `end`. NaN counts as 0.
    METAL_FUNC float two_largest(constant TopKParams& p, uint first, uint end, uint lane) const {
        uint best = 0, next = 0;
        for (uint i = first + lane; i < end; i += SIMD) {
            const uint key = of_any_group(p, i);
            next = max(next, min(best, key));
            best = max(best, key);
        }
        const uint largest = simd_max(best);
        const uint owner = simd_min(best == largest ? lane : uint(SIMD));
        const uint second = simd_max(lane == owner ? next : best);
        return (largest > NEVER ? value_of_sort_key(largest - 1) : 0.0f) +
               (second > NEVER ? value_of_sort_key(second - 1) : 0.0f);
    }

    // Finds the n_group_used best groups.
    METAL_FUNC void find_groups(constant TopKParams& p, uint lane) {
        const uint size = p.n_expert / p.n_group;
        uint mine = 0;  // the key of group `lane`, + 1; 0 if there is none or it is kept
        for (uint g = 0; g < p.n_group; g++) {
            const uint key = sort_key(two_largest(p, g * size, (g + 1) * size, lane)) + 1;
            if (lane == g) mine = key;
        }
        groups = 0;
        for (uint rank = 0; rank < p.n_group_used; rank++) {
            const uint largest = simd_max(mine);
            const uint group = simd_min(mine == largest ? lane : SIMD - 1);
            if (lane == group) mine = 0;
            groups |= 1u << group;
        }
    }
};

struct Candidate {
    uint key, expert;
};

// A lane's candidates: some experts of a block, and one of those that have been chosen among earlier blocks.
struct LaneCandidates {
    Candidate earlier;
    uint first;              // of the block
    uint keys[CHOICE_KEYS];  // of expert first + lane + j * SIMD

    // The lane that has the largest key of all. Of lanes with equal keys the one with the lowest id.
    METAL_FUNC uint owner_of(uint largest, Candidate mine) const {
        uint owners = uint(simd_vote::vote_t(simd_ballot(mine.key == largest)));
        if ((owners & (owners - 1)) != 0) {  // rare
            const uint lowest = simd_min(mine.key == largest ? mine.expert : 0xFFFFFFFFu);
            owners = uint(simd_vote::vote_t(simd_ballot(mine.key == largest && mine.expert == lowest)));
        }
        return ctz(owners);
    }

    // Returns the first candidate with the largest key of the simdgroup, which is then taken.
    METAL_FUNC Candidate take_largest(uint lane) {
        uint mine = earlier.key, slot = CHOICE_KEYS;
        UNROLL for (uint j = 0; j < CHOICE_KEYS; j++) {
            if (keys[j] > mine) {
                mine = keys[j];
                slot = j;
            }
        }
        const uint expert = slot == CHOICE_KEYS ? earlier.expert : first + lane + slot * SIMD;
        const uint largest = simd_max(mine);
        const uint owner = owner_of(largest, {mine, expert});
        const uint taken = lane == owner ? slot : CHOICE_KEYS + 1;
        UNROLL for (uint j = 0; j < CHOICE_KEYS; j++) {
            if (taken == j) keys[j] = 0;
        }
        if (taken == CHOICE_KEYS) earlier.key = 0;
        return {largest, simd_shuffle(expert, ushort(owner))};
    }
};

// The first n experts: lane r gets the one of rank r.
template <class T>
METAL_FUNC uint first_experts(constant TopKParams& p, ExpertKeys<T> keys, uint n, uint lane) {
    Candidate chosen = {0, 0};  // of rank `lane`, among the experts so far; loops stay loops, to save registers
    UNROLL_BY(1)
    for (uint first = 0; first < p.n_expert; first += CHOICE_KEYS * SIMD) {
        LaneCandidates candidates;
        candidates.earlier = chosen;
        candidates.first = first;
        UNROLL for (uint j = 0; j < CHOICE_KEYS; j++) candidates.keys[j] = keys.of(p, first + lane + j * SIMD);
        UNROLL_BY(1)
        for (uint rank = 0; rank < n; rank++) {
            const Candidate next = candidates.take_largest(lane);
            if (lane == rank) chosen = next;
        }
    }
    return chosen.expert;
}

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

// A row's router: the operands that the choice reads. bias and scales, [n_expert], and the logit of the shared expert
// are not read without has_bias, has_scales and SHARED_GATED.
template <class T>
struct RowRouter {
    device const T* logits;
    device const T* shared_logit;
    device const T* bias;
    device const T* scales;

    // The router of row t, of a step whose first row is this one.
    METAL_FUNC RowRouter of_row(constant TopKParams& p, uint t) const {
        return {logits + ulong(t) * p.n_expert, shared_logit + (p.shared == SHARED_GATED ? t : 0), bias, scales};
    }

    // The first n experts of the row: lane r gets the one of rank r.
    METAL_FUNC uint choose(constant TopKParams& p, uint n, uint lane) const {
        ExpertKeys<T> keys = {logits, bias, {p.score, 0.0f, 0.0f}, 0};
        if (!chooses_by_logit(p)) keys.scores.of_row(p.score, logits, p.n_expert, lane);
        if (p.n_group > 1) keys.find_groups(p, lane);
        return first_experts(p, keys, n, lane);
    }

    // Writes the ids and the weights of the experts of row t, of which the lane has the one of its rank.
    METAL_FUNC void put(constant TopKParams& p, uint t, uint expert, device int* ids, device T* weights,
                        uint lane) const {
        device T* out = weights + ulong(t) * (p.n_used + 1);
        ExpertScores scores;
        scores.of_row(p.score, logits, p.n_expert, lane);
        const float weight = expert_weight(p, scores, logits[expert], lane);
        if (lane < p.n_used) {
            ids[ulong(t) * p.n_used + lane] = int(expert);
            out[lane] = p.scale * (p.has_scales != 0 ? float(scales[expert]) : 1.0f) * weight;
        }
        if (lane == 0) out[p.n_used] = shared_weight(p);
    }

    METAL_FUNC float shared_weight(constant TopKParams& p) const {
        if (p.shared != SHARED_GATED) return p.shared == SHARED_NONE ? 0.0f : 1.0f;
        return 1.0f / (1.0f + precise::exp(-float(shared_logit[0])));
    }
};
