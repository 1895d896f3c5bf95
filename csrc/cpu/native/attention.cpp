// Native attention over the KV cache with an online softmax. Decode takes a row at a time, prefill tiles of the
// queries of all heads that share keys.
#include "cpu/native/attention.h"
#include "cpu/native/dot.h"
#include "cpu/native/tile.h"

namespace zinc {
namespace {

// The operands of a launch. T is the type of the cache: F32, F16 or Q8_0.
template <class T>
struct Heads {
    AttentionParams p;
    Step step;
    const Row* rows;
    const uint32_t* pages;
    const float* q;
    const uint8_t *k_cache, *v_cache;
    const float *gate, *sinks;
    float* out;
    size_t head_bytes, kv_stride;  // bytes of a head vector in the cache, and from one position to the next

    explicit Heads(const NativeLaunch& l)
        : p(l.as<AttentionParams>()), step(*l.buffer<const Step>(1)), rows(l.buffer<const Row>(2)),
          pages(l.buffer<const uint32_t>(3)), q(l.buffer<const float>(4)), k_cache(l.buffer<const uint8_t>(5)),
          v_cache(l.buffer<const uint8_t>(6)), gate(l.buffer<const float>(7)), sinks(l.buffer<const float>(8)),
          out(l.buffer<float>(9)), head_bytes(row_bytes<T>(p.head_dim)), kv_stride(p.n_head_kv * head_bytes) {}

    uint32_t group() const { return p.n_head / p.n_head_kv; }
    // The first byte of the keys (or values) of a page of row t's sequence, for this head.
    size_t page(uint32_t head, uint32_t t, uint32_t page) const {
        return size_t(pages[rows[t].pages + page]) * KV_PAGE * kv_stride + head / group() * head_bytes;
    }
    size_t row(uint32_t head, uint32_t t) const { return (size_t(t) * p.n_head + head) * p.head_dim; }
    KeyRange visible(uint32_t t) const {
        const uint32_t pos = rows[t].pos, end = pos + 1;
        if (p.both_ways) {
            const uint32_t last = pos + rows[t].end - t - 1, reach = p.window ? p.window / 2 : last;
            return {pos > reach ? pos - reach : 0, std::min(last, pos + reach) + 1};
        }
        return {p.window && p.window < end ? end - p.window : 0, end};
    }

    // The softmax of a head before its first key: its sink, if it has one.
    void begin(uint32_t head, float& max_score, float& sum) const {
        max_score = p.has_sinks ? sinks[head] : LOWEST_SCORE;
        sum = p.has_sinks ? 1 : 0;
    }

    // The output of a head: sums of weighted values, divided by the sum of the weights, times the gate.
    void write(uint32_t head, uint32_t t, const float* values, float sum) const {
        float* to = out + row(head, t);
        const float scale = 1.0f / sum;
        if (p.gate_stride == 0) {
            for (uint32_t d = 0; d < p.head_dim; d++) to[d] = values[d] * scale;
            return;
        }
        const float* gates = gate + (size_t(t) * p.n_head + head + 1) * p.gate_stride - p.head_dim;
        map_floats(p.head_dim, to, values, gates, [scale](vf v, vf g) { return v * scale / (1.0f + exp(-g)); });
    }
};

// ---- decode

// A row of a head vector in the cache, from a column on: the following columns times a weight. The first column of a
// quantised row is the first of a block.
template <class T>
struct Columns {
    const uint8_t* p;
    Columns(const uint8_t* row, uint32_t column) : p(row + size_t(column) * T::BYTES) {}
    INLINE vf times(float weight, uint32_t c) const { return T::lanes(p + c * T::BYTES) * weight; }
};

template <>
struct Columns<Q8_0> {
    const uint8_t* p;
    Columns(const uint8_t* row, uint32_t column) : p(row + size_t(column / BLOCK) * Q8_0::BYTES) {}
    INLINE vf times(float weight, uint32_t c) const {
        const uint8_t* block = p + c / BLOCK * Q8_0::BYTES;
        return convert<vf>(widen(signed_bytes(block + 2 + c % BLOCK))) *
               (half_to_float(load<uint16_t>(block)) * weight);
    }
};

// acc[VECTORS * W] = acc * factor + sum of weight[j] * row j of the values, from a column on.
template <class T, int VECTORS>
INLINE void add_columns(const uint8_t* values, size_t stride, uint32_t column, const float* weight, uint32_t n,
                        float factor, float* acc) {
    vf sum[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) sum[v] = load<vf>(acc + column + v * W) * factor;
    for (uint32_t j = 0; j < n; j++) {
        const Columns<T> row(values + j * stride, column);
        UNROLL for (int v = 0; v < VECTORS; v++) sum[v] += row.times(weight[j], v * W);
    }
    UNROLL for (int v = 0; v < VECTORS; v++) store(acc + column + v * W, sum[v]);
}

template <class T>
INLINE void add_values(const uint8_t* values, size_t stride, const float* weight, uint32_t n, float factor,
                       uint32_t dim, float* acc) {
    constexpr int WIDE = W == 16 ? 64 : 32;
    uint32_t d = 0;
    for (; d + WIDE <= dim; d += WIDE) add_columns<T, WIDE / W>(values, stride, d, weight, n, factor, acc);
    for (; d + BLOCK <= dim; d += BLOCK) add_columns<T, BLOCK / W>(values, stride, d, weight, n, factor, acc);
    if constexpr (!Grouped<T>) {
        for (; d + W <= dim; d += W) add_columns<T, 1>(values, stride, d, weight, n, factor, acc);
        for (; d < dim; d++) {
            acc[d] *= factor;
            for (uint32_t j = 0; j < n; j++) acc[d] += T::one(values + j * stride + d * T::BYTES) * weight[j];
        }
    }
}

// The heads [begin, end) of one row. They share their keys: each page of the cache serves all of them at once.
template <class T>
void attend_row(const Heads<T>& h, Range heads, uint32_t t) {
    const uint32_t dim = h.p.head_dim, n = heads.end - heads.begin;
    float* acc = thread_scratch().take<float>(size_t(n) * (dim + 2));
    float *max_score = acc + size_t(n) * dim, *sum = max_score + n;
    std::memset(acc, 0, size_t(n) * dim * sizeof(float));
    for (uint32_t i = 0; i < n; i++) h.begin(heads.begin + i, max_score[i], sum[i]);
    for_pages(h.visible(t), [&](uint32_t page, KeyRange range) {
        const size_t at = h.page(heads.begin, t, page) + range.begin * h.kv_stride;
        const uint8_t *keys = h.k_cache + at, *values = h.v_cache + at;
        const uint32_t n_keys = range.end - range.begin;
        for (uint32_t i = 0; i < n; i++) {
            const float* q = h.q + h.row(heads.begin + i, t);
            float scores[KV_PAGE];
            uint32_t j = 0;
            for (; j + 4 <= n_keys; j += 4) dot_rows<4, T>(keys + j * h.kv_stride, h.kv_stride, q, dim, scores + j);
            for (; j < n_keys; j++) dot_rows<1, T>(keys + j * h.kv_stride, h.kv_stride, q, dim, scores + j);
            for (j = 0; j < n_keys; j++) scores[j] *= h.p.scale;
            const float factor = softmax_step(scores, n_keys, max_score[i], sum[i]);
            add_values<T>(values, h.kv_stride, scores, n_keys, factor, dim, acc + size_t(i) * dim);
        }
    });
    for (uint32_t i = 0; i < n; i++) h.write(heads.begin + i, t, acc + size_t(i) * dim, sum[i]);
}

// Calls f(heads, y) for the threadgroups [begin, end) of a grid with a head in each column x. A call has a run of heads
// that share their keys, in one line y.
template <class F>
INLINE void for_groups(const NativeLaunch& l, uint64_t begin, uint64_t end, uint32_t group, F&& f) {
    while (begin < end) {
        const uint32_t y = uint32_t(begin / l.grid[0]), head = uint32_t(begin % l.grid[0]);
        const uint64_t left = (head / group + 1) * group - head, n = end - begin < left ? end - begin : left;
        f(Range{head, head + uint32_t(n)}, y);
        begin += n;
    }
}

template <class T>
void attention_decode(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const Heads<T> h(l);
    const uint32_t n = h.p.singles ? h.step.n_single : h.step.n_tokens;
    for_groups(l, begin, end, h.group(), [&](Range heads, uint32_t t) {
        if (t < n) attend_row(h, heads, t);
    });
}

// ---- prefill

constexpr uint32_t TILE_QUERIES = 32;
static_assert(KV_PAGE % PANEL == 0);

// The queries of rows [t0, t1) of a run and heads [head0, head1), which share their keys, and their running softmax.
template <class T>
class QueryTile {
  public:
    QueryTile(const Heads<T>& heads, Range rows, Range range)
        : h(heads), dim(h.p.head_dim), width((dim + PANEL - 1) / PANEL * PANEL), n_heads(range.end - range.begin),
          n((rows.end - rows.begin) * n_heads), t0(rows.begin), head0(range.begin) {
        const size_t floats = size_t(n) * (dim + width + KV_PAGE + 2) + KV_PAGE * width + (KV_PAGE + PANEL) * width;
        float* memory = thread_scratch().take<float>(floats);
        panels = memory, memory += KV_PAGE * width;
        unpacked = memory, memory += (KV_PAGE + PANEL) * width;
        scores = memory, memory += n * KV_PAGE;
        acc = memory, memory += n * width;
        q = memory, memory += n * dim;
        max_score = memory, memory += n;
        sum = memory;
        for (uint32_t i = 0; i < n; i++) {
            const float* from = h.q + h.row(head_of(i), row_of(i));
            for (uint32_t d = 0; d < dim; d++) q[size_t(i) * dim + d] = from[d] * h.p.scale;
            h.begin(head_of(i), max_score[i], sum[i]);
        }
        std::memset(acc, 0, size_t(n) * width * sizeof(float));
    }

    void attend() {
        for_pages({h.visible(t0).begin, h.visible(row_of(n - 1)).end}, [this](uint32_t page, KeyRange range) {
            const size_t at = h.page(head0, t0, page);
            score(h.k_cache + at, range);
            weigh(page * KV_PAGE);
            accumulate(h.v_cache + at, range);
        });
        for (uint32_t i = 0; i < n; i++) h.write(head_of(i), row_of(i), acc + size_t(i) * width, sum[i]);
    }

  private:
    uint32_t row_of(uint32_t i) const { return t0 + i / n_heads; }
    uint32_t head_of(uint32_t i) const { return head0 + i % n_heads; }

    // scores[n][KV_PAGE] = q · the keys of a page. Scores out of range are not used.
    void score(const uint8_t* keys, KeyRange range) {
        std::memset(scores, 0, size_t(n) * KV_PAGE * sizeof(float));
        for (uint32_t r = range.begin / PANEL * PANEL; r < range.end; r += PANEL) {
            for (uint32_t j = 0; j < PANEL; j++) {
                const uint32_t key = r + j < range.begin ? range.begin : r + j < range.end ? r + j : range.end - 1;
                unpack_head<T>(keys + key * h.kv_stride, dim, unpacked + j * width);
            }
            pack_panel(unpacked, width, int(dim), panels);
            multiply_panel(panels, q, dim, n, int(dim), scores + r, KV_PAGE);
        }
    }

    // Turns scores into weights: zero for the keys of the page that a row does not see. The page begins at position
    // `first`.
    void weigh(uint32_t first) {
        for (uint32_t i = 0; i < n; i++) {
            float *row = scores + size_t(i) * KV_PAGE, *sums = acc + size_t(i) * width;
            const KeyRange seen = h.visible(row_of(i));
            const uint32_t begin = in_page(seen.begin, first), end = in_page(seen.end, first);
            std::memset(row, 0, begin * sizeof(float));
            if (begin < end) {
                const float factor = softmax_step(row + begin, end - begin, max_score[i], sum[i]);
                for (uint32_t d = 0; d < width; d += W) store(sums + d, load<vf>(sums + d) * factor);
            }
            std::memset(row + end, 0, (KV_PAGE - end) * sizeof(float));
        }
    }

    // acc += weights · values
    void accumulate(const uint8_t* values, KeyRange range) {
        const uint32_t n_keys = range.end - range.begin;
        for (uint32_t j = 0; j < n_keys; j++) {
            unpack_head<T>(values + (range.begin + j) * h.kv_stride, dim, unpacked);
            std::memset(unpacked + dim, 0, (width - dim) * sizeof(float));
            for (uint32_t c = 0; c < width; c += PANEL)
                std::memcpy(panels + c * KV_PAGE + j * PANEL, unpacked + c, PANEL * sizeof(float));
        }
        for (uint32_t c = 0; c < width; c += PANEL)
            multiply_panel(panels + c * KV_PAGE, scores + range.begin, KV_PAGE, n, int(n_keys), acc + c, width);
    }

    const Heads<T>& h;
    const uint32_t dim, width, n_heads, n, t0, head0;
    float *panels, *unpacked, *scores, *acc, *q, *max_score, *sum;
};

template <class T>
void attention_prefill(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const Heads<T> h(l);
    for_groups(l, begin, end, h.group(), [&](Range heads, uint32_t y) {
        const uint32_t skipped = h.p.singles ? h.step.n_single : 0;
        const Range rows = piece(h.step.n_tokens - skipped, y, l.grid[1]);
        const uint32_t first = skipped + rows.begin, last = skipped + rows.end;
        for (uint32_t t = first, stop; t < last; t = stop) {  // a tile ends with its run
            stop = h.rows[t].end < last ? h.rows[t].end : last;
            stop = t + TILE_QUERIES < stop ? t + TILE_QUERIES : stop;
            QueryTile<T>(h, {t, stop}, heads).attend();
        }
    });
}

}  // namespace

// One native kernel serves every class of head_dim.
#define HEAD_CLASS(kv, T, dim)                                                                                         \
    {"attention_decode_" kv "_" #dim, attention_decode<T>, 1},                                                         \
        {"attention_prefill_" kv "_" #dim, attention_prefill<T>, 0},
#define EXACT_CLASS(kv, T, dim) {"attention_prefill_exact_" kv "_" #dim, attention_prefill<T>, 0},
#define ATTENTION(kv, T) HEAD_CLASSES_OF(HEAD_CLASS, kv, T)
#define EXACT(kv, T) HEAD_CLASSES_OF(EXACT_CLASS, kv, T)

NATIVE_TABLE(attention) = {ATTENTION("f32", F32) ATTENTION("f16", F16) ATTENTION("q8_0", Q8_0) EXACT("f16", F16)
                               EXACT("q8_0", Q8_0){}};

}  // namespace zinc
