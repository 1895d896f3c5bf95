// Attention for few queries, bound by the bandwidth of the cache.
#include "attention_parts.h"
#include "reduce.h"

constant constexpr uint DECODE_MAX_SIMDGROUPS = ATTENTION_DECODE_THREADS / SIMD;

// A softmax-weighted sum of the values seen so far: sum and acc are relative to exp2(max_score). A lane holds PIECES
// float4 of the head vector: its own and every LANES-th after it.
template <uint PIECES>
struct SoftmaxSum {
    float max_score;
    float sum;
    float4 acc[PIECES];

    METAL_FUNC void clear() {
        max_score = LOWEST_SCORE;
        sum = 0.0f;
        UNROLL for (uint j = 0; j < PIECES; j++) acc[j] = float4(0.0f);
    }

    METAL_FUNC void raise_max(float new_max) {
        const float scale = metal::exp2(max_score - new_max);
        max_score = new_max;
        sum *= scale;
        UNROLL for (uint j = 0; j < PIECES; j++) acc[j] *= scale;
    }
};

// Sums across the SIMD / LANES key groups of a simdgroup; every group gets the result.
template <uint PIECES, uint LANES>
METAL_FUNC void merge_groups(thread SoftmaxSum<PIECES>& s) {
    s.raise_max(simd_max(s.max_score));
    UNROLL for (ushort mask = LANES; mask < SIMD; mask <<= 1) {
        s.sum += simd_shuffle_xor(s.sum, mask);
        UNROLL for (uint j = 0; j < PIECES; j++) s.acc[j] += simd_shuffle_xor(s.acc[j], mask);
    }
}

// A query head of class DIM and its keys and values, as one simdgroup reads them. LANES lanes share a key. So a
// simdgroup scores GROUPS keys with log2(LANES) shuffles, and keeps KEYS times that many loads in flight.
template <class KV, uint DIM>
struct DecodeHead {
    static constant constexpr uint LANES = DIM <= 128 ? 8 : DIM <= 256 ? 16 : 32;
    static constant constexpr uint PIECES = DIM / 4 / LANES;
    static constant constexpr uint KEYS = 4;
    static constant constexpr uint GROUPS = SIMD / LANES;
    static constant constexpr uint TILE = KEYS * GROUPS;
    static_assert(KV_PAGE % TILE == 0, "a tile of keys lies in one page");

    float4 query[PIECES];
    uint piece[PIECES];
    uint group;
    ulong row_units;    // of the cache, from one position to the next
    ulong head_offset;  // in units

    METAL_FUNC void load(constant AttentionParams& p, device const float4* q, uint t, uint head, uint lane) {
        const uint dim4 = p.head_dim / 4, head_units = p.head_dim / KV::ELEMENTS;
        const ulong q_row = (ulong(t) * p.n_head + head) * dim4;
        group = lane / LANES;
        row_units = ulong(p.n_head_kv) * head_units;
        head_offset = head / (p.n_head / p.n_head_kv) * head_units;
        // Pieces past the head's end repeat its last piece with a zero query: no branch in the loop, no overrun of a
        // row.
        UNROLL for (uint j = 0; j < PIECES; j++) {
            const uint i = lane % LANES + j * LANES;
            piece[j] = min(i, dim4 - 1);
            query[j] = i < dim4 ? q[q_row + i] * (p.scale * LOG2_E) : float4(0.0f);
        }
    }

    // Adds the keys in range of the tile that starts at `first`. Each group has a separate sum.
    METAL_FUNC void attend(thread SoftmaxSum<PIECES>& s, device const uint* pages,
                           device const typename KV::Unit* k_cache, device const typename KV::Unit* v_cache, uint first,
                           KeyRange range) {
        const ulong tile_at = cache_row(pages, first) * row_units + head_offset;
        bool in_range[KEYS];
        typename KV::Quad k[KEYS][PIECES], v[KEYS][PIECES];
        UNROLL for (uint u = 0; u < KEYS; u++) {
            const uint key = first + u * GROUPS + group;
            in_range[u] = key >= range.begin && key < range.end;
            const uint readable = min(max(key, range.begin), range.end - 1);
            const ulong at = tile_at + (readable - first) * row_units;
            UNROLL for (uint j = 0; j < PIECES; j++) {
                k[u][j] = KV::quad(k_cache + at, piece[j]);
                v[u][j] = KV::quad(v_cache + at, piece[j]);
            }
        }
        float score[KEYS];
        float new_max = s.max_score;
        UNROLL for (uint u = 0; u < KEYS; u++) {
            float part = 0.0f;
            UNROLL for (uint j = 0; j < PIECES; j++) part += dot(query[j], KV::value(k[u][j]));
            const float sum = lanes_sum<LANES>(part);
            score[u] = in_range[u] ? sum : LOWEST_SCORE;
            new_max = max(new_max, score[u]);
        }
        s.raise_max(new_max);
        UNROLL for (uint u = 0; u < KEYS; u++) {
            const float weight = metal::exp2(score[u] - s.max_score);
            s.sum += weight;
            UNROLL for (uint j = 0; j < PIECES; j++) s.acc[j] += weight * KV::value(v[u][j]);
        }
    }
};

// Stores a simdgroup's sum for write_head. Lanes from LANES on hold copies, and store nothing.
template <uint PIECES, uint LANES>
METAL_FUNC void share_sum(thread const SoftmaxSum<PIECES>& s, threadgroup float* max_score, threadgroup float* sum,
                          threadgroup float4* acc, uint sg, uint lane) {
    if (lane == 0) {
        max_score[sg] = s.max_score;
        sum[sg] = s.sum;
    }
    if (lane < LANES) {
        UNROLL for (uint j = 0; j < PIECES; j++) acc[(sg * PIECES + j) * LANES + lane] = s.acc[j];
    }
}

// Writes the output of a head from n sums and its sink. Sum i is acc[i * part_stride ..], relative to
// exp2(max_score[i]).
METAL_FUNC void write_head(constant AttentionParams& p, float sink, threadgroup const float* max_score,
                           threadgroup const float* sum, threadgroup const float4* acc, uint n, uint part_stride,
                           device const float4* gate, device float4* out, ulong row, uint tid, uint n_threads) {
    float max_all = sink;
    for (uint i = 0; i < n; i++) max_all = max(max_all, max_score[i]);
    for (uint d = tid; d < p.head_dim / 4; d += n_threads) {
        float total = p.has_sinks != 0 ? metal::exp2(sink - max_all) : 0.0f;
        float4 x = float4(0.0f);
        for (uint i = 0; i < n; i++) {
            const float weight = metal::exp2(max_score[i] - max_all);
            total += weight * sum[i];
            x += weight * acc[i * part_stride + d];
        }
        out[row * (p.head_dim / 4) + d] = gated(p, gate, row, d, x / total);
    }
}

// One threadgroup per (head, row). Its simdgroups, DECODE_MAX_SIMDGROUPS at most, divide the keys and meet at the end.
// With `singles` it takes only the first rows, which are runs of one row.
// Grid: (n_head, T). Threads: ATTENTION_DECODE_THREADS.
template <class KV, uint DIM>
kernel void
attention_decode(constant AttentionParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                 device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                 device const float4* q [[buffer(4)]], device const typename KV::Unit* k_cache [[buffer(5)]],
                 device const typename KV::Unit* v_cache [[buffer(6)]], device const float4* gate [[buffer(7)]],
                 device const float* sinks [[buffer(8)]], device float4* out [[buffer(9)]], GRID_IDS) {
    typedef DecodeHead<KV, DIM> Head;
    TG_ARRAY(float, part_max, DECODE_MAX_SIMDGROUPS);
    TG_ARRAY(float, part_sum, DECODE_MAX_SIMDGROUPS);
    TG_ARRAY(float4, part_acc, DECODE_MAX_SIMDGROUPS * Head::PIECES * Head::LANES);

    const uint head = tg.x;
    const uint t = tg.y;
    // Before the branch: these loads wait for no other.
    const uint pos = rows[t].pos, table = rows[t].pages, end = rows[t].end;
    if (t >= (p.singles ? step->n_single : step->n_tokens)) return;
    const KeyRange range = visible_keys(p, pos, pos + end - t - 1);
    Head h;
    h.load(p, q, t, head, lane);
    SoftmaxSum<Head::PIECES> s;
    s.clear();
    for (uint first = range.begin / Head::TILE * Head::TILE + sg * Head::TILE; first < range.end;
         first += n_sg * Head::TILE)
        h.attend(s, pages + table, k_cache, v_cache, first, range);
    merge_groups<Head::PIECES, Head::LANES>(s);
    share_sum<Head::PIECES, Head::LANES>(s, part_max, part_sum, part_acc, sg, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    write_head(p, sink_score(p, sinks, head), part_max, part_sum, part_acc, n_sg, Head::PIECES * Head::LANES, gate, out,
               ulong(t) * p.n_head + head, tid, n_sg * SIMD);
}

// ---- A long context: the keys of a row are divided among threadgroups -----------------------------------------------

// Threadgroups by (key head, share, row), with a simdgroup for each query head. Query heads that share keys read them
// at about the same time, so most reads hit the cache of the core.
// Grid: (n_head_kv, n_split, T). Threads: 32 for each query head of the group, at most 8 of them.
template <class KV, uint DIM>
kernel void attention_split(constant AttentionParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                            device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                            device const float4* q [[buffer(4)]], device const typename KV::Unit* k_cache [[buffer(5)]],
                            device const typename KV::Unit* v_cache [[buffer(6)]], device float4* out [[buffer(7)]],
                            GRID_IDS) {
    typedef DecodeHead<KV, DIM> Head;
    static_assert(ATTENTION_SPLIT_KEYS % Head::TILE == 0, "parts begin with a tile");
    const uint t = tg.z;
    const uint pos = rows[t].pos, table = rows[t].pages;
    if (t >= step->n_tokens) return;
    KeyParts parts = key_parts(visible_keys(p, pos, pos), p.n_split);
    if (tg.y >= parts.n) return;
    const KeyRange range = parts.part(tg.y);
    const uint group = p.n_head / p.n_head_kv;
    for (uint head = tg.x * group + sg; head < (tg.x + 1) * group; head += n_sg) {
        Head h;
        h.load(p, q, t, head, lane);
        SoftmaxSum<Head::PIECES> s;
        s.clear();
        for (uint first = range.begin / Head::TILE * Head::TILE; first < range.end; first += Head::TILE)
            h.attend(s, pages + table, k_cache, v_cache, first, range);
        merge_groups<Head::PIECES, Head::LANES>(s);
        device float4* to = out + part_at(ulong(t) * p.n_head + head, p.n_split, tg.y, p.head_dim / 4);
        if (lane < Head::LANES) {
            UNROLL for (uint j = 0; j < Head::PIECES; j++) {
                const uint d = lane + j * Head::LANES;
                if (d < p.head_dim / 4) to[d] = s.acc[j];
            }
        }
        if (lane == 0) to[p.head_dim / 4] = float4(s.max_score, s.sum, 0.0f, 0.0f);
    }
}

// Threadgroups by (head, row), whose simdgroups divide the shares. A lane holds every 32nd float4 of the head.
// Grid: (n_head, T). Threads: ATTENTION_DECODE_THREADS.
template <uint PIECES>
kernel void attention_merge(constant AttentionParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                            device const Row* rows [[buffer(2)]], device const float4* part [[buffer(3)]],
                            device const float4* gate [[buffer(4)]], device const float* sinks [[buffer(5)]],
                            device float4* out [[buffer(6)]], GRID_IDS) {
    TG_ARRAY(float, part_max, DECODE_MAX_SIMDGROUPS);
    TG_ARRAY(float, part_sum, DECODE_MAX_SIMDGROUPS);
    TG_ARRAY(float4, part_acc, DECODE_MAX_SIMDGROUPS * PIECES * SIMD);

    const uint head = tg.x;
    const uint t = tg.y;
    const uint pos = rows[t].pos;
    if (t >= step->n_tokens) return;
    const uint dim4 = p.head_dim / 4;
    const uint n_parts = key_parts(visible_keys(p, pos, pos), p.n_split).n;
    SoftmaxSum<PIECES> s;
    s.clear();
    for (uint i = sg; i < n_parts; i += n_sg) {
        device const float4* from = part + part_at(ulong(t) * p.n_head + head, p.n_split, i, dim4);
        const float max_score = from[dim4].x;
        s.raise_max(max(s.max_score, max_score));
        const float weight = metal::exp2(max_score - s.max_score);
        s.sum += weight * from[dim4].y;
        UNROLL for (uint j = 0; j < PIECES; j++) {
            const uint d = lane + j * SIMD;
            if (d < dim4) s.acc[j] += weight * from[d];
        }
    }
    share_sum<PIECES, SIMD>(s, part_max, part_sum, part_acc, sg, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    write_head(p, sink_score(p, sinks, head), part_max, part_sum, part_acc, n_sg, PIECES * SIMD, gate, out,
               ulong(t) * p.n_head + head, tid, n_sg * SIMD);
}

#define DECODE(kv, KV, dim)                                                                                            \
    KERNEL("attention_decode_" kv "_" #dim, attention_decode<KV, dim>)                                                 \
    KERNEL("attention_split_" kv "_" #dim, attention_split<KV, dim>)
HEAD_CLASSES(DECODE)
KERNEL("attention_merge", attention_merge<2>)      // heads of up to 2 * SIMD float4
KERNEL("attention_merge_512", attention_merge<4>)  // of up to 4 * SIMD
