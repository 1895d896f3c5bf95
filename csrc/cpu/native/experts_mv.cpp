// Native kernels of a mixture of experts on one row of the step.
#include <cstring>

#include "cpu/native/experts_choose.h"
#include "cpu/native/experts_store.h"
#include "cpu/native/products.h"
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

static_assert(STRIP <= STORED_ROWS);

// An id out of range gives the last expert.
template <class P>
INLINE uint32_t expert_of(const P& p, int32_t id) {
    return uint32_t(id) < p.n_expert ? uint32_t(id) : p.n_expert - 1;
}

template <class P>
INLINE Matrix expert_matrix(const P& p, const uint8_t* w, int32_t id) {
    return {w + size_t(expert_of(p, id)) * p.expert_bytes, p.row_bytes, p.k};
}

// The ids of a row's experts, which are given or chosen here. Router and weights begin at binding `at`. Each share of
// the dispatch chooses again; the first one writes ids and weights for the kernels that follow.
const int32_t* ids_of_row(const NativeLaunch& l, int at, bool writes, int32_t* chosen) {
    const auto& p = l.as<MoeMvParams>().choice;
    auto* ids = l.buffer<int32_t>(1);
    if (p.n_used == 0) return ids;
    const Router router{p, l.buffer<const float>(at), l.buffer<const float>(at + 1), l.buffer<const float>(at + 2),
                        l.buffer<const float>(at + 3)};
    router.choose(0, chosen);
    if (writes) {
        std::memcpy(ids, chosen, p.n_used * sizeof(int32_t));
        router.weigh(0, chosen, l.buffer<float>(at + 4));
    }
    return chosen;
}

// Products of the rows of each chosen expert in MATRICES tensors (bindings 2 ..) with x. A weight of its norm follows
// x, then the biases. Threadgroups [begin, end) are rows along the grid's x, chosen experts along its y.
template <class T, int MATRICES>
void moe_mv(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const MoeParams& p = l.as<MoeMvParams>().experts;
    const float* x = maybe_normed(l, p, 2 + MATRICES);
    int32_t chosen[MAX_EXPERTS_USED] = {};
    const int32_t* ids = ids_of_row(l, 5 + 2 * MATRICES, begin == 0, chosen);
    for_lines(l, begin, end, [&](const Line& line) {
        const int32_t id = ids[line.y];
        const Range rows = pieces(p.m, line.begin, line.end, l.grid[0]);
        float* out = l.buffer<float>(4 + 2 * MATRICES) + size_t(line.y) * p.m;
        for_strips(rows.begin, rows.end, [&](uint32_t r, uint32_t n) {
            float y[2][STRIP];
            for (int i = 0; i < MATRICES; i++)
                products<T>(expert_matrix(p, l.buffer<const uint8_t>(2 + i), id), r, n, x, y[i]);
            store_expert<MATRICES>(p, expert_of(p, id), r, n, out + r, y[0], y[1],
                                   [&](int i) { return l.buffer<const float>(4 + MATRICES + i); });
        });
    });
}

// sum[0..n) += weight * (rows [first, first + n) of w · x)
template <class T>
INLINE void add_products(const Matrix& w, uint32_t first, uint32_t n, const float* x, float weight, float* sum) {
    float y[STRIP];
    products<T>(w, first, n, x, y);
    map_floats(n, sum, sum, y, [weight](vf a, vf b) { return a + weight * b; });
}

// out = residual, if there is one, + the weighted products of the chosen experts with their rows of x.
// more(first, n, sums) adds to a strip.
template <class T, class P, class More>
INLINE void mix(const NativeLaunch& l, uint64_t begin, uint64_t end, const float* residual, const float* bias,
                float* out, More&& more) {
    const auto& p = l.as<P>();
    const int32_t* ids = l.buffer<const int32_t>(1);
    const float *weights = l.buffer<const float>(2), *x = l.buffer<const float>(4);
    const Range rows = pieces(p.m, begin, end, l.grid[0]);
    for_strips(rows.begin, rows.end, [&](uint32_t r, uint32_t n) {
        float sum[STRIP] = {};
        if (residual) std::memcpy(sum, residual + r, n * sizeof(float));
        for (uint32_t j = 0; j < p.n_used; j++) {
            const float weight = weights[j];
            add_products<T>(expert_matrix(p, l.buffer<const uint8_t>(3), ids[j]), r, n, x + size_t(j) * p.k, weight,
                            sum);
            if (p.has_bias)
                map_floats(n, sum, sum, bias + size_t(expert_of(p, ids[j])) * p.m + r,
                           [weight](vf a, vf b) { return a + weight * b; });
        }
        more(r, n, sum);
        std::memcpy(out + r, sum, n * sizeof(float));
    });
}

template <class T>
void moe_mv_mix(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const float* residual = l.as<MoeParams>().alone ? nullptr : l.buffer<const float>(5);
    mix<T, MoeParams>(l, begin, end, residual, l.buffer<const float>(6), l.buffer<float>(7),
                      [](uint32_t, uint32_t, float*) {});
}

template <class T, class Shared>
void moe_mv_mix2(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MoeSharedParams>();
    const Matrix shared{l.buffer<const uint8_t>(6), p.row_bytes_shared, p.k_shared};
    const float *x = l.buffer<const float>(7), weight = l.buffer<const float>(2)[p.n_used];
    mix<T, MoeSharedParams>(
        l, begin, end, l.buffer<const float>(5), l.buffer<const float>(8), l.buffer<float>(9),
        [&](uint32_t r, uint32_t n, float* sum) { add_products<Shared>(shared, r, n, x, weight, sum); });
}

}  // namespace

#define MOE_MV(name, T)                                                                                                \
    {"moe_mv_" name, moe_mv<T, 1>, 1}, {"moe_mv_gated_" name, moe_mv<T, 2>, 1},                                        \
        {"moe_mv_mix_" name, moe_mv_mix<T>, 1}, {"moe_mv_mix2_" name "_" name, moe_mv_mix2<T, T>, 1},
#define MOE_MV_SHARED_Q8_0(name, T) {"moe_mv_mix2_" name "_q8_0", moe_mv_mix2<T, Q8_0>, 1},

NATIVE_TABLE(experts_mv) = {TENSOR_TYPES(MOE_MV) LOW_BIT_TYPES(MOE_MV_SHARED_Q8_0){}};

}  // namespace zinc
