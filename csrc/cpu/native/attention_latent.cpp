// Native latent attention, and the kernel before it that divides queries and stores rows of the cache. All heads of
// some rows meet the keys of a page together.
#include <cmath>

#include "cpu/native/attention.h"
#include "cpu/native/cache_rows.h"
#include "cpu/native/tile.h"

namespace zinc {
namespace {

constexpr uint32_t TILE_QUERIES = 32;
static_assert(KV_PAGE % PANEL == 0);

// Queries [first, end) of a run of rows, of all heads, and their running softmax. T is the type of the cache. Query
// t * n_head + head is a head of row t.
template <class T>
class LatentTile {
  public:
    LatentTile(const NativeLaunch& l, Range queries)
        : p(l.as<LatentParams>()), width(p.latent + p.n_rot), first(queries.begin), n(queries.end - queries.begin),
          values_width((p.latent + PANEL - 1) / PANEL * PANEL), run(l.buffer<const Row>(2)[first / p.n_head]),
          pages(l.buffer<const uint32_t>(3) + run.pages), cache(l.buffer<const uint8_t>(6)),
          out(l.buffer<float>(7) + size_t(first) * p.latent) {
        const size_t floats = size_t(n) * (width + values_width + KV_PAGE + 2) + KV_PAGE * (2 * width + PANEL);
        float* memory = thread_scratch().take<float>(floats);
        panels = memory, memory += KV_PAGE * (width + PANEL);
        keys = memory, memory += KV_PAGE * width;
        scores = memory, memory += n * KV_PAGE;
        acc = memory, memory += n * values_width;
        q = memory, memory += n * width;
        max_score = memory, memory += n;
        sum = memory;
        const float *still = l.buffer<const float>(4) + size_t(first) * p.latent,
                    *rot = l.buffer<const float>(5) + size_t(first) * p.n_rot;
        for (uint32_t i = 0; i < n; i++, still += p.latent, rot += p.n_rot) {
            for (uint32_t d = 0; d < p.latent; d++) q[size_t(i) * width + d] = still[d] * p.scale;
            for (uint32_t d = 0; d < p.n_rot; d++) q[size_t(i) * width + p.latent + d] = rot[d] * p.scale;
            max_score[i] = LOWEST_SCORE;
            sum[i] = 0;
        }
        std::memset(acc, 0, size_t(n) * values_width * sizeof(float));
    }

    void attend() {
        for_pages({0, end_of(n - 1)}, [this](uint32_t page, KeyRange range) {
            const uint8_t* rows = cache + size_t(pages[page]) * KV_PAGE * row_bytes<T>(width);
            for (uint32_t j = 0; j < (range.end + PANEL - 1) / PANEL * PANEL;
                 j++) {  // the last key stands for those that lack
                const uint32_t key = j < range.end ? j : range.end - 1;
                unpack_head<T>(rows + key * row_bytes<T>(width), width, keys + j * width);
            }
            score(range.end);
            weigh(page * KV_PAGE);
            accumulate(range.end);
        });
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t d = 0; d < p.latent; d++)
                out[size_t(i) * p.latent + d] = acc[size_t(i) * values_width + d] * (1.0f / sum[i]);
    }

  private:
    // The position after the last that a query sees.
    uint32_t end_of(uint32_t i) const { return run.pos + (first + i) / p.n_head - first / p.n_head + 1; }

    // scores[n][KV_PAGE] = q · the keys of a page. Scores out of range are not used.
    void score(uint32_t n_keys) {
        std::memset(scores, 0, size_t(n) * KV_PAGE * sizeof(float));
        for (uint32_t r = 0; r < n_keys; r += PANEL) {
            pack_panel(keys + r * width, width, int(width), panels);
            multiply_panel(panels, q, width, n, int(width), scores + r, KV_PAGE);
        }
    }

    // Turns scores into weights: zero for the keys that a query does not see. The page begins at position `page`.
    void weigh(uint32_t page) {
        for (uint32_t i = 0; i < n; i++) {
            float *row = scores + size_t(i) * KV_PAGE, *sums = acc + size_t(i) * values_width;
            const uint32_t end = in_page(end_of(i), page);
            if (end) {
                const float factor = softmax_step(row, end, max_score[i], sum[i]);
                for (uint32_t d = 0; d < values_width; d += W) store(sums + d, load<vf>(sums + d) * factor);
            }
            std::memset(row + end, 0, (KV_PAGE - end) * sizeof(float));
        }
    }

    // acc += weights · the latent parts of the keys
    void accumulate(uint32_t n_keys) {
        for (uint32_t c = 0; c < p.latent; c += PANEL) {
            const uint32_t columns = p.latent - c < PANEL ? p.latent - c : PANEL;
            for (uint32_t j = 0; j < n_keys; j++) {
                std::memset(panels + j * PANEL, 0, PANEL * sizeof(float));
                std::memcpy(panels + j * PANEL, keys + j * width + c, columns * sizeof(float));
            }
            multiply_panel(panels, scores, KV_PAGE, n, int(n_keys), acc + c, values_width);
        }
    }

    const LatentParams& p;
    const uint32_t width, first, n, values_width;
    const Row& run;  // of the first query
    const uint32_t* pages;
    const uint8_t* cache;
    float* out;
    float *panels, *keys, *scores, *acc, *q, *max_score, *sum;
};

// All queries of the step divide evenly over the grid.
template <class T>
void attention_latent(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n_head = l.as<LatentParams>().n_head, n_tokens = l.buffer<const Step>(1)->n_tokens;
    const Range range = pieces(n_tokens * n_head, begin, end, l.grid[0]);
    for (uint32_t query = range.begin, stop; query < range.end; query = stop) {  // a tile ends with its run
        stop = l.buffer<const Row>(2)[query / n_head].end * n_head;
        stop = stop < range.end ? stop : range.end;
        stop = query + TILE_QUERIES < stop ? query + TILE_QUERIES : stop;
        LatentTile<T>(l, {query, stop}).attend();
    }
}

// ---- queries divided, rows of the cache stored

// out = scale * x, rotated in pairs (2i, 2i + 1).
void rotate_pairs(const float* x, float scale, const float* sine, const float* cosine, uint32_t n_rot, float* out) {
    for (uint32_t i = 0; i < n_rot / 2; i++) {
        const float a = scale * x[2 * i], b = scale * x[2 * i + 1];
        out[2 * i] = a * cosine[i] - b * sine[i];
        out[2 * i + 1] = a * sine[i] + b * cosine[i];
    }
}

// Heads of q along x, and then the row of the cache; the rows of the step along y. KV is the type of the cache.
template <class KV>
void rope_latent(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<RopeLatentParams>();
    const float* freqs = l.buffer<const float>(7);
    for_lines(l, begin, end, [&](const Line& line) {
        const uint32_t t = line.y;
        if (t >= l.buffer<const Step>(1)->n_tokens) return;
        const Row& row = l.buffer<const Row>(2)[t];
        float sine[LATENT_MAX_ROT], cosine[LATENT_MAX_ROT];
        rotations(float(row.pos), freqs, p.n_rot / 2, p.magnitude, sine, cosine);
        const float scale = q_scale(p, row.pos);
        const Range heads = pieces(p.n_head + 1, line.begin, line.end, l.grid[0]);
        for (uint32_t head = heads.begin; head < heads.end && head < p.n_head; head++) {
            const size_t at = size_t(t) * p.n_head + head;
            const float* from = l.buffer<const float>(4) + at * (p.n_still + p.n_rot);
            for (uint32_t i = 0; i < p.n_still; i++) l.buffer<float>(8)[at * p.n_still + i] = scale * from[i];
            rotate_pairs(from + p.n_still, scale, sine, cosine, p.n_rot, l.buffer<float>(9) + at * p.n_rot);
        }
        if (heads.end <= p.n_head) return;
        const uint32_t page = l.buffer<const uint32_t>(3)[row.pages + row.pos / KV_PAGE], width = p.latent + p.n_rot;
        const float *from = l.buffer<const float>(5) + size_t(t) * width, *weight = l.buffer<const float>(6);
        float* stored = thread_scratch().take<float>(width);
        const float norm = rms_scale(from, p.latent, p.eps);
        for (uint32_t i = 0; i < p.latent; i++) stored[i] = from[i] * (norm * weight[i]);
        rotate_pairs(from + p.latent, 1.0f, sine, cosine, p.n_rot, stored + p.latent);
        const size_t place = size_t(page) * KV_PAGE + row.pos % KV_PAGE;
        store_row<KV>(l.buffer<uint8_t>(10) + place * row_bytes<KV>(width), stored, width);
    });
}

}  // namespace

// One native kernel serves every class of latent vectors.
#define LATENT_CLASS(kv, T, latent) {"attention_latent_" kv "_" #latent, attention_latent<T>, 1},
#define ROPE_LATENT(kv, T) {"rope_latent_" kv, rope_latent<T>, 1},

NATIVE_TABLE(attention_latent) = {LATENT_CLASSES_OF(LATENT_CLASS, "f32", F32)
                                      LATENT_CLASSES_OF(LATENT_CLASS, "f16", F16)
                                          LATENT_CLASSES_OF(LATENT_CLASS, "q8_0", Q8_0) ROPE_LATENT("f32", F32)
                                              ROPE_LATENT("f16", F16) ROPE_LATENT("q8_0", Q8_0){}};

}  // namespace zinc
