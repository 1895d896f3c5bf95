#include "moe.h"
#include "moe_choose.h"
#include "mul_mv_rows.h"

// A mixture of experts on one row of the step. The experts' matrices of a layer are one tensor, and a few ids name the
// matrices that count.

// The grid's x is tiles of rows, its y the chosen experts. Row j of out is the products of expert ids[j]. Biases are
// [n_expert, m], and not read without has_bias. x may stand for its RMSNorm: see mul_norm.h.
//
// If the experts are not given, each threadgroup chooses its own by the operands of the router, as moe_topk does, and
// one of them writes ids and weights for the kernels that follow. This takes less time than a dispatch.

// The expert of a threadgroup. Of the chosen one it needs to know the rank tg.y alone; the last one knows all.
METAL_FUNC int expert_of_group(constant TopKParams& p, RowRouter<float> row, device int* ids, device float* weights,
                               threadgroup uint* shared, uint3 tg, uint sg, uint lane) {
    if (FOLDED_CHOICE == 0 || p.n_used == 0) return ids[tg.y];
    if (sg == 0) {
        const uint expert = row.choose(p, tg.y + 1, lane);
        if (lane == tg.y) shared[0] = expert;
        if (tg.x == 0 && tg.y == p.n_used - 1) row.put(p, 0, expert, ids, weights, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return int(shared[0]);
}

// Grid: (ceil(m / (R n_sg)), n_used). Threads: 32 MUL_MV_SIMDGROUPS, or as tuning.py says; MOE_CHOOSE_THREADS.
template <class Q, uint R = MUL_MV_ROWS>
kernel void moe_mv(constant MoeMvParams& p [[buffer(0)]], device int* ids [[buffer(1)]],
                   device const uchar* w [[buffer(2)]], device const float* x [[buffer(3)]],
                   device const float* norm [[buffer(4)]], device const float* bias [[buffer(5)]],
                   device float* out [[buffer(6)]], device const float* logits [[buffer(7)]],
                   device const float* shared_logit [[buffer(8)]], device const float* choice_bias [[buffer(9)]],
                   device const float* scales [[buffer(10)]], device float* weights [[buffer(11)]], GRID_IDS) {
    TG_ARRAY(uint, shared, 1);
    const RowRouter<float> row = {logits, shared_logit, choice_bias, scales};
    const int id = expert_of_group(p.choice, row, ids, weights, shared, tg, sg, lane);
    mul_mv_rows<Q, R, 1, MUL_FEW_TILE_SIMDGROUPS>(
        p.experts, Matrices<1>{{w + expert_offset(p.experts, id)}}, maybe_normed(p.experts, x, norm),
        expert_out(p.experts, id, out + ulong(tg.y) * p.experts.m, bias), tg.x, sg, n_sg, lane);
}

// Grid: (ceil(m / (R / 2 n_sg)), n_used). Threads: as moe_mv.
template <class Q, uint R = MUL_MV_ROWS>
kernel void moe_mv_gated(constant MoeMvParams& p [[buffer(0)]], device int* ids [[buffer(1)]],
                         device const uchar* gate [[buffer(2)]], device const uchar* up [[buffer(3)]],
                         device const float* x [[buffer(4)]], device const float* norm [[buffer(5)]],
                         device const float* gate_bias [[buffer(6)]], device const float* up_bias [[buffer(7)]],
                         device float* out [[buffer(8)]], device const float* logits [[buffer(9)]],
                         device const float* shared_logit [[buffer(10)]],
                         device const float* choice_bias [[buffer(11)]], device const float* scales [[buffer(12)]],
                         device float* weights [[buffer(13)]], GRID_IDS) {
    TG_ARRAY(uint, shared, 1);
    const RowRouter<float> row = {logits, shared_logit, choice_bias, scales};
    const int id = expert_of_group(p.choice, row, ids, weights, shared, tg, sg, lane);
    const ulong at = expert_offset(p.experts, id);
    mul_mv_rows<Q, R, 1, MUL_FEW_TILE_SIMDGROUPS>(
        p.experts, Matrices<2>{{gate + at, up + at}}, maybe_normed(p.experts, x, norm),
        expert_gated(p.experts, id, out + ulong(tg.y) * p.experts.m, gate_bias, up_bias), tg.x, sg, n_sg, lane);
}

// sums += the sum over the chosen experts j of weights[j] W[ids[j]] x[j], for the rows from `first` on. Only this
// lane's share, and only the experts of its simdgroup.
template <class Q, uint R, class P>
METAL_FUNC void add_experts(thread Sums<R>& sums, constant P& p, device const int* ids, device const float* weights,
                            device const uchar* w, device const float* x, uint first, uint sg, uint lane, uint n_sg) {
    for (uint j = sg; j < p.n_used; j += n_sg) {
        const Matrices<1> expert{{w + expert_offset(p, ids[j])}};
        Floats of_expert{x + ulong(j) * p.k};
        add_rows<Q>(sums, rows_of<R>(expert, first, p.m, p.row_bytes), of_expert, p.k, weights[j], lane);
    }
}

// out = residual, or 0, + the sums of all simdgroups + the weighted biases of the chosen experts; residual may be out
// itself. scratch holds R values per simdgroup.
template <uint R, class P>
METAL_FUNC void put_scratch(constant P& p, device const int* ids, device const float* weights, device const float* bias,
                            device const float* residual, bool alone, device float* out, threadgroup float* scratch,
                            uint first, uint tid, uint n_sg) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint row = first + tid;
    if (tid >= R || row >= p.m) return;
    float sum = alone ? 0.0f : residual[row];
    for (uint i = 0; i < n_sg; i++) sum += scratch[i * R + tid];
    if (p.has_bias != 0) {
        for (uint j = 0; j < p.n_used; j++) sum += weights[j] * bias[ulong(expert_of(p, ids[j])) * p.m + row];
    }
    out[row] = sum;
}

// The same from the shares of the lanes.
template <uint R, class P>
METAL_FUNC void put_mix(constant P& p, Sums<R> sums, device const int* ids, device const float* weights,
                        device const float* bias, device const float* residual, bool alone, device float* out,
                        threadgroup float* scratch, uint first, uint tid, uint sg, uint lane, uint n_sg) {
    sum_lanes(sums);
    UNROLL for (uint r = 0; r < R; r++) {
        if (lane == 0) scratch[sg * R + r] = sums.of[r];
    }
    put_scratch<R>(p, ids, weights, bias, residual, alone, out, scratch, first, tid, n_sg);
}

#ifdef __CUDACC__
// moe_mv_mix for the TILE_ROWS rows from `first` on, by a matrix unit. A simdgroup takes an expert, or some of its
// columns if there are fewer experts than simdgroups.
template <class B>
METAL_FUNC void mix_by_tile(constant MoeParams& p, device const int* ids, device const float* weights,
                            device const uchar* w, device const float* x, device const float* residual,
                            device const float* bias, device float* out, uint first, uint tid, uint sg, uint lane) {
    threadgroup TileMemory<B, 1, TILE_SIMDGROUPS>& memory = tile_memory<B, 1, TILE_SIMDGROUPS>();
    const uint splits = max(TILE_SIMDGROUPS / p.n_used, 1u);
    float2 sums = float2(0.0f);
    for (uint j = sg / splits; j < p.n_used; j += TILE_SIMDGROUPS / splits) {
        const Matrices<1> expert{{w + expert_offset(p, ids[j])}};
        const TileRows rows = tile_rows(expert, first, p.m, p.row_bytes, lane);
        const TileVectors<1> one{{x + ulong(j) * p.k}, {0}};
        sums += weights[j] * multiply_tile(memory.rooms[sg], rows, one, p.k, sg % splits, splits, lane).of[0];
    }
    UNROLL for (uint h = 0; h < 2; h++) {
        const float sum = quad_sum(sums[h]);
        if (lane % 4 == 0) memory.sums[0][sg][8 * h + lane / 4] = sum;
    }
    put_scratch<TILE_ROWS>(p, ids, weights, bias, residual, p.alone != 0, out, memory.sums[0][0], first, tid,
                           TILE_SIMDGROUPS);
}
#endif

// out = residual, or 0, + the weighted products of the chosen experts with their rows of x. A threadgroup takes R rows,
// or TILE_ROWS of a type that is mixed by tiles.
// Grid: ceil(m / R). Threads: MOE_MIX_THREADS, or as tuning.py says.
template <class Q, uint R = MOE_MIX_ROWS>
kernel void moe_mv_mix(constant MoeParams& p [[buffer(0)]], device const int* ids [[buffer(1)]],
                       device const float* weights [[buffer(2)]], device const uchar* w [[buffer(3)]],
                       device const float* x [[buffer(4)]], device const float* residual [[buffer(5)]],
                       device const float* bias [[buffer(6)]], device float* out [[buffer(7)]], GRID_IDS) {
#ifdef __CUDACC__
    if constexpr (IsTiled<Q, R>::MIXED) {
        if (n_sg == TILE_SIMDGROUPS)
            return mix_by_tile<typename Q::Block>(p, ids, weights, w, x, residual, bias, out, tg.x * TILE_ROWS, tid, sg,
                                                  lane);
    }
#endif
    TG_ARRAY(float, scratch, SIMD* R);
    const uint first = tg.x * R;
    Sums<R> sums;
    sums.clear();
    add_experts<Q>(sums, p, ids, weights, w, x, first, sg, lane, n_sg);
    put_mix(p, sums, ids, weights, bias, residual, p.alone != 0, out, scratch, first, tid, sg, lane, n_sg);
}

// moe_mv_mix with a shared expert, whose weight follows the weights of the others.
// Grid: ceil(m / R). Threads: MOE_MIX2_THREADS, or as tuning.py says.
template <class Q, class Shared, uint R = MOE_MIX_ROWS>
kernel void moe_mv_mix2(constant MoeSharedParams& p [[buffer(0)]], device const int* ids [[buffer(1)]],
                        device const float* weights [[buffer(2)]], device const uchar* w [[buffer(3)]],
                        device const float* x [[buffer(4)]], device const float* residual [[buffer(5)]],
                        device const uchar* w_shared [[buffer(6)]], device const float* x_shared [[buffer(7)]],
                        device const float* bias [[buffer(8)]], device float* out [[buffer(9)]], GRID_IDS) {
    TG_ARRAY(float, scratch, SIMD* R);
    const uint first = tg.x * R;
    Sums<R> sums;
    sums.clear();
    add_experts<Q>(sums, p, ids, weights, w, x, first, sg, lane, n_sg);
    if (sg == p.n_used % n_sg) {  // whose turn it is
        const Matrices<1> shared{{w_shared}};
        Floats of_shared{x_shared};
        add_rows<Shared>(sums, rows_of<R>(shared, first, p.m, p.row_bytes_shared), of_shared, p.k_shared,
                         weights[p.n_used], lane);
    }
    put_mix(p, sums, ids, weights, bias, residual, false, out, scratch, first, tid, sg, lane, n_sg);
}

#define MOE_MV(type, Q)                                                                                                \
    KERNEL("moe_mv_" type, moe_mv<Q>)                                                                                  \
    KERNEL("moe_mv_gated_" type, moe_mv_gated<Q>)                                                                      \
    KERNEL("moe_mv_mix_" type, moe_mv_mix<Q>)                                                                          \
    KERNEL("moe_mv_mix2_" type "_" type, moe_mv_mix2<Q, Q>)
TENSOR_TYPES(MOE_MV)

// Files of few bits keep the shared expert at eight bits: every token meets it.
#define MOE_MV_SHARED_Q8_0(type, Q) KERNEL("moe_mv_mix2_" type "_q8_0", moe_mv_mix2<Q, Quantised<Q8_0>>)
LOW_BIT_TYPES(MOE_MV_SHARED_Q8_0)

#define MOE_MV_OF(type, Q, R) KERNEL("moe_mv_gated_" type "_r" #R, moe_mv_gated<Q, R>)
PAIR_ROW_VARIANTS(MOE_MV_OF)
#define MOE_MV_MIX_OF(type, Q, R) KERNEL("moe_mv_mix2_" type "_q8_0_r" #R, moe_mv_mix2<Q, Quantised<Q8_0>, R>)
ROW_VARIANTS(MOE_MV_MIX_OF)
