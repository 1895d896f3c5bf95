// Attention for many queries: tiles of them by tiles of keys, on 8x8 matrices.
//
// Operands are halves if the cache has no more precision, sums are floats. A row of queries is divided by the power of
// two of its largest element, so that any row fits. exact: operands are floats.
#include "attention_tiles.h"

// The shape of a threadgroup of attention_prefill. A simdgroup owns ROWS queries and DIM / SPLIT columns of the head:
// as many as its registers hold. Tiles of keys are as long as threadgroup memory allows. With two BUFFERS the values
// come while the keys are multiplied, and the next keys while the values are.
template <class T_, uint DIM_>
struct PrefillShape {
    typedef T_ T;
    static constant constexpr bool HALVES = sizeof(T) == 2;
    static constant constexpr uint DIM = DIM_, ROWS = PER_DEVICE(8, 16);
    static constant constexpr uint COLUMNS = PER_DEVICE(128, HALVES ? 256 : 128);  // of a simdgroup, at most
    static constant constexpr uint SPLIT = DIM > COLUMNS ? DIM / COLUMNS : 1;
    static constant constexpr uint ROOM = PER_DEVICE(16, 32) * 1024;  // bytes for tiles, about
    static constant constexpr uint FITTING = ROOM / (DIM * sizeof(T)), KEYS = FITTING < 32 ? FITTING & ~7u : 32;
    static constant constexpr uint BUFFERS = PER_DEVICE(false, 2 * DIM * KEYS * sizeof(T) <= ROOM) ? 2 : 1;
    static constant constexpr uint THREADS = ATTENTION_PREFILL_THREADS, SIMDGROUPS = THREADS / SIMD;
    static constant constexpr uint QUERIES = SIMDGROUPS / SPLIT * ROWS;
    static constant constexpr uint FRAGMENTS = DIM / 8 / SPLIT, VALUE_FRAGMENTS = FRAGMENTS;
    static constant constexpr uint SCORE_ROW = KEYS + 4;
    static_assert(DIM % (8 * SPLIT) == 0 && VALUE_FRAGMENTS % (KEYS / 8) == 0,
                  "whole fragments, stored some at a time");
    static_assert(KV_PAGE % KEYS == 0, "a tile of keys lies in one page");
};

// Where a simdgroup works: its rows of the tile of queries, its columns of the head, and its lane's row.
template <class Shape>
struct QueryShare {
    typedef TileSizes<Shape> Sizes;
    static constant constexpr uint QUERIES = Shape::ROWS * 8 * Shape::FRAGMENTS;  // elements of its queries
    static constant constexpr uint DIAGONALS = 64 * Sizes::MATRICES;
    // Tiles of keys and values lie where the queries of all simdgroups have been. In float4s.
    static constant constexpr uint TILES = Shape::BUFFERS * Sizes::TILE, ALL = Shape::SIMDGROUPS * QUERIES;
    static constant constexpr uint STAGED4 = (TILES > ALL ? TILES : ALL) * sizeof(typename Shape::T) / 16;
    uint rows, first_run, row, lane;
    threadgroup float* scores;
    threadgroup float* diagonals;

    // The factor of a row of a lane, by its place on the diagonals.
    METAL_FUNC threadgroup float& factor(uint of_row) const { return diagonals[of_row / 8 * 64 + of_row % 8 * 9]; }

    // Stages the queries, each divided by the power of two of its largest element if they are to be halves: scores are
    // too small by that factor. Lanes that share a row share its elements, and return the factor.
    METAL_FUNC float stage_queries(threadgroup typename Shape::T* to, device const float4* q, bool inside,
                                   uint dim4) const {
        constexpr uint EACH = Shape::DIM / 4 / Sizes::LANES, MINE = 2 * Shape::FRAGMENTS / Sizes::LANES;
        const uint first = lane % Sizes::LANES;
        float factor = 1.0f;
        if (Shape::HALVES) {
            float4 sizes = float4(0.0f);
            UNROLL for (uint j = 0; j < EACH; j++) {
                const uint col = first + j * Sizes::LANES;
                if (inside && col < dim4) sizes = max(sizes, fabs(q[col]));
            }
            const float largest = largest_of_row<Shape>(max(max(sizes.x, sizes.y), max(sizes.z, sizes.w)));
            // A power of two is its exponent. The reciprocal must be a normal number too.
            factor = as_type<float>(clamp(as_type<uint>(largest), 0x01000000u, 0x7E000000u) & 0x7F800000u);
        }
        const float inverse = as_type<float>(0x7F000000u - as_type<uint>(factor));
        UNROLL for (uint j = 0; j < MINE; j++) {
            const uint i = first + j * Sizes::LANES, col = 2 * first_run + i;
            const float4 x = inside && col < dim4 ? q[col] * inverse : float4(0.0f);
            store_quad(to + i / 2 * (8 * Shape::ROWS) + (row - rows) * 8 + i % 2 * 4, x);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        return factor;
    }

    // Writes the n rows that the tile has, some columns at a time, times the factors of the rows.
    METAL_FUNC void write(constant AttentionParams& p, thread const TileRows<Shape>& result, uint first, uint n,
                          uint head, device const float4* gate, device float4* out) const {
        constexpr uint WIDE = Shape::KEYS / 4;  // float4s at a time
        const uint dim4 = p.head_dim / 4;
        UNROLL for (uint f = 0; f < Shape::VALUE_FRAGMENTS; f += WIDE / 2) {
            simdgroup_barrier(mem_flags::mem_threadgroup);  // what was there has been used
            UNROLL for (uint b = 0; b < WIDE / 2; b++) {
                UNROLL for (uint m = 0; m < Sizes::MATRICES; m++) {
                    simdgroup_store(result.o[f + b][m], scores + m * 8 * Shape::SCORE_ROW + 8 * b, Shape::SCORE_ROW);
                }
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
            for (uint i = lane; i < Shape::ROWS * WIDE; i += SIMD) {
                const uint of_row = i / WIDE, col = 2 * (first_run + f) + i % WIDE;
                if (rows + of_row >= n || col >= dim4) continue;
                const float4 x = *(threadgroup const float4*)(scores + of_row * Shape::SCORE_ROW + i % WIDE * 4);
                const ulong to = ulong(first + rows + of_row) * p.n_head + head;
                out[to * dim4 + col] = gated(p, gate, to, col, x * factor(of_row));
            }
        }
    }
};

// Keys, or values, of a head of a sequence.
template <class Shape, class KV>
struct HeadCache {
    device const uint* table;
    ulong stride, column;  // from one position to the next, and to the head; in units
    uint dim4, tid;
    KeyRange keys;

    // Stages a tile of positions from `key` on, and zeros for those that no row sees.
    METAL_FUNC void stage(threadgroup typename Shape::T* tile, device const typename KV::Unit* cache, uint key) const {
        device const typename KV::Unit* source = cache + cache_row(table, key) * stride + column;
        stage_tile<Shape, KV>(tile, source, stride, in_tile(keys, key), dim4, tid);
    }
};

// Attends to all keys that the tile's rows see. The tiles of keys come one after the other, or while the values before
// are multiplied.
template <class Shape, class KV>
METAL_FUNC void attend(thread TileRows<Shape>& result, thread RowSoftmax<Shape>& softmax, QueryShare<Shape> share,
                       HeadCache<Shape, KV> heads, KeyRange row_keys, float scale,
                       threadgroup typename Shape::T* k_tile, device const typename KV::Unit* k_cache,
                       device const typename KV::Unit* v_cache, uint sg) {
    typedef TileSizes<Shape> Sizes;
    constexpr uint KEYS = Shape::KEYS, AHEAD = Shape::BUFFERS - 1;
    threadgroup typename Shape::T* v_tile = k_tile + AHEAD * Sizes::TILE;
    threadgroup typename Shape::T* weights = (threadgroup typename Shape::T*)share.scores;
    threadgroup const float* row_scores = share.scores - sg % Shape::SPLIT * Sizes::SCORES;
    const uint my_runs = share.first_run * Sizes::RUN;

    uint key = heads.keys.begin / KEYS * KEYS;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the queries have been used
    if (AHEAD) heads.stage(k_tile, k_cache, key);
    for (; key < heads.keys.end; key += KEYS) {
        if (!AHEAD) {
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the values have been used
            heads.stage(k_tile, k_cache, key);
        }
        wait_for_copies<0>();
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the keys are there
        if (AHEAD) heads.stage(v_tile, v_cache, key);
        result.score(k_tile + my_runs, share.scores);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // all scores are there, the keys have been used
        if (!AHEAD) heads.stage(v_tile, v_cache, key);
        if (AHEAD && key + KEYS < heads.keys.end)
            heads.stage(k_tile, k_cache, key + KEYS);
        else
            end_copies();
        const float factor = softmax.take(row_scores, scale, in_tile(row_keys, key), share.lane);
        wait_for_copies<1>();
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the values are there, the scores have been used
        softmax.store_weights(weights, share.lane);
        if (simd_any(factor != 1.0f)) result.scale(factor, share.diagonals, share.lane);
        result.accumulate(weights, v_tile + my_runs);
    }
}

// Threadgroups by (head, tile of queries). Each takes every n_tg.y-th tile, so that the grid decides only the speed:
// the last tiles, which see the most keys, begin first. With `singles` it leaves the first rows, which are runs of one
// row, to attention_decode.
// Grid: (n_head, ceil(T / QUERIES)). Threads: ATTENTION_PREFILL_THREADS.
template <class KV, class Shape>
kernel void
attention_prefill(constant AttentionParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                  device const Row* rows [[buffer(2)]], device const uint* pages [[buffer(3)]],
                  device const float4* q [[buffer(4)]], device const typename KV::Unit* k_cache [[buffer(5)]],
                  device const typename KV::Unit* v_cache [[buffer(6)]], device const float4* gate [[buffer(7)]],
                  device const float* sinks [[buffer(8)]], device float4* out [[buffer(9)]], GRID_IDS) {
    typedef TileSizes<Shape> Sizes;
    TG_ARRAY(float4, tiles4, QueryShare<Shape>::STAGED4);
    TG_ARRAY(float, scores, Shape::SIMDGROUPS* Sizes::SCORES);
    TG_ARRAY(float, diagonals, Shape::SIMDGROUPS* QueryShare<Shape>::DIAGONALS);

    const uint head = tg.x, dim4 = p.head_dim / 4, head_units = p.head_dim / KV::ELEMENTS;
    threadgroup typename Shape::T* tiles = (threadgroup typename Shape::T*)tiles4;
    const uint my_rows = sg / Shape::SPLIT * Shape::ROWS;
    const QueryShare<Shape> share = {
        my_rows, sg % Shape::SPLIT * Shape::FRAGMENTS, my_rows + lane / Sizes::LANES,
        lane,    scores + sg * Sizes::SCORES,          diagonals + sg * QueryShare<Shape>::DIAGONALS};
    for (uint i = lane; i < QueryShare<Shape>::DIAGONALS; i += SIMD) share.diagonals[i] = 0.0f;

    for (TilePlace<Shape::QUERIES> at = {p.singles ? step->n_single : 0, n_tg.y - 1 - tg.y, 1}; at.find(step, rows);
         at.tile += n_tg.y) {
        const uint first = at.run + at.tile * Shape::QUERIES;
        const uint n_rows = min(uint(Shape::QUERIES), rows[at.run].end - first);
        const uint pos = rows[at.run].pos + at.tile * Shape::QUERIES, last = pos + rows[at.run].end - first - 1;
        const KeyRange keys = {visible_keys(p, pos, last).begin, visible_keys(p, pos + n_rows - 1, last).end};
        // Rows past the run's last see what it sees, so that each has a key.
        const KeyRange row_keys = visible_keys(p, pos + min(share.row, n_rows - 1), last);
        const HeadCache<Shape, KV> heads = {pages + rows[at.run].pages,
                                            ulong(p.n_head_kv) * head_units,
                                            head / (p.n_head / p.n_head_kv) * head_units,
                                            dim4,
                                            tid,
                                            keys};

        threadgroup_barrier(mem_flags::mem_threadgroup);  // the values before have been used
        threadgroup typename Shape::T* queries = tiles + sg * QueryShare<Shape>::QUERIES;
        device const float4* my_q = q + (ulong(first + share.row) * p.n_head + head) * dim4;
        const float q_factor = share.stage_queries(queries, my_q, share.row < n_rows, dim4);
        TileRows<Shape> result;
        result.load_queries(queries);
        RowSoftmax<Shape> softmax;
        softmax.begin(sink_score(p, sinks, head), p.has_sinks != 0, lane);
        attend<Shape, KV>(result, softmax, share, heads, row_keys, q_factor * (p.scale * LOG2_E), tiles, k_cache,
                          v_cache, sg);
        const float inverse = 1.0f / softmax.total();
        simdgroup_barrier(mem_flags::mem_threadgroup);  // the last factors have been used
        if (lane % Sizes::LANES == 0) share.factor(share.row - my_rows) = inverse;
        share.write(p, result, first, n_rows, head, gate, out);
    }
}

// The operands that a cache needs, and float ones for exact products.
template <class KV>
struct CacheOperand {
    typedef half T;
};
template <>
struct CacheOperand<CacheF32> {
    typedef float T;
};

#define PREFILL(kv, KV, dim)                                                                                           \
    KERNEL("attention_prefill_" kv "_" #dim, attention_prefill<KV, PrefillShape<typename CacheOperand<KV>::T, dim>>)
#define EXACT(kv, KV, dim)                                                                                             \
    KERNEL("attention_prefill_exact_" kv "_" #dim, attention_prefill<KV, PrefillShape<float, dim>>)
HEAD_CLASSES(PREFILL)
HEAD_CLASSES_OF(EXACT, "f16", CacheF16)
HEAD_CLASSES_OF(EXACT, "q8_0", CacheQ8_0)
