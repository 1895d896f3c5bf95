// Native causal attention over the KV cache with an online softmax, for decode (a row at a time) and prefill (tiles of
// queries of all the heads that share keys).
#include "native_dot.h"
#include "native_register.h"
#include "native_tile.h"

namespace zinc {
namespace {

constexpr float LOWEST_SCORE = -1e38f;

// What a launch works on. T is F32 or F16, the type of the cache.
template <class T>
struct Heads {
    AttentionParams p;
    Step step;
    const float* q;
    const uint8_t *keys, *values;
    float* out;
    size_t kv_stride;  // bytes from one position to the next

    explicit Heads(const Launch& l)
        : p(l.as<AttentionParams>()), step(*l.buffer<const Step>(1)), q(l.buffer<const float>(2)),
          keys(l.buffer<const uint8_t>(3)), values(l.buffer<const uint8_t>(4)), out(l.buffer<float>(5)),
          kv_stride(size_t(p.n_head_kv) * p.head_dim * T::BYTES) {}

    uint32_t group() const { return p.n_head / p.n_head_kv; }
    size_t kv_offset(uint32_t head, uint32_t position) const {
        return position * kv_stride + size_t(head / group()) * p.head_dim * T::BYTES;
    }
    size_t row(uint32_t head, uint32_t t) const { return (size_t(t) * p.n_head + head) * p.head_dim; }
};

// Turns n scores into weights relative to the running maximum; returns the factor for what was accumulated before.
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

// ---- decode
// ----------------------------------------------------------------------------------------------------------

constexpr uint32_t DECODE_KEYS = 256;  // per step of the softmax

// acc[VECTORS * W] = acc * factor + sum of weight[j] * row j of the values.
template <class T, int VECTORS>
INLINE void add_values(const uint8_t* values, size_t stride, const float* weight, uint32_t n, float factor,
                       float* acc) {
    vf sum[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) sum[v] = load<vf>(acc + v * W) * factor;
    for (uint32_t j = 0; j < n; j++)
        UNROLL for (int v = 0; v < VECTORS; v++) sum[v] += T::lanes(values + j * stride + v * W * T::BYTES) * weight[j];
    UNROLL for (int v = 0; v < VECTORS; v++) store(acc + v * W, sum[v]);
}

template <class T>
void attend_row(const Heads<T>& h, uint32_t head, uint32_t t) {
    const uint32_t dim = h.p.head_dim, n_kv = h.step.pos + t + 1;
    const float* q = h.q + h.row(head, t);
    float* acc = h.out + h.row(head, t);
    std::memset(acc, 0, dim * sizeof(float));
    float max_score = LOWEST_SCORE, sum = 0;
    for (uint32_t first = 0; first < n_kv; first += DECODE_KEYS) {
        const uint32_t n = n_kv - first < DECODE_KEYS ? n_kv - first : DECODE_KEYS;
        const uint8_t *keys = h.keys + h.kv_offset(head, first), *values = h.values + h.kv_offset(head, first);
        float scores[DECODE_KEYS];
        uint32_t j = 0;
        for (; j + 4 <= n; j += 4) dot_rows<4, T>(keys + j * h.kv_stride, h.kv_stride, q, dim, scores + j);
        for (; j < n; j++) dot_rows<1, T>(keys + j * h.kv_stride, h.kv_stride, q, dim, scores + j);
        for (j = 0; j < n; j++) scores[j] *= h.p.scale;
        const float factor = softmax_step(scores, n, max_score, sum);
        uint32_t d = 0;
        for (; d + 4 * W <= dim; d += 4 * W)
            add_values<T, 4>(values + d * T::BYTES, h.kv_stride, scores, n, factor, acc + d);
        for (; d + W <= dim; d += W) add_values<T, 1>(values + d * T::BYTES, h.kv_stride, scores, n, factor, acc + d);
        for (; d < dim; d++) {
            acc[d] *= factor;
            for (j = 0; j < n; j++) acc[d] += T::one(values + j * h.kv_stride + d * T::BYTES) * scores[j];
        }
    }
    for (uint32_t d = 0; d < dim; d++) acc[d] /= sum;
}

template <class T>
void attention_decode(const Launch& l, uint64_t begin, uint64_t end) {
    const Heads<T> h(l);
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t head = uint32_t(i % l.grid[0]), t = uint32_t(i / l.grid[0]);
        if (t < h.step.n_tokens) attend_row(h, head, t);
    }
}

// ---- prefill
// ---------------------------------------------------------------------------------------------------------

constexpr uint32_t TILE_KEYS = 64, TILE_QUERIES = 32;
static_assert(TILE_KEYS % PANEL == 0);

// The queries of rows [t0, t1) and heads [head0, head1), which share their keys, and their running softmax.
template <class T>
class QueryTile {
  public:
    QueryTile(const Heads<T>& heads, Range rows, Range range)
        : h(heads), dim(h.p.head_dim), width((dim + PANEL - 1) / PANEL * PANEL), n_heads(range.end - range.begin),
          n((rows.end - rows.begin) * n_heads), t0(rows.begin), head0(range.begin) {
        const size_t floats =
            size_t(n) * (dim + width + TILE_KEYS + 2) + TILE_KEYS * width + (TILE_KEYS + PANEL) * width;
        float* memory = thread_scratch().take<float>(floats);
        panel = memory, memory += TILE_KEYS * width;
        unpacked = memory, memory += (TILE_KEYS + PANEL) * width;
        scores = memory, memory += n * TILE_KEYS;
        acc = memory, memory += n * width;
        q = memory, memory += n * dim;
        max_score = memory, memory += n;
        sum = memory;
        for (uint32_t i = 0; i < n; i++) {
            const float* from = h.q + h.row(head_of(i), row_of(i));
            for (uint32_t d = 0; d < dim; d++) q[size_t(i) * dim + d] = from[d] * h.p.scale;
            max_score[i] = LOWEST_SCORE;
            sum[i] = 0;
        }
        std::memset(acc, 0, size_t(n) * width * sizeof(float));
    }

    void attend() {
        const uint32_t n_kv = h.step.pos + row_of(n - 1) + 1;
        for (uint32_t first = 0; first < n_kv; first += TILE_KEYS) {
            const uint32_t n_keys = n_kv - first < TILE_KEYS ? n_kv - first : TILE_KEYS;
            score(first, n_keys);
            weigh(first);
            accumulate(first, n_keys);
        }
        for (uint32_t i = 0; i < n; i++) {
            float* to = h.out + h.row(head_of(i), row_of(i));
            for (uint32_t d = 0; d < dim; d++) to[d] = acc[size_t(i) * width + d] / sum[i];
        }
    }

  private:
    uint32_t row_of(uint32_t i) const { return t0 + i / n_heads; }
    uint32_t head_of(uint32_t i) const { return head0 + i % n_heads; }

    // scores[n][TILE_KEYS] = q · keys from `first` on; those of keys past the last are of no meaning.
    void score(uint32_t first, uint32_t n_keys) {
        const uint8_t* keys = h.keys + h.kv_offset(head0, first);
        std::memset(scores, 0, size_t(n) * TILE_KEYS * sizeof(float));
        for (uint32_t r = 0; r < n_keys; r += PANEL) {
            for (uint32_t j = 0; j < PANEL; j++)
                dequantise<T>(keys + (r + j < n_keys ? r + j : n_keys - 1) * h.kv_stride, 0, dim, unpacked + j * width);
            pack_panel(unpacked, width, int(dim), panel);
            multiply_panel(panel, q, dim, n, int(dim), scores + r, TILE_KEYS);
        }
    }

    void weigh(uint32_t first) {
        for (uint32_t i = 0; i < n; i++) {
            float *row = scores + size_t(i) * TILE_KEYS, *sums = acc + size_t(i) * width;
            const uint32_t end = h.step.pos + row_of(i) + 1, visible = end > first ? end - first : 0;
            const uint32_t n_visible = visible < TILE_KEYS ? visible : TILE_KEYS;
            if (n_visible) {
                const float factor = softmax_step(row, n_visible, max_score[i], sum[i]);
                for (uint32_t d = 0; d < width; d += W) store(sums + d, load<vf>(sums + d) * factor);
            }
            std::memset(row + n_visible, 0, (TILE_KEYS - n_visible) * sizeof(float));
        }
    }

    // acc += weights · values
    void accumulate(uint32_t first, uint32_t n_keys) {
        const uint8_t* values = h.values + h.kv_offset(head0, first);
        for (uint32_t c = 0; c < dim; c += PANEL) {
            const uint32_t columns = dim - c < PANEL ? dim - c : PANEL;
            for (uint32_t j = 0; j < n_keys; j++) {
                dequantise<T>(values + j * h.kv_stride, c, columns, panel + j * PANEL);
                std::memset(panel + j * PANEL + columns, 0, (PANEL - columns) * sizeof(float));
            }
            multiply_panel(panel, scores, TILE_KEYS, n, int(n_keys), acc + c, width);
        }
    }

    const Heads<T>& h;
    const uint32_t dim, width, n_heads, n, t0, head0;
    float *panel, *unpacked, *scores, *acc, *q, *max_score, *sum;
};

template <class T>
void attention_prefill(const Launch& l, uint64_t begin, uint64_t end) {
    const Heads<T> h(l);
    while (begin < end) {
        // The heads of one row of the grid that share keys.
        const uint32_t y = uint32_t(begin / l.grid[0]), head = uint32_t(begin % l.grid[0]);
        const uint32_t group_end = (head / h.group() + 1) * h.group();
        const uint64_t n_heads = end - begin < group_end - head ? end - begin : group_end - head;
        const Range rows = piece(h.step.n_tokens, y, l.grid[1]), heads{head, head + uint32_t(n_heads)};
        for (uint32_t t = rows.begin; t < rows.end; t += TILE_QUERIES)
            QueryTile<T>(h, {t, t + TILE_QUERIES < rows.end ? t + TILE_QUERIES : rows.end}, heads).attend();
        begin += n_heads;
    }
}

}  // namespace

// One native kernel serves every class of head_dim.
#define HEAD_CLASS(name, dim, decode, prefill, T)                                                                      \
    {"attention_decode_" name "_" dim, decode<T>, 1}, {"attention_prefill_" name "_" dim, prefill<T>, 0}
#define ATTENTION(name, T)                                                                                             \
    HEAD_CLASS(name, "32", attention_decode, attention_prefill, T),                                                    \
        HEAD_CLASS(name, "64", attention_decode, attention_prefill, T),                                                \
        HEAD_CLASS(name, "96", attention_decode, attention_prefill, T),                                                \
        HEAD_CLASS(name, "128", attention_decode, attention_prefill, T),                                               \
        HEAD_CLASS(name, "256", attention_decode, attention_prefill, T)

NATIVE_TABLE(attention) = {ATTENTION("f32", F32), ATTENTION("f16", F16), {}};

}  // namespace zinc
