// Native kernels of a mixture of experts on one row of the step, and its routing.
#include "cpu/native/products.h"
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

// The matrix of an expert. An id out of range gives the last expert.
template <class P>
INLINE Matrix expert_matrix(const P& p, const uint8_t* w, int32_t id) {
    const uint32_t expert = uint32_t(id) < p.n_expert ? uint32_t(id) : p.n_expert - 1;
    return {w + size_t(expert) * p.expert_bytes, p.row_bytes, p.k};
}

// Calls f(rows, id, out) for threadgroups [begin, end): rows along the grid's x, chosen experts along its y.
template <class F>
INLINE void for_experts(const NativeLaunch& l, uint64_t begin, uint64_t end, float* out, F&& f) {
    const auto& p = l.as<MoeParams>();
    for_lines(l, begin, end, [&](const Line& line) {
        f(pieces(p.m, line.begin, line.end, l.grid[0]), l.buffer<const int32_t>(1)[line.y], out + size_t(line.y) * p.m);
    });
}

template <class T>
void moe_mv(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    for_experts(l, begin, end, l.buffer<float>(4), [&](Range rows, int32_t id, float* out) {
        products<T>(expert_matrix(l.as<MoeParams>(), l.buffer<const uint8_t>(2), id), rows.begin, rows.end - rows.begin,
                    l.buffer<const float>(3), out + rows.begin);
    });
}

template <class T>
void moe_mv_swiglu(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MoeParams>();
    for_experts(l, begin, end, l.buffer<float>(5), [&](Range rows, int32_t id, float* out) {
        const Matrix gate = expert_matrix(p, l.buffer<const uint8_t>(2), id);
        const Matrix up = expert_matrix(p, l.buffer<const uint8_t>(3), id);
        gated_products<T, silu>(gate, up, rows.begin, rows.end, l.buffer<const float>(4), out);
    });
}

// sum[0..n) += weight * (rows [first, first + n) of w · x)
template <class T>
INLINE void add_products(const Matrix& w, uint32_t first, uint32_t n, const float* x, float weight, float* sum) {
    float y[STRIP];
    products<T>(w, first, n, x, y);
    map_floats(n, sum, sum, y, [weight](vf a, vf b) { return a + weight * b; });
}

// out = residual + the weighted products of the chosen experts with their rows of x. more(first, n, sums) adds to a
// strip.
template <class T, class P, class More>
INLINE void mix(const NativeLaunch& l, uint64_t begin, uint64_t end, float* out, More&& more) {
    const auto& p = l.as<P>();
    const int32_t* ids = l.buffer<const int32_t>(1);
    const float *weights = l.buffer<const float>(2), *x = l.buffer<const float>(4),
                *residual = l.buffer<const float>(5);
    const Range rows = pieces(p.m, begin, end, l.grid[0]);
    for_strips(rows.begin, rows.end, [&](uint32_t r, uint32_t n) {
        float sum[STRIP];
        std::memcpy(sum, residual + r, n * sizeof(float));
        for (uint32_t j = 0; j < p.n_used; j++)
            add_products<T>(expert_matrix(p, l.buffer<const uint8_t>(3), ids[j]), r, n, x + size_t(j) * p.k, weights[j],
                            sum);
        more(r, n, sum);
        std::memcpy(out + r, sum, n * sizeof(float));
    });
}

template <class T>
void moe_mv_mix(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    mix<T, MoeParams>(l, begin, end, l.buffer<float>(6), [](uint32_t, uint32_t, float*) {});
}

template <class T, class Shared>
void moe_mv_mix2(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MoeSharedParams>();
    const Matrix shared{l.buffer<const uint8_t>(6), p.row_bytes_shared, p.k_shared};
    const float *x = l.buffer<const float>(7), weight = l.buffer<const float>(2)[p.n_used];
    mix<T, MoeSharedParams>(l, begin, end, l.buffer<float>(8), [&](uint32_t r, uint32_t n, float* sum) {
        add_products<Shared>(shared, r, n, x, weight, sum);
    });
}

// ---- routing

// True if a logit comes before another: NaN after all numbers.
INLINE bool before(float a, float b) { return a > b || (a == a && b != b); }

// The best n of the logits, in order; the lowest id among equals.
INLINE void best_experts(const float* logits, uint32_t n_expert, uint32_t n, int32_t* ids) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < n_expert; i++) {
        if (found == n && !before(logits[i], logits[ids[n - 1]])) continue;
        uint32_t at = found < n ? found++ : n - 1;
        for (; at > 0 && before(logits[i], logits[ids[at - 1]]); at--) ids[at] = ids[at - 1];
        ids[at] = int32_t(i);
    }
}

void moe_topk(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<TopKParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens, n = p.n_used < p.n_expert ? p.n_used : p.n_expert;
    for (uint64_t t = begin; t < end && t < n_tokens; t++) {
        const float* logits = l.buffer<const float>(2) + t * p.n_expert;
        int32_t* ids = l.buffer<int32_t>(4) + t * p.n_used;
        float* weights = l.buffer<float>(5) + t * (p.n_used + 1);
        best_experts(logits, p.n_expert, n, ids);
        float total = 0;
        for (uint32_t j = 0; j < n; j++) {
            const float logit = logits[ids[j]];
            weights[j] = logit == logit ? std::exp(logit - logits[ids[0]]) : 0;
            total += weights[j];
        }
        for (uint32_t j = 0; j < n; j++) weights[j] *= p.scale / total;
        weights[p.n_used] = p.has_shared ? 1 / (1 + std::exp(-l.buffer<const float>(3)[t])) : 0;
    }
}

}  // namespace

#define MOE_MV(name, T)                                                                                                \
    {"moe_mv_" name, moe_mv<T>, 1}, {"moe_mv_swiglu_" name, moe_mv_swiglu<T>, 1},                                      \
        {"moe_mv_mix_" name, moe_mv_mix<T>, 1}, {"moe_mv_mix2_" name "_" name, moe_mv_mix2<T, T>, 1},
#define MOE_MV_SHARED_Q8_0(name, T) {"moe_mv_mix2_" name "_q8_0", moe_mv_mix2<T, Q8_0>, 1},
#define MOE_TOPK(n) {"moe_topk_" #n, moe_topk, 1},

NATIVE_TABLE(experts_mv) = {
    EXPERT_TYPES(MOE_MV) LOW_BIT_TYPES(MOE_MV_SHARED_Q8_0) EXPERT_CLASSES(MOE_TOPK){},
};

}  // namespace zinc
